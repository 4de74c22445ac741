import dataclasses
import json

import pytest

from ctsft.choices import AdapterOptions
from ctsft.errors import CTError
from ctsft.tune.recipe import FIELDS, Recipe, make_recipe, read_recipe


def test_defaults_are_a_recipe_and_survive_json():
    recipe = make_recipe({})
    assert (recipe.model, recipe.data, recipe.k, recipe.form, recipe.basis) == (
        "smollm2-135m",
        "sql",
        64,
        "diagonal",
        "random",
    )
    assert make_recipe(json.loads(json.dumps(recipe.values()))) == recipe


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
    assert make_recipe(right).values().items() >= right.items()


def test_a_recipe_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        make_recipe({}).k = 3


def test_title():
    assert Recipe().title == "diagonal K=64, random basis"
    assert Recipe(k={".*": 3}, form="core", basis="weight").title == "core K=mixed, weight basis"


@pytest.mark.parametrize("text", ["", "{", "[1]", '"k"', "null", '{"k": 0}', '{"later": 1}'])
def test_read_recipe_refuses_what_is_none(tmp_path, text):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(CTError, match=r"recipe\.json"):
        read_recipe(path)


def test_the_options_of_an_adapter_are_those_of_its_config():
    ours = {field.name: field for field in dataclasses.fields(Recipe)}
    for field in dataclasses.fields(AdapterOptions):
        assert ours[field.name].metadata["description"], field.name
        if field.name not in (
            "target_modules",
            "basis",
            "basis_dtype",
            "save_dtype",
            "seed",
        ):  # a run has its own words for these
            told = {n: v for n, v in ours[field.name].metadata.items() if n != "unsaid"}  # of the command alone
            assert told == field.metadata and ours[field.name].default == field.default
    assert set(FIELDS) == {*ours} and all(f.metadata["description"] for f in ours.values())


def test_a_wrong_combination_is_told_in_the_adapters_own_words():
    with pytest.raises(CTError, match=r"^weight_from='bottom' chooses among W's own directions; it needs"):
        make_recipe({"weight_from": "bottom", "basis": "random"})


def test_an_older_recipe_without_the_later_fields_is_read(tmp_path):
    values = make_recipe({"k": {"q_proj": 4, ".*": 2}}).values()
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({n: v for n, v in values.items() if n not in ("prompt_column", "completion_column")}))
    assert read_recipe(path) == make_recipe(values) and list(read_recipe(path).k) == ["q_proj", ".*"]
