"""The laboratory's page: every verdict and figure is on it, its filter works, and nothing from the data is markup."""

import math
import random
import re
import shutil
import statistics
import subprocess
from html import escape
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure as MatplotlibFigure

from ctsft.errors import CTError
from ctsft.lab.claims import Artefact, Claim
from ctsft.lab.compare import arm_runs
from ctsft.lab.experiments import Experiment, Figure, Laboratory, arms
from ctsft.lab.figures import (
    GLYPHS,
    LAWS,
    MARKERS,
    PLACES,
    RAMP,
    axis,
    centre,
    curves,
    logarithmic,
    picture,
    points,
    styles,
    told,
)
from ctsft.lab.page import VERDICTS, places, write_lab_report
from ctsft.lab.predicates import Side
from ctsft.lab.rates import choose_rate, due
from ctsft.lab.records import Record
from ctsft.lab.tables import table
from ctsft.lab.verdicts import WORDS, Verdict

CHROMIUM = shutil.which("chromium")
SHAPES = [[768, 256], [256, 256], [1024, 256], [256, 1024]] * 8 + [[15007, 256]]
KINDS = ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")
NAMES = [f"blocks.{i}.{kind}" for i in range(8) for kind in KINDS] + ["tok_emb"]


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


def experiment(name, title, **rest):
    sentences = {"question": f"What does {title} say?", "source": "ours" if name == "arena" else name}
    return {"name": name, "title": title} | sentences | rest


def a_laboratory(**changes):
    """Experiments of every kind of figure; `changes` replace whole experiments."""
    ks = [2, 4, 8, 16, 32, 64]
    paper = [(2, 9.5846), (4, 9.5155), (8, 9.2927), (16, 8.98), (32, 8.4622)]
    loss_columns = {
        "K": "k",
        "trained": "trained",
        "final loss, nats per token": "train_loss",
        "held-out": "heldout_loss",
    }
    experiments = [
        experiment(
            "81",
            "Fixed K against K that moves",
            base={"k": ks},
            arms=[{"name": "fixed"}, {"name": "moving", "k": 8, "schedule": ["8>16@1/2", "2>8@1/2"]}],
            notes=["The paper's count of trained numbers is LoRA's."],
            tables=[
                {
                    "title": "Fixed K",
                    "columns": loss_columns,
                    "where": {"name": "fixed"},
                    "paper": [{"K": k, "final loss, nats per token": loss, "trained": 48031 * k} for k, loss in paper],
                }
            ],
            figures=[
                {
                    "title": "Final loss against K",
                    "x": "k",
                    "y": "train_loss",
                    "log_x": True,
                    "paper": paper,
                    "where": {"name": "fixed"},
                },
                {
                    "title": "Training with a fixed K",
                    "x": "step",
                    "y": "train_loss",
                    "by": "k",
                    "where": {"name": "fixed"},
                },
                {
                    "title": "K that moves",
                    "x": "step",
                    "y": "train_loss",
                    "by": "schedule",
                    "where": {"schedule": ["8>16@1/2", "2>8@1/2"]},
                },
            ],
        ),
        experiment(
            "82",
            "Equal budgets, and where the curves cross",
            arms=[{"name": "budget", "k": [2, 16, 32], "steps": [10, 20, 40, 80]}],
            figures=[{"title": "Loss by budget", "x": "param_steps", "y": "train_loss", "by": "k", "log_x": True}],
        ),
        experiment(
            "85",
            "Are directions 33 to 64 noise?",
            arms=[{"name": "ablated", "k": 64, "ablate": True}],
            figures=[{"title": "Loss by directions kept", "x": "kept", "y": "ablation", "log_x": True}],
        ),
        experiment(
            "86",
            "The rank of the true gradient over training",
            arms=[{"name": "probe", "k": 32, "probes": ["gradient_rank"]}],
            figures=[
                {"title": "Effective rank by matrix", "x": "step", "y": "true_effective_rank_by_matrix"},
                {"title": "Its mean", "x": "step", "y": "true_effective_rank", "paper": [(0, 5), (20, 19), (40, 9)]},
            ],
        ),
        experiment(
            "87",
            "What share of the gradient K directions cover",
            arms=[{"name": "cover", "k": ks, "weight_from": ["top", "bottom", "random"], "probes": ["coverage"]}],
            figures=[
                {
                    "title": "Coverage against its law",
                    "x": "k",
                    "y": "coverage_diagonal",
                    "by": "weight_from",
                    "law": "coverage",
                }
            ],
        ),
        experiment(
            "78",
            "The K frontier of amplitude-only tuning",
            base={"method": "scores", "basis": "universal", "targets": "last2"},
            arms=[
                {"name": "scores", "k": [4, 8, 16, 32, 64], "universal_mode": ["residual", "replace"]},
                {"name": "full", "method": "full", "k": 0, "basis": "weight", "targets": "last2+head"},
            ],
            figures=[
                {
                    "title": "The regimes",
                    "x": "k",
                    "y": "fraction_of_full_sft",
                    "by": "universal_mode",
                    "log_x": True,
                    "law": "one,zero,kmin",
                    "where": {"method": "scores"},
                    "paper": [(4, -0.35), (8, -0.125), (16, 0.008), (32, 0.456), (64, 1.077)],
                }
            ],
        ),
        experiment(
            "arena",
            "Every method at equal cost",
            arms=[
                {"name": "ours", "method": ["diagonal", "core"], "k": 64},
                {"name": "LoRA r8", "method": "lora", "k": 8},
                {"name": "norms only", "method": "norms", "k": 0},
            ],
            figures=[{"title": "Share of LoRA r8's drop", "x": "method", "y": "fraction_of_lora_r8"}],
        ),
        experiment("89", "Are more directions more diverse?", arms=[{"name": "none", "k": 32, "steps": 21}]),
    ]
    return Laboratory(
        base={"steps": 40},
        rates=dict.fromkeys(("diagonal", "core", "scores", "full", "lora", "norms"), 0.01),
        profiles={
            "full": {"seeds": 5, "tune_seeds": 1, "rates": 3},
            "quick": {"seeds": 2, "tune_seeds": 1, "rates": 3},
        },
        experiments={e["name"]: e for e in experiments} | changes,
    )


