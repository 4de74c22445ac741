import math
import multiprocessing
import os
import subprocess

import pytest
from pydantic import ValidationError

from ctsft.errors import CTError
from ctsft.lab.records import Records, finite
from ctsft.lab.spec import Spec
from synthetic import record

SEEDS = (range(100), range(100, 200), range(200, 300))  # of three processes


def test_records_come_back_from_disk(tmp_path):
    records = Records(tmp_path / "new")
    assert records == {}
    spec = Spec(k=2)
    made = finite(
        {"train_loss": [9.0, -math.inf], "probes": {"cosine": [(2, float("nan")), (3, {"x": (1, math.inf)})]}}
    )
    records.add(record(spec, **made))
    again = Records(tmp_path / "new")
    assert again == records and list(again) == [spec.key]
    assert again[spec.key].train_loss == [9.0, None]
    assert again[spec.key].probes == {"cosine": [(2, None), (3, {"x": [1, None]})]}
    assert "NaN" not in (tmp_path / "new" / "photonic-diagonal.jsonl").read_text()


@pytest.mark.parametrize(
    "wrong", [{"train_loss": [math.nan]}, {"heldout": [(0, math.inf)]}, {"trained": None}, {"t": 1}]
)
def test_a_record_holds_what_it_must_and_only_finite_numbers(wrong):
    with pytest.raises(ValidationError):
        record(Spec(), **wrong)


def test_a_file_for_every_model_and_method_and_a_line_for_every_run(tmp_path):
    records, before = Records(tmp_path), {}
    for spec in (Spec(k=2), Spec(method="lora"), Spec(model="~/m/Tiny"), Spec(k=2, seed=1)):
        records.add(record(spec))
        now = {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")}
        assert all(now[name].startswith(text) for name, text in before.items()), "what was there has changed"
        before = now
    assert {name: text.count("\n") for name, text in before.items()} == {
        "photonic-diagonal.jsonl": 2,
        "photonic-lora.jsonl": 1,
        "tiny-diagonal.jsonl": 1,
    }
    assert Records(tmp_path) == records


def test_other_tools_read_the_lines(tmp_path):
    records = Records(tmp_path)
    for k in (2, 4):
        records.add(record(Spec(k=k, method="lora"), [9.0, 8.0 - k]))
    pandas = pytest.importorskip("pandas")
    frame = pandas.json_normalize(pandas.read_json(tmp_path / "photonic-lora.jsonl", lines=True).to_dict("records"))
    assert frame["spec.k"].tolist() == [2, 4] and [losses[-1] for losses in frame["train_loss"]] == [6.0, 4.0]


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_torn_last_line_is_no_record_and_the_next_one_takes_its_place(tmp_path, kept):
    """What a process leaves that is killed in mid-write."""
    records = Records(tmp_path)
    for k in range(2, 2 + kept):
        records.add(record(Spec(k=k)))
    path = tmp_path / "photonic-diagonal.jsonl"
    whole = path.read_bytes() if kept else b""
    for torn in (b"{", record(Spec(k=9)).model_dump_json().encode()):
        path.write_bytes(whole + torn)
        again = Records(tmp_path)
        assert again == records and Spec(k=9).key not in again
        assert path.read_bytes() == whole + torn, "reading changes nothing"
        again.add(record(Spec(k=9)))
        assert path.read_bytes() == whole + record(Spec(k=9)).model_dump_json().encode() + b"\n"
        assert set(Records(tmp_path)) == {*records, Spec(k=9).key}


def test_a_failing_write_leaves_the_records_as_they_were(tmp_path, monkeypatch):
    records = Records(tmp_path)
    spec = Spec(k=2)
    records.add(record(spec, [9.0, 5.0]))
    before = (tmp_path / "photonic-diagonal.jsonl").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    for changed in (record(spec, [9.0, 4.0]), record(Spec(k=4))):
        with pytest.raises(OSError, match="disk full"):
            records.add(changed)
    monkeypatch.undo()
    assert records[spec.key].train_loss == [9.0, 5.0] and list(records) == [spec.key]
    assert (tmp_path / "photonic-diagonal.jsonl").read_bytes() == before and Records(tmp_path) == records


def add_many(folder, seeds):
    records = Records(folder)
    for seed in seeds:
        records.add(record(Spec(seed=seed)))


def test_processes_may_write_to_one_folder_at_once(tmp_path):
    several = [multiprocessing.get_context("spawn").Process(target=add_many, args=(tmp_path, s)) for s in SEEDS]
    for one in several:
        one.start()
    for one in several:
        one.join()
    assert {one.spec.seed for one in Records(tmp_path).values()} == {seed for seeds in SEEDS for seed in seeds}
    assert (tmp_path / "photonic-diagonal.jsonl").read_bytes().count(b"\n") == sum(map(len, SEEDS))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 0}'])
def test_a_line_that_is_no_record(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(record(Spec()).model_dump_json() + "\n" + content + "\n")
    with pytest.raises(CTError, match=r"line 2 of .*x\.jsonl is no record of this ctsft \(.*\); delete the line"):
        Records(tmp_path)


def test_a_folder_of_one_file_a_run_says_how_to_join_them(tmp_path):
    made = [record(Spec(k=k)) for k in (2, 4)]
    for one in made:
        (tmp_path / f"{one.spec.key}.json").write_text(one.model_dump_json() + "\n")
    with pytest.raises(CTError, match="has a file for every run") as error:
        Records(tmp_path)
    subprocess.run(str(error.value).partition(": ")[2], shell=True, check=True)
    for path in tmp_path.glob("*.json"):
        path.unlink()
    assert list(Records(tmp_path).values()) == made
