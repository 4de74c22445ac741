"""Another adapter's numbers onto an adapter that a model already has: hotswap, and peft's own load_adapter."""

import inspect
import os
from pathlib import Path
from typing import Any

from torch import nn

from ctsft.adapter.config import CTConfig
from ctsft.adapter.layer import CTLayer
from ctsft.adapter.read import check_read, unpack
from ctsft.adapter.seal import CHECKSUM, TENSORS, read_tensors
from ctsft.adapter.store import check_same_base, layers_of, note_other_ends
from ctsft.compat import uncompiled
from ctsft.errors import CTError

WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")  # of a file on the hub
# what decides the shapes and what they mean
SAME = ("form", "basis", "basis_dtype", "basis_checksum", "start", "universal_mode", "k")

READ = ("tensors_hash", "stored_basis", "save_dtype", "uncovered_ends", "unread")  # what `unpack` goes by


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
    if config.modules_to_save or old.modules_to_save:
        raise CTError("modules_to_save cannot be swapped in place; load the adapter under another name.")
    check_alike(config, layers, folder, adapter_name)
    check_read(model, config, adapter_name, tensors)
    config.unread = False
    numbers = {n: t for n, t in tensors.items() if not n.startswith("ctsft.basis")}  # unpack compares the directions
    model.load_state_dict(unpack(model, config, adapter_name, numbers), strict=False)


def check_alike(config: CTConfig, layers: dict[str, CTLayer], folder: object, adapter_name: str) -> None:
    """CTError unless the adapter of `config`, in `folder`, can take the place of `adapter_name`, which has these
    `layers`: it has its options and as many matrices, and is of its base weights."""
    layer = next(iter(layers.values()))
    old, base = layer.ctsft_config[adapter_name], layer.ctsft_fingerprint[adapter_name]
    if adapter_name in layer.merged_adapters:
        raise CTError("the adapter is merged into these weights; unmerge it before its numbers are swapped.")
    for name in SAME:
        here, there = getattr(old, name), getattr(config, name)
        if here != there:
            raise CTError(
                f"the adapter in {folder} has {name}={there!r} and {adapter_name!r} has {here!r}; load it under a name "
                "of its own."
            )
    file = config.folder / TENSORS
    if file.is_file() and read_tensors(file)[CHECKSUM].numel() != len(layers):
        raise CTError(f"the adapter in {folder} has other modules than {adapter_name!r}; load it under another name.")
    check_same_base(config, base)
    note_other_ends(config, old.uncovered_ends if config.fingerprint == base else None)


def load_onto(theirs: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `PeftModel.load_adapter` does: `theirs`, but for the name of a CT-SFT adapter that is there already.

    peft then reads no settings. Here they are read, checked as those of a new adapter, and held against what is there.
    """
    given = inspect.signature(theirs).bind(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    name = given["adapter_name"]
    old = model.peft_config.get(name)
    if not isinstance(old, CTConfig) or old.unread:  # which has just been read
        return theirs(*args, **kwargs)
    folder, layers = given["model_id"], layers_of(model, name)
    config = CTConfig.from_pretrained(folder, **{n: given[n] for n in WHERE if n in given})
    check_alike(config, layers, folder, name)
    before = vars(old).copy()
    vars(old).update({n: getattr(config, n) for n in READ})
    try:
        result = theirs(*args, **kwargs)
    except BaseException:
        vars(old).update(before)
        raise
    old.save_dtype = before["save_dtype"]  # that of the file was for its reader
    for layer in layers.values():
        layer.ctsft_fingerprint[name] = config.fingerprint or ""
    return result
