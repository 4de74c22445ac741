"""The page: every number is on it, nothing outside is needed, and nothing from the data is taken for markup."""

import copy
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from ctsft.pages.plot import COLOURS
from ctsft.tune.record import Accuracy, Point, run_record
from ctsft.tune.report import score, thinned, window, write_report

KINDS = ("self_attn.q_proj", "mlp.up_proj")

RUN = {
    "format": 1,
    "name": "tiny on sql, diagonal K=8",
    "created": "2026-01-02T03:04:05+00:00",
    "recipe": {"model": "tiny", "k": 8, "learning_rate": 0.0213, "targets": ["q_proj", "up_proj"], "cut": None},
    "versions": {"torch": "2.13.0", "ctsft": "0.1.0"},
    "machine": {"platform": "Linux-6", "cpu": "a small one", "threads": 2, "device": "cpu"},
    "model": {"name": "tiny", "parameters": 1_234_567, "dtype": "float32", "note": "random weights"},
    "data": {
        "name": "sql",
        "kind": "built in",
        "train_rows": 4021,
        "heldout_rows": 211,
        "truncated": 3,
        "dropped": 17,
        "notes": ["schemas of the held-out split never occur in training"],
    },
    "fingerprint": "xxh3-0123456789abcdef",
    "costs": {"trainable": 13440, "adapter_bytes": 54321, "extra_memory_bytes": 61_234_567, "seconds": 247.3},
    "before": {
        "heldout_loss": 2.9412,
        "heldout_tokens": 8123,
        "accuracy": {
            "correct": 3,
            "total": 40,
            "low": 0.026,
            "high": 0.199,
            "by_kind": {"join": [1, 19], "<b>": [2, 21]},
        },
    },
    "after": {
        "heldout_loss": 1.0934,
        "heldout_tokens": 8123,
        "accuracy": {
            "correct": 22,
            "total": 40,
            "low": 0.398,
            "high": 0.692,
            "by_kind": {"join": [13, 19], "<b>": [9, 21]},
        },
    },
    "curve": [
        {"step": i, "loss": 3 / i + 0.1234, "tokens": 1000 * i + 7, "seconds": 1.1 * i, "learning_rate": 0.02 / i}
        for i in range(1, 31)
    ],
    "spectra": [
        {
            "name": f"model.layers.{i}.{kind}",
            "shape": [48 + 16 * j, 48],
            "k": 8,
            "effective_rank": 30.5 + i + j / 5,
            "stable_rank": 10.25 + i,
            "energy_top_k": 0.3 + i / 100,
            "largest": 2.5,
            "coefficient_norm": 0.123 * (i + 1),
            "delta_over_weight": 0.00111 * (i + 1 + j / 3),
        }
        for i in range(8)
        for j, kind in enumerate(KINDS)
    ],
    "samples": [
        {
            "prompt": "List <script>alert('x')</script> & all",
            "reference": "SELECT a FROM t WHERE a < 3",
            "before": "",
            "after": "SELECT a FROM t",
            "before_ok": False,
            "after_ok": True,
        }
    ],
    "steps": 30,
    "resumed": 2,
}


@pytest.fixture
def run():
    return copy.deepcopy(RUN)


@pytest.fixture
def page(tmp_path):
    def write(run):
        write_report(run_record(run), tmp_path / "report.html")
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


VOID = {"meta", "br", "col", "hr"}


