"""The learning rate that an adapter asks for: measured on a few batches, or read off its weights, form and K."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from ctsft.adapter.forms import FORMS
from ctsft.adapter.loss import summed_loss
from ctsft.adapter.store import layers_of
from ctsft.errors import CTError
from ctsft.spectral.collect import own_labels, still
from ctsft.spectral.weights import matrix

# The best peak rates of tuned grids lie at this share of r t, whatever the form, the basis, K, the batch and the
# number of steps (docs/learning-rates.md).
SHARE = 0.9
BATCHES = 4  # that `ctsft tune` and the laboratory measure on: six forward and backward passes
TRIED = (0.5, 2.0)  # where the slope is measured, as shares of `line`
MOST = 16.0  # how far off `line` a measurement counts
LEAST = 0.3  # of r: 40 steps average more noise away than one batch shows (docs/learning-rates.md)

# The shares of the forms are the best peak rates of short AdamW runs with linear decay at this K, over the model's
# typical singular value: of `diagonal` on SmolLM2-135M (LOG.md), of the others on a 15M model. An amplitude adds to a
# singular value, so it moves on the scale of those; the more numbers share the work, the smaller the rate.
TUNED_K = 64


def learning_rate(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]] | None = None, adapter_name: str = "default"
) -> float:
    """The peak AdamW rate for adapter `adapter_name` of `model`: change of a trained number per step, to two digits.

    `batches`: two or more (four are enough) of the size that is trained on, as the model takes them: input_ids (b, t),
    and labels (without them, all tokens but padding). The rate is 0.9 r t. Along -sign(gradient), the way of Adam's
    first step, the loss falls until t: its slope is measured at two places, and t is where it would be zero. r is what
    other batches leave of that slope, at least 0.3: the mean slope of a batch along the sign of the others' gradient,
    over that along the sign of all. Where two factors multiply and one of them has no gradient at the start
    (form='gains'), the rate is smaller, see `growth`. This takes a forward and backward pass a batch, and two more,
    there three. Numbers, gradients, modes and random state are left as they were.

    Without `batches` it is read off the weights, share(form) * s * sqrt(64 / K), where s is the median over the adapted
    matrices of |W|_F / sqrt(min(d_out, d_in)), the rms singular value, and K is the largest that the config asks for
    (below 16 it counts as 16). That knows neither the data nor the basis: it is tenfold too high for basis='gradient'.

    Both are for linear decay without weight decay; the rates that trainers have as their default, made for all weights,
    are thousands of times smaller. Raises CTError where the model has no such adapter, the adapter is not active, or a
    loss or gradient is zero or not finite.
    """
    if isinstance(batches, str):
        raise CTError(f"batches are inputs of the model; name the adapter by adapter_name={batches!r}.")
    layers = list(layers_of(model, adapter_name, ", so there is nothing to give a rate for").values())
    if batches is not None:
        numbers: list[Tensor] = [m.ctsft_coefficients[adapter_name] for m in layers]
        return valley(model, numbers, [*batches]).rate
    scale = median(rms_singular_value(m.get_base_layer(), m.base_weight()) for m in layers)
    config = layers[0].ctsft_config[adapter_name]
    return rate(config.form, config.k if isinstance(config.k, int) else max(config.k.values()), scale)


# ---- measured


@dataclass(frozen=True)
class Valley:
    """What is measured of trained numbers: t and r of `learning_rate`, and how the other factor grows."""

    t: float
    r: float
    growth: float = 0.0

    @property
    def rate(self) -> float:
        """The x with x (1 + growth x) = 0.9 r t, to two digits; r counts as at least 0.3."""
        return self.rate_above(LEAST)

    def rate_above(self, least: float) -> float:
        """`rate` where r counts as at least `least`."""
        alone = SHARE * (self.t * max(self.r, least))
        return two_digits(2 * alone / (1 + math.sqrt(1 + 4 * self.growth * alone)))


def valley(model: nn.Module, numbers: Sequence[Tensor], batches: Sequence[Mapping[str, Tensor]]) -> Valley:
    """The way of Adam's first step with any trained `numbers` of `model`.

    t: by the secant of the slope on the first batch, the geometric mean over two places, each at most 16-fold off
    `line`. Raises CTError for fewer than two batches and where the gradient is zero or not finite.
    """
    if len(batches) < 2:
        raise CTError(f"learning_rate got {len(batches)} of the two batches it needs at least; four are enough.")
    with borrowed(model, numbers) as start:
        each = [gradient(model, numbers, batch) for batch in batches]
        total = [sum(parts[1:], parts[0]) for parts in zip(*each, strict=True)]
        norm = math.sqrt(sum(float(g.square().sum()) for g in each[0]))
        if not norm or not math.isfinite(sum(float(g.square().sum()) for g in total)):
            raise CTError(
                f"the gradient of the adapter's numbers is {'not finite' if norm else 'zero'} on these batches, so "
                "they give no rate; is the adapter active, and has every batch a token that counts?"
            )
        way = [-g.sign() for g in total]

        def after(distance: float) -> list[Tensor]:
            """The first batch's gradient so far along `way`."""
            for number, begin, w in zip(numbers, start, way, strict=True):
                number.data.copy_(begin + distance * w)
            torch.clear_autocast_cache()  # it holds casts of the numbers as they stood
            return gradient(model, numbers, batches[0])

        others = sum(slope(g, [-(t - own).sign() for t, own in zip(total, g, strict=True)]) for g in each)
        first, scale, found = slope(each[0], way), line(norm, sum(n.numel() for n in numbers)), []
        for share in TRIED:
            rises = slope(after(share * scale), way) - first
            step = share * scale * -first / rises if rises > 0 else math.inf
            found.append(min(max(step, scale / MOST), scale * MOST) if math.isfinite(rises) else scale / MOST)
        t, every = math.prod(found) ** (1 / len(found)), slope(total, way)
        return Valley(t, others / every, growth(after, t, way, -every / len(batches)))