def a_record(spec):
    """A run's record with plausible numbers, the same for the same spec."""
    noise = random.Random(spec.key)
    k = spec.k or 100
    rate = math.exp(-0.5 * (math.log10(spec.lr) + 1.6 + 0.2 * math.log2(k) / 6) ** 2)
    scale = {"full": 2.0, "lora": 1.6, "scores": 0.2 * (math.log2(k) - 2.5)}.get(spec.method, 0.35 * math.log2(k))
    scale *= -0.3 if spec.universal_mode == "replace" and k < 16 else 1
    drop, tilt = scale * rate * (1 + noise.gauss(0, 0.04)), noise.gauss(0, 0.01)
    train = [7.8 - drop * (1 - math.exp(-i / 25)) + tilt + noise.gauss(0, 0.006) for i in range(spec.steps + 1)]
    probes = {"cosine": [[i, 0.99] for i in range(2, spec.steps)]}
    updates = [1, *range(10, spec.steps + 1, 10)]
    for i in updates if "coverage" in spec.probes else []:
        law = k * sum(1 / (o * n) for o, n in SHAPES) / len(SHAPES)
        probes.setdefault("coverage_diagonal", []).append([i, law * (1 + noise.gauss(0, 0.1))])
    for i in updates if "gradient_rank" in spec.probes else []:
        values = {n: 5 + 14 * math.sin(i / 13) ** 2 * (1 + j % 4) / 4 + noise.random() for j, n in enumerate(NAMES)}
        probes.setdefault("true_effective_rank_by_matrix", []).append([i, values])
        probes.setdefault("true_effective_rank", []).append([i, sum(values.values()) / len(values)])
    measures = {}
    if spec.ablate:
        curve = {"order": 0.5, "reverse": 2.5, "random": 1.0}
        kept = (0, 8, 16, 32, 48, 64)
        measures["ablation"] = {
            order: {str(n): 7.8 - drop * (n / k) ** power + noise.gauss(0, 0.02) for n in kept}
            for order, power in curve.items()
        }
    return Record(
        spec=spec,
        adapted={"matrices": 33, "shapes": SHAPES},
        trained=33 * k,
        counted=48031 * k,
        adapter_bytes=1000 + 132 * k,
        memory_bytes=192_000 * k,
        tokens=254 * spec.steps,
        flops=1.2e12,
        seconds=0.2 * spec.steps + noise.random(),
        train_loss=train,
        heldout=[(0, 7.9), (spec.steps, train[-1] + 0.15 + noise.gauss(0, 0.02))],
        probes=probes,
        measures=measures,
        diverged=False,
        versions={"ctsft": "0.1.0"},
        machine={"cpu": "a small one", "threads": 2},
    )


