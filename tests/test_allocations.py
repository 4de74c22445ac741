from dataclasses import replace
from typing import get_args

import pytest
import torch

from ctsft import CTError
from ctsft.lab.allocations import ALLOCATIONS, Asked, allocate, captured, fisher, importance, one_down, ranks, slope
from ctsft.lab.methods import equip, targets
from ctsft.lab.spec import Allocation
from ctsft.quantities.gradients import coverage
from ctsft.spectral.basis import random_basis
from ctsft.spectral.decompose import effective_rank
from helpers import assert_same_bits, batches, logits
from test_methods import spec, three

pytestmark = pytest.mark.filterwarnings("ignore:the first loss")  # tiny random models guess worse than uniform
FEW = {"attention": ("attn",), "down": ("down_proj", "mlp.down"), "one_down": ("down_proj", "mlp.down")}
MEASURED = ("effective_rank", "gradient", "slope", "fisher", "gora")


def asked(shape="llama", k=4):
    model = three(shape)
    return Asked(model, targets(model, spec(wanted="blocks")), k, batches())


def dense(shape="llama"):
    """The gradient of every batch by autograd alone: [{name: (d_out, d_in)}]."""
    found = []
    for batch in batches():
        model = three(shape)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append({n: model.get_submodule(n).weight.grad for n in targets(model, spec(wanted="blocks"))})
    return found


def test_the_table_is_what_specs_can_name():
    assert set(ALLOCATIONS) == set(get_args(Allocation)) == {"uniform", "energy", *MEASURED, *FEW}


@pytest.mark.parametrize("shape", ("photonic", "llama"))
@pytest.mark.parametrize("name", [n for n in ALLOCATIONS if n != "energy"])  # which needs learned ones: test_siblings
def test_every_allocation_spends_the_same_total_and_starts_at_the_model(name, shape):
    k = 2 if name != "one_down" else 1
    all_of_them = targets(three(shape), spec(wanted="blocks"))
    equipped = equip(three(shape), spec(wanted="blocks", allocation=name, basis="random", k=k), batches())
    room = sum(min(s) for s in equipped.shapes)
    assert equipped.trained == sum(equipped.ks) == min(k * len(all_of_them), room)
    assert room >= k * len(all_of_them) or (name == "one_down" and room == 16)
    assert all(1 <= own <= min(s) for own, s in zip(equipped.ks, equipped.shapes, strict=True))
    assert equipped.counted() == sum(own * sum(s) for own, s in zip(equipped.ks, equipped.shapes, strict=True))
    assert_same_bits(logits(equipped.model.eval()), logits(three(shape)))
    wanted = [n for n in all_of_them if name not in FEW or any(part in n for part in FEW[name])]
    assert equipped.names == wanted if name != "one_down" else equipped.names[0] in wanted[:2]
    if name in MEASURED:
        assert len(set(equipped.ks)) > 1


@pytest.mark.parametrize("shape", ("photonic", "llama"))
def test_what_is_measured_is_that_of_dense_gradients(shape):
    given, every = asked(shape), dense(shape)
    mean = {n: sum(one[n] for one in every) / len(every) for n in given.modules}
    entries = {n: g.numel() for n, g in mean.items()}
    each = {n: [x for one in every for x in one[n].flatten().tolist()] for n in given.modules}
    products = {n: (given.modules[n].weight * g).flatten().tolist() for n, g in mean.items()}
    twins = {
        ranks: {n: effective_rank(torch.linalg.svdvals(g)) for n, g in mean.items()},
        captured: {n: torch.linalg.matrix_norm(g) ** 2 / entries[n] for n, g in mean.items()},
        slope: {n: torch.linalg.matrix_norm(g) / entries[n] ** 0.5 for n, g in mean.items()},
        fisher: {n: sum(x * x for x in found) / len(found) for n, found in each.items()},
        importance: {n: sum(abs(x) for x in found) / len(found) for n, found in products.items()},
    }
    for measure, twin in twins.items():
        found = measure(given)
        assert list(found) == list(given.modules)
        assert found == pytest.approx({n: float(v) for n, v in twin.items()}, rel=1e-3), measure.__name__


def test_captured_is_what_random_directions_capture_in_the_mean():
    given = asked()
    name, g = next(iter(given.gradients().items()))
    shares = [float(coverage(g, random_basis(tuple(g.shape), 8, i, name))["diagonal"][-1]) / 8 for i in range(400)]
    assert captured(given)[name] == pytest.approx(sum(shares) / 400 * float(g.square().sum()), rel=0.1)


def test_the_one_down_projection_is_the_steepest_of_the_shallow_half():
    given = asked("photonic")
    mean = {n: sum(one[n] for one in dense("photonic")) for n in given.modules if n.endswith("mlp.down")}
    shallow = list(mean)[:2]
    assert list(one_down(given)) == [max(shallow, key=lambda n: float(mean[n].norm()))]


def test_models_without_such_matrices_are_told():
    given = asked()
    given.model.config.model_type = "unheard"
    with pytest.raises(CTError, match="no adapted matrix of this unheard model"):
        ALLOCATIONS["down"](given)
    with pytest.raises(CTError, match="has attn or attention in its name"):
        ALLOCATIONS["attention"](replace(given, modules={"mlp.up": given.modules[next(iter(given.modules))]}))


def test_allocation_by_hand():
    assert allocate([1, 1, 1], 12, [9, 9, 9]) == [4, 4, 4]
    assert allocate([1, 2, 3], 12, [9, 9, 9]) == [2, 4, 6]
    assert allocate([1, 1, 1], 11, [9, 9, 9]) == [4, 4, 3]
    assert allocate([1, 1, 10], 12, [9, 9, 6]) == [3, 3, 6]  # what a limit holds back goes to the others
    assert allocate([0.001, 1, 1], 9, [9, 9, 9]) == [1, 4, 4]
    assert allocate([0, 1, 0], 9, [9, 5, 9]) == [2, 5, 2] and allocate([0, 0], 4, [5, 5]) == [2, 2]
    assert allocate([3, 1], 2, [5, 5]) == [1, 1] and allocate([3, 1], 10, [5, 5]) == [5, 5]
    for total in (2, 11):
        with pytest.raises(CTError, match="directions do not fit 3 matrices"):
            allocate([1, 1, 1], total, [3, 3, 4])
