"""The one exception that a user's mistake raises, and the ways from a library's error to its one sentence."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class CTError(ValueError):
    """A user's mistake, told in one sentence: what is wrong and what to do about it."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports: a package that is not installed becomes one CTError, which names the extra that has it."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "ctsft").partition(".")[0]
        if missing == "ctsft":
            raise
        raise CTError(
            f"{missing.replace('_', '-')} is needed here and not installed: pip install 'ctsft[{extra}]'."
        ) from None


def wrong_fields(error: "ValidationError", values: Mapping[str, Any] | None = None, whole: str = "all") -> str:
    """What pydantic found wrong, a clause a place: `arms.0.seeds: Input should be ...; all: ...`.

    Given the `values` that were refused, a clause a field, with its value: `k=0 (Input should be ..., or: ...)`.
    `whole` names the place of what is wrong with all fields together.
    """
    found: dict[str, list[str]] = {}
    for e in error.errors():
        path = list(map(str, e["loc"])) or [whole]
        found.setdefault(path[0] if values else ".".join(path), []).append(e["msg"])
    given = values or {}
    return "; ".join(
        f"{place}={given[place]!r} ({', or: '.join(why)})" if place in given else f"{place}: {', or: '.join(why)}"
        for place, why in found.items()
    )
