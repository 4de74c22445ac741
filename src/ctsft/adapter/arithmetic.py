"""Sums of adapters: along the same directions the trained numbers add up, exactly."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ctsft.adapter.forms import FORMS
from ctsft.adapter.layer import CTLayer
from ctsft.errors import CTError
from ctsft.spectral.basis import Basis


def add_weighted(
    model: nn.Module, configs: dict[str, Any], names: Sequence[str], weights: Sequence[float], to: str
) -> None:
    """Add to the layers of `model` the adapter `to`, dW = sum of w dW_i over the adapters `names` with these `weights`.

    `configs`: the configs of all adapters, by name; that of `to` is put in. Raises CTError, with nothing added, unless
    all have one form, in whose numbers dW is linear, and in every layer the same directions.
    """
    if not names or len(names) != len(weights):
        raise CTError(f"{len(names)} adapters and {len(weights)} weights; give one weight an adapter.")
    if unknown := [n for n in names if n not in configs]:
        raise CTError(f"the model has no adapter {unknown[0]!r}; it has {', '.join(configs)}.")
    if to in configs:
        raise CTError(f"the model has an adapter {to!r}; give another name, or delete it first (delete_adapter).")
    first = configs[names[0]]
    if any(configs[n].modules_to_save or configs[n].universal_mode == "replace" for n in names):
        raise CTError("adapters with modules_to_save or universal_mode='replace' are no sums of small changes.")
    if unfit := [n for n in names if not FORMS[configs[n].form].linear]:
        raise CTError(
            f"adapter {unfit[0]!r} has form={configs[unfit[0]].form!r}, in whose numbers the change is not linear, so "
            "sums of them mean nothing; export the adapters as LoRA and add those."
        )
    layers = {
        n: m for n, m in model.named_modules() if isinstance(m, CTLayer) and any(a in m.ctsft_config for a in names)
    }
    for name, layer in layers.items():
        check_same(name, layer, names)

    config = replace(first, fingerprint=None, stored_basis=False, tensors_hash=None, settings_hash=None)
    for layer in layers.values():
        if layer.ctsft_owner:
            continue  # of a tied weight's second use, once its owner is done
        numbers = sum(w * layer.coefficients(n).detach() for n, w in zip(names, weights, strict=True))
        if (start := layer.ready(names[0]).start) is not None:  # which the sum has too: it was counted once a term
            numbers = numbers - layer.form(names[0]).begin(start)
        layer.ctsft_config[to], layer.ctsft_basis[to] = config, layer.ctsft_basis[names[0]]
        layer.ctsft_fingerprint[to] = layer.ctsft_fingerprint[names[0]]
        layer.ctsft_coefficients[to] = nn.Parameter(torch.as_tensor(numbers), requires_grad=False)
    for layer in layers.values():
        if layer.ctsft_owner:
            layer.share(to, layer.ctsft_owner[0])
    configs[to] = config


def check_same(name: str, layer: CTLayer, names: Sequence[str]) -> None:
    """CTError unless the adapters `names` have one form and the same directions in `layer`."""
    if missing := [n for n in names if n not in layer.ctsft_config]:
        raise CTError(f"adapter {missing[0]!r} does not adapt {name}; only adapters of the same modules add up.")
    forms = {layer.ctsft_config[n].form for n in names}
    first, *others = (layer.ready(n) for n in names)
    if len(forms) > 1 or not all(same(first, other) for other in others):
        raise CTError(
            f"the adapters have other directions or forms in {name}; only along the same ones they add up: export them "
            "as LoRA and add those."
        )


def same(a: Basis, b: Basis) -> bool:
    """Whether two bases have the same directions; what training starts from along them may differ."""
    mine, theirs = (replace(one, start=None).tensors() for one in (a, b))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[f], theirs[f]) for f in mine)
