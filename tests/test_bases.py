"""The bases of all targets: their bits, and what was asked for."""

import pytest
import torch

from ctsft import CTConfig, CTError
from ctsft.adapter.bases import prepare
from helpers import SHAPES, adapt, assert_same_bits, owners, tiny


@pytest.mark.parametrize("basis", ("weight", "random", "universal"))
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_prepared_has_the_same_bits_twice_and_with_two_threads(shape, basis):
    plans = [prepare(tiny(shape), CTConfig(k=4, basis=basis))]
    torch.set_num_threads(2)
    try:
        plans.append(prepare(tiny(shape), CTConfig(k=4, basis=basis)))
        assert torch.get_num_threads() == 2
        with pytest.raises(CTError):
            prepare(tiny(shape), CTConfig(k=99, basis=basis))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert plans[0].fingerprint == plans[1].fingerprint
    for name, a in plans[0].bases.items():
        for x, y in zip(a.tensors().values(), plans[1].bases[name].tensors().values(), strict=True):
            assert_same_bits(x, y)


def test_the_basis_is_what_was_asked_for():
    """The chosen directions of every matrix, found again by an SVD of each."""
    for choice in ("top", "bottom"):
        for layer in owners(adapt(tiny(), weight_from=choice)).values():
            w, b = layer.get_base_layer().weight.detach().double(), layer.ctsft_basis["default"]
            s = torch.linalg.svdvals(w)
            expected = s[:4] if choice == "top" else s.flip(0)[:4]
            assert torch.allclose((b.u.double().T @ w @ b.vh.double().T), torch.diag(expected), atol=1e-5)


def test_the_seed_moves_random_directions_only():
    def first(**options):
        return next(iter(owners(adapt(tiny(), **options)).values())).ctsft_basis["default"].vh

    assert not torch.allclose(first(basis="random"), first(basis="random", seed=1))
    assert not torch.allclose(first(weight_from="random"), first(weight_from="random", seed=1))
    assert_same_bits(first(), first(seed=1))
