// The filter's state is the address behind the #, so that a filtered page can be sent on.
const form = document.forms[0], rows = [...document.querySelectorAll(".claims tbody tr")];
const pills = [...document.querySelectorAll(".pills .pill")];
let verdict = "";
function show() {
  const words = form.q.value.toLowerCase().split(/\s+/);
  for (const row of rows)
    row.hidden = (form.paper.value && row.dataset.paper != form.paper.value) || (verdict && row.dataset.verdict != verdict)
      || !words.every(word => row.textContent.toLowerCase().includes(word));
  for (const pill of pills) pill.setAttribute("aria-pressed", pill.dataset.verdict == verdict);
  const shown = rows.filter(row => !row.hidden).length;
  form.querySelector("output").textContent = shown < rows.length ? `${shown} of ${rows.length}` : "";
}
function changed() {
  const state = Object.entries({ paper: form.paper.value, verdict, q: form.q.value }).filter(([, value]) => value);
  history.replaceState(null, "", state.length ? "#" + new URLSearchParams(state) : location.pathname + location.search);
  show();
}
function read() {
  const hash = location.hash.slice(1);
  if (hash && !hash.includes("=")) return show();  // an anchor of the page
  const state = new URLSearchParams(hash);
  form.paper.value = state.get("paper") || "";
  form.q.value = state.get("q") || "";
  verdict = state.get("verdict") || "";
  show();
}
for (const pill of pills) {
  pill.role = "button";
  pill.tabIndex = 0;
  pill.onclick = () => { verdict = verdict == pill.dataset.verdict ? "" : pill.dataset.verdict; changed(); };
  pill.onkeydown = event => { if (event.key == "Enter" || event.key == " ") { event.preventDefault(); pill.click(); } };
}
form.oninput = changed;
form.onsubmit = event => event.preventDefault();
form.onreset = () => setTimeout(() => { verdict = ""; changed(); });
onhashchange = read;
document.documentElement.classList.add("js");
form.hidden = false;
read();
