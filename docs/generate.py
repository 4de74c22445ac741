"""Write the pages that are made from the code: docs/commands.md, docs/options.md, docs/files.md. Run by `make docs`."""

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import typer.main

from ctsft.choices import CHOSEN, AdapterOptions
from ctsft.cli.main import app
from ctsft.cli.tune import WORSE

ROOT = Path(__file__).parents[1]
MADE = "<!-- Made by `make docs`; do not edit. -->\n\n"
FOLDERS = {  # of Python files that the map shows, beside the rooms of the package
    "benchmarks": "the measured tables of `benchmarks/RESULTS.md`; `make bench`",
    "scripts": "what makes or fetches models and texts",
    "packages/ctsft-photonic/src/ctsft_photonic": "PhotonicGPT's weights, tokenizer and card, a package of their own",
    "examples": "scripts and a notebook to start from",
    "docs": "this site; `make docs`",
}

EXITS = {
    0: "done",
    2: "a mistake of yours, told in one sentence",
    WORSE: "`ctsft tune` ended with a higher held-out loss than it began with, and `--allow-worse` was not given",
    130: "stopped with Ctrl-C; what was finished is kept",
}


def cell(text: str) -> str:
    """`text` on one line of a Markdown table."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|").replace("<", "&lt;")


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# ------------------------------------------------------------------------------------------------------------- commands


def commands() -> list[tuple[str, Any]]:
    """Every command of ctsft by its full name, groups left out."""

    def below(name: str, command: Any) -> list[tuple[str, Any]]:
        subcommands = getattr(command, "commands", None)
        if subcommands is None:
            return [(name, command)]
        return [found for word, one in subcommands.items() for found in below(f"{name} {word}", one)]

    return below("ctsft", typer.main.get_command(app))


def option_row(option: Any) -> tuple[str, str]:
    """An option or argument as it is written, and what it is for."""
    if option.param_type_name == "argument":
        return f"`{option.name.upper()}`", cell(option.help or "")
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    told = cell(option.help or "")
    default = option.default
    if not (default is None or isinstance(default, bool) or callable(default) or default == () or "(default:" in told):
        told = f"{told} (default: {default})".strip()
    return names, f"`{cell(option.metavar)}` {told}" if option.metavar else told


def commands_page() -> str:
    parts = [
        MADE
        + "# Commands\n\nEvery command, its arguments and its options, as `--help` tells them.\n\n"
        + table(("exit code", "meaning"), [(f"`{code}`", told) for code, told in EXITS.items()])
    ]
    for name, command in commands():
        parts.append(f"## {name}\n\n{command.help}\n")
        if command.epilog:
            parts.append("```bash\n" + command.epilog.removeprefix("Example: ") + "\n```\n")
        shown = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
        panels = dict.fromkeys(["", *(getattr(p, "rich_help_panel", None) or "" for p in shown)])  # "": of all of it
        for panel in panels:
            rows = [option_row(p) for p in shown if (getattr(p, "rich_help_panel", None) or "") == panel]
            parts += [f"**{panel}**\n"] if panel else []
            parts += [table(("argument or option", "what it does"), rows)] if rows else []
    return "\n".join(parts)


# -------------------------------------------------------------------------------------------------------------- options


def options_page() -> str:
    """Every field of CTConfig that is ours, its default and what it chooses."""
    rows = []
    for one in dataclasses.fields(AdapterOptions):
        told, words = one.metadata["help"], [f"`{word}`" for word in CHOSEN.get(one.name, ())]
        if not all(word in told for word in words):
            told += f" One of {', '.join(words)}."
        rows.append((f"`{one.name}`", f"`{one.default!r}`", cell(told)))
    return (
        MADE + "# Options of an adapter\n\nThe fields of `ctsft.CTConfig`, each with its default. `ctsft tune` has the "
        "same options, see [Commands](commands.md), with other defaults: `basis` random, `basis_dtype` auto, "
        "`save_dtype` float16, and `k` auto in long runs.\n\n" + table(("field", "default", "what it chooses"), rows)
    )


# ---------------------------------------------------------------------------------------------------------------- files


def first_sentence(path: Path) -> str:
    """The first sentence of a file's docstring; it says what the file is for."""
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = re.sub(r"\s+", " ", told.split("\n\n")[0])
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0]


def files_page() -> str:
    parts = [
        MADE
        + "# File map\n\nOne line a file: the first sentence of its docstring. [Architecture](architecture.md) tells "
        "how the rooms stand to each other.\n"
    ]
    package = ROOT / "src" / "ctsft"
    rooms = [package, *sorted(p.parent for p in package.glob("**/__init__.py") if p.parent != package)]
    for folder in [*rooms, *(ROOT / name for name in FOLDERS)]:
        paths = sorted(p for p in folder.glob("*.py") if p.name != "__init__.py" or folder not in rooms[1:])
        if not paths:
            continue
        where = folder.relative_to(ROOT).as_posix()
        told = FOLDERS.get(where) or first_sentence(folder / "__init__.py").rstrip(".")
        told = "the small files that all rooms use" if folder == package else told
        rows = [(f"`{where}/{p.name}`", cell(first_sentence(p))) for p in paths]
        parts.append(f"## {where}/\n\n{told[0].upper()}{told[1:]}.\n\n" + table(("file", "what it holds"), rows))
    return "\n".join(parts)


PAGES = {"commands.md": commands_page, "options.md": options_page, "files.md": files_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")
