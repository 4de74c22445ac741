"""The product in one node of autograd, against plain autograd and against what it may keep in memory."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ctsft.adapter.forms import FORMS as BY_NAME
from ctsft.adapter.fused import AdaptedLinear
from ctsft.adapter.layer import CTLinear
from helpers import EVEN, FORMS, adapt, assert_close, assert_same_bits, ids, owners, randomise, tiny

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
FACTORS = ("float32", "bfloat16")


def pieces(form, side="left", dtype=torch.float32, factors=torch.float32, bias=False, seed=0):
    """x, weight, bias, u, c, vh of a 7 x 5 matrix, K = 3; `side`: which factor trains in `scores`."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    u, vh = torch.linalg.qr(randn(7, 3))[0].to(factors), torch.linalg.qr(randn(5, 3))[0].T.to(factors)
    c = {"diagonal": randn(3), "core": randn(3, 3), "scores": randn(7 if side == "left" else 5, 3), "gains": randn(10)}[
        form
    ].float()
    if form == "scores":
        u, vh = (None, vh) if side == "left" else (u, None)
    x = randn(2, 4, 5).to(dtype)
    return x, randn(7, 5).to(dtype), randn(7).to(dtype) if bias else None, u, c, vh


def fast(form, x, weight, bias, u, c, vh):
    return AdaptedLinear.apply(x, weight, bias, BY_NAME[form], u, c, vh)


def slow(x, weight, bias, u, c, vh):
    """The dense formula in float64, by plain autograd."""
    u, c, vh = (None if t is None else t.double() for t in (u, c, vh))
    left = c if u is None else u
    if len(c) == 10:  # gains
        dense = weight.double() + c[:7, None] * (u * (c[7:] + EVEN)) @ vh
        return x.double() @ dense.T + (0 if bias is None else bias.double())
    middle = torch.eye(3, dtype=torch.float64) if u is None or vh is None else torch.diag(c) if c.ndim == 1 else c
    dense = weight.double() + left @ middle @ (c.T if vh is None else vh)
    return x.double() @ dense.T + (0 if bias is None else bias.double())


FORM_SIDES = [("diagonal", "left"), ("core", "left"), ("scores", "left"), ("scores", "right"), ("gains", "left")]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("form", "side"), FORM_SIDES)
def test_output_and_gradients_are_those_of_the_dense_formula(form, side, dtype, factors, bias):
    x, weight, b, u, c, vh = pieces(form, side, dtype, getattr(torch, factors), bias)
    x.requires_grad_(), c.requires_grad_()
    out, exact = fast(form, x, weight, b, u, c, vh), slow(x, weight, b, u, c, vh)
    assert out.dtype == dtype and out.shape == exact.shape
    rounding = 0.02 if dtype == torch.bfloat16 else 1e-5
    assert_close(out, exact, rounding)
    dy = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    for got, expected in zip(
        torch.autograd.grad(out, (x, c), dy), torch.autograd.grad(exact, (x, c), dy.double()), strict=True
    ):
        assert got.dtype == expected.dtype
        assert_close(got, expected, rounding)


@pytest.mark.parametrize("wanted", ["x", "c"])
@pytest.mark.parametrize(("form", "side"), FORM_SIDES)
def test_only_the_gradient_that_is_asked_for(form, side, wanted):
    x, weight, _, u, c, vh = pieces(form, side)
    one = {"x": x, "c": c}[wanted].requires_grad_()
    fast(form, x, weight, None, u, c, vh).sum().backward()
    (expected,) = torch.autograd.grad(slow(x, weight, None, u, c, vh).sum(), one)
    assert_close(one.grad, expected, 1e-5)
    assert (c if wanted == "x" else x).grad is None


@pytest.mark.parametrize(("form", "side"), FORM_SIDES)
def test_no_token_at_all(form, side):
    x, *others = pieces(form, side)
    empty, c = x[:, :0].requires_grad_(), others[3].requires_grad_()
    y = fast(form, empty, *others)
    y.sum().backward()
    assert y.shape == (2, 0, 7) and empty.grad.shape == empty.shape
    assert c.grad.shape == c.shape and not c.grad.any()


