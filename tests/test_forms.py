"""The forms of an adapter, against the formula dW = left right."""

import pytest
import torch
from peft import VeraConfig, get_peft_model
from torch import nn

from ctsft import choices
from ctsft.adapter.forms import FORMS
from ctsft.spectral.basis import Basis
from helpers import EVEN, assert_close

D_OUT, D_IN, K = 7, 5, 3
W = torch.Size([D_OUT, D_IN])
PIECES = [("diagonal", "both"), ("core", "both"), ("scores", "vh"), ("scores", "u"), ("gains", "both")]
every = pytest.mark.parametrize(("name", "sides"), PIECES)


def pieces(name, sides):
    """The form, a basis of a 7 x 5 matrix with those sides, trained numbers, and the dense dW (float64)."""
    u, vh = torch.linalg.qr(torch.randn(D_OUT, K))[0], torch.linalg.qr(torch.randn(D_IN, K))[0].T
    basis = Basis(None if sides == "vh" else u, None if sides == "u" else vh)
    form = FORMS[name]
    c = torch.randn(form.shape(W, basis, K))
    middle = {"diagonal": c.diag_embed, "core": lambda: c, "gains": lambda: torch.diag(c[D_OUT:] + EVEN)}.get(name)
    dense = u @ middle() @ vh if middle else c @ vh if sides == "vh" else u @ c.T
    if name == "gains":
        dense = c[:D_OUT, None] * dense
    return form, basis, c, dense.double()


def test_every_form_has_its_word_and_every_word_its_form():
    assert tuple(FORMS) == choices.FORMS


@pytest.mark.parametrize(
    ("name", "sides", "shape"),
    [(*p, s) for p, s in zip(PIECES, [(K,), (K, K), (D_OUT, K), (D_IN, K), (D_OUT + K,)], strict=True)],
)
def test_the_shape_of_what_trains(name, sides, shape):
    form, basis, c, _ = pieces(name, sides)
    assert tuple(c.shape) == shape
    assert form.shape(W, None, K) == (shape if sides != "u" else (D_OUT, K))
    assert form.both == basis.both


@every
def test_factors_and_products_are_those_of_the_dense_matrix(name, sides):
    form, basis, c, dense = pieces(name, sides)
    left, right = form.factors(basis, c)
    assert left.shape == (D_OUT, K) and right.shape == (K, D_IN)
    assert_close(left @ right, dense, 1e-6)
    x, ids = torch.randn(2, 4, D_IN), torch.tensor([[6, 0], [3, 3]])
    assert_close(form.delta(x, basis, c), x.double() @ dense.T, 1e-6)
    assert_close(form.rows(ids, basis, c), dense[ids], 1e-6)


@every
def test_the_pieces_of_the_fused_product_and_of_its_gradient(name, sides):
    form, basis, c, dense = pieces(name, sides)
    x, dy = torch.randn(4, D_IN), torch.randn(4, D_OUT)
    a, b, kept = form.forward(x, basis.u, c, basis.vh)
    assert_close(a @ b, x.double() @ dense.T, 1e-6)
    assert kept is x or kept.shape == (4, K)
    c.requires_grad_(), x.requires_grad_()
    expected = torch.autograd.grad(form.delta(x, basis, c), (c, x), dy)
    dc, d, b = form.backward(dy, kept, basis.u, c.detach(), basis.vh, True)
    assert_close(dc, expected[0], 1e-5)
    assert_close(d @ b, expected[1], 1e-5)
    assert form.backward(dy, kept, basis.u, c.detach(), basis.vh, False)[0] is None


@every
def test_a_direction_that_is_masked_adds_nothing(name, sides):
    form, basis, c, _ = pieces(name, sides)
    left, right = form.factors(basis, form.only(c, torch.tensor([True, False, True])))
    kept = [0, 2]
    fewer = Basis(None if basis.u is None else basis.u[:, kept], None if basis.vh is None else basis.vh[kept])
    part = (
        c[kept]
        if name == "diagonal"
        else c[kept][:, kept]
        if name == "core"
        else c[:, kept]
        if name == "scores"
        else c[[*range(D_OUT), D_OUT, D_OUT + 2]]
    )
    alone = form.factors(fewer, part)
    assert_close(left @ right, alone[0] @ alone[1], 1e-6)


@every
def test_directions_weigh_as_much_as_they_are_told(name, sides):
    form, basis, c, dense = pieces(name, sides)
    by = torch.tensor([2.0, 0.0, 1.0])
    left, right = form.factors(basis, form.weighted(c, by))
    u, vh = (None if f is None else f.double() for f in (basis.u, basis.vh))
    expected = dense @ (vh.T * by) @ vh if vh is not None else (u * by) @ u.T @ dense
    assert_close(left @ right, expected, 1e-5)


@every
def test_numbers_that_are_zero_change_nothing_and_have_a_gradient(name, sides):
    form, basis, c, _ = pieces(name, sides)
    zero = torch.zeros_like(c, requires_grad=True)
    y = form.delta(torch.randn(4, D_IN), basis, zero)
    assert not y.any()
    y.backward(torch.randn(4, D_OUT))
    assert zero.grad.count_nonzero() >= (D_OUT if name == "gains" else c.numel())


def test_gains_are_those_of_vera():
    """peft's VeRA, whose frozen factors are shared by all matrices, with the same ones and the same numbers."""
    form, basis, c, _ = pieces("gains", "both")
    base = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
    model = get_peft_model(base, VeraConfig(r=K, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.vera_A["default"].data, layer.vera_B["default"].data = basis.vh.contiguous(), basis.u
    layer.vera_lambda_b["default"].data, layer.vera_lambda_d["default"].data = c[:D_OUT], c[D_OUT:] + EVEN
    x = torch.randn(4, D_IN)
    assert_close(model(x) - layer.base_layer(x), form.delta(x, basis, c), 1e-5)
