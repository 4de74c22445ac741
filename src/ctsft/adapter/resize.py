"""K of an adapter changed in place, also while it trains."""

import copy
import math

import torch
from torch import Tensor, nn

from ctsft.adapter.bases import check_k, make_bases
from ctsft.adapter.layer import CTLayer
from ctsft.adapter.store import base_fingerprint, layers_of
from ctsft.compat import uncompiled
from ctsft.errors import CTError
from ctsft.spectral.basis import Basis, checksum
from ctsft.spectral.kinds import kind_of
from ctsft.spectral.weights import checked, clean_name

TURNED = 1e-3  # of a checksum's order sqrt(K): as for bfloat16 on another machine (see `read.TOLERANCE`)


def resize(
    model: nn.Module,
    k: int | dict[str, int],
    adapter_name: str = "default",
    optimizer: torch.optim.Optimizer | None = None,
    carry: bool = False,
) -> None:
    """Change K of an adapter in place, also during training: shared directions keep their values, new ones add nothing,
    or with start="mean" the siblings' mean.

    The parameters stay the same objects; a loss from before must not be kept with its graph (detach it), for autograd
    remembers the shapes in there. With `optimizer`, their state is reset, or with `carry` kept for shared
    directions and zero for new ones (papers 81 and 82 reset). Raises CTError, with nothing changed, for a K that a
    matrix or a calibrated basis does not allow, and where the directions come out otherwise here than they were.
    """
    layers = layers_of(model, adapter_name, " to resize")
    if any(isinstance(m, CTLayer) and m.merged for m in model.modules()):
        raise CTError("an adapter is merged into these weights; unmerge it before K is changed.")
    bare = uncompiled(getattr(getattr(model, "base_model", None), "model", model))
    names = {id(m): clean_name(n) for n, m in bare.named_modules()}
    first = next(iter(layers.values()))
    old = first.ctsft_config[adapter_name]
    new = copy.copy(old)
    new.k = k
    new.check()
    new.calibrated = old.calibrated or {names[id(m)]: m.ready(adapter_name) for m in layers.values()}
    weights = {names[id(m)]: checked(n, m.get_base_layer()) for n, m in layers.items()}
    now = base_fingerprint(bare, new, {names[id(m)]: m for m in layers.values()})
    if kind_of(new.basis).of_weights and first.ctsft_fingerprint[adapter_name] != now:
        raise CTError("the base weights are not those that the basis was made from, so K cannot be changed.")
    ks = {n: new.k_for(n) for n in weights}
    for name, w in weights.items():
        check_k(new, name, w, ks[name])
    bases = make_bases(bare, new, weights, ks, now, but=adapter_name)
    for layer in layers.values() if old.stored_basis else ():  # which may have been made elsewhere
        check_alike(names[id(layer)], layer.ready(adapter_name), bases[names[id(layer)]])

    old.k = k
    state = {} if optimizer is None else optimizer.state
    for layer in (m for m in model.modules() if isinstance(m, CTLayer) and adapter_name in m.ctsft_coefficients):
        owner = layer.ctsft_owner[0] if layer.ctsft_owner else layer
        layer.ctsft_basis[adapter_name] = bases[names[id(owner)]]
        layer.settle()
        if owner is not layer:
            continue
        parameter = layer.ctsft_coefficients[adapter_name]
        shape = layer.coefficient_shape(adapter_name, ks[names[id(layer)]])
        parameter.data, parameter.grad = fitted(parameter.data, shape, layer.form(adapter_name).absent), None
        if parameter in state:
            moments = state.pop(parameter)
            if carry:
                state[parameter] = {n: fitted(v, shape) if v.ndim else v for n, v in moments.items()}


def check_alike(name: str, old: Basis, new: Basis | None) -> None:
    """CTError unless the first directions of `new` are those of `old`, up to rounding: numbers stay on theirs."""
    assert new is not None
    k = min(old.k, new.k)
    was, now = (checksum(basis.view(k), name) for basis in (old, new))
    if abs(was - now) > TURNED * math.sqrt(k):
        raise CTError(
            f"the directions of {name} come out otherwise here than they are in the adapter (rounding on another "
            "machine turned near-equal ones), so K cannot be changed; change it where the adapter was made."
        )


def fitted(old: Tensor, shape: tuple[int, ...], fill: float = 0.0) -> Tensor:
    """`old` cut or padded with `fill` to `shape`."""
    new = old.new_full(shape, fill)
    common = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, shape, strict=True))
    new[common] = old[common]
    return new
