"""The laboratory's page: every claim with its verdict first, then for each experiment the plots it should have had."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctsft.files import write_text
from ctsft.lab.compare import ArmRuns, arm_runs, chosen
from ctsft.lab.experiments import Laboratory, arms
from ctsft.lab.figures import GLYPHS, RAMP, axis, check, picture, told, varying
from ctsft.lab.rates import choose_rate
from ctsft.lab.records import Record
from ctsft.lab.tables import table
from ctsft.pages.plot import COLOURS, LINE_COLOURS
from ctsft.pages.render import environment
from ctsft.pages.words import duration, size, words

if TYPE_CHECKING:
    from ctsft.lab.predicates import Side
    from ctsft.lab.verdicts import Verdict

VERDICTS = {  # in the order of the page
    "confirmed": "it holds, by the test that was written before the runs were read",
    "refuted": "it does not hold, by the same test",
    "artefact": "it shows in the paper's setting, and a control shows what else makes it",
    "inconclusive": "the runs are there and do not decide it",
    "not run": "runs that it needs are missing",
    "not applicable": "it cannot be asked of this model",
}
LAST = "not applicable"  # told only where there are such claims
SOURCES = {"derived": "arithmetic on the papers' figures", "ours": "our own expectation"}


def write_lab_report(
    laboratory: Laboratory,
    records: Mapping[str, Record],
    verdicts: Sequence["Verdict"],
    path: Path,
    profile: str = "full",
    protocol: str = "honest",
) -> None:
    """Write the page of all experiments of `laboratory` to `path`, whole or not at all.

    The page needs nothing from outside it. The part of its address behind the # filters the claims, such as
    `#paper=82&verdict=refuted&q=dead zone`; without scripts all are shown. Losses are in nats per token, bars and bands
    are 95% t intervals over the seeds. Raises CTError for a figure that names a metric, a field or a law wrongly.
    """
    jinja = environment()
    jinja.filters.update(source=source, p=shown_p, places=places, axis=axis)
    jinja.globals.update(size=size, duration=duration)
    sections = [section(laboratory, name, records, profile, protocol) for name in laboratory.experiments]
    counts = Counter(verdict.verdict for verdict in verdicts)
    page = jinja.from_string(TEMPLATE).render(
        style=jinja.get_template("style.css").render(palette=COLOURS | RAMP),
        glyphs=GLYPHS,
        colours=len(LINE_COLOURS),  # with more lines than these, colours come again with another dash and marker
        verdicts=verdicts,
        counts=[(word, told, counts[word]) for word, told in VERDICTS.items() if counts[word] or word != LAST],
        papers=sorted({verdict.claim.source for verdict in verdicts}),
        sections=sections,
        runs=len({id(record) for s in sections for row in s["rows"] for record in row.records}),
        profile=profile,
        protocol=protocol,
    )
    write_text(Path(path), page)


# ------------------------------------------------------------------------------------------------- one experiment


def section(
    laboratory: Laboratory, name: str, records: Mapping[str, Record], profile: str, protocol: str
) -> dict[str, Any]:
    """All that the page says of the experiment `name`."""
    experiment, found = laboratory.experiments[name], arm_runs(laboratory, name, records, profile, protocol)
    ran = [record for row in found for record in row.records]
    for figure in experiment.figures:
        check(name, figure)
    return {
        "experiment": experiment,
        "rows": found,
        "done": len(ran),
        "wanted": sum(len(row.seeds) for row in found),
        "tables": [
            (t.title, *table(experiment, t, found)) for t in experiment.tables if ran and chosen(found, t.where)
        ],
        "pictures": [
            picture(f"e{name}-{i}", figure, found, experiment.figures)
            for i, figure in enumerate(experiment.figures)
            if ran and chosen(found, figure.where)
        ],
        "recipe": recipe(laboratory, name, found, records, profile, protocol),
        "common": common(found),
        "machines": sorted({words(record.machine) for record in ran}),
    }


def source(name: str) -> str:
    """Where a claim or an experiment comes from, in words."""
    return f"paper {name}" if name[:1].isdigit() else SOURCES.get(name, name)


def shown_p(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"= {p:.2g}"


def places(side: "Side", width: float = 300, margin: float = 14) -> dict[str, float] | None:
    """Where a strip `width` wide shows the bound, the mean and its interval; None if there is no number."""
    test = side.test
    shown = {"low": test.low, "mean": test.mean, "high": test.high, "bound": side.bound}
    found = {name: side.show(number) for name, number in shown.items()}
    first, last = min(found.values()), max(found.values())
    if math.isnan(found["mean"]) or math.isclose(first, last):
        return None
    return {name: round(margin + (v - first) / (last - first) * (width - 2 * margin), 1) for name, v in found.items()}


def common(found: Sequence[ArmRuns]) -> dict[str, Any]:
    """What all arms share and is not the default."""
    if not found:
        return {}
    changed = found[0].spec.model_dump(exclude_defaults=True)
    return {name: v for name, v in changed.items() if name not in (*varying(found), "lr", "seed")}


def recipe(
    laboratory: Laboratory,
    name: str,
    found: Sequence[ArmRuns],
    records: Mapping[str, Record],
    profile: str,
    protocol: str,
) -> list[dict[str, Any]]:
    """How every arm was run: what sets it apart, the learning rates that were tried, and its four costs."""
    out = []
    fields = varying(found)
    for arm, row in zip(arms(laboratory, name, profile, protocol), found, strict=True):
        costs = {cost: row.mean(cost) for cost in ("matrices", "trained", "adapter_bytes", "memory_bytes", "seconds")}
        out.append(
            {
                "row": row,
                "fields": ", ".join(told(field, getattr(row.spec, field)) for field in fields),
                "tried": choose_rate(arm, records).tried,
                "tune_steps": arm.tune_steps,
            }
            | costs
        )
    return out


# ------------------------------------------------------------------------------------------------------- the page

TEMPLATE = """\
{% macro anchor(name) %}experiment-{{ name }}{% endmacro %}
{% macro cost(value, words) %}{% if value is none %}&ndash;{% else %}{{ words(value) }}{% endif %}{% endmacro %}
{% macro strip(v) %}{% set at = v.side|places %}{% if at %}<svg class="strip {{ v.verdict|replace(" ", "-") }}" viewBox="0 0 300 16" role="img" aria-label="{{ v.side.told() }}">
<rect x="{{ at.bound if v.side.above else 0 }}" width="{{ 300 - at.bound if v.side.above else at.bound }}" height="16"/><path d="M{{ at.bound }} 0v16M0 8h300"/>
<line x1="{{ at.low }}" x2="{{ at.high }}" y1="8" y2="8"/><circle cx="{{ at.mean }}" cy="8" r="3.5"/></svg>{% endif %}{% endmacro %}
{% macro pill(verdict) %}<b class="pill {{ verdict|replace(" ", "-") }}">{{ verdict }}</b>{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>The laboratory of CT-SFT</title>
<style>
{{ style|safe }}
html { scroll-padding-top: 1rem; }
body { max-width: 1248px; display: grid; grid-template-columns: 10.5rem minmax(0, 1fr); gap: 0 3rem; padding-top: 2.6rem; }
nav, .pill, .claims, form, .picture h4, .heat b { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
nav { position: sticky; top: 1.6rem; align-self: start; max-height: calc(100vh - 3rem); overflow-y: auto; font-size: .78rem; line-height: 1.35; }
nav a { display: grid; grid-template-columns: 3.9em 1fr; padding: .28rem 0 .28rem .7rem; border-left: 2px solid var(--rule); color: var(--muted); text-decoration: none; }
nav a b { color: var(--ink); font-weight: 600; }
nav a:hover { color: var(--ink); border-left-color: var(--after); }
nav a.first { display: block; }
nav a.idle b { color: var(--muted); font-weight: 400; }
a { color: var(--after); text-underline-offset: .15em; }
section:first-of-type h2 { margin-top: 2rem; }
h2 { overflow-wrap: anywhere; }
h2 small { display: block; margin-bottom: .25rem; }
h3 { font: 600 .86rem/1.4 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; margin: 1.8rem 0 .5rem; }
.pill { display: inline-block; padding: .1rem .6rem; border: 1px solid; border-radius: 1em; font-size: .74rem; line-height: 1.5; font-weight: 600; white-space: nowrap;
  color: var(--hue); border-color: color-mix(in srgb, var(--hue) 45%, transparent); background: color-mix(in srgb, var(--hue) 11%, transparent); }
.confirmed { --hue: var(--good); } .refuted { --hue: var(--bad); } .artefact { --hue: var(--c3); } .inconclusive { --hue: var(--muted); }
.not-run, .not-applicable { --hue: var(--muted); border-style: dashed; background: none; font-weight: 400; }
.pills { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1.4rem 0 1rem; }
.pills .pill { font-size: .84rem; font-weight: 600; padding: .25rem .8rem; cursor: default; }
.js .pills .pill { cursor: pointer; }
.pills .pill[aria-pressed=true] { background: var(--hue); color: var(--paper); }
form { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem .8rem; margin: 0 0 .9rem; font-size: .83rem; color: var(--muted); }
select, input, form button { font: inherit; color: var(--ink); background: var(--panel); border: 1px solid var(--rule); border-radius: 5px; padding: .3rem .5rem; min-width: 0; }
form button { cursor: pointer; }
input { flex: 1 1 12rem; max-width: 20rem; }
:focus-visible { outline: 2px solid var(--after); outline-offset: 1px; }
[hidden] { display: none !important; }
.claims { width: 100%; font-size: .86rem; line-height: 1.45; }
.claims th { text-align: left; font-size: .76rem; }
.claims td { text-align: left; vertical-align: top; white-space: normal; padding: .55rem .7rem; }
.claims td:first-child { width: 5.5rem; padding-left: 0; }
.claims .text { width: 38%; font: .95rem/1.45 Charter, "Bitstream Charter", "Iowan Old Style", "Palatino Linotype", Georgia, serif; }
.claims .name { white-space: nowrap; color: var(--muted); }
.claims .measured { font-size: .82rem; overflow-wrap: anywhere; } .claims dl { display: block; margin: .3rem 0; font-size: inherit; } .claims dd { margin-bottom: .4rem; }
.strip { width: 100%; max-width: 300px; margin: .2rem 0 .35rem; border-radius: 3px; background: var(--panel); } .strip rect { fill: var(--rule); }
.strip path { stroke: var(--muted); stroke-width: .6; } .strip line { stroke: var(--hue); stroke-width: 3; opacity: .55; } .strip circle { fill: var(--hue); }
.measured > div { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden; } .measured:has([open]) > div { display: block; }
.claims details { margin: .2rem 0 0; } .claims summary { padding: .1rem 0; font-size: .78rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); gap: 1.6rem 2.4rem; margin: 1.4rem 0; }
.picture { margin: 0; min-width: 0; } .picture h4 { margin: 0 0 .5rem; font-size: .86rem; line-height: 1.35; font-weight: 600; }
.picture svg text { font-variant-numeric: tabular-nums; }
.heat { grid-column: 1 / -1; } .heat > div:not(.legend) { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); gap: 1rem 2.4rem; }
.heat b { font-size: .78rem; font-weight: 400; color: var(--muted); }
.legend i.ring { width: .7em; height: .7em; border: 1px solid var(--ink); border-radius: 50%; vertical-align: -.04em; }
.legend i.block { width: .9em; height: .9em; border: 0; vertical-align: -.1em; background: var(--hue); }
.legend { gap: .15rem 1.1rem; }
.scroll { max-width: 100%; } .figures th:not(:first-child), .figures td:not(:first-child) { padding: .3rem .5rem; }
.figures th:not(:first-child) { min-width: 4.2rem; } .figures .paper:not(:first-child) { color: var(--muted); font-style: italic; padding-left: .2rem; }
.recipe td { vertical-align: top; } .recipe td:nth-child(3) { white-space: normal; min-width: 20rem; } .recipe td:nth-child(-n+3), .recipe th:nth-child(-n+3) { text-align: left; }
.recipe td:first-child { white-space: normal; min-width: 11rem; }
.recipe td:nth-child(3) span:not(.none) { white-space: nowrap; } .best { font-weight: 600; } .how dl { margin-bottom: .4rem; }
.tall thead th { position: sticky; top: 0; background: var(--paper); }
.tall { max-height: 30rem; overflow-y: auto; }
@media (max-width: 860px) {
  html { scroll-padding-top: 3.4rem; }
  body { display: block; padding-top: 0; }
  nav { display: flex; gap: 1.1rem; top: 0; z-index: 2; margin: 0 -1.1rem 1.6rem; padding: .75rem 1.1rem; overflow-x: auto; white-space: nowrap; background: var(--paper); border-bottom: 1px solid var(--rule); }
  nav a, nav a.first { display: block; padding: 0; border: 0; } nav a span { display: none; }
  .claims thead { display: none; } .claims, .claims tbody { display: block; }
  .claims tr { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem .8rem; padding: .9rem 0; border-bottom: 1px solid var(--rule); }
  .claims td, .claims td:first-child { padding: 0; border: 0; width: auto; } .claims .text, .claims .measured { flex-basis: 100%; width: 100%; order: 1; padding: 0; }
}
@media print { nav, form { display: none; } body { display: block; } section { break-inside: auto; } figure, tr { break-inside: avoid; } }
</style>
</head>
<body>
<nav aria-label="Contents">
<a class="first" href="#claims"><b>Claims</b></a>
{% for s in sections %}
<a href="#{{ anchor(s.experiment.name) }}"{% if not s.done %} class="idle"{% endif %}><b>{{ s.experiment.name }}</b> <span>{{ s.experiment.title }}</span></a>
{% endfor %}
</nav>
<main>
<header>
<div class="eyebrow">CT-SFT laboratory</div>
<h1>What the papers claim, and what the runs say</h1>
<p class="lead">{{ verdicts|length|number }} claims, judged on {{ runs|number }} runs by tests that were fixed beforehand.</p>
<p class="note">Profile {{ profile }}, {{ protocol }} protocol. {% if protocol == "paper" %}The paper's own settings: one seed, a learning rate of 0.005, the same batch at
every step.{% else %}The learning rate of every arm is tuned; no claim is judged on one seed.{% endif %} Losses are in nats per token. Bars and bands are 95% t intervals
of the mean over seeds; rings are the paper's own figures. A claim's strip: the mean and its interval against the bound, shaded where the claim has it.</p>
</header>
<section id="claims">
<h2>Claims</h2>
<div class="pills">
{% for verdict, meaning, count in counts %}
<span class="pill {{ verdict|replace(" ", "-") }}" data-verdict="{{ verdict }}" title="{{ meaning }}">{{ count }} {{ verdict }}</span>
{% endfor %}
</div>
<form hidden>
<select name="paper" aria-label="paper"><option value="">all papers</option>
{% for paper in papers %}<option value="{{ paper }}">{{ paper|source }}</option>{% endfor %}</select>
<input type="search" name="q" placeholder="search" aria-label="search in the claims">
<button type="reset">show all</button>
<output aria-live="polite"></output>
</form>
<table class="claims"><thead><tr><th>claim</th><th>sentence</th><th>verdict</th><th>measured</th></tr></thead><tbody>
{% for v in verdicts %}
<tr id="claim-{{ v.claim.id }}" data-paper="{{ v.claim.source }}" data-verdict="{{ v.verdict }}"><td class="name">{{ v.claim.id }}</td><td class="text">{{ v.claim.text }}</td>
<td>{{ pill(v.verdict) }}</td><td class="measured">{% if v.side %}<small class="none">{{ v.claim.metric|axis }}</small>{{ strip(v) }}<div>{{ v.side.told() }}</div>{% else %}<div>{{ v.detail }}</div>{% endif %}
<details><summary>{% if v.p is not none %}corrected p {{ v.p|p }}, {{ v.seeds }} seeds{% else %}more{% endif %}</summary><dl>
{% if v.claim.artefact %}<dt>{{ "cause" if v.verdict == "artefact" else "cause that was tried" }}</dt><dd>{{ v.claim.artefact.cause }}</dd>{% endif %}
{% if v.control %}<dt>control</dt><dd>{{ v.control }}</dd>{% endif %}
{% if v.side %}<dt>measured</dt><dd>{{ v.detail }}</dd>{% endif %}
<dt>what counts</dt><dd>{{ v.claim.predicate }}: {{ v.claim.metric }}, by more than {{ v.claim.effect }}{% if v.p is not none %}; p is corrected for the number of tests{% endif %}</dd>
<dt>runs</dt><dd>{% for name in v.claim.experiments %}<a href="#{{ anchor(name) }}">{{ name }}</a>{{ ", " if not loop.last }}{% endfor %}, {{ v.claim.protocol }} protocol</dd>
{% if v.claim.note %}<dt>note</dt><dd>{{ v.claim.note }}</dd>{% endif %}
</dl></details></td></tr>
{% endfor %}
</tbody></table>
</section>
{% for s in sections %}
<section id="{{ anchor(s.experiment.name) }}">
<h2><small class="eyebrow">{{ "our own experiment" if s.experiment.source == "ours" else s.experiment.source|source }}</small>{{ s.experiment.title }}</h2>
<p>{{ s.experiment.question }}</p>
{% for text in s.experiment.notes %}<p class="note">{{ text }}</p>{% endfor %}
{% if not s.done %}
<p><b class="pill not-run">not run</b></p>
{% else %}
{% if s.done < s.wanted %}<p class="note"><b class="bad">Not complete:</b> {{ s.done|number }} of {{ s.wanted|number }} runs are there.</p>{% endif %}
{% for title, heads, body in s.tables %}
<h3>{{ title }}</h3>
<div class="scroll tall"><table class="figures"><thead><tr>{% for head in heads %}<th{% if head.endswith("(paper)") %} class="paper"{% endif %}>{{ head }}</th>{% endfor %}</tr></thead><tbody>
{% for line in body %}<tr>{% for text in line %}<td{% if heads[loop.index0].endswith("(paper)") %} class="paper"{% endif %}>{{ text }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endfor %}
{% if s.tables %}<p class="note">Mean ± standard deviation over the seeds (how many); beside it, where the paper prints one, its own figure.</p>{% endif %}
<div class="pictures">
{% for p in s.pictures %}
<figure class="picture{% if p.svgs|length > 1 %} heat{% endif %}"><h4>{{ p.title }}</h4>
<div>{% for of, svg in p.svgs %}<div>{% if of %}<b>{{ of }}</b>{% endif %}{{ svg|safe }}</div>{% endfor %}</div>
{% if p.legend %}<div class="legend">{% for text, colour, line in p.legend %}<span><i {% if line in ("ring", "block") %}class="{{ line }}" style="--hue:var(--{{ colour }})"
{% else %}style="border-top-style:{{ line }};border-top-color:var(--{{ colour }})"{% endif %}></i>{% if line in glyphs and colour != "ink" and p.legend|length > colours %}<b style="color:var(--{{ colour }})">{{ glyphs[line] }}</b> {% endif %}{{ text }}</span>{% endfor %}</div>{% endif %}
<figcaption>{{ p.note }}</figcaption></figure>
{% endfor %}
</div>
{% endif %}
<details class="how"><summary>How it was run: {{ s.recipe|length }} arm{{ "s" if s.recipe|length != 1 }}, learning rates, costs</summary>
<dl>{% for key, value in s.common.items() %}<dt>{{ key|replace("_", " ") }}</dt><dd>{{ value|words }}</dd>{% endfor %}
{% for machine in s.machines %}<dt>machine</dt><dd>{{ machine }}</dd>{% endfor %}</dl>
<div class="scroll tall"><table class="recipe"><thead><tr><th>arm</th><th>learning rate</th><th>tried: mean loss of the tuning runs</th><th>seeds</th><th>matrices</th><th>trained numbers</th>
<th>adapter</th><th>extra memory</th><th>time of a run</th></tr></thead><tbody>
{% for arm in s.recipe %}
<tr><td>{{ arm.row.name }}{% if arm.fields %}<br><span class="none">{{ arm.fields }}</span>{% endif %}</td>
<td>{{ arm.row.lr|number("g") }}<br>{% if arm.row.lr is none %}<span class="none">not tuned yet</span>{% elif not arm.row.tuned %}<span class="none">given</span>
{% elif arm.row.bracketed %}<span class="good">bracketed</span>{% else %}<span class="bad">at the grid's edge</span>{% endif %}</td>
<td>{% for lr, loss in arm.tried %}<span{% if lr == arm.row.lr %} class="best"{% endif %}>{{ lr|number("g") }}: {{ loss|number(".4g") }}</span>{{ " · " if not loop.last }}
{% else %}&ndash;{% endfor %}{% if arm.tune_steps and arm.tried %}<br><span class="none">on runs of {{ arm.tune_steps }} updates</span>{% endif %}</td>
<td>{{ arm.row.records|length }} of {{ arm.row.seeds|length }}</td><td>{{ arm.matrices|number(",.0f") }}</td><td>{{ arm.trained|number(",.0f") }}</td>
<td>{{ cost(arm.adapter_bytes, size) }}</td><td>{{ cost(arm.memory_bytes, size) }}</td><td>{{ cost(arm.seconds, duration) }}</td></tr>
{% endfor %}
</tbody></table></div></details>
</section>
{% endfor %}
</main>
<script>
// The filter's state is the address behind the #, so that a filtered page can be sent on.
const form = document.forms[0], rows = [...document.querySelectorAll(".claims tbody tr")];
const pills = [...document.querySelectorAll(".pills .pill")];
let verdict = "";
function show() {
  const words = form.q.value.toLowerCase().split(/\\s+/);
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
</script>
</body>
</html>
"""  # noqa: E501
