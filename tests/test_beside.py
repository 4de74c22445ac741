"""The papers' figures beside ours: each once, of the paper's own settings, and a dash where a run is missing."""

import pytest

from ctsft.lab.beside import beside, beside_markdown
from ctsft.lab.experiments import PAPERS, Table, arms, read_laboratory
from ctsft.lab.records import Records
from ctsft.lab.tables import keys_of
from synthetic import laboratory, record

TABLE = {
    "title": "Loss",
    "columns": {"K": "k", "Final": "train_loss", "Trained": "trained"},
    "paper": [{"K": 2, "Final": 8.0, "Trained": 66}, {"K": 4, "Final": 0.0}, {"K": 64, "Final": 7.0}],
}


def lab(*tables):
    return laboratory({"k": [2, 4]}, name="1", tables=[Table(**TABLE | more) for more in tables])


def runs(given, make):
    return {s.key: make(s) for arm in arms(given, "1", "full", "paper") for s in arm.final(5e-3)}


def test_every_figure_of_a_paper_with_the_ratio():
    given = lab({})
    found = beside(given, runs(given, lambda s: record(s, [9.0, 4.0 * s.k])))
    assert [(one.row, one.figure, one.theirs, one.ours, one.ratio) for one in found] == [
        ("K 2", "Final", 8.0, 8.0, 1.0),
        ("K 2", "Trained", 66.0, 6.0, 6 / 66),
        ("K 4", "Final", 0.0, 16.0, None),
        ("K 64", "Final", 7.0, None, None),
    ]
    text = beside_markdown(found)
    assert "3 of the 4 figures" in text
    assert "| 1 | Loss | K 2 | Final | 8 | 8 | 1 |\n" in text and text.count("| \N{EN DASH} |") == 2


def test_runs_of_the_honest_protocol_do_not_count():
    given = lab({})
    honest = {s.key: record(s, [9.0, 8.0]) for arm in arms(given, "1") for s in arm.final(arm.rates[0])}
    assert {one.ours for one in beside(given, honest)} == {None}


def test_figures_of_another_setting_and_of_our_own_experiments_are_left_out():
    assert beside(lab({"elsewhere": True}), {}) == []
    ours = lab({})
    (one,) = ours.experiments.values()
    again = ours.model_copy(update={"experiments": {"1": one.model_copy(update={"source": "2"})}})
    assert beside(again, {}) == []


def test_the_committed_records_have_the_figures_of_81_85_and_88():
    """Each figure of the papers' own tables stands in the list once, and VERDICTS.md has the list."""
    root, given = PAPERS.parents[3], read_laboratory()
    found = beside(given, Records(root / "records"))
    assert beside_markdown(found) in (root / "VERDICTS.md").read_text(encoding="utf-8")
    own = [t for name, e in given.experiments.items() if name == e.source for t in e.tables if not t.elsewhere]
    assert len(found) == sum(len({*row} - {*keys_of(t)}) for t in own for row in t.paper)
    missing = [one for one in found if one.ours is None and one.paper in ("81", "88") and "1,280" not in one.table]
    assert missing == []


@pytest.mark.parametrize("name", ["81", "82"])
def test_no_figure_of_an_untied_model_stands_beside_a_tied_one(name):
    experiment = read_laboratory().experiments[name]
    assert all(t.elsewhere == ("are of its untied model" in t.title) for t in experiment.tables if t.paper)
