"""The rule for the learning rate: its numbers, and what it reads of the model."""

import statistics

import pytest
import torch

import ctsft
from ctsft import CTConfig, CTError, resize
from ctsft.adapter.rate import learning_rate, rate
from helpers import FORMS, SHAPES, adapt, owners, randomise, tiny


@pytest.mark.parametrize(
    ("form", "k", "scale", "lr"),
    [
        ("diagonal", 64, 5.737, 0.4),  # SmolLM2-135M
        ("diagonal", 64, 0.691, 0.048),  # a 15M model of width 288
        ("diagonal", 256, 1.0, 0.035),
        ("diagonal", 16, 1.0, 0.14),
        ("diagonal", 1, 1.0, 0.14),
        ("core", 64, 1.0, 0.004),
        ("core", 16, 1.0, 0.008),
        ("scores", 64, 2.0, 0.003),
    ],
)
def test_rate(form, k, scale, lr):
    assert rate(form, k, scale) == pytest.approx(lr)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_on_the_scale_of_the_adapted_weights(shape, form):
    model = adapt(tiny(shape), form=form)
    values = [torch.linalg.svdvals(m.base_layer.weight.detach()) for m in owners(model).values()]
    scale = statistics.median(float(s.square().mean().sqrt()) for s in values)
    assert learning_rate(model) == rate(form, 4, scale)
    assert ctsft.learning_rate is learning_rate


def test_the_largest_k_of_the_config_counts_also_after_a_resize():
    wide = {"hidden_size": 128, "intermediate_size": 128, "tie_word_embeddings": False}
    model = adapt(tiny(**wide), k={"v_proj": 48, ".*": 20})
    assert learning_rate(model) == learning_rate(adapt(tiny(**wide), k=48)) < learning_rate(adapt(tiny(**wide), k=20))
    resize(model, 20)
    assert learning_rate(model) == learning_rate(adapt(tiny(**wide), k=20))


def test_it_is_that_of_the_adapter_named_and_of_weights_without_a_merge():
    model = randomise(adapt(tiny()), scale=100.0)
    model.add_adapter("two", CTConfig(k=4, form="scores", target_modules=["q_proj"]))
    first, second = learning_rate(model), learning_rate(model, "two")
    assert second == learning_rate(adapt(tiny(), form="scores", target_modules=["q_proj"])) < first
    model.merge_adapter()
    assert learning_rate(model) == first


def test_no_adapter_is_an_error():
    for model, name in ((tiny(), "default"), (adapt(tiny()), "two")):
        with pytest.raises(CTError, match=rf"no CT-SFT adapter '{name}', so there is nothing to give a rate for\."):
            learning_rate(model, name)