def test_a_second_derivative_is_refused_and_not_wrong():
    form = "diagonal"
    x, weight, _, u, c, vh = pieces(form)
    x.requires_grad_()
    (g,) = torch.autograd.grad(fast(form, x, weight, None, u, c, vh).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def saved_beside(frozen, run):
    """The tensors that `run` keeps for its backward pass, one of each storage, without those of `frozen`."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        run()
    for t in frozen:
        kept.pop(t.untyped_storage().data_ptr(), None)
    return list(kept.values())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("form", "side"), FORM_SIDES)
def test_it_keeps_k_numbers_a_token_and_no_copy_of_the_input(form, side, dtype):
    x, weight, _, u, c, vh = pieces(form, side, dtype, dtype)
    x.requires_grad_(), c.requires_grad_()
    frozen = [t for t in (weight, u, c, vh) if t is not None]
    kept = saved_beside(frozen, lambda: fast(form, x, weight, None, u, c, vh))
    (only,) = kept
    if side == "right":
        assert only.data_ptr() == x.data_ptr()
    else:
        assert only.numel() == x.numel() // x.shape[-1] * 3 and only.dtype == dtype


def layer(form, dtype=torch.float32, basis="weight"):
    model = randomise(adapt(tiny(dtype=dtype), form=form, basis=basis, basis_dtype=str(dtype).removeprefix("torch.")))
    return model, next(iter(owners(model).values()))


def node(out):
    return type(out.grad_fn).__name__


def run(model):
    """Loss, gradients of the trained numbers, and the class names of all autograd nodes of adapted layers' outputs."""
    nodes, handles = [], []
    for module in model.modules():
        if isinstance(module, CTLinear):
            handles.append(module.register_forward_hook(lambda m, a, y: nodes.append(node(y))))
    loss = model(input_ids=ids(), labels=ids()).loss
    model.zero_grad()
    loss.backward()
    for handle in handles:
        handle.remove()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad], set(nodes)


@pytest.mark.parametrize("basis", ["weight", "universal"])
@pytest.mark.parametrize("form", FORMS)
def test_the_layer_takes_the_fast_way_and_both_ways_agree(form, basis):
    model, _ = layer(form, basis=basis)
    loss, grads, nodes = run(model)
    assert nodes == {"AdaptedLinearBackward"}
    for m in list(owners(model).values()):
        m.base_layer.register_forward_hook(lambda *_: None)
    plain, plain_grads, plain_nodes = run(model)
    assert "AdaptedLinearBackward" not in plain_nodes
    assert_close(loss, plain, 1e-6)
    for a, b in zip(grads, plain_grads, strict=True):
        assert_close(a, b, 1e-4)


def test_dropout_drops_the_same_directions_either_way():
    _, one = layer("diagonal")
    one.ctsft_config["default"].amplitude_dropout = 0.5
    one.train()
    x, outs = torch.randn(3, 16), []
    for slow_way in (False, True):
        if slow_way:
            one.base_layer.register_forward_hook(lambda *_: None)
        torch.manual_seed(4)
        outs.append(one(x))
    assert_close(outs[0], outs[1], 1e-6)
    one.eval()
    assert (one(x) - outs[0]).abs().max() > 1e-3


def with_a_hook(m):
    m.base_layer.register_forward_hook(lambda *_: None)


def with_a_gradient(m):
    m.base_layer.weight.requires_grad_()


def with_its_own_forward(m):
    m.base_layer.forward = m.base_layer.forward


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def as_another_class(m):
    m.base_layer.__class__ = Doubled


@pytest.mark.parametrize("change", [with_a_hook, with_a_gradient, with_its_own_forward, as_another_class])
def test_a_base_that_does_more_than_its_product_is_called(change):
    _, one = layer("diagonal")
    x = torch.randn(3, 16)
    assert node(one(x)) == "AdaptedLinearBackward"
    change(one)
    assert node(one(x)) != "AdaptedLinearBackward"
    assert_close(one(x), one.base_layer(x) + one.delta("default", x), 1e-6)


def test_torch_func_and_autocast_go_the_plain_way():
    _, one = layer("diagonal")
    c, x = one.ctsft_coefficients["default"], torch.randn(5, 3, 16)

    def loss(c, x):
        return torch.func.functional_call(one, {"ctsft_coefficients.default": c}, x).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(c.detach(), x)
    for got, row in zip(each, x, strict=True):
        (expected,) = torch.autograd.grad(one(row).square().sum(), c)
        assert_close(got, expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert node(one(x)) != "AdaptedLinearBackward"


@pytest.mark.parametrize("form", FORMS)
def test_zero_coefficients_change_no_bit(form):
    for dtype in DTYPES:
        x, weight, b, u, c, vh = pieces(form, "left", dtype, torch.float32, bias=True)
        assert_same_bits(fast(form, x, weight, b, u, 0 * c, vh), nn.functional.linear(x, weight, b))


@pytest.mark.parametrize("form", FORMS)
def test_torch_compile_makes_one_graph_of_an_adapted_layer(form):
    """With the backend that needs no compiler: no break, the same numbers, by the plain way."""
    _, one = layer(form)
    x, c = torch.randn(5, 16), one.ctsft_coefficients["default"]
    compiled = torch.compile(one, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), one(x), 1e-6)
    (graph,), (plain,) = (torch.autograd.grad(f(x).square().sum(), c) for f in (compiled, one))
    assert_close(graph, plain, 1e-5)
