import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctsft.spectral import decompose as spectrum
from ctsft.spectral.decompose import (
    GRAM_LIMIT,
    STAGES,
    effective_rank,
    energy,
    fixed_sign,
    iterated,
    leading_triples,
    one_thread,
    orthonormal_columns,
    principal_directions,
    seconds,
    singular_triples,
    singular_values,
    stable_rank,
    whole_gram,
)
from helpers import assert_same_bits

sizes = st.integers(1, 12)
property_test = settings(deadline=None, max_examples=60)


def with_spectrum(s, d_out, d_in, seed=0):
    """A random matrix (d_out, d_in) with singular values `s`, float64."""
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(d, len(s), generator=g, dtype=torch.float64))[0] for d in (d_out, d_in))
    return u @ torch.diag(torch.tensor(s, dtype=torch.float64)) @ v.T


def orthonormal(rows, atol=1e-9):
    return torch.allclose(rows @ rows.T, torch.eye(len(rows), dtype=rows.dtype), atol=atol)


@st.composite
def matrices(draw):
    """Random matrices of every rank, zero included, with values over many orders of magnitude and some equal."""
    d_out, d_in = draw(sizes), draw(sizes)
    s = draw(st.lists(st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 0.5, 1.0, 1.0, 3.0]), max_size=min(d_out, d_in)))
    w = with_spectrum(s, d_out, d_in, draw(st.integers(0, 99))) if s else torch.zeros(d_out, d_in)
    return w * draw(st.sampled_from([1e-20, 1.0, 1e10]))


@property_test
@given(matrices(), st.data())
def test_triples_are_singular_triples(w, data):
    n = min(w.shape)
    which = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True)))
    u, s, vh = singular_triples(w, which)
    a, scale = w.double(), max(w.abs().max().item(), 1e-300)
    # A direction of the Gram matrix just above the limit, beside one of the full decomposition just below it.
    beside = torch.finfo(torch.float64).eps / GRAM_LIMIT**2
    assert orthonormal(u.T, beside) and orthonormal(vh, beside)
    assert torch.allclose(s / scale, torch.linalg.svdvals(a)[which] / scale, atol=1e-7)
    assert torch.allclose(u.T @ a @ vh.T / scale, torch.diag(s) / scale, atol=1e-7)
    assert torch.allclose(a.T @ u / scale, vh.T * s / scale, atol=1e-7)


@property_test
@given(matrices(), st.data())
def test_a_triple_does_not_depend_on_the_others_asked_for(w, data):
    """So a larger K keeps the directions of a smaller one, also among equal or vanishing singular values."""
    n = min(w.shape)
    which = torch.tensor(data.draw(st.permutations(range(n))))
    k = data.draw(st.integers(1, n))
    (u, s, vh), (u_all, s_all, vh_all) = singular_triples(w, which[:k]), singular_triples(w, which)
    for part, whole in ((u, u_all[:, :k]), (vh, vh_all[:k]), (s, s_all[:k])):
        assert torch.allclose(part, whole, rtol=1e-9, atol=1e-12)


@property_test
@given(matrices(), st.data())
def test_the_top_holds_the_most_energy_that_any_k_directions_can(w, data):
    k = data.draw(st.integers(1, min(w.shape)))
    u, s, vh = singular_triples(w, torch.arange(k))
    a = w.double()
    best = torch.linalg.svdvals(a)[:k].square().sum()
    assert torch.isclose((u.T @ a @ vh.T).square().sum(), best, rtol=1e-9)
    assert torch.isclose(s.square().sum(), best, rtol=1e-9)


@pytest.mark.parametrize("shape", [(300, 160), (160, 300), (200, 200)])  # large enough for threads to matter
@pytest.mark.parametrize("k", [4, 160])
def test_the_same_bits_twice_and_with_any_number_of_threads(shape, k):
    w = torch.randn(shape)
    first = singular_triples(w, torch.arange(k))
    gram = (w.T @ w).double()
    directions = principal_directions(gram, k)
    torch.set_num_threads(2)
    try:
        again, other = singular_triples(w, torch.arange(k)), principal_directions(gram, k)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(directions, other)


def test_one_thread_restores_the_number_after_an_error():
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@property_test
@given(sizes, st.integers(0, 99))
def test_the_sign_is_fixed(n, seed):
    w = torch.randn(n, n + 2, generator=torch.Generator().manual_seed(seed))
    vh = singular_triples(w, torch.arange(n))[2]
    assert (vh.gather(1, vh.abs().argmax(1, keepdim=True)) > 0).all()
    minus = singular_triples(-w, torch.arange(n))[2]
    assert torch.allclose(vh, minus, atol=1e-6)
    assert fixed_sign(-vh).tolist() == [-1.0] * n


