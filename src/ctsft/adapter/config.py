"""CTConfig: everything a user chooses about an adapter, checked when it is made."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ctsft.choices import CHOSEN, AdapterOptions
from ctsft.compat import add_peft_type
from ctsft.errors import CTError
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
    basis_checksum: str | None = field(
        default=None, metadata={"help": "Set by ctsft: what lay in basis_file when the adapter was made."}
    )
    stored_basis: bool = field(default=False, metadata={"help": "Set when saved: the basis lies in the file."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = CTSFT
        self.calibrated: dict[str, Basis] | None = None
        self.saved_as: dict[str, Any] = {}
        self.folder = Path()  # that the adapter was read from
        if self.basis_file is not None:
            self.basis_file = os.fspath(self.basis_file)
        if isinstance(self.k, list):
            self.k = dict(self.k)
        if self.format_version != FORMAT_VERSION:
            raise CTError(
                f"this adapter has format_version {self.format_version} and this ctsft reads {FORMAT_VERSION}; install "
                "the ctsft that wrote it."
            )
        for name, known in CHOSEN.items():
            if getattr(self, name) not in known:
                raise CTError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}.")
        self.check()
        if self.layers_pattern and self.layers_to_transform is None:
            raise CTError("layers_pattern needs layers_to_transform.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As peft's; a basis_file beside the adapter is then found."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        config.folder = Path(pretrained_model_name_or_path, subfolder or "")
        return config

    @property
    def from_disk(self) -> bool:
        """Whether this describes an adapter that was saved, whose trained numbers are still to be read."""
        return self.fingerprint is not None

    def k_for(self, name: str) -> int:
        """K of the module `name`; CTError when no pattern fits it."""
        if isinstance(self.k, int):
            return self.k
        for pattern, k in self.k.items():
            if re.fullmatch(rf"(.*\.)?(?:{pattern})", name):
                return k
        raise CTError(f"no pattern of k ({', '.join(self.k)}) fits {name}; add one, or '.*' as the last.")

    def to_dict(self) -> dict[str, Any]:
        """As peft's, with k in order, what the last save found, and a basis_file's fields only where there is one."""
        pairs = {"k": list(self.k.items())} if isinstance(self.k, Mapping) else {}  # JSON would sort a mapping's keys
        found = super().to_dict() | pairs | self.saved_as
        return {n: v for n, v in found.items() if v is not None or not n.startswith("basis_")}
