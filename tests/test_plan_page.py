"""The page of a comparison."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from contests import arm, comparison
from ctsft.plan.page import write_comparison
from ctsft.tune.record import Accuracy

ARMS = (arm("lora-8", (2.0, 2.2), 5000), arm("diagonal-4", (2.1, 2.15), 30), arm("norms", (4.1, 4.3), 7, rate=0.03))
VOID = {"meta", "br", "col", "hr"}


class Page(HTMLParser):
    """Text by tag, and whether every tag is closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.tags = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


@pytest.fixture
def page(tmp_path):
    def write(*arms, **changes):
        write_comparison(comparison(*arms, **changes), tmp_path / "page.html")
        return (tmp_path / "page.html").read_text(encoding="utf-8")

    return write


def cells(text):
    return [" ".join(cell.split()) for cell in Page(text).cells]


def test_it_shows_every_number_of_every_arm(page):
    text = page(*ARMS)
    shown = cells(text)
    for cell in (
        "2.100 ± 0.141",
        "5,000",
        "20.5 kB",
        "80.0 kB",
        "8.0 s",
        "4.000",
        "2.1500",
        "0.03: 3.500 · 0.1: 3.000 · 0.3: diverged",
    ):
        assert cell in shown, cell
    assert shown.index("lora-8") < shown.index("diagonal-4") < shown.index("norms")
    assert "lora-8 ends lowest" in text and "diagonal-4 is level with it" in text
    assert "norms is no better than the model as it is" in text and "the best was at the edge" in text
    assert text.count("<svg") == 3 and "nan" not in text.lower().replace("nanu", "") and "inf" not in shown


def test_it_is_one_file_that_runs_nothing_and_escapes_names(page):
    text = page(*ARMS)
    assert "small &amp; &lt;b&gt;" in text and "<b>" not in re.sub(r"<b>[\d.]+: [\d.]+</b>", "", text)
    assert not re.search(r"<script|https?://(?!www\.w3\.org)|<link|<img|@import", text)


@pytest.mark.parametrize("seeds", [1, 2])
def test_what_there_is_not_is_left_out(page, seeds):
    only = [arm("norms", (2.0, 2.5)[:seeds], 7, tried=[])]
    text = page(*only)
    assert ("±" in " ".join(cells(text))) == (seeds == 2)
    assert "right answers" not in text and "to the loss" not in text
    assert ("one seed: no spread is known" in text) == (seeds == 1) and "no races were run" in text


def test_answers_have_their_interval_and_a_diverged_arm_its_word(page):
    broken = arm("vera-4", (None, 2.0), 9)
    text = page(*ARMS, broken, before_accuracy=Accuracy(correct=1, total=4, low=0.05, high=0.7))
    assert "25% (5% to 70%)" in cells(text) and "1 of 2 diverged" in cells(text) and "\N{EN DASH}" in cells(text)


def test_it_needs_no_torch(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); from contests import arm, comparison\n"
        "from ctsft.plan.page import write_comparison\n"
        f"write_comparison(comparison(arm('norms', (2.0, 2.1))), {str(tmp_path / 'p.html')!r})\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("False", "")