class Reader(HTMLParser):
    """What a reader sees, the tags there are, and whether each is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.attributes, self.open = "", [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += f" {data}"


def test_every_number_is_on_the_page(run, page):
    text = Reader(page(run)).text
    for label in ("before", "after"):
        assert f"{run[label]['heldout_loss']:.3f}" in text
        assert score(Accuracy(**run[label]["accuracy"])) in text
        for correct, total in run[label]["accuracy"]["by_kind"].values():
            assert f"{correct} of {total}" in text
    for value in ("13,440", "1.09% of 1,234,567", "54,321 bytes", "61,234,567 bytes", "247.3 seconds", "4 min 7 s"):
        assert value in text
    for point in run["curve"]:
        assert f"{point['step']} {point['loss']:.4f} {point['tokens']:,} {point['seconds']:.1f}" in text
    for row in run["spectra"]:
        form = ".2e", ".3g", ",", ".1%", ".1f", ".1f"
        keys = "delta_over_weight", "coefficient_norm", "k", "energy_top_k", "effective_rank", "stable_rank"
        cells = " ".join(format(row[key], spec) for key, spec in zip(keys, form, strict=True))
        assert f"{row['name']} {cells} {row['shape'][0]} \N{MULTIPLICATION SIGN} {row['shape'][1]}" in text
    for value in (
        "0.0213",
        "q_proj, up_proj",
        "cut none",
        "2.13.0",
        "a small one",
        "4021",
        "211",
        "17",
        "random weights",
    ):
        assert value in text
    for value in ("xxh3-0123456789abcdef", "never occur in training", "30 steps", "resumed 2 times", "8,123 tokens"):
        assert value in text
    assert "one seed" in text and "no spread" in text and "2026-01-02 03:04:05" in text


def test_the_result_is_one_sentence(run, page):
    assert (
        "Training 13,440 numbers, 1.09% of the model, lowered the held-out loss from 2.941 to 1.093 nats per token; "
        "execution accuracy went from 3 of 40 (7.5%, 95% interval 2.6% to 19.9%) to 22 of 40 "
        "(55.0%, 95% interval 39.8% to 69.2%)."
    ) in Reader(page(run)).text


@pytest.mark.parametrize(
    ("after", "verb"),
    [(3.5, "raised"), (2.9412, "did not change"), (float("nan"), "broke"), (1.0, "lowered")],
)
def test_the_verb_follows_the_loss(run, page, after, verb):
    run["after"]["heldout_loss"] = after
    assert f"{verb} the held-out loss from 2.941 to {after:.3f}" in Reader(page(run)).text


def test_nothing_from_the_data_is_markup(run, page):
    evil = "<script>alert(1)</script><img src=x>\"'&amp;"
    for holder, key in (
        (run, "name"),
        (run, "created"),
        (run, "fingerprint"),
        (run["recipe"], "model"),
        (run["versions"], "torch"),
        (run["machine"], "cpu"),
        (run["model"], "note"),
        (run["data"], "name"),
        (run["spectra"][0], "name"),
        (run["samples"][0], "reference"),
        (run["samples"][0], "before"),
        (run["samples"][0], "after"),
    ):
        holder[key] = evil
    run["recipe"][evil] = [evil]
    run["data"]["notes"] = [evil]
    reader = Reader(page(run))
    assert not {"script", "img", "b>"} & set(reader.tags)
    assert reader.text.count(evil) >= 14
    assert "List <script>alert('x')</script> & all" in reader.text


def test_characters_that_would_steer_the_page_are_shown_not_obeyed(run, page):
    run["samples"][0]["after"] = "SELECT \N{RIGHT-TO-LEFT OVERRIDE}1\x1b[2J"
    run["name"] = "a\N{RIGHT-TO-LEFT ISOLATE}b"
    found = page(run)
    assert "SELECT \\u202e1\\x1b[2J" in found and "a\\u2067b" in found
    assert not set(found) & {"\N{RIGHT-TO-LEFT OVERRIDE}", "\N{RIGHT-TO-LEFT ISOLATE}", "\x1b"}


def test_the_page_is_self_contained(run, page):
    html = page(run)
    reader = Reader(html)
    assert "http:" not in html and "https:" not in html and "@import" not in html
    assert not {"link", "script", "iframe", "img", "object"} & set(reader.tags)
    for name, value in reader.attributes:
        assert name != "src" and (name not in ("href", "xlink:href") or value.startswith("#"))
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', html))
    assert used <= set(ids)


def test_plots_take_the_colours_of_the_scheme(run, page):
    html = page(run)
    figures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(figures) == 4
    for figure in figures:
        assert "var(--" in figure and not any(light in figure for light, _ in COLOURS.values())
        assert set(re.findall(r"#[0-9a-f]{6}\b", figure)) == set()
    assert html.count("prefers-color-scheme: dark") == 1


def test_without_the_optional_parts(run, page):
    run["before"]["accuracy"] = run["after"]["accuracy"] = None
    run.update(curve=[], samples=[], spectra=[], resumed=0)
    run["model"]["note"] = None
    run["data"]["notes"] = []
    html = page(run)
    text = Reader(html).text
    assert "from 2.941 to 1.093 nats per token." in text and "13,440" in text
    assert "svg" not in Reader(html).tags
    for absent in ("accuracy", "What it writes", "adapted", "The curve", "resumed", "wrong"):
        assert absent not in text


@pytest.mark.parametrize("label", ["before", "after"])
def test_accuracy_on_one_side_only(run, page, label):
    run[label]["accuracy"] = None
    text = Reader(page(run)).text
    assert "went from" not in text and "by kind" in text


def test_a_kind_of_question_asked_on_one_side_only_keeps_its_column(run, page):
    del run["before"]["accuracy"]["by_kind"]["join"]
    assert re.search(r"join\s*0 of 0\s*13 of 19", Reader(page(run)).text)


def test_samples_with_and_without_a_mark(run, page):
    one = run["samples"][0]
    run["samples"] = [one | {"before_ok": None, "after_ok": None} for _ in range(6)]
    text = Reader(page(run)).text
    assert "right" not in text and "wrong" not in text and "2 more" in text and "nothing" in text


def test_few_rows_are_not_folded_and_outer_matrices_are_no_depth(run, page):
    run["spectra"] = [run["spectra"][0] | {"name": "lm_head"}, run["spectra"][1]]
    html = page(run)
    assert "more matrices" not in html and html.count("<svg") == 1


def test_the_table_is_in_order_of_the_change(run, page):
    table = page(run)
    table = table[table.index('class="spectra"') :]
    names = re.findall(r'<td class="name">(.*?)</td>', table)
    assert names == [row["name"] for row in sorted(run["spectra"], key=lambda row: -row["delta_over_weight"])]


def test_a_diverged_curve_still_draws(run, page):
    run["curve"][5]["loss"] = float("nan")
    run["curve"][6]["loss"] = None
    assert "nan" in Reader(page(run)).text


def test_the_same_run_gives_the_same_page(run, page):
    assert page(run) == page(json.loads(json.dumps(run)))


def test_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "report.html"
    write_report(run_record(run), path)
    assert os.listdir(path.parent) == ["report.html"]
    before = path.read_text()

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    run["name"] = "another"
    with pytest.raises(OSError, match="disk full"):
        write_report(run_record(run), path)
    assert path.read_text() == before and os.listdir(path.parent) == ["report.html"]


def test_needs_no_torch(run, tmp_path):
    code = (
        "import json, sys; from ctsft.tune.report import write_report; from ctsft.tune.record import run_record; "
        "assert 'matplotlib' not in sys.modules; "
        "write_report(run_record(json.load(sys.stdin)), 'report.html'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], input=json.dumps(run), text=True, check=True, cwd=tmp_path)
    assert (tmp_path / "report.html").exists()


def test_the_smoothed_loss_is_over_an_odd_number_of_steps():
    assert [window(n) for n in (0, 10, 30, 200)] == [1, 1, 3, 13]


@pytest.mark.parametrize("n", [0, 1, 60, 61, 1000])
def test_a_long_curve_is_thinned_and_keeps_its_end(n):
    curve = [Point(step=i, loss=None, learning_rate=0, seconds=0, tokens=0) for i in range(n)]
    kept = thinned(curve)
    assert len(kept) <= 60 and (kept[-1:] == curve[-1:]) and kept == sorted(kept, key=lambda point: point.step)
    assert n > 60 or kept == curve


def test_a_run_that_ended_worse_says_so_in_red_with_the_loss_at_the_end(run, page):
    run["worse"] = {"end": run["after"] | {"heldout_loss": 6.6}, "kept_step": 16}
    html = page(run)
    assert f'<p class="lead bad">{run_record(run).warning}</p>' in html
    assert "held-out at the end 6.600" in html and "held-out after" not in html
    del run["worse"]
    assert "lead bad" not in page(run)


@pytest.mark.parametrize(
    ("resumed", "words"), [(False, None), (True, "resumed after a stop"), (1, "resumed 1 time"), (3, "resumed 3 times")]
)
def test_resuming_is_told_in_words(run, page, resumed, words):
    run["resumed"] = resumed
    text = Reader(page(run)).text
    assert "True" not in text and (f"· {words} ·" in text if words else "resumed" not in text)


def test_what_one_must_know_of_the_model_stands_at_the_top(run, page):
    text = Reader(page(run)).text
    assert text.index("About the model: random weights.") < text.index("held-out loss, nats per token")
