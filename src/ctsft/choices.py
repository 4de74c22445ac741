"""What can be chosen, in one list each: adapter options, dtypes and probes. Configs, recipes, specs and commands are
made from these; nothing here imports torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import regex

from ctsft.errors import CTError, told

Form = Literal["diagonal", "core", "scores", "gains"]
BasisKind = Literal["weight", "random", "universal", "gradient", "activation", "file", "learned"]
WeightFrom = Literal["top", "bottom", "random"]
Start = Literal["zero", "mean"]
UniversalMode = Literal["residual", "replace"]
BasisDtype = Literal["float32", "bfloat16"]
SaveDtype = Literal["float32", "bfloat16", "float16"]
ModelDtype = Literal["auto", "float32", "bfloat16", "float16"]
Probe = Literal["coverage", "gradient_rank", "gradient_snr", "diversity"]

FORMS: tuple[str, ...] = get_args(Form)
BASES: tuple[str, ...] = get_args(BasisKind)
DTYPES: tuple[str, ...] = get_args(ModelDtype)
PROBES: tuple[str, ...] = get_args(Probe)
LEARNED = "basis.safetensors"  # the file of directions in the folder that they were learned in
FILED = ("file", "learned")  # kinds of basis that are read from basis_file

CHOSEN = {  # the options of an adapter that are one of a few words
    "form": FORMS,
    "basis": BASES,
    "start": get_args(Start),
    "weight_from": get_args(WeightFrom),
    "universal_mode": get_args(UniversalMode),
    "basis_dtype": get_args(BasisDtype),
    "save_dtype": get_args(SaveDtype),
}


def about(told: str) -> dict[str, str]:
    """A field's description, under the name that transformers and peft read, and the one that pydantic reads."""
    return {"help": told, "description": told}


LARGEST = 20_000  # letters of a pattern, and repetitions that its {n} ask for
PATIENCE = 0.2  # seconds for one pattern on one name: a thousand times what an honest one takes


def compiled(pattern: str, option: str) -> Any:
    """The regular expression `pattern` of `option`; CTError where it is none, or too large to be read quickly."""
    repeats = math.prod(int(n[:9]) + 1 for n in regex.findall(r"\d+(?=\})", pattern))
    if len(pattern) > LARGEST or repeats > LARGEST:
        raise CTError(f"the {option} pattern {told(pattern)} is too long or repeats too often; write a simpler one.")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise CTError(f"the {option} pattern {told(pattern)} is no regular expression: {error}.") from None


def fits(pattern: str, name: str) -> bool:
    """Whether the regular expression `pattern` matches all of `name`; CTError where that takes too long."""
    try:
        return regex.fullmatch(pattern, name, timeout=PATIENCE) is not None
    except TimeoutError:
        raise CTError(
            f"the pattern {told(pattern)} takes too long on {name}; write it without nested repetition."
        ) from None


@dataclass
class AdapterOptions:
    """All that one chooses about an adapter, checked by `check`: CTConfig and the recipe of a run both have these."""

    k: int | dict[str, int] = field(
        default=64,
        metadata=about("Directions per matrix, or a mapping from module pattern (a regex on the name's end) to K."),
    )
    form: Form = field(
        default="diagonal",
        metadata=about(
            "`diagonal`: K amplitudes; `core`: a K x K matrix; `scores`: one whole factor, d_out x K; `gains`: a gain "
            "for each of d_out outputs and K amplitudes (as VeRA)."
        ),
    )
    basis: BasisKind = field(
        default="weight",
        metadata=about(
            "Where the directions come from; `gradient` and `activation` are made from data, `file` and `learned` are "
            "read from `basis_file`."
        ),
    )
    basis_file: str | None = field(
        default=None,
        metadata=about(
            "A safetensors file with directions, `<module>.u` (d_out, K) and `<module>.vh` (K, d_in), at least K of "
            "them: orthonormal ones, or what `ctsft basis learn` made, file or folder. Many adapters may share it. A "
            "path that is not there is looked for in the adapter's folder."
        ),
    )
    start: Start = field(
        default="zero",
        metadata=about(
            "`zero`: training starts from the base model; `mean`: from the mean of a `learned` basis' siblings."
        ),
    )
    weight_from: WeightFrom = field(
        default="top",
        metadata=about("Which singular directions of W: `top`, `bottom` or a seeded `random` choice."),
    )
    universal_mode: UniversalMode = field(
        default="residual",
        metadata=about("`residual`: W + D B, identity at the start. `replace`: W becomes its K-term form (paper 78)."),
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata=about("Names (or one regex) of modules to adapt; None: every Linear and Conv1D but the head."),
    )
    amplitude_dropout: float = field(
        default=0.0,
        metadata=about("Chance that a direction is dropped for a training step (paper 85's alpha dropout)."),
    )
    basis_dtype: BasisDtype = field(
        default="float32",
        metadata=about(
            "`bfloat16` rounds the directions once, when they are made: half the memory and, on a bfloat16 base, "
            "products in bfloat16. The adapter is then the rounded one everywhere, exports included."
        ),
    )
    store_basis: bool = field(
        default=False,
        metadata=about("Always write the basis, even where it can be made again from the base weights."),
    )
    save_dtype: SaveDtype = field(
        default="float32", metadata=about("How trained numbers are written: 4 or 2 bytes each.")
    )
    seed: int = field(default=0, metadata=about("Seed of the random basis and of weight_from='random'."))

    def check(self) -> None:
        """CTError for a value or a combination that makes no sense."""
        for k in self.k.values() if isinstance(self.k, Mapping) else [self.k]:
            if not isinstance(k, int) or isinstance(k, bool) or k < 1:
                raise CTError(f"k={told(k)} must be a whole number of directions, at least 1.")
        if self.k == {}:
            raise CTError("k is an empty mapping; give an int or {module pattern: int}.")
        for pattern in self.k if isinstance(self.k, Mapping) else ():
            compiled(pattern, "k")
        if not 0 <= self.amplitude_dropout < 1:
            raise CTError(f"amplitude_dropout={self.amplitude_dropout} must be at least 0 and below 1.")
        if self.basis in FILED and not self.basis_file:
            raise CTError(
                f"basis='{self.basis}' needs basis_file, the safetensors file that the directions are read from."
            )
        if self.basis_file is not None and self.basis not in FILED:
            kinds = " and ".join(f"basis='{name}'" for name in FILED)
            raise CTError(f"basis_file is read for {kinds} only; leave it out, or choose one of them.")
        if self.start == "mean" and (self.basis != "learned" or self.form not in ("diagonal", "core")):
            raise CTError(
                "start='mean' sets the amplitudes to the mean of the siblings that directions were learned from; it "
                "needs basis='learned' and form='diagonal' or 'core'."
            )
        if self.weight_from != "top" and self.basis != "weight":
            raise CTError(
                f"weight_from={self.weight_from!r} chooses among W's own directions; it needs basis='weight'."
            )
        if self.universal_mode == "replace" and (self.basis, self.form) != ("universal", "scores"):
            raise CTError(
                "universal_mode='replace' makes W its scores on the universal basis; it needs basis='universal' and "
                "form='scores'."
            )
