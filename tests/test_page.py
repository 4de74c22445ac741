"""The laboratory's page: every verdict and figure is on it, its filter works, and nothing from the data is markup."""

import math
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import pytest

from ctsft.errors import CTError
from ctsft.lab.claims import Artefact, Claim
from ctsft.lab.compare import arm_runs
from ctsft.lab.drawing import RAMP
from ctsft.lab.experiments import arms
from ctsft.lab.own import Own
from ctsft.lab.page import places, write_lab_report
from ctsft.lab.predicates import Side
from ctsft.lab.rates import choose_rate, due
from ctsft.lab.tables import table
from ctsft.lab.verdicts import VERDICTS, Verdict
from plausible import a_laboratory, a_record, only, records_of

CHROMIUM = shutil.which("chromium")


def a_verdict(name, text, word, detail, source="82", control="", p=None, side=None, **claim):
    """A verdict on a claim of the experiment `source`; with a control the claim has a cause."""
    if control:
        claim["artefact"] = Artefact(cause="The head of the model is random.", control={"where": {"tied": True}})
    fields = {"experiments": (source,), "predicate": "above", "metric": "loss_drop", "number": 0.0, "effect": 0.05}
    fields |= {"a": {"k": 2}, "where": {"tied": False}}
    made = Claim(**{"id": name, "source": source, "text": text} | fields | claim)
    return Verdict(made, word, detail, p, 5 if p is not None else 0, control, side)


LONG = "k 32 minus k 2 is -0.93 [-0.98, -0.88], claimed above 0.05; " + ", ".join(f"7.{i} (k {i})" for i in range(40))
SIDE = Side("k 32 minus k 2", [-0.96, -0.93, -0.91, -0.92, -0.93], 0.05)
CONTROL = "control (tied True) refuted: the drop is 0.61 [0.58, 0.64]"
VERDICT_LIST = [
    a_verdict("81-fixed", "Fixed K=32 beats all dynamic schedules.", "confirmed", "it is 0.3 [0.2, 0.4]", "81", p=1e-7),
    a_verdict("82-four", "K=2 wins with 4x the budget.", "refuted", LONG, p=0.003, side=SIDE),
    a_verdict("82-dead", "K=16 is a dead zone.", "artefact", "the drop is 0.00 [-0.01, 0.01]", p=0.01, control=CONTROL),
    a_verdict(
        "85-noise", "Directions 33 to 64 are noise.", "inconclusive", "0.012", "85", p=0.4, note="Its own ratio."
    ),
    a_verdict("89-more", "Higher K gives more diverse directions.", "not run", "missing: no arm with k=64", "89"),
    a_verdict("81-count", "96,062 trained at K=2.", "refuted", "trained of k 2 is 66 at seed 0, not 96,062", "81"),
]


VOID = {"meta", "br", "input"}


