"""CTConfig: everything a user chooses about an adapter, checked when it is made."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig, PeftType

from ctsft.basis import Basis
from ctsft.errors import CTError

FORMAT_VERSION = 1

Form = Literal["diagonal", "core", "scores"]
BasisKind = Literal["weight", "random", "universal", "gradient", "activation"]
WeightFrom = Literal["top", "bottom", "random"]
UniversalMode = Literal["residual", "replace"]
BasisDtype = Literal["float32", "bfloat16"]
SaveDtype = Literal["float32", "bfloat16", "float16"]

RECOMPUTABLE = ("weight", "random", "universal")  # from the base weights and the seed alone; the others need data


def extend_peft_type(name: str) -> PeftType:
    """Add `name` to peft's enum of methods: a plain string breaks transformers' add_adapter, Trainer and mixed mode."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


CTSFT = extend_peft_type("CTSFT")


@dataclass
class CTConfig(PeftConfig):
    """An adapter dW = U_K C Vh_K with frozen orthonormal U, Vh and a small trained C (papers 81-88; 78 for `scores`).

    Raises CTError for any value or combination that makes no sense.
    """

    k: int | dict[str, int] = field(
        default=64,
        metadata={"help": "Directions per matrix, or a mapping from module pattern (a regex on the name's end) to K."},
    )
    form: Form = field(
        default="diagonal",
        metadata={"help": "`diagonal`: K amplitudes; `core`: a K x K matrix; `scores`: one whole factor, d_out x K."},
    )
    basis: BasisKind = field(
        default="weight",
        metadata={
            "help": "Where the directions come from; `gradient` and `activation` are made by ctsft.calibrate first."
        },
    )
    weight_from: WeightFrom = field(
        default="top", metadata={"help": "Which singular directions of W: `top`, `bottom` or a seeded `random` choice."}
    )
    universal_mode: UniversalMode = field(
        default="residual",
        metadata={
            "help": "`residual`: W + D B, identity at the start. `replace`: W becomes its K-term form (paper 78)."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names (or one regex) of modules to adapt; None: every Linear and Conv1D but the head."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (or one regex) to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only blocks with these indices."}
    )
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})
    seed: int = field(default=0, metadata={"help": "Seed of the random basis and of weight_from='random'."})
    amplitude_dropout: float = field(
        default=0.0,
        metadata={"help": "Chance that a direction is dropped for a training step (paper 85's alpha dropout)."},
    )
    basis_dtype: BasisDtype = field(
        default="float32",
        metadata={
            "help": "`bfloat16` rounds the directions once, when they are made: half the memory and, on a bfloat16 "
            "base, products in bfloat16. The adapter is then the rounded one everywhere, exports included."
        },
    )
    store_basis: bool = field(
        default=False,
        metadata={"help": "Always write the basis, even where it can be recomputed from the base weights."},
    )
    save_dtype: SaveDtype = field(
        default="float32", metadata={"help": "How trained numbers are written: 4 or 2 bytes each."}
    )
    target_modules_to_tie: list[str] | None = field(
        default=None, metadata={"help": "Set by ctsft: modules that share a weight, and so the adapter, with a target."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the format on disk."})
    fingerprint: str | None = field(
        default=None, metadata={"help": "Set when saved: the base weights that the basis was made from."}
    )
    stored_basis: bool = field(default=False, metadata={"help": "Set when saved: the basis lies in the file."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = CTSFT
        self.calibrated: dict[str, Basis] | None = None
        self.saved_as: dict[str, Any] = {}
        if isinstance(self.k, list):
            self.k = dict(self.k)
        if self.format_version != FORMAT_VERSION:
            raise CTError(
                f"this adapter has format_version {self.format_version} and this ctsft reads {FORMAT_VERSION}; install "
                "the ctsft that wrote it."
            )
        for name, kind in (
            ("form", Form),
            ("basis", BasisKind),
            ("weight_from", WeightFrom),
            ("universal_mode", UniversalMode),
            ("basis_dtype", BasisDtype),
            ("save_dtype", SaveDtype),
        ):
            if getattr(self, name) not in get_args(kind):
                raise CTError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(get_args(kind))}.")
        for k in self.k.values() if isinstance(self.k, Mapping) else [self.k]:
            if not isinstance(k, int) or isinstance(k, bool) or k < 1:
                raise CTError(f"k={k!r} must be a whole number of directions, at least 1.")
        if self.k == {}:
            raise CTError("k is an empty mapping; give an int or {module pattern: int}.")
        for pattern in self.k if isinstance(self.k, Mapping) else ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise CTError(f"the k pattern {pattern!r} is no regular expression: {error}.") from None
        if not 0 <= self.amplitude_dropout < 1:
            raise CTError(f"amplitude_dropout={self.amplitude_dropout} must be at least 0 and below 1.")
        if self.weight_from != "top" and self.basis != "weight":
            raise CTError(
                f"weight_from={self.weight_from!r} chooses among W's own directions; it needs basis='weight'."
            )
        if self.universal_mode == "replace" and (self.basis, self.form) != ("universal", "scores"):
            raise CTError(
                "universal_mode='replace' makes W its scores on the universal basis; it needs basis='universal' and "
                "form='scores'."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise CTError("layers_pattern needs layers_to_transform.")

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
        """As peft's, with k in order and what the last save found (fingerprint, stored_basis)."""
        pairs = {"k": list(self.k.items())} if isinstance(self.k, Mapping) else {}  # JSON would sort a mapping's keys
        return super().to_dict() | pairs | self.saved_as
