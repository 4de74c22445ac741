"""Ablation: the loss of a model that keeps some of its trained directions only."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ctsft.adapter.store import layers_of
from ctsft.errors import CTError
from ctsft.quantities.look import undisturbed
from ctsft.spectral.basis import generator


def ablation(
    model: nn.Module,
    loss: Callable[[], float],
    kept: Sequence[int],
    order: str = "order",
    seed: int = 0,
    adapter_name: str = "default",
) -> dict[str, float]:
    """loss() by the number of trained directions kept in every matrix, all others adding nothing (paper 85), not
    the siblings' mean of start="mean" either.

    order: `order` keeps the first, `reverse` the last, `random` a seeded choice per matrix, nested over the counts. A
    matrix with fewer directions keeps all. In evaluation mode; the model is left bit for bit as it was. Keys are the
    counts as text. Raises CTError for another order, a negative count, or no adapter.
    """
    if order not in ("order", "reverse", "random"):
        raise CTError(f"order={order!r} is unknown; choose one of order, reverse, random.")
    if wrong := [n for n in kept if n < 0]:
        raise CTError(f"kept={wrong[0]} must be a number of directions, at least 0.")
    layers = layers_of(model, adapter_name)
    pieces = {n: m.ctsft_coefficients[adapter_name] for n, m in layers.items()}
    whole = {n: p.data for n, p in pieces.items()}

    def ranked(name: str, k: int) -> Tensor:
        if order == "random":
            return torch.randperm(k, generator=generator(seed, "ablation", name))
        return torch.arange(k) if order == "order" else torch.arange(k).flip(0)

    losses = {}
    with undisturbed(model), torch.no_grad():
        try:
            for count in kept:
                for name, c in whole.items():
                    layer, k = layers[name], layers[name].ready(adapter_name).k
                    mask = torch.zeros(k, dtype=torch.bool)
                    mask[ranked(name, k)[:count]] = True
                    form, start = layer.form(adapter_name), layer.ready(adapter_name).start
                    begin = 0.0 if start is None or layer.replaces(adapter_name) else form.begin(start)
                    pieces[name].data = form.only(c + begin, mask.to(c.device)) - begin
                losses[str(count)] = float(loss())
        finally:
            for name, c in whole.items():
                pieces[name].data = c
    return losses
