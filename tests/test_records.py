import math
import os

import pytest
from pydantic import ValidationError

from ctsft.errors import CTError
from ctsft.lab.records import Records, finite
from ctsft.lab.spec import Spec
from synthetic import record


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
    assert "NaN" not in (tmp_path / "new" / f"{spec.key}.json").read_text()


@pytest.mark.parametrize(
    "wrong", [{"train_loss": [math.nan]}, {"heldout": [(0, math.inf)]}, {"trained": None}, {"t": 1}]
)
def test_a_record_holds_what_it_must_and_only_finite_numbers(wrong):
    with pytest.raises(ValidationError):
        record(Spec(), **wrong)


def test_a_failing_write_leaves_the_records_as_they_were(tmp_path, monkeypatch):
    records = Records(tmp_path)
    spec = Spec(k=2)
    records.add(record(spec, [9.0, 5.0]))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    for changed in (record(spec, [9.0, 4.0]), record(Spec(k=4))):
        with pytest.raises(OSError, match="disk full"):
            records.add(changed)
    monkeypatch.undo()
    assert records[spec.key].train_loss == [9.0, 5.0] and list(records) == [spec.key]
    assert Records(tmp_path) == records and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 0}'])
def test_a_file_that_is_no_record(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(CTError, match=r"x\.json is no record of this ctsft"):
        Records(tmp_path)
