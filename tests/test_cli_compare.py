"""`ctsft compare` as a user runs it."""

import json

import pytest
from rich.console import Console

from command import assert_one_sentence
from contests import arm, comparison
from ctsft.cli.compare import table_of
from ctsft.plan.compare import Match
from ctsft.tune.record import Accuracy

SMALL = "--steps 3 --batch-size 4 --heldout 8 --eval-rows 4 --max-length 64 --rates rule --seeds 1"


def words(files, *more):
    return ["compare", "--model", files[0], "--data", files[1], *SMALL.split(), *more]


def test_a_comparison_and_what_it_shows(ctsft, files, tmp_path):
    out = tmp_path / "compared"
    code, shown, err = ctsft(*words(files, "--arms", "lora-8, norms", "--arms", "diagonal-2", "--out", out))
    assert code == 0 and "Traceback" not in err
    for word in ("lora-8", "norms", "diagonal-2", "held-out loss", "as it is", "ends lowest", "One seed has no spread"):
        assert word in shown
    assert str(out / "comparison.html") in shown and (out / "comparison.html").exists()
    code, shown, _ = ctsft("compare", "--resume", "--out", out, "--json")
    assert code == 0 and [a["name"] for a in json.loads(shown)["arms"]] == ["lora-8", "norms", "diagonal-2"]


def test_mistakes_are_one_sentence(ctsft, files, tmp_path):
    out = ["--out", tmp_path / "out"]
    assert_one_sentence(ctsft(*words(files, "--arms", "lora", *out)), "lora needs a K; write lora-64")
    assert_one_sentence(ctsft(*words(files, "--resume", "--overwrite", *out)), "give one of them")
    assert_one_sentence(ctsft(*words(files, "--resume", *out)), "holds no comparison to resume")
    assert_one_sentence(ctsft(*words(files, "--rates", "long", *out)), "rates='long'")
    assert_one_sentence(
        ctsft("compare", "--model", files[0], "--data", "none.jsonl", *out), "There is no data 'none.jsonl'"
    )
    assert not (tmp_path / "out").exists()


def test_stopped_it_tells_how_to_go_on(ctsft, files, tmp_path, monkeypatch):
    def stop(self, rules):
        raise KeyboardInterrupt

    monkeypatch.setattr(Match, "played", stop)
    code, _, err = ctsft(*words(files, "--arms", "norms", "--out", tmp_path / "my out"))
    assert code == 130 and f"continue with: ctsft compare --resume --out '{tmp_path / 'my out'}'" in err


@pytest.mark.parametrize("asked", [False, True])
def test_the_table_has_a_row_an_arm_and_a_dash_where_there_is_nothing(asked):
    right = Accuracy(correct=1, total=4, low=0, high=1) if asked else None
    arms = [arm("lora-8", (2.0, 2.2), 5000), arm("norms", (3.0, 3.1)), arm("vera-4", (None, 2.0))]
    console = Console(width=200, record=True)
    console.print(table_of(comparison(*arms, before_accuracy=right)))
    text = console.export_text()
    row = next(line for line in text.splitlines() if "lora-8" in line and "2.100" in line)
    for word in ("2.100 ± 0.141", "5,000", "20.5 kB", "80.0 kB", "8.0 s"):
        assert word in row
    assert "1 of 2 diverged" in text and ("right answers" in text) == asked == ("25%" in text)
    assert next(line for line in text.splitlines() if "norms" in line).count("\N{EN DASH}") == 1 + asked
