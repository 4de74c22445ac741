"""The seal of an adapter's folder: hashes of its tensors and settings, checked before a model is touched.

They find damage and mix-ups: a flipped bit, exchanged values, the settings of one adapter beside the tensors of
another. They are no signature: who means to deceive can hash anew.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ctsft.errors import CTError, told
from ctsft.files import read_json

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
COEFFICIENTS, CHECKSUM = "ctsft.coefficients", "ctsft.checksum"  # tensors of every adapter
# What may be edited after saving: where the base lies and what peft notes for itself. The numbers do not depend on it.
FREE = {
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"),
    *("basis_file", "settings_hash"),  # what lies in a basis_file has a checksum of its own
}


def hash_settings(settings: Mapping[str, Any]) -> str:
    """A 128-bit hash (xxh3) of all settings but those in FREE; whether they come from JSON or go there is the same."""
    meant = {name: value for name, value in settings.items() if name not in FREE}
    return f"xxh3-{xxhash.xxh3_128_hexdigest(json.dumps(meant, sort_keys=True).encode())}"


def plain(name: str) -> str:
    """A tensor's name as in the bare model: peft and transformers put a prefix to the names of what they save."""
    return name.removeprefix("base_model.model.")


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with CT-SFT's own by their plain names: a bare transformers model saves them with a prefix."""
    return {plain(n) if plain(n).startswith("ctsft.") else n: t for n, t in tensors.items()}


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A 128-bit hash (xxh3) of every tensor's name, dtype, shape and bytes."""
    total = xxhash.xxh3_128()
    for name, tensor in sorted(((plain(n), t) for n, t in tensors.items()), key=lambda pair: pair[0]):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return f"xxh3-{total.hexdigest()}"


def read_settings(file: Path, known: Collection[str]) -> dict[str, Any]:
    """The settings of a CT-SFT adapter in `file`.

    CTError where it is missing, no JSON object, of another method, has fields that are not in `known`, or was changed
    since it was saved.
    """
    if not file.is_file():
        raise CTError(f"there is no {file}; give the folder of an adapter.")
    settings = read_json(file)
    if not isinstance(settings, dict):
        raise CTError(f"{file} is no JSON object; it is damaged, take the adapter's folder anew.")
    method = settings.get("peft_type")
    if method != "CTSFT":
        raise CTError(f"{file} is of an adapter of the method {told(method)}, not CTSFT; load it with peft alone.")
    if unknown := sorted(settings.keys() - set(known)):
        raise CTError(f"{file} has the unknown field {told(unknown[0])}; it is damaged, or a newer ctsft wrote it.")
    sealed = settings.get("settings_hash")
    if (sealed is None) != (settings.get("tensors_hash") is None) or sealed not in (None, hash_settings(settings)):
        raise CTError(f"{file} is not as it was saved; it is damaged or was edited, take the adapter's folder anew.")
    return settings


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in `file`, mapped into memory; CTError where it is missing or damaged."""
    if not file.is_file():
        raise CTError(f"{file.parent} holds no {file.name}; only safetensors are read, take the whole folder anew.")
    try:
        return without_prefix(load_file(file))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, MemoryError) as error:
        reason = told(str(error))[1:-1].rstrip(". ")
        raise CTError(f"{file} is truncated or damaged ({reason}); take the adapter's folder anew.") from None


def foreign(names: Iterable[str], whole: Collection[str]) -> list[str]:
    """Those of `names` in a file that are neither CT-SFT's nor of the modules `whole` that the adapter brings."""
    ours = tuple(f"{module}." for module in whole)  # peft goes by the ends of names: `norm` is input_layernorm as well
    return [n for n in names if not plain(n).startswith("ctsft.") and not any(part in f"{n}." for part in ours)]


def check_tensors(tensors: Mapping[str, Tensor], whole: Collection[str], expected: str | None) -> None:
    """CTError unless `tensors` are those of a CT-SFT adapter and of the modules `whole` that it brings, all finite
    numbers, with the hash `expected` (None: that of an old file, which has none)."""
    if extra := foreign(tensors, whole):
        raise CTError(
            f"the file has {told(extra[0])}, which is no part of this adapter and would replace a weight of the base; "
            "it is damaged (a module that is trained whole has to be named in modules_to_save)."
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CTError(f"the file holds NaN or infinite numbers in {told(name)}; it is damaged.")
    if COEFFICIENTS not in tensors or CHECKSUM not in tensors:
        raise CTError(f"the file holds no CT-SFT numbers; take {TENSORS} from the same folder as {SETTINGS}.")
    if expected not in (None, hash_tensors(tensors)):
        raise CTError(
            f"the numbers are not those that were saved with this {SETTINGS}; the file is damaged or another."
        )
