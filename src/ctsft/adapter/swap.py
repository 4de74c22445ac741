"""Hotswap: another adapter's numbers under the directions that a model already has, in place."""

import os
from pathlib import Path

from torch import nn

from ctsft.adapter.config import CTConfig
from ctsft.adapter.layer import CTLayer
from ctsft.adapter.read import check_read, unpack
from ctsft.adapter.seal import CHECKSUM, TENSORS, read_tensors
from ctsft.adapter.store import check_same_base, layers_of, note_other_ends
from ctsft.compat import uncompiled
from ctsft.errors import CTError

SAME = ("form", "basis", "basis_dtype", "universal_mode", "k")  # what decides the shapes and what they mean


def hotswap(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Put the numbers of the adapter in `folder` into the adapter `adapter_name` of `model`, in place.

    Parameters and directions stay the same objects, so that a compiled model is not compiled again. Raises CTError,
    with nothing changed, unless the directions, K and modules are the same.
    """
    model = uncompiled(model)
    layers = layers_of(model, adapter_name, " to swap")
    first = next(iter(layers.values()))
    config, old = CTConfig.from_pretrained(folder), first.ctsft_config[adapter_name]
    tensors = read_tensors(Path(folder) / TENSORS)
    if any(isinstance(m, CTLayer) and adapter_name in m.merged_adapters for m in model.modules()):
        raise CTError("the adapter is merged into these weights; unmerge it before its numbers are swapped.")
    if config.modules_to_save or old.modules_to_save:
        raise CTError("modules_to_save cannot be swapped in place; load the adapter under another name.")
    for name in SAME:
        here, there = getattr(old, name), getattr(config, name)
        if here != there:
            raise CTError(
                f"the adapter in {folder} has {name}={there!r} and {adapter_name!r} has {here!r}; load it under a name "
                "of its own."
            )
    if tensors[CHECKSUM].numel() != len(layers):
        raise CTError(f"the adapter in {folder} has other modules than {adapter_name!r}; load it under another name.")
    check_same_base(config, first.ctsft_fingerprint[adapter_name])
    note_other_ends(config, old.uncovered_ends or {})
    check_read(model, config, adapter_name, tensors)
    config.unread = False
    numbers = {n: t for n, t in tensors.items() if not n.startswith("ctsft.basis")}  # unpack compares the directions
    model.load_state_dict(unpack(model, config, adapter_name, numbers), strict=False)
