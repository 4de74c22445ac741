"""Numbers and settings in words, the same on every page and in the terminal."""

import re

from ctsft.errors import steers

PLACE = re.compile(r"(?:.*?\.(\d+)\.)?(.+)")  # "model.layers.3.mlp.up_proj": the block's index and the kind of matrix


def number(value: object, form: str = ",") -> str:
    """A number in `form`; a dash where there is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "\N{EN DASH}"
    return format(value, form)


def percent(share: float) -> str:
    """A share with three digits, however small."""
    return f"{share * 100:.3g}%"


def size(value: float) -> str:
    """Bytes for people: 54.0 kB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people: 4 min 0 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def words(value: object) -> str:
    """A setting of the recipe in words."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {words(item)}" for key, item in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def visible(value: object) -> object:
    """A text with its characters that would act on the page shown as their codes (see `steers`); all else as it is."""
    if type(value) is not str:  # what is marked as HTML is a str of its own kind
        return value
    return "".join(
        c if c in "\n\t" or not steers(c) else c.encode("unicode_escape", "surrogatepass").decode()
        for c in value.replace("\r\n", "\n")
    )


def place(name: str) -> tuple[int | None, str]:
    """The block's index in a matrix' name (None outside the blocks) and the kind, the same for all experts."""
    block, kind = PLACE.fullmatch(name).groups()  # type: ignore[union-attr]
    return None if block is None else int(block), re.sub(r"\.\d+\.", ".*.", kind)
