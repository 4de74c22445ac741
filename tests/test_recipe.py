import json

import pytest

from ctsft.errors import CTError
from ctsft.tune.recipe import Recipe, make_recipe, read_recipe


def test_defaults_are_a_recipe_and_survive_json():
    recipe = make_recipe({})
    assert (recipe.model, recipe.data, recipe.k, recipe.form, recipe.basis) == (
        "smollm2-135m",
        "sql",
        64,
        "diagonal",
        "weight",
    )
    assert make_recipe(json.loads(json.dumps(recipe.model_dump()))) == recipe


def test_one_error_names_every_wrong_field():
    wrong = {"k": 0, "form": "round", "lr": -1, "heldout": 1.5, "colour": "red", "seed": 2**32, "steps": "many"}
    with pytest.raises(CTError) as caught:
        make_recipe(wrong | {"model": "photonic", "batch_size": 2})
    text = str(caught.value)
    for name, value in wrong.items():
        assert f"{name}={value!r} (" in text
    assert "model" not in text and "batch_size" not in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": {}},
        {"k": {"q_proj": 0}},
        {"k": 2.5},
        {"lr": 0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": "fast"},
        {"heldout": 0},
        {"heldout": -0.1},
        {"amplitude_dropout": 1},
        {"max_length": 1},
        {"limit": 0},
        {"threads": 0},
        {"dtype": "int8"},
        {"target_modules": "q_proj"},
    ],
)
def test_values_beyond_their_limits(wrong):
    with pytest.raises(CTError, match=f"the recipe is wrong: {next(iter(wrong))}="):
        make_recipe(wrong)


@pytest.mark.parametrize("right", [{"k": {"q_proj": 4, ".*": 2}}, {"heldout": 0.5}, {"heldout": 20}, {"lr": 1e-3}])
def test_values_within_their_limits(right):
    assert make_recipe(right).model_dump().items() >= right.items()


def test_a_recipe_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        make_recipe({}).k = 3


def test_title():
    assert Recipe().title == "diagonal K=64, weight basis"
    assert Recipe(k={".*": 3}, form="core", basis="random").title == "core K=mixed, random basis"


@pytest.mark.parametrize("text", ["", "{", "[1]", '"k"', "null", '{"k": 0}', '{"later": 1}'])
def test_read_recipe_refuses_what_is_none(tmp_path, text):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(CTError, match=r"recipe\.json"):
        read_recipe(path)
