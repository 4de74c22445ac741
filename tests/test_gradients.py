"""What is read off gradients, each quantity against a slower way to the same number."""

import math

import numpy as np
import pytest
import torch

from ctsft.errors import CTError
from ctsft.quantities.gradients import (
    TOP,
    AbsMeanOverStd,
    Diversity,
    Vector,
    amplitude_gradients,
    constrained_effective_rank,
    cosine,
    coverage,
    gradient_snr,
    gradient_vector,
    gram_singular_values,
)
from ctsft.spectral.basis import Basis, gradient_basis, random_basis
from ctsft.spectral.decompose import effective_rank
from helpers import FORMS, assert_close, backward, owners, rows, whole


def vector(*pieces):
    pieces = [torch.as_tensor(p, dtype=torch.float32) for p in pieces]
    return Vector(torch.cat([p.flatten() for p in pieces]), tuple(p.shape for p in pieces))


# ---- gradients of the trained numbers


def test_cosine_is_that_of_the_joined_vectors():
    a, b = ([torch.randn(4), torch.randn(3, 3)] for _ in range(2))
    flat = [torch.cat([p.flatten() for p in side]).double().numpy() for side in (a, b)]
    expected = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert cosine(vector(*a), vector(*b)) == pytest.approx(expected, rel=1e-6)
    assert cosine(vector(*a), vector(*(-p for p in a))) == pytest.approx(-1)
    assert math.isnan(cosine(vector(*a), vector(*(0 * p for p in a))))


