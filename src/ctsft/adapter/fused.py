"""The adapted product y = W x + b + dW x as one node of autograd.

Plain autograd computes the same (see `CTLayer.forward`, its twin). One node adds the adapter's products into the base's
own output and gradient, so that nothing of size (t, d_out) or (t, d_in) is allocated, written and read a second time,
and keeps what its form needs, K numbers a token, for the backward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctsft.adapter.forms import Form, product


class AdaptedLinear(torch.autograd.Function):
    """x (..., d_in) -> (..., d_out) in x's dtype, through frozen `weight` (d_out, d_in) and `bias` (d_out,).

    form: what the trained c (float32) is beside the frozen u (d_out, K) and vh (K, d_in); what `form` trains in their
    place is None. Where products run in x's own dtype, the sum with W x is rounded once.

    Kept for backward beside frozen tensors and c: z (t, K); where vh trains, x itself, whose product with dL/dz is c's
    gradient. Only first derivatives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        form: Form,
        u: Tensor | None,
        c: Tensor,
        vh: Tensor | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, weight, bias)
        a, b, kept = form.forward(rows, u, c, vh)
        ctx.form = form
        ctx.save_for_backward(x if kept is rows else kept, weight, u, c, vh)
        return added(y, a, b).view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, u, c, vh = ctx.saved_tensors
        wants_x, wants_c = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        rows = dy.reshape(-1, dy.shape[-1])
        dc, d, b = ctx.form.backward(rows, kept.reshape(-1, kept.shape[-1]), u, c, vh, wants_c)
        dx = added(rows @ weight, d, b).view(*dy.shape[:-1], weight.shape[1]) if wants_x else None
        return dx, None, None, None, None, dc, None


def added(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + a b, the product in the wider of y's and b's dtype: in place where that is y's, else rounded to it once.

    y (t, d), a (t, K), b (K, d).
    """
    if y.dtype == torch.promote_types(y.dtype, b.dtype):
        return y.addmm_(a.to(y.dtype), b.to(y.dtype))
    return (y + product(a, b, y.dtype)).to(y.dtype)
