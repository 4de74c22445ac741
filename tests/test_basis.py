import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctsft.adapter.read import TOLERANCE
from ctsft.spectral.basis import (
    BLOCK,
    Basis,
    checksum,
    generator,
    gradient_basis,
    input_basis,
    paired,
    random_basis,
    replacing,
    two_sides,
    weight_basis,
)

CHOICES = ("top", "bottom", "random")
property_test = settings(deadline=None, max_examples=40)


def weights(d_out=14, d_in=10, seed=0):
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))


def gram(d=10):
    x = weights(30, d, seed=1)
    return x.T @ x


MAKERS = {
    **{f"weight {c}": lambda k, c=c: weight_basis(weights(), k, c, seed=3, name="m") for c in CHOICES},
    "gradient": lambda k: gradient_basis(weights(), k),
    "random": lambda k: random_basis((14, 10), k, 3, "m"),
    "activation": lambda k: input_basis(gram(), k),
    "paired": lambda k: paired(weights(), input_basis(gram(), k)),
    "paired the other way": lambda k: paired(weights(), two_sides(input_basis(gram(14), k).vh, [k])[k][1]),
    "replacing": lambda k: replacing(weights(), input_basis(gram(), k)),
    "deficient": lambda k: weight_basis(weights(14, 3) @ weights(3, 10), k),
    "zero": lambda k: weight_basis(torch.zeros(14, 10), k),
    "equal values": lambda k: weight_basis(torch.eye(14, 10), k),
    "projection": lambda k: weight_basis(torch.eye(14, 10) * (torch.arange(10) < 5), k, "bottom"),
}
made = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def orthonormal(rows):
    return torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)


@made
@pytest.mark.parametrize("k", (1, 4, 10))
def test_both_sides_are_orthonormal_contiguous_float32(make, k):
    b = make(k)
    assert b.k == k
    for name, t in b.tensors().items():
        assert t.dtype == torch.float32 and t.device.type == "cpu"
        assert t.shape == {"u": (14, k), "vh": (k, 10), "start": (14, k)}[name]
        assert name == "start" or orthonormal(t.T if name == "u" else t)


@made
def test_the_directions_of_a_smaller_k_are_the_first_of_a_larger(make):
    small, large = make(4), make(8)
    assert small.tensors().keys() == large.tensors().keys()
    for a, b in zip(small.tensors().values(), large.own(4).tensors().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@made
def test_the_same_bits_twice_and_with_two_threads(make):
    first = make(6)
    torch.set_num_threads(2)
    try:
        again = make(6)
    finally:
        torch.set_num_threads(1)
    for a, b in zip(first.tensors().values(), again.tensors().values(), strict=True):
        assert torch.equal(a, b)


@property_test
@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 50), st.sampled_from(CHOICES), st.data())
def test_weight_directions_are_those_chosen(d_out, d_in, seed, choice, data):
    w = weights(d_out, d_in, seed)
    n = min(w.shape)
    k = data.draw(st.integers(1, n))
    b = weight_basis(w, k, choice, seed, "m")
    caught = (b.u.T @ w @ b.vh.T).diagonal().double()
    s = torch.linalg.svdvals(w.double())
    if choice == "top":
        assert torch.allclose(caught, s[:k], atol=1e-5)
    elif choice == "bottom":
        assert torch.allclose(caught, s.flip(0)[:k], atol=1e-5)
    else:
        assert len({int((s - c).abs().argmin()) for c in caught}) == k
        assert all((s - c).abs().min() < 1e-5 for c in caught)


def test_a_random_choice_depends_on_seed_and_name_only():
    a, b, c, d = (weight_basis(weights(), 4, "random", s, n) for s, n in ((0, "m"), (0, "m"), (1, "m"), (0, "n")))
    assert torch.equal(a.vh, b.vh)
    assert not torch.allclose(a.vh, c.vh) and not torch.allclose(a.vh, d.vh)


def test_a_random_basis_is_drawn_from_seed_name_and_side():
    torch.manual_seed(1)
    a = random_basis((10, 10), 4, 0, "m")
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(random_basis((10, 10), 4, 0, "m").u, a.u)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is not touched
    others = [random_basis((10, 10), 4, 1, "m").u, random_basis((10, 10), 4, 0, "n").u, a.vh.T]
    assert not any(torch.allclose(a.u, o, atol=1e-2) for o in others)


