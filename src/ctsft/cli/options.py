"""Options of a command out of the fields of what it does: a recipe, a lesson."""

import dataclasses
import inspect
import os
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from ctsft.choices import BASES
from ctsft.errors import CTError, shown
from ctsft.files import cores

FIRST = "Model and data"  # the heading that comes first in the help
NAMES = {"target_modules": "target"}  # options that are not called as their field
METAVARS = {"k": "K|PATTERN=K,...|auto", "arms": "ARM,...", "lr": "RATE|auto", "basis": "|".join((*BASES, "FOLDER"))}
DEFAULTS = {"threads": "OMP_NUM_THREADS, else all cores"}


def parse_k(text: str) -> int | dict[str, int] | str:
    """`64`, or `q_proj=64,.*=16`: K by module pattern, the first that fits counts; or `auto`."""
    if text == "auto":
        return text
    try:
        if "=" not in text:
            return int(text)
        return {p: int(k) for p, _, k in (part.rpartition("=") for part in text.split(","))}
    except ValueError:
        raise CTError(f"--k {shown(text)!r} is neither a number nor pattern=number,pattern=number nor auto.") from None


def parse_lr(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise CTError(f"--lr {shown(text)!r} is neither a number nor auto.") from None


def parse_arms(given: list[str]) -> list[str]:
    """Names between commas, of one option or of several."""
    return [name.strip() for text in given for name in text.split(",")]


PARSERS: dict[str, Callable[[Any], Any]] = {"k": parse_k, "lr": parse_lr, "arms": parse_arms}


def parsed(given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as the values of their fields."""
    said = {name: value for name, value in given.items() if value is not None}
    return {n: PARSERS[n](v) if n in PARSERS else v for n, v in said.items()}


def default_threads() -> int:
    """OMP_NUM_THREADS where it is set, else the cores this process may use."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else cores()


def flat(hint: Any) -> list[Any]:
    """The types and words that a field's type allows: of `int | Literal["auto"] | None` int, "auto" and None."""
    if get_origin(hint) is Annotated:
        return flat(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [found for part in get_args(hint) for found in flat(part)]
    return list(get_args(hint)) if get_origin(hint) is Literal else [get_origin(hint) or hint]


def option_of(field: Any, hint: Any) -> inspect.Parameter:
    """The option of a dataclass' `field`, of type `hint`; not given it is None."""
    name, allowed = field.name, [kind for kind in flat(hint) if kind is not type(None)]
    words = all(isinstance(kind, str) for kind in allowed)
    kind: Any = list[str] if allowed == [list] else allowed[0] if len(allowed) == 1 and not words else str
    told = field.metadata["description"].replace("`", "")
    if field.default is not None and kind is not bool:
        unsaid = field.metadata.get("unsaid") or DEFAULTS.get(name, str(field.default).removesuffix(".0"))
        told += f" (default: {unsaid})"
    declared = typer.Option(
        "--" + NAMES.get(name, name).replace("_", "-"),
        help=told,
        metavar=field.metadata.get("metavar", METAVARS.get(name, "|".join(allowed) if words else None))
        if kind in (str, list[str])
        else None,
        rich_help_panel=group(field),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, declared]
    )


def group(field: Any) -> str:
    """The heading that a field stands under in the help."""
    return str(field.metadata.get("group", "Adapter"))


def options_of(asked: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command gets an option for every field of the dataclass `asked`, in place of its `**given`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(asked, include_extras=True)
        all_fields = sorted(dataclasses.fields(asked), key=lambda field: group(field) != FIRST)
        fields = [option_of(field, hints[field.name]) for field in all_fields]
        signature = inspect.signature(command).parameters.values()
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature if p.name != "given"]
        command.__signature__ = inspect.Signature([*fields, *own])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*fields, *own]}
        return command

    return decorate
