"""Pages from template files, which are package data beside this file: *.html, and the style.css that all include."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from ctsft.files import write_text
from ctsft.pages.plot import COLOURS
from ctsft.pages.words import duration, number, percent, size, visible, words


def environment() -> Environment:
    """Where templates are found: all that they insert is escaped and visible, and they have `words` as filters."""
    found = Environment(
        loader=PackageLoader("ctsft.pages", ""),
        autoescape=True,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters.update(number=number, percent=percent, size=size, duration=duration, words=words)
    return found


def write_page(
    template: str,
    path: Path,
    values: Mapping[str, Any],
    filters: Mapping[str, Callable[..., Any]] | None = None,
    palette: Mapping[str, tuple[str, str]] = COLOURS,
) -> None:
    """Write the page of `template` (a file name in this room) with `values` to `path`, whole or not at all.

    `filters` are added to those of `environment`; `palette` gives the style's variables, each in light and in dark.
    """
    here = environment()
    here.filters.update(filters or {})
    page = here.get_template(template).render(palette=palette, **values)
    write_text(Path(path), page.encode("utf-8", "replace").decode())  # JSON knows halves of characters, a file does not
