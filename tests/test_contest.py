"""The options of a comparison."""

import json

import pytest

from ctsft import CTError
from ctsft.plan.arms import DEFAULT
from ctsft.plan.contest import Contest, make_contest, read_contest
from ctsft.tune.recipe import Recipe


def test_what_a_contest_shares_with_a_recipe_means_the_same():
    ours, theirs = Contest(), Recipe()
    recipe = Contest(data="a.jsonl", heldout=7, steps=9, threads=2).recipe()
    assert (recipe.data, recipe.heldout, recipe.steps, recipe.threads) == ("a.jsonl", 7, 9, 2)
    shared = set(ours.values()) & set(theirs.values())
    assert {"model", "data", "limit", "steps", "batch_size", "seed", "eval_rows", "max_length"} <= shared
    assert all(getattr(ours, name) == getattr(theirs, name) for name in shared)


def test_it_survives_json_and_tells_what_trials_depend_on(tmp_path):
    contest = Contest(arms=["lora-2", "diagonal-8@random"], seeds=5, rates="full")
    assert contest.arms == ["lora-2", "diagonal-8"] and tuple(Contest().arms) == DEFAULT
    (tmp_path / "contest.json").write_text(json.dumps(contest.values()))
    assert read_contest(tmp_path / "contest.json") == contest
    assert contest.fixed() == Contest().fixed() != Contest(steps=7).fixed()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"arms": ["lorra-1"]}, "there is no arm 'lorra-1'"),
        ({"arms": ["lora-1", "norms", "lora-1"]}, "lora-1 is among the arms twice"),
        ({"arms": ["diagonal-4", "diagonal-4@random"]}, "diagonal-4 is among the arms twice"),
        ({"seeds": 0, "steps": 0}, "seeds=0 (Input should be greater than or equal to 1); steps=0"),
        ({"rates": "long"}, "rates='long' (Input should be 'rule', 'short' or 'full')"),
        ({"heldout": 1.5}, "give a share below 1 or a whole number of rows"),
        ({"kk": 1}, "kk=1"),
    ],
)
def test_wrong_values_are_one_sentence(values, told):
    with pytest.raises(CTError) as error:
        make_contest(values)
    assert told in str(error.value) and "\n" not in str(error.value) and "Value error, there" not in str(error.value)


def test_a_file_that_is_no_contest(tmp_path):
    (tmp_path / "contest.json").write_text("[1]")
    with pytest.raises(CTError, match=r"contest\.json is not from this ctsft"):
        read_contest(tmp_path / "contest.json")
