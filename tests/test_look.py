"""The pass of the probes' own, against dense models and loops over samples."""

import pytest
import torch

from ctsft import CTError
from ctsft.quantities.look import look
from ctsft.spectral.weights import matrix
from helpers import EMBEDDING, SHAPES, adapt, assert_close, backward, coefficients, ids, owners, rows, tiny, twin, whole


def ragged():
    """Two batches of different sizes, whose rows have different numbers of labels."""
    text, labels = ids(3, 8, seed=2), ids(3, 8, seed=2)
    labels[0, :5], labels[2, 6:] = -100, -100
    return [{"input_ids": text, "labels": labels}, rows(2, 6, seed=3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_true_gradient_is_that_of_a_dense_model(shape):
    model = whole(shape)
    dense = twin(model, tiny(shape))
    found = look(model, ragged()).gradients
    expected = {n: 0 for n in owners(model)}
    for batch in ragged():
        backward(dense, batch)
        for name in expected:
            module = dense.get_submodule(name)
            expected[name] = expected[name] + matrix(module, module.weight.grad).clone() / 2
    assert list(found) == list(expected) and EMBEDDING[shape] in str(list(found))
    for name, g in found.items():
        assert_close(g, expected[name], 1e-4)


@pytest.mark.parametrize("dense", (True, False))
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_samples_are_those_of_a_loop(shape, dense):
    model, batches = whole(shape), ragged()
    owners(model)[
        next(n for n in owners(model) if n.endswith(EMBEDDING[shape]))
    ].base_layer.embed_scale = 3.0  # Gemma's
    found = look(model, batches, gradients=dense).samples
    expected = {n: [] for n in owners(model)}
    for batch in batches:
        counts = (batch["labels"][:, 1:] != -100).sum(1)
        for row in range(len(counts)):
            alone = {k: v[row : row + 1] for k, v in batch.items()}  # its own mean loss, then its share of the batch's
            share = float(counts[row] / counts.sum()) * len(counts)
            backward(model, alone)
            for name, c in coefficients(model).items():
                expected[name].append(c.grad.clone() * share)
    for name, g in found.items():
        assert g.shape == (5, 6)
        assert_close(g, torch.stack(expected[name]), 1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_mean_of_the_samples_is_the_gradient_of_the_batch(dtype):
    model = whole(basis="random").to(dtype)
    backward(model, rows())
    for name, g in look(model, [rows()], gradients=False).samples.items():
        assert_close(g.mean(0), coefficients(model)[name].grad, 1e-5 if dtype == torch.float32 else 0.1)


def test_mistakes_that_only_the_model_shows():
    replacing = adapt(tiny(), basis="universal", form="scores", universal_mode="replace")
    for model, wrong in (
        (tiny(), "the model has no CT-SFT adapter 'default'"),
        (whole(form="core"), "gradient_snr reads the gradients of amplitudes, so it needs form='diagonal'."),
        (replacing, "universal_mode='replace' takes W out of the model"),
        (adapt(tiny("gpt2"), target_modules=["wpe"]), "transformer.wpe sees 1 rows of a batch of 5"),
    ):
        with pytest.raises(CTError, match=wrong):
            look(model, [rows()])
        assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(CTError, match="needs batches of its own"):
        look(whole(), [])
