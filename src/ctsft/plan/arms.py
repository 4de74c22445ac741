"""Arms: what can be compared, one entry of one table each; a candidate is an arm with its K and its directions."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ctsft.choices import BASES, FILED, LEARNED
from ctsft.errors import CTError, shown

NAME = re.compile(r"(?P<method>[a-z]+)(-(?P<k>[1-9]\d{0,6}))?(@(?P<basis>.+))?")
DEFAULT = ("diagonal-64", "gains-64", "lora-1", "lora-8", "vera-256", "norms")


@dataclass(frozen=True)
class Arm:
    """kind: a form of ours, a method of peft, or the vectors that a model has already; all but the last have a K."""

    kind: Literal["form", "peer", "vectors"]
    told: str


ARMS = {
    "diagonal": Arm("form", "K amplitudes a matrix"),
    "core": Arm("form", "K x K numbers a matrix"),
    "gains": Arm("form", "K amplitudes and a gain for every output"),
    "scores": Arm("form", "K numbers for every output"),
    "lora": Arm("peer", "LoRA of rank K"),
    "vera": Arm("peer", "VeRA of rank K"),
    "norms": Arm("vectors", "the model's own norm gains and biases"),
}


@dataclass(frozen=True)
class Candidate:
    """An arm of `ARMS` at its `k`; a form of ours also has a basis, whose directions may be read from `basis_file`."""

    method: str
    k: int = 0
    basis: str = "random"
    basis_file: str | None = None

    @property
    def arm(self) -> Arm:
        return ARMS[self.method]

    @property
    def name(self) -> str:
        """As `candidate` reads it: `diagonal-64`, `diagonal-64@weight`, `lora-8`, `norms`."""
        where = "" if self.basis == "random" else f"@{self.basis_file or self.basis}"
        return self.method + (f"-{self.k}" if self.k else "") + where


def candidate(name: str) -> Candidate:
    """The candidate called `name`: METHOD-K, and for a form of ours METHOD-K@BASIS, a kind of basis or a folder of
    learned directions; CTError where there is none."""
    found = NAME.fullmatch(name)
    if not found or found["method"] not in ARMS:
        raise CTError(
            f"there is no arm {shown(name)!r}; write one of {', '.join(ARMS)}, all but norms with a K: diagonal-64."
        )
    method, k, basis = found["method"], int(found["k"] or 0), found["basis"]
    kind = ARMS[method].kind
    if (kind == "vectors") == bool(k):
        raise CTError(f"{method} has no K; write {method}." if k else f"{method} needs a K; write {method}-64.")
    if basis is None:
        return Candidate(method, k)
    if kind != "form":
        raise CTError(f"{method} has no basis; write {name.partition('@')[0]}.")
    if basis in BASES and basis not in FILED:
        return Candidate(method, k, basis)
    place = Path(basis).expanduser()
    if not (place.is_file() or (place / LEARNED).is_file()):
        kinds = ", ".join(b for b in BASES if b not in FILED)
        raise CTError(
            f"{shown(basis)!r} in {shown(name)!r} is neither a kind of basis ({kinds}) nor learned directions."
        )
    return Candidate(method, k, "learned", str(place.absolute()))
