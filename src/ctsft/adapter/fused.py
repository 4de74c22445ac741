"""The adapted product y = W x + b + U C Vh x as one node of autograd.

Plain autograd computes the same (see `CTLayer.forward`, its twin). One node adds the adapter's products into the base's
own output and gradient, so that nothing of size (t, d_out) or (t, d_in) is allocated, written and read a second time,
and keeps z = Vh x, K numbers a token, for the backward pass.

Index letters: t tokens, i inputs, o outputs, k directions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class AdaptedLinear(torch.autograd.Function):
    """x (..., d_in) -> (..., d_out) in x's dtype, through frozen `weight` (d_out, d_in) and `bias` (d_out,).

    u (d_out, K), vh (K, d_in): frozen, one of them None where c is that factor. c, float32: (K,) or (K, K) between
    both; (d_out, K) for u, or (d_in, K) for vh transposed. Products with c run in float32, those with u and vh in the
    wider of their and x's dtype; where that is x's own, the sum with W x is rounded once.

    Kept for backward beside frozen tensors and c: z (t, K); where vh trains, x itself, whose product with dL/dz is c's
    gradient. Only first derivatives.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor | None, c: Tensor, vh: Tensor | None
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, weight, bias)
        z = rows.float() @ c if vh is None else product(rows, vh.T, x.dtype)
        ctx.save_for_backward(x if vh is None else z, weight, u, c, vh)
        if u is None:
            y = added(y, z.float(), c.T)
        else:
            if vh is not None:
                z = z * c if c.ndim == 1 else z.float() @ c.T
            y = added(y, z, u.T)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, u, c, vh = ctx.saved_tensors
        wants_x, wants_c = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        rows = dy.reshape(-1, dy.shape[-1])
        dc: Tensor | None = None
        # d: gradient of what stands right of U, and then of z, (t, K)
        d = rows.float() if u is None else product(rows, u, dy.dtype)
        if u is None or vh is None or c.ndim == 2:
            left, right = d.float(), kept.reshape(-1, kept.shape[-1]).float()
            if wants_c:
                dc = right.T @ left if vh is None else left.T @ right
            d = left if vh is None else left @ c
        else:
            if wants_c:
                dc = (d.float() * kept).sum(0)
            d = d * c
        if not wants_x:
            return None, None, None, None, dc, None
        dx = rows @ weight
        dx = added(dx, d, c.T if vh is None else vh)
        return dx.view(*dy.shape[:-1], -1), None, None, None, dc, None


def product(a: Tensor, b: Tensor, at_least: torch.dtype) -> Tensor:
    """a b in the wider of b's dtype and `at_least`."""
    dtype = torch.promote_types(at_least, b.dtype)
    return a.to(dtype) @ b.to(dtype)


def added(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + a b, the product in the wider of y's and b's dtype: in place where that is y's, else rounded to it once.

    y (t, d), a (t, K), b (K, d).
    """
    if y.dtype == torch.promote_types(y.dtype, b.dtype):
        return y.addmm_(a.to(y.dtype), b.to(y.dtype))
    return (y + product(a, b, y.dtype)).to(y.dtype)
