"""The record of a run: what is written is read again, and what is none is told in one sentence."""

import copy
import json

import pytest

from ctsft.errors import CTError
from ctsft.files import write_json
from ctsft.tune.record import read_run, run_record
from test_report import RUN


@pytest.fixture
def run():
    return copy.deepcopy(RUN)


def test_the_content_of_the_file_is_that_of_the_record(run, tmp_path):
    record = run_record(run)
    assert record.values() == run and "worse" not in record.values()
    write_json(tmp_path / "run.json", record.values())
    assert read_run(tmp_path / "run.json") == record


@pytest.mark.parametrize("resumed", [False, True, 0, 1, 2])
def test_resumed_stays_what_it_is(run, resumed):
    kept = run_record(run | {"resumed": resumed}).values()["resumed"]
    assert kept == resumed and type(kept) is type(resumed)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1], "is no record of a run; give the run.json"),
        ({"name": "x"}, "is no record of a run; give the run.json"),
        ({"format": 2}, "has format 2 and this ctsft reads 1"),
        ({"format": 1}, "is no record of a run: name: Field required; created: Field required"),
    ],
)
def test_what_is_no_record_is_one_sentence(values, words, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(CTError, match=rf"run\.json {words}"):
        read_run(tmp_path / "run.json")


def test_a_wrong_field_is_named_with_its_place(run):
    run["costs"]["seconds"] = "long"
    del run["curve"][3]["tokens"]
    run["after"]["colour"] = "red"
    with pytest.raises(CTError) as told:
        run_record(run)
    for place in ("costs.seconds: ", "curve.3.tokens: ", "after.colour: "):
        assert place in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("number", ["1e999", "-1e300", "9" * 4_000])
def test_a_number_that_no_run_has_is_one_sentence(number, run, tmp_path):
    """1e999 is infinite when it is read, and no plot could show the others."""
    run["curve"][1]["loss"] = "here"
    (tmp_path / "run.json").write_text(json.dumps(run).replace('"here"', number))
    with pytest.raises(CTError, match=r"run\.json is no record of a run: it holds the number \S{3,30}\.$"):
        read_run(tmp_path / "run.json")


def test_a_matrix_without_sides_is_refused(run):
    run["spectra"][0]["shape"], run["spectra"][1]["shape"], run["model"]["parameters"] = [0, 4], [3], 0
    with pytest.raises(CTError, match=r"parameters: .*spectra\.0\.shape\.0: .*spectra\.1\.shape: "):
        run_record(run)


WORSE = {"end": RUN["after"] | {"heldout_loss": 6.6}}


@pytest.mark.parametrize(
    ("kept_step", "words"),
    [
        (0, "no state on the way was better than the start, so the adapter that was kept is as it began"),
        (16, "the adapter that was kept is that of step 16, with 1.093"),
        (30, "no state on the way was better than the last, which was kept"),
    ],
)
def test_a_run_that_ended_worse_warns(run, kept_step, words):
    record = run_record(run | {"worse": WORSE | {"kept_step": kept_step}})
    assert record.warning == (
        "The training ended worse than it began: the held-out loss rose from 2.941 to 6.600; "
        f"{words}. Try a smaller lr than 0.0213."
    )
    assert run_record(record.values()) == record
    assert run_record(run).warning == ""
