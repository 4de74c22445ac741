"""Lone adapters: identity at the start, their counts, and what their numbers mean."""

from typing import get_args

import pytest
import torch

from ctsft import CTError
from ctsft.lab import spec as specs
from ctsft.lab.lone import LONE, attach
from helpers import assert_close, assert_same_bits, ids, logits, tiny

K = 8
NAMES = ["q_proj", "o_proj", "down_proj"]
every = pytest.mark.parametrize("method", LONE)


def attached(method, k=K, basis="random", seed=3):
    """A tiny Llama with `method` on three matrices of each of its two layers, and these by name."""
    model = tiny()
    modules = {n: m for n, m in model.named_modules() if n.endswith(tuple(NAMES))}
    attach(model, modules, method, k, basis, seed)
    return model, modules


def test_every_method_has_its_word():
    assert tuple(LONE) == get_args(specs.Lone)


@pytest.mark.parametrize("basis", ["random", "weight"])
@every
def test_it_starts_as_the_base_and_trains_so_many_numbers(method, basis):
    model, modules = attached(method, basis=basis)
    assert_same_bits(logits(model), logits(tiny()))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gains = {n for n in trained if "norm" in n}
    assert trained.keys() - gains == {"lone"} and bool(gains) == (method == "with-norms")
    assert model.lone.shape == (K * len(modules),)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert model.lone.grad.count_nonzero() >= 6  # of one whose factors both move, one side has none yet


@every
def test_the_change_is_a_product_with_a_dense_matrix(method):
    model, modules = attached(method)
    model.lone.data = 0.3 * torch.randn(len(model.lone), generator=torch.Generator().manual_seed(1))
    changes = LONE[method][0]({n: m.weight.detach() for n, m in modules.items()}, K, "random", 3)
    plain = tiny()
    for name, make in changes.items():
        left, right = make(model.lone.detach())
        assert left.shape[1] == right.shape[0]
        plain.get_submodule(name).weight.data += left @ right
    assert_close(logits(model), logits(plain), 1e-5)
    assert (logits(model) - logits(tiny())).abs().max() > 0.01
    again, _ = attached(method)
    again.lone.data = model.lone.data
    assert_same_bits(logits(again), logits(model))
    other, _ = attached(method, seed=4)
    other.lone.data = model.lone.data
    assert method == "tinylora" or (logits(other) - logits(model)).abs().max() > 1e-3


def test_shared_numbers_move_the_entries_isometrically():
    weights = {n: torch.zeros(s) for n, s in {"a": (7, 5), "b": (6, 9)}.items()}
    changes = LONE["unilora"][0](weights, 4, "random", 0)

    def entries(c):
        return torch.cat([f.flatten() for make in changes.values() for f in make(c)])

    c = torch.randn(8)
    moved = entries(c) - entries(torch.zeros(20))
    assert_close(moved.norm(), c.norm(), 1e-5)
    assert moved.count_nonzero() == 4 * (7 + 5 + 6 + 9)


def test_moved_numbers_lie_where_the_stream_is_written():
    changes = LONE["moved"][0]({n: torch.zeros(9, 9) for n in ("x.q_proj", "x.o_proj", "x.up_proj")}, 3, "random", 0)
    assert list(changes) == ["x.o_proj"]
    left, right = changes["x.o_proj"](torch.ones(9))
    assert left.shape == right.shape == (9, 9)
    with pytest.raises(CTError, match="no matrix ends in one of o_proj"):
        LONE["moved"][0]({"q_proj": torch.zeros(9, 9)}, 3, "random", 0)


def test_what_it_cannot_have_is_one_sentence():
    with pytest.raises(CTError, match=r"99 directions are more than .*q_proj has \(16 x 16\); lower k"):
        attached("with-norms", k=99)
    with pytest.raises(CTError, match="basis='gradient' is unknown to lone adapters; choose random or weight"):
        attached("grouped", basis="gradient")