class Reader(HTMLParser):
    """What a reader sees, the tags there are, and whether each is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.attributes, self.open = "", [], [], []
        self.rows, self.hidden = {}, set()
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        its = dict(attributes)
        if tag == "tr" and "data-verdict" in its:
            self.rows[its["id"].removeprefix("claim-")] = its
            self.hidden |= {its["id"].removeprefix("claim-")} if "hidden" in its else set()
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += f" {data}"


def written(path, laboratory, records, verdicts=(), **options):
    write_lab_report(laboratory, records, verdicts, path / "lab.html", **options)
    return (path / "lab.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole():
    laboratory = a_laboratory()
    return laboratory, records_of(laboratory, [name for name in laboratory.experiments if name != "89"])


@pytest.fixture(scope="module")
def html(whole, tmp_path_factory):
    return written(tmp_path_factory.mktemp("page"), *whole, VERDICT_LIST)


@pytest.fixture(scope="module")
def page(html):
    return Reader(html)


# ---------------------------------------------------------------------------------------------------- what it says


def test_every_claim_is_on_the_page(page):
    assert list(page.rows) == [v.claim.id for v in VERDICT_LIST] and not page.hidden
    for v in VERDICT_LIST:
        assert page.rows[v.claim.id]["data-paper"] == v.claim.source
        assert page.rows[v.claim.id]["data-verdict"] == v.verdict
        for text in (v.claim.text, v.detail, v.control, v.claim.note):
            assert text in page.text
    for text in ("1 confirmed", "2 refuted", "1 artefact", "1 inconclusive", "1 not run", "6 claims"):
        assert text in page.text
    assert "The head of the model is random." in page.text and "p < 0.0001, 5 seeds" in page.text
    assert "arithmetic on the papers' figures" not in page.text


def test_a_strip_shows_the_mean_and_its_interval_against_the_bound(html, page):
    at = places(SIDE)
    assert 14 == at["low"] < at["mean"] < at["high"] < at["bound"] == 286
    share = (SIDE.test.mean - SIDE.test.low) / (SIDE.bound - SIDE.test.low)
    assert at["mean"] == pytest.approx(14 + share * 272, abs=0.06)
    assert html.count('<svg class="strip') == 1 and f'<rect x="{at["bound"]}" width="14.0"' in html
    assert SIDE.told() in page.text and "loss drop on the step's batch, nats per token" in page.text


@pytest.mark.parametrize("numbers", [[], [0.05, 0.05, 0.05]])
def test_a_side_without_extent_has_no_strip(numbers):
    assert places(Side("k 2", numbers, 0.05)) is None


def test_a_correlation_is_drawn_as_r():
    at = places(Side("r", [math.atanh(r) for r in (0.90, 0.92, 0.94)], math.atanh(0.5), show=math.tanh))
    assert at["bound"] == 14 and at["high"] == 286
    assert (at["mean"] - at["low"]) > (at["high"] - at["mean"])  # wider downwards, as an interval of r is


def test_every_verdict_says_what_it_means(page):
    told = [meaning for name, meaning in page.attributes if name == "title"]
    assert told == [meaning for word, meaning in VERDICTS.items() if word != "not applicable"]
    assert {v.verdict for v in VERDICT_LIST} < set(VERDICTS)


def test_what_cannot_be_asked_stands_last_and_is_not_counted(tmp_path):
    aside = a_verdict("78-other", "It is so.", "not applicable", "it is about tinyllama-1.1b", "78")
    page = Reader(written(tmp_path, only("89"), {}, [aside, *VERDICT_LIST]))
    ids = {value for name, value in page.attributes if name == "id"}
    assert {value[1:] for name, value in page.attributes if name == "href"} <= ids  # no link to what is not shown
    assert list(page.rows)[-1] == "78-other" and "it is about tinyllama-1.1b" in page.text
    assert f"{len(VERDICT_LIST)} claims, judged on" in page.text and "1 not applicable" in page.text
    assert "not applicable" not in Reader(written(tmp_path, only("89"), {}, VERDICT_LIST)).text


def test_the_page_says_whose_model_and_text_it_is_of(tmp_path, page):
    own = Own(model="/my/mo<del", text="/my/words.txt", narrowest=64, width=64)
    text = Reader(written(tmp_path, only("89").model_copy(update={"own": own}), {})).text
    assert "On /my/mo<del and the text /my/words.txt , in place of the papers' own." in text
    assert "in place of the papers' own" not in page.text


def test_the_filter_is_not_shown_where_scripts_do_not_run(html):
    assert "<form hidden>" in html


def test_every_experiment_tells_its_question_and_whether_it_ran(whole, page):
    laboratory, records = whole
    for experiment in laboratory.experiments.values():
        assert f"{experiment.title} {experiment.question}" in page.text
    assert page.text.count("not run") == 3  # the counts, the claim, experiment 89
    assert "not complete" not in page.text.lower()
    judged = [r for r in records.values() if r.spec.seed < 1000]
    assert f"judged on {len(judged)} runs" in page.text


def test_tables_have_the_papers_figures_beside_ours(whole, page):
    laboratory, records = whole
    for name, experiment in laboratory.experiments.items():
        for wanted in experiment.tables:
            heads, body = table(experiment, wanted, arm_runs(laboratory, name, records))
            for line in [heads, *body]:
                assert " ".join(line) in page.text


def test_the_recipe_tells_rates_seeds_and_costs(tmp_path):
    laboratory = only("82", arms=[{"name": "budget", "k": 32, "steps": 20}], notes=["One note."], base={"tied": False})
    records = records_of(laboratory)
    (arm,) = arms(laboratory, "82")
    choice = choose_rate(arm, records)
    text = Reader(written(tmp_path, laboratory, records)).text
    assert choice.bracketed and "bracketed" in text and "One note." in text
    assert re.sub(r"\s+", " ", " · ".join(f"{lr:g}: {loss:.4g}" for lr, loss in choice.tried)) in text.replace(
        " ·  ", " · "
    )
    for value in ("tied no", "steps 20", "5 of 5", "33", "1,056", "5.2 kB", "6.1 MB", "cpu: a small one"):
        assert value in text


def test_the_recipe_does_not_hide_what_is_missing(tmp_path):
    laboratory = only("82", arms=[{"name": "given", "k": 4, "rates": [0.003]}, {"name": "open", "k": 8}])
    given, open_ = arms(laboratory, "82")
    records = {spec.key: a_record(spec) for spec in given.final(0.003)[:3]}
    text = Reader(written(tmp_path, laboratory, records)).text
    assert "Not complete: 3 of 10 runs" in text and "3 of 5" in text and "0 of 5" in text
    assert "0.003 given" in text and "not tuned yet" in text
    lr = open_.rates[0]
    while any(spec.key not in records for spec in due(open_, records)):  # every higher rate is worse, without end
        for spec in due(open_, records):
            record = a_record(spec)
            record.train_loss[-1] = 9 + math.log10(spec.lr / lr)
            records[spec.key] = record
    text = Reader(written(tmp_path, laboratory, records)).text
    assert "at the grid's edge" in text and "bracketed" not in text


def test_nothing_from_the_data_is_markup(tmp_path):
    evil = "<script>alert(1)</script>\"'&amp; $x_1$"
    laboratory = only(
        "82",
        title=evil,
        question=evil,
        source=evil,
        notes=[evil],
        arms=[{"name": evil, "k": [2, 4], "steps": 3}],
        tables=[{"title": evil, "columns": {evil: "name", "loss": "train_loss"}}],
        figures=[
            {"title": evil, "x": "name", "y": "train_loss"},
            {"title": "b", "x": "k", "y": "train_loss", "by": "name"},
        ],
    )
    verdict = a_verdict("82-x", evil, "artefact", evil, control=evil, note=evil)
    html = written(tmp_path, laboratory, records_of(laboratory), [verdict])
    assert "script>alert" not in html.replace("&lt;script", "") and Reader(html).tags.count("script") == 1
    assert Reader(html).text.count(evil) >= 12


# ------------------------------------------------------------------------------------------------------- figures


def test_the_page_is_self_contained(html, page):
    assert "http:" not in html and "https:" not in html and "@import" not in html
    assert not {"link", "iframe", "img", "image", "object"} & set(page.tags)
    for name, value in page.attributes:
        assert name != "src" and (name not in ("href", "xlink:href") or value.startswith("#"))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', html)) <= set(ids)


def test_plots_take_the_colours_of_the_scheme(whole, html):
    figures = re.findall(r"<svg (?!class).*?</svg>", html, flags=re.DOTALL)
    assert len(figures) == sum(len(e.figures) for e in whole[0].experiments.values())
    for figure in figures:
        assert set(re.findall(r"#[0-9a-f]{6}\b", figure)) == set()
    assert all(f"var(--{shade})" in html for shade in RAMP)


def test_one_seed_has_no_interval(tmp_path):
    laboratory = only("82", arms=[{"name": "budget", "k": [2, 4], "steps": 5}])
    text = Reader(written(tmp_path, laboratory, records_of(laboratory, protocol="paper"), protocol="paper")).text
    assert "One seed; fewer than 3 have no interval." in text and "paper protocol" in text and "given" in text


def test_the_same_records_give_the_same_page(tmp_path):
    laboratory = only("85")
    records = records_of(laboratory)
    assert written(tmp_path, laboratory, records) == written(tmp_path, laboratory, dict(reversed(records.items())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": "los"}, "no metric 'los'"),
        ({"x": "ks"}, "no metric 'ks'"),
        ({"by": "kk"}, "'kk' is no field"),
        ({"where": {"arm": 1}}, "'arm' is no field"),
        ({"x": "step"}, "no curve 'loss_drop'"),
        ({"x": "kept"}, "not measured by directions kept"),
        ({"law": "gravity"}, "no law 'gravity'"),
        ({"law": "coverage"}, "one of K"),
    ],
)
def test_a_wrong_figure_is_refused(tmp_path, change, message):
    figure = {"title": "Budget", "x": "seconds", "y": "loss_drop"} | change
    with pytest.raises(CTError, match=f"Experiment 82, figure 'Budget'.*{message}"):
        written(tmp_path, only("82", figures=[figure]), {})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- a browser


def browsed(path, folder, fragment=""):
    """The page as Chromium shows it after its scripts ran, from a new profile and without a network."""
    quiet = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--no-first-run", *quiet, f"--user-data-dir={folder}/profile"]
    done = subprocess.run(
        [*command, "--dump-dom", path.as_uri() + fragment], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


@needs_chromium
@pytest.mark.parametrize(
    ("fragment", "shown"),
    [
        ("#paper=82&verdict=refuted", {"82-four"}),
        ("#verdict=not+run&q=Diverse", {"89-more"}),
        ("#experiment-82", {v.claim.id for v in VERDICT_LIST}),
    ],
)
def test_the_address_filters_the_claims(tmp_path, fragment, shown):
    written(tmp_path, only("89"), {}, VERDICT_LIST)
    page = Reader(browsed(tmp_path / "lab.html", tmp_path, fragment))
    assert set(page.rows) - page.hidden == shown
    assert (f"{len(shown)} of 6" in page.text) == (len(shown) < 6)


@needs_chromium
def test_the_controls_filter_and_write_the_address(tmp_path):
    html = written(tmp_path, only("89"), {}, VERDICT_LIST)
    use = (
        "const at = [], look = () => at.push(location.hash + ' ' + rows.filter(r => !r.hidden).map(r => r.id));"
        "pills[1].click(); look();"
        "form.q.value = 'budget k=2'; form.q.dispatchEvent(new Event('input', {bubbles: true})); look();"
        "pills[1].click(); form.q.value = ''; form.paper.value = '81';"
        "form.paper.dispatchEvent(new Event('input', {bubbles: true})); look();"
        "form.reset(); setTimeout(() => { look(); document.title = at.join('|'); });"
    )
    (tmp_path / "used.html").write_text(html.replace("</body>", f"<script>{use}</script></body>"), encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", browsed(tmp_path / "used.html", tmp_path))[1]
    assert title.replace("&amp;", "&").split("|") == [
        "#verdict=refuted claim-82-four,claim-81-count",
        "#verdict=refuted&q=budget+k%3D2 claim-82-four",
        "#paper=81 claim-81-fixed,claim-81-count",
        " " + ",".join(f"claim-{v.claim.id}" for v in VERDICT_LIST),
    ]


@needs_chromium
def test_the_page_does_not_scroll_sideways(html, tmp_path):
    over = "d => `${d.scrollWidth - d.clientWidth} over, ${d.querySelectorAll('.claims tbody tr').length} rows`"
    tell = f"onload = () => {{ document.title = [0, 1].map(i => ({over})(frames[i].document.documentElement)) }}"
    opened = escape(html.replace("<details", "<details open"))
    frames = [
        f'<iframe srcdoc="{opened}" style="width:{width}px;height:900px;border:0"></iframe>' for width in (390, 1280)
    ]
    (tmp_path / "frame.html").write_text(f"<title></title>{''.join(frames)}<script>{tell}</script>", encoding="utf-8")
    assert "<title>0 over, 6 rows,0 over, 6 rows</title>" in browsed(tmp_path / "frame.html", tmp_path)