def changed(row, **values):
    """Give all records of `row` these values."""
    row.records[:] = [record.model_copy(update=values) for record in row.records]


def records_of(laboratory, names=None, profile="full", protocol="honest"):
    """Every run that the experiments need, the tuning runs too."""
    records = {}
    for name in names or laboratory.experiments:
        for arm in arms(laboratory, name, profile, protocol):
            while needed := due(arm, records):
                records |= {spec.key: a_record(spec) for spec in needed}
    return records


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


def only(name, **changes):
    """The laboratory with one experiment, changed."""
    whole = a_laboratory()
    one = Experiment(**whole.experiments[name].model_dump() | changes)
    return whole.model_copy(update={"experiments": {name: one}})


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


def test_the_verdicts_are_those_that_are_given():
    assert tuple(VERDICTS) == WORDS


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


def figure_of(name, laboratory=None, **changes):
    """The first figure of an experiment, changed, with its rows."""
    laboratory = laboratory or a_laboratory()
    figure = Figure(**laboratory.experiments[name].figures[0].model_dump() | changes)
    return figure, arm_runs(laboratory, name, records_of(laboratory, [name]))


def test_points_are_means_with_t_intervals():
    figure, found = figure_of("82")
    (line,) = points(figure, found[:1], found, ["k"], [])
    losses = [record.train_loss[-1] for record in found[0].records]
    half = 2.7764451 * statistics.stdev(losses) / 5**0.5  # t of 4 degrees of freedom at 97.5%
    assert line.key == (2,) and len(line.points) == 1
    assert line.points[0] == pytest.approx((96062 * 10, statistics.fmean(losses), half))
    lines = points(figure, found, found, ["k"], [])
    assert [(line.key, len(line.points)) for line in lines] == [((2,), 4), ((16,), 4), ((32,), 4)]
    assert centre([1.5]) == (1.5, 0.0) and centre([1.5, 2.5]) == (2.0, 0.0)


def test_points_over_words_are_ticks():
    figure, found = figure_of("arena")
    ticks = []
    lines = points(figure, found, found, [], ticks)
    assert ticks == ["diagonal", "core", "lora", "norms"]
    (line,) = lines
    assert [x for x, _, _ in line.points] == [0, 1, 2, 3]
    assert line.points[2][1:] == (1.0, 0.0)  # LoRA r8 as a share of itself


def test_curves_are_means_where_all_seeds_have_numbers():
    figure, found = figure_of("81", x="step", y="train_loss")
    row = found[0]
    row.records[2].train_loss[30:] = [None] * 11
    (line,) = curves(figure, row, ["k"])
    assert [x for x, _, _ in line.points] == list(range(30)) and line.curve
    losses = [record.train_loss[7] for record in row.records]
    assert line.points[7][1:] == pytest.approx(centre(losses))


def test_curves_over_directions_kept_have_a_line_an_order():
    figure, found = figure_of("85")
    lines = curves(figure, found[0], [])
    assert [line.key for line in lines] == [("order",), ("reverse",), ("random",)]
    assert [x for x, _, _ in lines[0].points] == [0, 8, 16, 32, 48, 64]
    (one,) = curves(Figure(title="", x="kept", y="ablation.reverse"), found[0], [])
    assert one.points == lines[1].points
    assert curves(Figure(title="", x="kept", y="variance_explained"), found[0], []) == []


def test_long_curves_are_thinned_and_keep_their_end():
    figure, found = figure_of("82", x="step", y="heldout")
    changed(found[0], heldout=[(i, 1.0) for i in range(1001)])
    (line,) = curves(figure, found[0], [])
    assert len(line.points) <= 220 and [x for x, _, _ in line.points[:3]] == [0, 1, 2] and line.points[-1][0] == 1000


