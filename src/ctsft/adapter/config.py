"""CTConfig: everything a user chooses about an adapter, checked when it is made."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from peft import PeftConfig, TaskType
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import safe_open
from torch import Tensor

from ctsft.adapter.seal import SETTINGS, TENSORS, check_tensors, foreign, hash_settings, read_settings, read_tensors
from ctsft.choices import CHOSEN, AdapterOptions, compiled, fits
from ctsft.compat import add_peft_type
from ctsft.errors import CTError, told
from ctsft.spectral.basis import Basis

FORMAT_VERSION = 1


CTSFT = add_peft_type("CTSFT")


@dataclass
class CTConfig(AdapterOptions, PeftConfig):
    """An adapter dW = U_K C Vh_K with frozen orthonormal U, Vh and a small trained C (papers 81-88; 78 for `scores`).

    Raises CTError for any value or combination that makes no sense.
    """

    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (or one regex) to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only blocks with these indices."}
    )
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})
    target_modules_to_tie: list[str] | None = field(
        default=None, metadata={"help": "Set by ctsft: modules that share a weight, and so the adapter, with a target."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the format on disk."})
    fingerprint: str | None = field(
        default=None, metadata={"help": "Set when saved: the base weights that the basis was made from."}
    )
    uncovered_ends: dict[str, str] | None = field(
        default=None, metadata={"help": "Set by ctsft: hashes of embeddings and head that the fingerprint leaves out."}
    )
    basis_checksum: str | None = field(
        default=None, metadata={"help": "Set by ctsft: what lay in basis_file when the adapter was made."}
    )
    stored_basis: bool = field(default=False, metadata={"help": "Set when saved: the basis lies in the file."})
    tensors_hash: str | None = field(default=None, metadata={"help": "Set when saved: a hash of every tensor."})
    settings_hash: str | None = field(default=None, metadata={"help": "Set when saved: a hash of every setting."})

    def __post_init__(self) -> None:
        if isinstance(self.basis_file, os.PathLike):
            self.basis_file = os.fspath(self.basis_file)
        self.check_types()
        try:
            super().__post_init__()
        except ValueError:  # an unknown task_type
            raise CTError(
                f"task_type={told(self.task_type)} is unknown; choose one of {', '.join(TaskType)}."
            ) from None
        self.peft_type = CTSFT
        self.calibrated: dict[str, Basis] | None = None
        self.saved_as: dict[str, Any] = {}
        self.folder = Path()  # that the adapter was read from
        self.unread = self.from_disk  # until `unpack` has the trained numbers
        if self.format_version != FORMAT_VERSION:
            raise CTError(
                f"this adapter has format_version {told(self.format_version)} and this ctsft reads {FORMAT_VERSION}; "
                "install the ctsft that wrote it."
            )
        for name, known in CHOSEN.items():
            if getattr(self, name) not in known:
                raise CTError(f"{name}={told(getattr(self, name))} is unknown; choose one of {', '.join(known)}.")
        self.check()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(pattern := getattr(self, name), str):
                compiled(pattern, name)
        if self.layers_pattern and self.layers_to_transform is None:
            raise CTError("layers_pattern needs layers_to_transform.")

    def check_types(self) -> None:
        """CTError for a field of another type than its own; sets become sorted lists, pairs a mapping for k."""
        for name, value in vars(self).items():
            if isinstance(value, (set, frozenset, tuple)) and all(isinstance(v, str) for v in value):
                setattr(self, name, list(value) if isinstance(value, tuple) else sorted(value))
        if isinstance(self.k, list):
            try:
                self.k = {regex + "": k for regex, k in self.k}
            except (TypeError, ValueError):
                raise CTError(f"k={told(self.k)} is no list of pairs of a module pattern and a number.") from None
        for name, kind in types().items():
            value = getattr(self, name)
            try:
                kind.validate_python(value)
            except ValidationError as error:
                raise CTError(f"{name}={told(value)} is of a wrong type: {error.errors()[0]['msg']}.") from None
        for name in ("fingerprint", "basis_checksum"):
            if not re.fullmatch(r"[\w-]{1,80}", str(getattr(self, name))):
                raise CTError(f"{name}={told(getattr(self, name))} is no hash of weights; the file is damaged.")
        for name in ("layers_pattern", "modules_to_save"):  # peft reads them as parts of a regex
            value = getattr(self, name)
            for word in [value] if isinstance(value, str) else value or ():
                if not re.fullmatch(r"[\w.-]+", word):
                    raise CTError(
                        f"{name}={told(word)} is no name of a module; give it by letters, digits, '_' and '.'."
                    )

    @property
    def from_disk(self) -> bool:
        """Whether this describes an adapter that was saved, whose trained numbers are still to be read."""
        return self.fingerprint is not None

    def k_for(self, name: str) -> int:
        """K of the module `name`; CTError when no pattern fits it."""
        if isinstance(self.k, int):
            return self.k
        for pattern, k in self.k.items():
            if fits(rf"(.*\.)?(?:{pattern})", name):
                return k
        raise CTError(f"no pattern of k ({told(', '.join(self.k))[1:-1]}) fits {name}; add one, or '.*' as the last.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """The config in a folder or on the hub; in a local folder of a saved adapter, its tensors are checked as well.

        Raises CTError for whatever is not as it was saved (see `seal`), before any model is touched. What looks like a
        local path is never asked of the hub. A basis_file beside the adapter is found.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if is_local(Path(pretrained_model_name_or_path)):
            config = cls.from_peft_type(**read_settings(folder / SETTINGS, known_fields()))
            if config.from_disk or (folder / TENSORS).exists():
                config.check_tensors(read_tensors(folder / TENSORS))
        else:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        config.folder = folder
        return config

    @classmethod
    def from_json_file(cls, path_json_file: Any, **kwargs: Any) -> dict[str, Any]:
        return read_settings(Path(path_json_file), known_fields())

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """CTError unless `tensors`, by their names in the file, can be those saved with this config."""
        if not self.from_disk:
            raise CTError("adapter_config.json does not name the base weights; it is damaged, take the folder anew.")
        check_tensors(tensors, self.modules_to_save or (), self.tensors_hash)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As peft's, which has just saved the tensors; CTError where it put more among them than the adapter has."""
        file = Path(save_directory, TENSORS)
        if self.saved_as and file.is_file():
            with safe_open(file, "pt") as saved:
                extra = foreign(saved.keys(), self.modules_to_save or ())
            if extra:
                raise CTError(
                    f"peft saved {extra[0]} with the adapter, which could not be read back: a vocabulary was resized; "
                    "name the embedding in modules_to_save, or save with save_embedding_layers=False."
                )
        super().save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As peft's, with k in order, what the last save found, and its seal; of a basis_file where there is one."""
        pairs = {"k": list(self.k.items())} if isinstance(self.k, Mapping) else {}  # JSON would sort a mapping's keys
        found = super().to_dict() | pairs | self.saved_as
        settings = {n: v for n, v in found.items() if v is not None or not n.startswith("basis_")}
        return settings | ({"settings_hash": hash_settings(settings)} if settings["tensors_hash"] else {})


def is_local(folder: Path) -> bool:
    """Whether `folder` is there, or can only be meant as a path: not as organisation/name on the hub."""
    return folder.exists() or folder.is_absolute() or len(folder.parts) != 2 or folder.parent.is_dir()


def known_fields() -> set[str]:
    return {f.name for f in fields(CTConfig)}


@cache
def types() -> dict[str, TypeAdapter[Any]]:
    """What each field may hold, but for those that have a check of their own."""
    hints = get_type_hints(CTConfig)
    strict = ConfigDict(strict=True)
    own = {"peft_type", "task_type", "k", *CHOSEN}
    return {n: TypeAdapter(hints[n], config=strict) for n in sorted(known_fields() - own)}
