import pytest

from ctsft.errors import CTError
from ctsft.lab.compare import arm_runs
from ctsft.lab.experiments import Table
from ctsft.lab.tables import cell, short, spread, table
from synthetic import laboratory, record, run


def losing(losses):
    """A maker of records whose last loss is losses[k] + seed / 100."""
    return lambda spec: record(spec, [9.0, losses[spec.k] + spec.seed / 100], [[0, 9.0], [40, 8.0]])


def test_a_table_beside_the_papers_figures():
    wanted = Table(
        title="Fixed K",
        columns={"K": "k", "Params": "counted", "Final loss": "train_loss", "Rate": "lr"},
        paper=[{"K": 4, "Params": 192124, "Final loss": 9.5155}, {"K": 64, "Final loss": "none"}],
    )
    lab = laboratory({"k": [2, 4]}, seeds=3, tables=[wanted])
    records = run(lab, losing({2: 8.0, 4: 7.0}))
    heads, body = table(lab.experiments["x"], wanted, arm_runs(lab, "x", records))
    assert heads == ["K", "Params", "Params (paper)", "Final loss", "Final loss (paper)", "Rate"]
    assert body == [
        ["2", "33,598", "–", "8.01 ± 0.01 (3)", "–", "0.1"],  # noqa: RUF001
        ["4", "67,196", "192,124", "7.01 ± 0.01 (3)", "9.5155", "0.1"],
        ["64", "–", "–", "–", "none", "–"],  # noqa: RUF001
    ]


def test_a_line_of_the_paper_alone_stands_in_its_place():
    lab = laboratory({"k": [2, 8]}, seeds=1)
    found = arm_runs(lab, "x", run(lab))
    paper = [{"K": 4, "Loss": 7.5}, {"K": 16, "Loss": 7.0}]

    def first_cells(**columns):
        return [
            line[:2] for line in table(lab.experiments["x"], Table(title="", columns=columns, paper=paper), found)[1]
        ]

    assert [line[0] for line in first_cells(K="k", Loss="train_loss")] == ["2", "4", "8", "16"]
    dash = cell(None)
    assert first_cells(Arm="name", K="k", Loss="train_loss") == [["arm", "2"], ["arm", "8"], [dash, "4"], [dash, "16"]]


def test_a_row_for_every_value_of_a_field():
    """Of an arm the mean of its seeds, of the arms the mean and the largest; what was not run is not in it."""
    wanted = Table(title="", columns={"Loss": "train_loss", "Cosine": "cosine"}, per="basis", where={"k": [2, 4]})
    lab = laboratory({"k": [2, 4, 8]}, {"k": [2, 4], "basis": "random"}, seeds=2, tables=[wanted])
    records = run(lab, losing({2: 8.0, 4: 7.0, 8: 1.0}))
    gone = [key for key, r in records.items() if r.spec.basis == "random" and r.spec.k == 2]
    for key in gone:
        del records[key]
    heads, body = table(lab.experiments["x"], wanted, arm_runs(lab, "x", records))
    assert heads == ["basis", "arms", "Loss", "Loss, largest", "Cosine", "Cosine, largest"]
    assert [line[:4] for line in body] == [["weight", "2", "7.505", "8.005"], ["random", "1", "7.005", "7.005"]]


def test_a_field_that_a_method_does_not_read_is_not_shown():
    arms = [{"k": 4}, {"k": 4, "basis": "random"}, {"method": "lora-xs", "k": 4}, {"method": "lora", "k": 8}]
    lab = laboratory(*arms, {"method": "scores", "k": 4, "basis": "universal"}, seeds=1)
    columns = {"Method": "method", "Basis": "basis", "Of W": "weight_from", "Form": "universal_mode"}
    _, body = table(lab.experiments["x"], Table(title="", columns=columns), arm_runs(lab, "x", run(lab)))
    dash = cell(None)
    assert body == [
        ["diagonal", "weight", "top", dash],
        ["diagonal", "random", dash, dash],
        ["lora-xs", "weight", dash, dash],
        ["lora", dash, dash, dash],
        ["scores", "universal", dash, "residual"],
    ]


def test_a_table_keeps_to_where_and_knows_its_metrics():
    lab = laboratory({"k": [2, 4]}, seeds=1)
    found = arm_runs(lab, "x", run(lab))
    _, body = table(lab.experiments["x"], Table(title="", columns={"Arm": "name", "K": "k"}, where={"k": [4]}), found)
    assert body == [["arm", "4"]]
    with pytest.raises(CTError, match="experiment x, table 'T', column 'L': there is no metric 'loss'"):
        table(lab.experiments["x"], Table(title="T", columns={"L": "loss"}), found)


def test_numbers_for_people():
    assert [short(x) for x in (6.12345, 1234.5, 2.0, 1.234e12, 0.00012)] == [
        "6.123",
        "1,234",
        "2",
        "1.23e+12",
        "0.00012",
    ]
    assert spread([6.0, None]) == "6 (1 of 2)"
    assert spread([3.0, 3.0]) == "3"
    assert spread([None]) == cell(None) == cell("")
    assert (cell(True), cell(False), cell(1000), cell("a")) == ("yes", "no", "1,000", "a")
