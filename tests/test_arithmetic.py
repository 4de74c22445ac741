"""Sums of adapters: exact along the same directions, refused along others."""

import pytest
from peft import PeftModel, get_peft_model

from ctsft import CTError, save_adapter
from helpers import adapt, assert_close, assert_same_bits, coefficients, logits, owners, randomise, ready_config, tiny


def pair(options, other=None):
    """A model with two adapters of random numbers."""
    base = tiny()
    first = ready_config(base, **options)
    second = first if other is None else ready_config(base, **other)
    model = get_peft_model(base, first).eval()
    model.add_adapter("second", second)
    return randomise(randomise(model), "second", seed=9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"form": "core", "basis": "random"},
        {"form": "scores", "basis": "universal"},
        {"basis": "gradient"},
        {"k": {"q_proj": 2, ".*": 4}},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_the_changes_add_up(options, tmp_path):
    model = pair(options)
    model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum")
    for layer in owners(model).values():
        wanted = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("second")
        assert_close(layer.get_delta_weight("sum"), wanted, 1e-5)
    model.set_adapter("sum")
    save_adapter(model, tmp_path / "a", "sum")
    assert_same_bits(logits(PeftModel.from_pretrained(tiny(), tmp_path / "a").eval()), logits(model))
    assert all(c.requires_grad for c in coefficients(model, "sum").values())


def test_one_that_was_loaded_adds_up_too(tmp_path):
    model = randomise(adapt(tiny()))
    save_adapter(model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "a").eval()
    loaded.add_weighted_adapter(["default"], [2.0], "twice")
    for name, c in coefficients(loaded, "twice").items():
        assert_same_bits(c.data, 2 * coefficients(model)[name].data)
    loaded.set_adapter("twice")
    save_adapter(loaded, tmp_path / "b", "twice")
    assert_same_bits(logits(PeftModel.from_pretrained(tiny(), tmp_path / "b").eval()), logits(loaded))


REPLACE = {"form": "scores", "basis": "universal", "universal_mode": "replace"}


@pytest.mark.parametrize(
    ("options", "other", "asked", "message"),
    [
        (
            {},
            {"basis": "random"},
            {},
            "other directions or forms in model.layers.0.self_attn.q_proj; only along",
        ),
        ({}, {"form": "core"}, {}, "other directions or forms"),
        ({}, {"k": 3}, {}, "other directions or forms"),
        ({}, {"target_modules": ["q_proj"]}, {}, "adapter 'second' does not adapt model.layers.0.self_attn.k_proj"),
        (REPLACE, None, {}, "universal_mode='replace' are no sums"),
        ({"form": "gains"}, None, {}, "'default' has form='gains', in whose numbers the change is not linear"),
        ({}, None, {"weights": [1.0]}, "2 adapters and 1 weights; give one weight an adapter"),
        ({}, None, {"adapters": ["default", "third"]}, "no adapter 'third'; it has default, second"),
        ({}, None, {"adapter_name": "second"}, "the model has an adapter 'second'; give another name"),
        ({}, None, {"combination_type": "svd"}, "combination_type='svd' is unknown"),
    ],
)
def test_what_does_not_add_up_is_refused(options, other, asked, message):
    model = pair(options, other)
    given = {"adapters": ["default", "second"], "weights": [1.0, 1.0], "adapter_name": "sum"} | asked
    with pytest.raises(CTError, match=message):
        model.add_weighted_adapter(**given)
    assert set(model.peft_config) == {"default", "second"}
    assert not any("sum" in layer.ctsft_config for layer in owners(model).values())