def test_a_random_basis_is_nested_across_blocks():
    small, large = (random_basis((200, 150), k, 0, "m") for k in (BLOCK - 3, 2 * BLOCK + 5))
    assert torch.allclose(large.u[:, : BLOCK - 3], small.u, atol=1e-6)
    assert torch.allclose(large.vh[: BLOCK - 3], small.vh, atol=1e-6)
    assert orthonormal(large.vh) and orthonormal(large.u.T)


def test_a_random_basis_has_no_preferred_direction():
    coordinates = torch.cat([random_basis((8, 8), 2, s, "m").u for s in range(400)], 1)
    assert coordinates.mean(1).abs().max() < 0.06  # 5 standard errors of 0.0125
    assert (coordinates.square().mean(1) - 1 / 8).abs().max() < 0.03


def test_generators_differ_by_every_word():
    seen = {torch.rand((), generator=generator(*words)).item() for words in ((0,), (1,), (0, "a"), (0, "a", "b"))}
    assert len(seen) == 4


def test_paired_spans_the_images():
    w, one = weights().double(), input_basis(gram(), 4)
    b = paired(w, one)
    images = w @ one.vh.double().T
    assert torch.equal(b.vh, one.vh)
    assert torch.allclose(b.u.double() @ (b.u.double().T @ images), images, atol=1e-5)
    assert torch.allclose(b.u[:, 0].double(), images[:, 0] / images[:, 0].norm(), atol=1e-6)


def test_replacing_starts_from_the_scores():
    w = weights()
    for side, k in ((0, 4), (1, 4)):
        b = replacing(w, two_sides(input_basis(gram(10 if side == 0 else 14), k).vh, [k])[k][side])
        near = b.start @ b.vh if side == 0 else b.u @ b.start.T
        p = b.vh.T @ b.vh if side == 0 else b.u @ b.u.T
        assert torch.allclose(near, w @ p if side == 0 else p @ w, atol=1e-5)


def test_two_sides_are_views_of_one_tensor():
    vh = input_basis(gram(), 6).vh
    sides = two_sides(vh, [3, 6])
    assert {t.untyped_storage().data_ptr() for pair in sides.values() for b in pair for t in b.tensors().values()} == {
        vh.untyped_storage().data_ptr()
    }
    assert torch.equal(sides[3][0].vh, vh[:3]) and torch.equal(sides[3][1].u, vh[:3].T)


def test_all_directions_are_the_same_basis_and_of_fewer_holds_no_more_memory():
    b = weight_basis(weights(), 6)
    assert b.own(6) is b
    assert b.own(2).u.untyped_storage().nbytes() == 4 * 14 * 2


def rotate(b, angle, side="both"):
    """Turn the first two directions into each other; on both sides by the same angle, as for equal singular values."""
    c, s = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
    r = torch.eye(b.k)
    r[:2, :2] = torch.tensor([[c, -s], [s, c]])
    return Basis(b.u @ r if side in ("both", "u") else b.u, r.T @ b.vh if side in ("both", "vh") else b.vh)


@pytest.mark.parametrize("k", (2, 16, 64))
def test_the_checksum_sees_rotations_and_not_rounding(k):
    b = weight_basis(weights(150, 130), k)
    value = checksum(b, "m")
    limit = TOLERANCE[torch.float32] * k**0.5
    assert abs(value) < 20 * k**0.5
    noise = Basis(b.u * (1 + 1e-7 * torch.randn_like(b.u)), b.vh * (1 + 1e-7 * torch.randn_like(b.vh)))
    assert abs(checksum(noise, "m") - value) < limit / 20
    assert checksum(b, "other") != value
    for angle in (0.05, 0.3, 1.0, 3.14159):  # the last turns the signs of u and vh together
        for side in ("both", "u", "vh"):
            assert abs(checksum(rotate(b, angle, side), "m") - value) > limit, (angle, side)
    assert abs(checksum(Basis(b.u.flip(1), b.vh.flip(0)), "m") - value) > limit
    assert abs(checksum(Basis(b.u, -b.vh), "m") - value) > limit


def test_the_checksum_of_one_side():
    b = input_basis(gram(), 5)
    turned = Basis(None, b.vh.roll(1, 0))
    assert abs(checksum(turned, "m") - checksum(b, "m")) > 1e-2
