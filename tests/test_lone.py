"""Lone adapters: identity at the start, their counts, and what their numbers mean."""

import itertools
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from ctsft import CTError
from ctsft.adapter.learned import Facts, Learned
from ctsft.lab import spec as specs
from ctsft.lab.lone import LONE, attach
from helpers import assert_close, assert_same_bits, ids, logits, tiny, write_learned

K = 8
NAMES = ["q_proj", "o_proj", "down_proj"]
DATALESS = [method for method in LONE if method != "components"]
every = pytest.mark.parametrize("method", DATALESS)


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


# ---- components


def whole(tmp_path, k=2, scale=1.0):
    """The tiny Llama with `components` along directions of three siblings, its matrices, and the file's tensors."""
    path, model = write_learned(tiny(), tmp_path / "basis.safetensors"), tiny()
    tensors = load_file(path)
    for name in [n for n in tensors if n.endswith(".siblings")]:
        tensors[name] *= scale
    path.unlink()
    u, vh, a = ({n[: -len(p)]: t for n, t in tensors.items() if n.endswith(p)} for p in (".u", ".vh", ".siblings"))
    Learned(u, vh, a, Facts([], "", "", 4, 1, 1, [], False, 0)).save(tmp_path)
    modules = {n: m for n, m in model.named_modules() if n.endswith(tuple(NAMES))}
    attach(model, modules, "components", k, str(tmp_path), 0)
    return model, modules, tensors


def test_components_are_few_in_the_whole_model_and_start_as_the_base(tmp_path):
    model, _, _ = whole(tmp_path)
    assert_same_bits(logits(model), logits(tiny()))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["lone"] and model.lone.shape == (2,)
    with pytest.raises(CTError, match="3 siblings have 2 components beside their mean and not 3; lower k"):
        whole(tmp_path, k=3)
    with pytest.raises(CTError, match="random holds no learned directions"):
        attached("components")


def test_all_components_reach_every_sibling(tmp_path):
    """Three siblings have two components: with fitting weights the change is a sibling's less their mean."""
    model, modules, tensors = whole(tmp_path, scale=5.0)
    rows = torch.cat([tensors[f"{n}.siblings"] for n in modules], 1)
    away = rows - rows.mean(0)
    changes = LONE["components"].changes({n: m.weight.detach() for n, m in modules.items()}, 2, str(tmp_path), 0)
    _, _, vh = torch.linalg.svd(away, full_matrices=False)
    lengths = (away @ vh[:2].T).square().mean(0).sqrt()
    for sibling in range(3):
        weights = away[sibling] @ vh[:2].T / lengths  # each component is one standard deviation long
        plain = tiny()
        for sign in itertools.product((1, -1), repeat=2):  # a component's sign is free
            model.lone.data = weights * torch.tensor(sign)
            found = [left @ right for left, right in (make(model.lone.detach()) for make in changes.values())]
            wanted = [
                (tensors[f"{n}.u"] * (a[sibling] - a.mean(0))) @ tensors[f"{n}.vh"]
                for n, a in ((n, tensors[f"{n}.siblings"]) for n in modules)
            ]
            if all(torch.allclose(f, w, atol=1e-5) for f, w in zip(found, wanted, strict=True)):
                break
        else:
            pytest.fail("no signs give the sibling")
        for name, w in zip(modules, wanted, strict=True):
            plain.get_submodule(name).weight.data += w
        assert_close(logits(model), logits(plain), 1e-5)


def test_what_it_cannot_have_is_one_sentence():
    with pytest.raises(CTError, match=r"99 directions are more than .*q_proj has \(16 x 16\); lower k"):
        attached("with-norms", k=99)
    with pytest.raises(CTError, match="basis='gradient' is unknown to lone adapters; choose random or weight"):
        attached("grouped", basis="gradient")
