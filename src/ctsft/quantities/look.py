"""A pass of the probes' own: the true gradient of the adapted matrices and the gradients of single samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctsft.adapter.layer import CTEmbedding, CTLayer
from ctsft.adapter.store import layers_of
from ctsft.errors import CTError
from ctsft.quantities.gradients import AMPLITUDES, NORMS
from ctsft.spectral.collect import own_labels, still
from ctsft.spectral.weights import matrix

Batch = Mapping[str, Tensor]


@contextmanager
def undisturbed(model: nn.Module, *wanted: Tensor) -> Iterator[None]:
    """As `still`; then every random state is as it was, too."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), still(model, *wanted):
        yield


@dataclass
class Look:
    """What one pass saw, by the clean name of the matrix."""

    gradients: dict[str, Tensor]  # dL/dW (d_out, d_in) float32, mean over the batches; of a tied weight both uses
    samples: dict[str, Tensor]  # dL/da of every sample (S, K) float32; their mean over a batch is the batch's


def look(
    model: nn.Module,
    batches: Sequence[Batch],
    gradients: bool = True,
    samples: bool = True,
    adapter_name: str = "default",
) -> Look:
    """One forward and backward pass over `batches` of an adapted model as it stands, without dropout.

    batches: model inputs, input_ids (b, t) with labels (where absent, all tokens but padding); L is the batch's mean
    loss in nats per token. `samples` needs form='diagonal' and a first dimension of b in every adapted layer's input:
    the gradient of a sample is the sum over its tokens of (Vh x)_i (U^T dL/dy)_i, times b, which are K numbers a token
    and no (d_out, d_in) product. The model, its `.grad` and the random state are left as they were. Raises CTError
    where there are no batches or the samples cannot be told apart.
    """
    owners = layers_of(model, adapter_name, NORMS)
    if not batches:
        raise CTError("a probe of the true gradient needs batches of its own; give at least one.")
    if gradients and any(m.replaces(adapter_name) for m in owners.values()):
        raise CTError("universal_mode='replace' takes W out of the model, so there is no dL/dW to measure.")
    bases = {n: m.get_base_layer() for n, m in owners.items()}
    amplitudes: dict[str, Tensor] = {n: m.ctsft_coefficients[adapter_name] for n, m in owners.items()}
    wanted = [cast(Tensor, b.weight) for b in bases.values()] if gradients else list(amplitudes.values())
    total: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {n: [] for n in owners}
    handles = hooks(model, owners, parts, adapter_name) if samples else []
    device = next(model.parameters()).device
    try:
        with undisturbed(model, *wanted), torch.enable_grad():
            for batch in batches:
                on_device = {k: v.to(device) for k, v in batch.items()}
                for name, a in amplitudes.items() if samples else ():
                    parts[name].append(a.new_zeros(len(on_device["input_ids"]), len(a)))
                loss = model(**{"labels": own_labels(on_device), **on_device}).loss / len(batches)
                found = torch.autograd.grad(loss, wanted, allow_unused=True)
                for (name, base), g in zip(bases.items(), found if gradients else (), strict=gradients):
                    dense = matrix(base, torch.zeros_like(base.weight) if g is None else g).float()  # type: ignore[arg-type]
                    total[name] = total[name] + dense if name in total else dense
    finally:
        for handle in handles:
            handle.remove()
    scaled = {n: torch.cat([g * len(g) * len(batches) for g in p]) for n, p in parts.items() if p}
    return Look(total, scaled)


def hooks(
    model: nn.Module, owners: Mapping[str, CTLayer], parts: Mapping[str, list[Tensor]], adapter_name: str
) -> list[Any]:
    """Hooks that add every use of an adapter to the last (b, K) tensor in its list of `parts`."""
    names = {m: n for n, m in owners.items()}
    made = []
    for layer in model.modules():
        if isinstance(layer, CTLayer) and adapter_name in layer.ctsft_coefficients:
            owner = layer.ctsft_owner[0] if layer.ctsft_owner else layer
            if owner.ctsft_config[adapter_name].form != "diagonal":
                raise CTError(AMPLITUDES)
            made.append(layer.register_forward_hook(by_sample(names[owner], parts[names[owner]], adapter_name)))
    return made


def by_sample(
    name: str, parts: list[Tensor], adapter_name: str
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A forward hook that takes the K inner numbers of every token, and meets them with dL/dy on the way back."""

    def forward(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        assert isinstance(layer, CTLayer)
        basis, x, total = layer.ready(adapter_name), args[0].detach(), parts[-1]
        u, vh = cast(Tensor, basis.u).float(), cast(Tensor, basis.vh).float()
        if len(x) != len(total):
            raise CTError(
                f"{name} sees {len(x)} rows of a batch of {len(total)}, so its samples cannot be told apart; leave it "
                "out of target_modules, or gradient_snr out of the probes."
            )
        if isinstance(layer, CTEmbedding):  # y = scale Vh^T (a * U[ids])
            inner, outer = F.embedding(x, u), vh.T * layer.scale()
        else:  # y = U (a * (Vh x))
            inner, outer = F.linear(x.float(), vh), u

        def backward(dy: Tensor) -> None:
            total.add_((inner * (dy.float() @ outer)).reshape(len(x), -1, total.shape[1]).sum(1))

        y.register_hook(backward)

    return forward