def growth(after: Callable[[float], list[Tensor]], t: float, way: Sequence[Tensor], steep: float) -> float:
    """How much steeper the loss falls along `way` for every step of 1 that the other numbers take, as a share.

    The others have no gradient at the start, as A of LoRA's B A has none while B is zero. Adam moves them by the rate
    all the same as soon as they have one. Where B A is linear in both, and B has moved by x and A by y, the loss is
    falling by `steep` x (1 + g y) before it bends, and Adam's x and y are alike: it gets to the valley, t steps of B
    alone, at x (1 + g x) = t. So g is the slope along A over `steep` and x, measured at x = t/2, where half is left of
    both slopes. `after(x)` gives the gradient at x, `steep` > 0 is the slope at the start.
    """
    still, x, left = [w == 0 for w in way], t, math.inf
    if not any(bool(s.any()) for s in still):
        return 0.0
    while not math.isfinite(left):
        x /= 2
        left = sum(float(g[s].abs().sum()) for g, s in zip(after(x), still, strict=True))
    return left / (steep * x * (1 - x / t))


def line(norm: float, count: int) -> float:
    """The rate of a line through 55 tuned arms: by the `norm` of the gradient of all `count` trained numbers."""
    return float(0.6 * norm**-0.76 * count**-0.27)


def slope(gradient: Sequence[Tensor], way: Sequence[Tensor]) -> float:
    return sum(float((g * w).sum()) for g, w in zip(gradient, way, strict=True))


def gradient(model: nn.Module, numbers: Sequence[Tensor], batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The gradient of the mean loss (nats per token) over `batch`, a tensor for each of `numbers`."""
    loss, count = summed_loss(model, {"labels": own_labels(batch), **batch})
    if not loss.requires_grad:  # the adapter takes no part
        return [torch.zeros_like(n) for n in numbers]
    found = torch.autograd.grad(loss / count, numbers, allow_unused=True)
    return [torch.zeros_like(n) if g is None else g for n, g in zip(numbers, found, strict=True)]


@contextmanager
def borrowed(model: nn.Module, numbers: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """`numbers` as they stand, copied, while they may be moved and have gradients and `model` drops nothing out."""
    start = [n.detach().clone() for n in numbers]
    try:
        with still(model, *numbers):
            yield start
    finally:
        for number, begin in zip(numbers, start, strict=True):
            number.data.copy_(begin)


# ---- read off the weights


def rms_singular_value(module: nn.Module, weight: Tensor) -> float:
    """|W|_F / sqrt(min(d_out, d_in)) of the `weight` of `module`."""
    w = matrix(module, weight)
    return float(w.float().norm()) / min(w.shape) ** 0.5


def rate(form: str, k: int, scale: float) -> float:
    """share(form) * `scale` * sqrt(64 / `k`), to two digits; `k` below 16 counts as 16 (see `learning_rate`)."""
    return two_digits(FORMS[form].rate * scale * (TUNED_K / max(k, 16)) ** 0.5)


def two_digits(value: float) -> float:
    return float(f"{value:.2g}")