def test_between_two_k_only_common_directions_count():
    small, large = vector([3.0, 0.0], [[1.0]]), vector([1.0, 5.0, 2.0], [[2.0, 7.0], [7.0, 7.0]])
    padded = vector([3.0, 0.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    assert cosine(small, large) == pytest.approx(cosine(padded, large))
    assert cosine(large, small) == pytest.approx(cosine(small, large))
    assert cosine(small, large) == pytest.approx(5 / math.sqrt(10) / math.sqrt(30 + 4 + 3 * 49))


def test_the_same_batch_at_the_same_place_gives_cosine_one():
    model = whole()
    backward(model, rows())
    first = gradient_vector(model)
    backward(model, rows())
    assert cosine(first, gradient_vector(model)) == pytest.approx(1, abs=1e-6)
    backward(model, rows(seed=9))
    assert cosine(first, gradient_vector(model)) < 0.99


def test_diversity_is_the_effective_rank_of_the_dense_stack():
    diversity, stack = Diversity(), []
    for i in range(7):
        g = torch.randn(12) * 10.0 ** (i - 3)  # lengths do not count
        diversity.add(vector(g[:5], g[5:]))
        stack.append((g / g.norm()).double())
        assert diversity.value() == pytest.approx(effective_rank(torch.linalg.svdvals(torch.stack(stack))), rel=1e-6)


def test_diversity_from_one_to_the_number_of_gradients():
    same, other = Diversity(), Diversity()
    for row in torch.eye(4):
        same.add(vector([1.0, 2.0, 3.0]))
        other.add(vector(row))
    assert same.value() == pytest.approx(1, abs=1e-4)
    assert other.value() == pytest.approx(4)
    same.add(vector([0.0, 0.0, 0.0]))
    assert same.value() == pytest.approx(1, abs=1e-4)
    same.add(vector([math.nan, 0.0, 0.0]))
    assert math.isnan(same.value())


def test_diversity_when_k_grows():
    grown, padded = Diversity(), Diversity()
    for g in ([1.0, 2.0], [0.0, 1.0, 3.0], [1.0, 1.0]):
        grown.add(vector(g))
        padded.add(vector(g + [0.0] * (3 - len(g))))
    assert grown.value() == pytest.approx(padded.value())


@pytest.mark.parametrize("form", [f for f in FORMS if f != "gains"])
def test_the_constrained_gradient_has_the_rank_of_its_dense_form(form):
    model = whole(form=form)
    backward(model, rows())
    ranks = []
    for layer in owners(model).values():
        basis, g = layer.ready("default"), layer.ctsft_coefficients["default"].grad
        dense = g @ basis.vh if basis.u is None else basis.u @ (torch.diag(g) if g.ndim == 1 else g) @ basis.vh
        ranks.append(effective_rank(torch.linalg.svdvals(dense.double())))
    found = constrained_effective_rank(amplitude_gradients(model))
    assert found == pytest.approx(sum(ranks) / len(ranks), rel=1e-4)
    assert 1 < found <= 6


def test_gains_have_no_gradient_of_directions_alone():
    model = whole(form="gains")
    backward(model, rows())
    with pytest.raises(CTError, match=r"form='gains' has gradients that are not of directions alone; only the norms"):
        amplitude_gradients(model)


def test_mean_over_std_is_numpys():
    ratios, seen = AbsMeanOverStd(), {"a": [], "b": []}
    for _ in range(5):
        gradients = {n: torch.randn(TOP + 3) + i for i, n in enumerate(seen)}
        ratios.add(gradients)
        for n, g in gradients.items():
            seen[n].append(g.double().numpy())
    stack = np.stack([np.array(s) for s in seen.values()])  # matrices, steps, directions
    found = ratios.values()
    for group, part in {"top": stack[..., :TOP], "rest": stack[..., TOP:]}.items():
        assert found[f"abs_mean_over_std_{group}"] == pytest.approx(np.abs(part).mean() / part.std())
        by_number = np.abs(part).mean(1) / part.std(1)
        assert found[f"abs_mean_over_std_by_number_{group}"] == pytest.approx(by_number.mean())


def test_mean_over_std_when_k_grows():
    ratios = AbsMeanOverStd()
    ratios.add({"a": torch.tensor([1.0, 2.0])})
    assert set(ratios.values()) == {"abs_mean_over_std_top"}  # one update has no spread over updates
    ratios.add({"a": torch.tensor([3.0, 3.0, -1.0])})
    every = np.array([1, 2, 3, 3, -1.0])
    found = ratios.values()
    assert found["abs_mean_over_std_top"] == pytest.approx(np.abs(every).mean() / every.std())
    assert found["abs_mean_over_std_by_number_top"] == pytest.approx((2 / 1 + 2.5 / 0.5) / 2)


def test_snr_is_the_loop_over_directions():
    samples = {n: torch.randn(6, TOP + 4) + 0.5 for n in "ab"}
    samples["a"][:, 0] = 0  # a direction without any gradient has no signal
    top, rest = [], []
    for g in samples.values():
        for i, column in enumerate(g.T.double().numpy()):
            mean, variance = column.mean(), column.var(ddof=1)
            (top if i < TOP else rest).append(mean**2 / variance if variance else 0.0)
    assert gradient_snr(samples) == pytest.approx({"top": np.mean(top), "rest": np.mean(rest)}, rel=1e-6)
    assert set(gradient_snr({"a": torch.randn(6, TOP)})) == {"top"}


def test_snr_of_pure_noise():
    n = 8
    noise = gradient_snr({"a": torch.randn(n, 40_000)})
    assert noise["rest"] == pytest.approx((n - 1) / (n * (n - 3)), rel=0.05)


# ---- the true gradient


@pytest.mark.parametrize("shape", ((9, 9), (12, 5), (5, 12)))
def test_coverage_is_the_dense_algebra_for_every_k(shape):
    g, basis = torch.randn(shape), random_basis(shape, 5, 0, "x")
    found = coverage(g, basis)
    dense, total = g.double(), g.double().square().sum()
    for k in range(1, 6):
        u, v = basis.u[:, :k].double(), basis.vh[:k].double().T
        expected = {
            "diagonal": sum(float(u[:, i] @ dense @ v[:, i]) ** 2 for i in range(k)),
            "two_sided": (u @ u.T @ dense @ v @ v.T).square().sum(),  # projectors on both sides
            "input": (dense @ v @ v.T).square().sum(),
            "output": (u @ u.T @ dense).square().sum(),
            "diagonal_null": total * k / dense.numel(),
        }
        assert {n: float(s[k - 1]) for n, s in found.items()} == pytest.approx(
            {n: float(e / total) for n, e in expected.items()}, rel=1e-5
        )
        assert found["diagonal"][k - 1] <= found["two_sided"][k - 1] + 1e-6
        assert found["two_sided"][k - 1] <= min(found["input"][k - 1], found["output"][k - 1]) + 1e-6


def test_coverage_of_a_full_basis_is_one():
    g = torch.randn(7, 7)
    full = coverage(g, random_basis((7, 7), 7, 0, "x"))
    for kind in ("two_sided", "input", "output"):
        assert float(full[kind][-1]) == pytest.approx(1, rel=1e-5)
    assert full["diagonal"][-1] < 0.9  # K amplitudes are not K x K
    own = coverage(torch.randn(12, 7), gradient_basis(torch.randn(12, 7), 7))
    assert float(own["input"][-1]) == pytest.approx(1, rel=1e-5)
    g = torch.randn(12, 7)
    assert float(coverage(g, gradient_basis(g, 7))["diagonal"][-1]) == pytest.approx(1, rel=1e-5)


def test_directions_that_do_not_know_the_gradient_cover_the_null():
    g = torch.randn(3, 12).T @ torch.randn(3, 10)
    found = [coverage(g, random_basis((12, 10), 8, seed, "x")) for seed in range(600)]
    mean = torch.stack([f["diagonal"] for f in found]).mean(0)
    assert_close(mean, found[0]["diagonal_null"], 0.12)


def test_coverage_of_one_side():
    basis = random_basis((6, 8), 3, 0, "x")
    assert set(coverage(torch.randn(6, 8), Basis(None, basis.vh))) == {"input"}
    assert set(coverage(torch.randn(6, 8), Basis(basis.u, None))) == {"output"}


@pytest.mark.parametrize("shape", ((30, 7), (7, 30)))
def test_singular_values_by_the_smaller_side(shape):
    g = torch.randn(shape)
    assert_close(gram_singular_values(g).flip(0), torch.linalg.svdvals(g.double()), 1e-10)
    g[0, 0] = math.inf
    assert gram_singular_values(g).isnan().all()