@property_test
@given(st.integers(1, 10), st.integers(0, 99))
def test_principal_directions_are_the_leading_eigenvectors(d, seed):
    x = torch.randn(20, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = x.T @ x
    rows = principal_directions(gram, d)
    assert rows.shape == (d, d) and orthonormal(rows)
    captured = (rows @ gram @ rows.T).diagonal()
    assert torch.allclose(captured, torch.linalg.svdvals(x) ** 2)
    for k in range(1, d + 1):
        assert torch.equal(principal_directions(gram, k), rows[:k])


@property_test
@given(st.integers(1, 10), st.integers(0, 99), st.booleans())
def test_gram_schmidt_keeps_the_span_and_the_order(k, seed, deficient):
    a = torch.randn(12, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if deficient:
        a[:, k // 2] = 0
    q = orthonormal_columns(a)
    assert orthonormal(q.T)
    coordinates = q.T @ a
    assert torch.allclose(q @ coordinates, a)
    assert torch.allclose(coordinates.tril(-1), torch.zeros(k, k, dtype=torch.float64), atol=1e-12)
    assert (coordinates.diagonal() > -1e-12).all()
    for fewer in range(1, k):
        assert torch.allclose(orthonormal_columns(a[:, :fewer]), q[:, :fewer], atol=1e-12)


def test_singular_values_are_all_and_descending():
    w = torch.randn(5, 9, dtype=torch.bfloat16)
    s = singular_values(w)
    assert s.dtype == torch.float64 and s.shape == (5,)
    assert torch.allclose(s, torch.linalg.svdvals(w.double()))
    assert (s.diff() <= 0).all()


def test_the_measures_of_rank_by_hand():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    s = torch.tensor([2.0, 1.0, 1.0])
    assert effective_rank(s) == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert stable_rank(s) == pytest.approx(6 / 4)
    assert [energy(s, k) for k in (1, 2, 3, 9)] == pytest.approx([4 / 6, 5 / 6, 1, 1])


@property_test
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_the_measures_of_rank_are_ordered(values):
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    p = s / s.sum()
    assert effective_rank(s) == pytest.approx(torch.exp(-(p * p.log()).sum()).item())
    assert 1 - 1e-9 <= stable_rank(s) <= effective_rank(s) + 1e-9 <= len(s) + 1e-8
    assert all(energy(s, k) <= energy(s, k + 1) for k in range(1, len(s)))


# ---- the iteration for large matrices, against a full svd in float64


def spread(s, d_out=560, d_in=530):
    return with_spectrum([float(x) for x in s], d_out, d_in)


LARGE = {
    "flat": lambda: torch.randn(700, 520, dtype=torch.float64),
    "wide": lambda: torch.randn(520, 700, dtype=torch.float64),
    "square, decaying": lambda: spread(torch.arange(1, 521) ** -0.7, 520, 520),
    "pairs of close values": lambda: spread([1 - i // 2 / 300 + i % 2 * 1e-5 for i in range(400)]),
    "equal values": lambda: spread([1.0] * 50 + [0.9] * 100 + [0.5] * 100),
    "more equal values than a block, among many others": lambda: spread(
        [1.0] * 40 + [0.99 - i / 600 for i in range(400)]
    ),
    "orthogonal": lambda: torch.eye(540, 520, dtype=torch.float64),
    "one direction": lambda: spread([1.0] + [1e-3] * 400),
    "over five orders": lambda: spread([10 ** (-i / 20) for i in range(400)]),
    "rank below K": lambda: spread([1 - i / 50 for i in range(40)]),
    "zero": lambda: torch.zeros(560, 520),
    "tiny": lambda: spread(torch.arange(1, 521) ** -0.7) * 1e-30,
    "huge": lambda: (spread(torch.arange(1, 521) ** -0.7) * 1e30).to(torch.bfloat16),
    "two groups": lambda: torch.randn(540, 520, dtype=torch.float64),
    "rank in the second group": lambda: spread([1 - i / 300 for i in range(100)], 520, 540),
    "one value across two groups": lambda: spread([1.0] * 30 + [0.7] * 70, 540, 520),
}


@pytest.fixture
def from_500(monkeypatch):
    """Iterate for sides from 500 and two groups, so that the slow twin takes no minute."""
    monkeypatch.setattr(spectrum, "ITERATED_FROM", 500)
    monkeypatch.setattr(spectrum, "most_iterated", lambda n: 128)


def clusters(s, k, gap):
    """Runs of indices below `k` whose values in the descending `s` are closer than `gap` to their neighbour's."""
    edges = [0, *(i for i in range(1, len(s)) if s[i - 1] - s[i] > gap), len(s)]
    return [range(a, b) for a, b in itertools.pairwise(edges) if b <= k]


@pytest.mark.parametrize("name", LARGE)
def test_iterated_triples_against_a_full_svd(name, from_500):
    w = LARGE[name]()
    k = 128 if "group" in name else 64
    assert iterated(w.shape, k)
    u, s, vh = leading_triples(w, k)
    full_u, full_s, full_vh = torch.linalg.svd(w.double(), full_matrices=False)
    s1 = full_s[0].clamp(min=1e-300)
    a = w.double() / s1
    assert u.shape == (w.shape[0], k) and vh.shape == (k, w.shape[1]) and s.shape == (k,)
    assert (u.T @ u - torch.eye(k)).abs().max() < 1e-7 and (vh @ vh.T - torch.eye(k)).abs().max() < 1e-7
    assert ((s - full_s[:k]) / s1).abs().max() < 1e-9
    captured = (u.T @ a @ vh.T).square().sum()
    assert captured >= (full_s[:k] / s1).square().sum() * (1 - 1e-9)
    assert (a @ vh.T - u * s / s1).norm(dim=0).max() <= 2e-6
    assert (a.T @ u - vh.T * s / s1).norm(dim=0).max() <= 2e-6
    for run in clusters((full_s / s1).tolist(), k, 1e-3):
        if full_s[run[0]] / s1 > 1e-3:
            for mine, exact in ((u[:, run], full_u[:, run]), (vh[run].T, full_vh[run].T)):
                assert torch.linalg.matrix_norm(mine - exact @ (exact.T @ mine), 2) < 1e-3  # sine of the largest angle


def test_close_values_are_told_apart(from_500):
    """Each direction, not only what close ones span."""
    w = LARGE["pairs of close values"]()
    vh, exact = leading_triples(w, 64)[2], torch.linalg.svd(w)[2][:64]
    assert ((vh * exact).sum(1).abs() > 1 - 1e-6).all()


@pytest.mark.parametrize("name", ["two groups", "rank in the second group", "one value across two groups"])
def test_fewer_iterated_triples_are_the_first_of_more_to_the_bit(name, from_500):
    w = LARGE[name]()
    u, s, vh = leading_triples(w, 128)
    for k in (1, 64, 65):
        fewer = leading_triples(w, k)
        assert all(torch.equal(a, b) for a, b in zip(fewer, (u[:, :k], s[:k], vh[:k]), strict=True)), k


def test_iterated_triples_have_the_same_bits_with_two_threads(from_500):
    w = LARGE["flat"]()
    torch.manual_seed(3)  # nor does the global generator count
    first = leading_triples(w, 64)
    torch.set_num_threads(2)
    try:
        again = leading_triples(w.clone(), 64)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("shape", [(1024, 1030), (200, 2048)])
def test_small_matrices_and_many_directions_are_decomposed_exactly(shape):
    assert not iterated(torch.Size(shape), 8)
    assert iterated(torch.Size((1025, 3000)), 128) and not iterated(torch.Size((1025, 3000)), 129)
    w = torch.randn(shape)[:, :300]
    assert all(
        torch.equal(a, b) for a, b in zip(leading_triples(w, 8), singular_triples(w, torch.arange(8)), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_gram_matrix_in_strips_is_whole_and_symmetric_to_the_bit(dtype, layout):
    a = torch.randn(90, 70, dtype=dtype) if layout == "rows" else torch.randn(70, 90, dtype=dtype).T
    gram = whole_gram(a)
    assert_same_bits(gram, gram.T)
    assert_same_bits(gram, whole_gram(a))
    exact = a.double().T @ a.double()  # a BLAS may round the strips in an order of its own
    assert (gram.double() - exact).abs().max() <= 200 * torch.finfo(dtype).eps * exact.abs().max()


def test_where_float32_does_not_do_float64_does_and_then_the_exact_way(from_500, monkeypatch):
    w = LARGE["flat"]()
    s = torch.linalg.svdvals(w)
    never = (torch.float32, 3e-7, 0.0)
    for stages, limit in (((never, STAGES[1]), 1e-8), ((never,), 1e-12)):
        monkeypatch.setattr(spectrum, "STAGES", stages)
        u, found, vh = leading_triples(w, 64)
        assert (w.T @ u - vh.T * found).norm(dim=0).max() <= limit * s[0]
        assert torch.allclose(found, s[:64], rtol=1e-12)


def test_the_iteration_stops_where_it_cannot_arrive(from_500, monkeypatch):
    monkeypatch.setattr(spectrum, "STEPS", 6)
    w = LARGE["flat"]()
    assert torch.allclose(leading_triples(w, 64)[1], torch.linalg.svdvals(w)[:64], rtol=1e-12)


def test_the_estimate_of_the_work_knows_what_is_iterated():
    large, small = torch.Size((5632, 2048)), torch.Size((16, 24))
    assert 0.1 < seconds(large, 64, True) < seconds(large, 65, True) < seconds(large, 64, False) < 60
    assert seconds(small, 8, True) == seconds(small, 8, False) < 1e-4