def test_the_law_of_coverage_is_the_papers_slope_times_k():
    shapes = [(4, 8), (16, 2)]
    assert LAWS["coverage"][1](3, shapes) == pytest.approx(3 / 32)
    figure, found = figure_of("87")
    legend = {text: line for text, _, line in picture("x", figure, found).legend}
    assert legend == {"top": "solid", "bottom": "solid", "random": "solid", LAWS["coverage"][0]: "dashed"}


def test_upright_lines_stand_at_shares_of_the_width():
    figure, found = figure_of("78")
    svg = picture("x", figure, found).svgs[0][1]
    assert "d/128" in svg and "d/32" in svg and len(PLACES["kmin"]) == 2


def test_numbers_take_the_ramp_and_names_the_series():
    figure, found = figure_of("81", x="step", y="train_loss", by="k", where={"name": "fixed"}, paper=[])
    colours = [colour for _, colour, _ in picture("x", figure, found).legend]
    assert colours[0] == "s0" and colours[-1] == "s7" and len(set(colours)) == 6
    assert [told("k", 4), told("tied", False), told("schedule", ""), told("model", "a/b"), told("steps", 3)] == [
        *("K = 4", "tied: no", "fixed K", "b", "steps = 3")
    ]


def test_single_points_of_one_colour_differ_by_their_marker():
    looks = [(colour, MARKERS[dash], GLYPHS[dash]) for colour, dash in styles([(f"arm {i}",) for i in range(20)])]
    assert len({colour for colour, _, _ in looks}) < len(looks) == len({(colour, m) for colour, m, _ in looks})
    assert len({m for _, m, _ in looks}) == len({g for _, _, g in looks}) == 3


def test_a_line_looks_the_same_in_all_figures_of_its_kind():
    laboratory = a_laboratory()
    figure, found = figure_of("82", laboratory, x="k", by="k,tied", where={})
    ks = sorted({row.spec.k for row in found})
    some = Figure(**figure.model_dump() | {"where": {"k": ks[1:]}})
    other = Figure(**figure.model_dump() | {"by": "tied"})

    def looks(drawn, beside=()):
        return {text: look for text, *look in picture("x", drawn, found, beside).legend}

    whole, part = looks(figure), looks(some, [figure, other])
    assert set(part) < set(whole) and all(whole[text] == look for text, look in part.items())
    assert looks(some) != part  # alone it takes the colours from the start


def test_axes_are_told_in_words():
    assert axis("train_loss@1280/k") == "loss on the step's batch, nats per token, after 1280 K-steps"
    assert axis("heldout_loss@40") == "held-out loss, nats per token, after 40 updates"
    assert [axis("k"), axis("snr_rest.last"), axis("snr_top")] == ["K", "snr rest, last", "snr top"]


@pytest.mark.parametrize("scale", [{"x": "step", "y": "cosine"}, {"x": "step", "y": "diversity"}])
def test_a_figure_without_numbers_says_so(scale):
    figure, found = figure_of("82", **scale)
    for row in found:
        changed(row, probes={})
    made = picture("x", figure, found)
    assert made.svgs == [] and "none has this number" in made.note


def test_runs_that_are_not_drawn_are_counted():
    figure, found = figure_of("82")
    found[0].records[1] = found[0].records[1].model_copy(update={"diverged": True})
    made = picture("x", figure, found)
    assert "without this number: 1." in made.note and "95% t interval" in made.note


def test_one_seed_has_no_interval(tmp_path):
    laboratory = only("82", arms=[{"name": "budget", "k": [2, 4], "steps": 5}])
    text = Reader(written(tmp_path, laboratory, records_of(laboratory, protocol="paper"), protocol="paper")).text
    assert "One seed; fewer than 3 have no interval." in text and "paper protocol" in text and "given" in text


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


@pytest.mark.parametrize(("xs", "scale"), [([0, 4, 8], "symlog"), ([1, 1e7], "log"), ([0], "linear")])
def test_logarithmic_axes_have_room_for_zero(xs, scale):
    ax = MatplotlibFigure().add_subplot()
    ax.plot(xs, xs)
    logarithmic(ax, xs)
    assert ax.get_xscale() == scale


def test_the_same_records_give_the_same_page(tmp_path):
    laboratory = only("85")
    records = records_of(laboratory)
    assert written(tmp_path, laboratory, records) == written(tmp_path, laboratory, dict(reversed(records.items())))


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
