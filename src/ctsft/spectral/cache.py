"""The cache folder: where it lies, and the bases kept in it, so that a second start need not make them again.

One safetensors file a model and kind of basis, memory-mapped when read: processes share its pages. A file that is
damaged, or not what its name says, is never used; a folder that cannot be written never stops a run.
"""

import os
import warnings
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctsft.files import home, replacing
from ctsft.spectral.basis import Basis
from ctsft.spectral.decompose import VERSION
from ctsft.spectral.weights import fingerprint

ALIGNED = 64  # bytes: tensors lie in the file as torch would have put them in memory, for the same bits of products


def keeps_bases() -> bool:
    """Whether bases are kept on disk: yes, unless `CTSFT_BASIS_CACHE` is 0."""
    return os.environ.get("CTSFT_BASIS_CACHE") != "0"


def key_of(*choices: object) -> str:
    """All that decides the bits of bases: `choices`, our algorithm, torch's version and the instructions it uses."""
    capability = torch.backends.cpu.get_cpu_capability()
    return " ".join(map(str, ("ctsft bases", VERSION, "torch", torch.__version__, capability, *choices)))


def file_of(key: str) -> Path:
    """Where the bases of `key` are kept."""
    return home() / "bases" / f"{xxhash.xxh3_128_hexdigest(key.encode())}.safetensors"


def read_bases(key: str) -> dict[str, Basis]:
    """The bases kept under `key` by module name, float32, mapped from the disk; none, and a warning, for a bad file."""
    path = file_of(key)
    if not path.exists():
        return {}
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            if notes.get("key") != key:
                raise ValueError("it is another file")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        if notes.get("values") != fingerprint(tensors.items()):
            raise ValueError("its numbers have changed")
    except (OSError, SafetensorError, ValueError) as error:
        warnings.warn(f"{path} cannot be used ({error}): the bases are made anew.", UserWarning, stacklevel=2)
        return {}
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {name: Basis(tensors[f"{name}.u"], tensors[f"{name}.vh"]) for name in names}


def write_bases(key: str, bases: dict[str, Basis]) -> None:
    """Keep `bases` (two-sided, float32) under `key`, whole or not at all; a warning where that cannot be done."""
    path = file_of(key)
    tensors = {f"{name}.{side}": t.contiguous() for name, b in bases.items() for side, t in b.tensors().items()}
    notes = {"key": key, "values": fingerprint(tensors.items())}
    try:
        with replacing(path) as scratch:
            save_file(tensors, scratch, notes)
            with scratch.open("rb") as file:
                beyond = (8 + int.from_bytes(file.read(8), "little")) % ALIGNED
            if beyond:  # the header ends there, in steps of 8, and the first tensor begins
                save_file(tensors, scratch, notes | {"pad": " " * (2 * ALIGNED - beyond - len('"pad":"",'))})
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"the bases could not be kept in {path.parent} ({error}): the next start makes them again. Set CTSFT_CACHE "
            "to another folder, or CTSFT_BASIS_CACHE=0.",
            UserWarning,
            stacklevel=2,
        )
