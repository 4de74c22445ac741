"""The one exception that a user's mistake raises, and the ways from a library's error to its one sentence."""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import requires
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

PLACES = 8  # wrong fields that a sentence names
JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}\N{SOFT HYPHEN}"  # unseen, and harmless: emoji need them


class CTError(ValueError):
    """A user's mistake, told in one sentence: what is wrong and what to do about it."""


def told(value: object, most: int = 100) -> str:
    """How a value that comes from a file is shown in a sentence: on one line, escaped, and no longer than `most`."""
    shown = repr(value)
    return shown if len(shown) <= most else f"{shown[:most]}..."


def extra_with(package: str) -> str:
    """The first extra of ctsft that asks for `package` (a name with - for _), as installed; `all` where none does."""
    asked = (re.match(r"([\w.-]+).*extra == .([\w-]+)", line) for line in requires("ctsft") or ())
    return next((found[2] for found in asked if found and found[1].lower().replace("_", "-") == package), "all")


@contextmanager
def needs(extra: str = "") -> Iterator[None]:
    """Around imports: a package that is not installed becomes one CTError, which names the extra that has it."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "ctsft").partition(".")[0].lower().replace("_", "-")
        if missing == "ctsft":
            raise
        raise CTError(
            f"{missing} is needed here and not installed: pip install 'ctsft[{extra or extra_with(missing)}]'."
        ) from None


def steers(character: str) -> bool:
    """Whether a character acts on a terminal or a page, in place of being seen: controls, marks that turn the direction
    of writing, line separators, halves of characters. Blanks of all widths do not, nor do the joiners of emoji."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in JOINERS


def shown(text: str, most: int = 200) -> str:
    """The beginning of a text that is not ours as it may stand in a sentence: on one line, nothing but characters."""
    return "".join("\N{REPLACEMENT CHARACTER}" if steers(c) else c for c in text[:most])


def wrong_fields(error: "ValidationError", values: Mapping[str, Any] | None = None, whole: str = "all") -> str:
    """What pydantic found wrong, a clause a place: `arms.0.seeds: Input should be ...; all: ...`.

    Given the `values` that were refused, a clause a field, with its value: `k=0 (Input should be ..., or: ...)`.
    `whole` names the place of what is wrong with all fields together. Long values are cut, and after a few places
    there is only their number.
    """
    found: dict[str, list[str]] = {}
    for e in error.errors():
        path = list(map(str, e["loc"])) or [whole]
        found.setdefault(path[0] if values else ".".join(path), []).append(e["msg"])
    clauses, given = [], values or {}
    for place, reasons in list(found.items())[:PLACES]:
        named, why = shown(place, 80), shown(", or: ".join(reasons))
        value = f"={shown(repr(given[place]), 80)} ({why})" if place in given else f": {why}"
        clauses.append(named + value)
    more = len(found) - PLACES
    return "; ".join(clauses) + (f"; and {more} more" if more > 0 else "")
