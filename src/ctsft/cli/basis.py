"""`ctsft basis`: directions that are learned from siblings, and what such a file holds."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ctsft.choices import LEARNED
from ctsft.cli.console import err, out_console, say
from ctsft.cli.options import default_threads, options_of, parsed
from ctsft.errors import CTError
from ctsft.pages.words import duration, number, size, words
from ctsft.progress import waiting
from ctsft.tune.lesson import Lesson, make_lesson, read_lesson

basis = typer.Typer(
    help="Directions learned from sibling tasks, which many adapters share: learn them, and look at them.",
    no_args_is_help=True,
)


@basis.command(epilog="Example: ctsft basis learn --model smollm2-135m --data a.jsonl b.jsonl c.jsonl --out directions")
@options_of(Lesson)
def learn(
    more: Annotated[list[str] | None, typer.Argument(help="Further siblings, after those of --data.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the directions.")] = Path("runs/directions"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue in --out, with the options of its start.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was learned as JSON.")] = False,
    **given: Any,
) -> None:
    """Learn directions from sibling tasks, along which a few amplitudes serve a task like them."""
    values = parsed(given)
    if named := [*values.get("data", ()), *(more or ())]:
        values["data"] = named
    if resume and overwrite:
        raise CTError("--resume continues in --out and --overwrite replaces what is there; give one of them.")
    known = out / "lesson.json"
    if resume and known.exists():
        values = read_lesson(known).values() | values
    lesson = make_lesson({"threads": default_threads()} | values)
    try:
        with waiting(err, "starting"):
            from ctsft.tune.learn import learn as teach
        learned = teach(lesson, out, resume, overwrite, err)
    except KeyboardInterrupt:
        if known.exists() and read_lesson(known) == lesson:
            then = f"continue with: ctsft basis learn --resume --out {shlex.quote(str(out))}"
        else:
            then = "nothing was begun, so start it again with the same command"
        say(f"stopped; {then}", "yellow")
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(told(learned, out), indent=1))
        return
    show_siblings(learned)
    place = shlex.quote(str(out))
    facts = learned.facts
    out_console.print(
        f"directions {out / LEARNED} ({size((out / LEARNED).stat().st_size)}), learned in {duration(facts.seconds)}\n"
        f"next: ctsft tune --model {shlex.quote(lesson.model)} --data NEW.jsonl --basis {place} --k {learned.k}\n"
        f"look: ctsft basis show {place}",
        highlight=False,
        soft_wrap=True,
    )


@basis.command(epilog="Example: ctsft basis show directions")
def show(
    folder: Annotated[Path, typer.Argument(help="Folder of learned directions, or the file in it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what directions were learned from, what the file holds, and how far the siblings agree."""
    from ctsft.adapter.learned import Learned

    learned = Learned.read(folder)
    found = told(learned, folder)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    facts = learned.facts
    out_console.print(
        f"{found['matrices']} matrices of {facts.model or 'a model'} ({facts.base}), K = {words(facts.k)}"
        f"{', nested' if facts.nested else ''}: {size(found['bytes'])}\n"
        f"learned from {len(facts.siblings)} siblings in {facts.steps} steps and {duration(facts.seconds)}, seed "
        f"{facts.seed}",
        highlight=False,
        soft_wrap=True,
    )
    show_siblings(learned)
    if not found["agreement"]:
        return
    table = Table(title="How far siblings agree", title_justify="left")
    for column in ("kind of matrix", "mean cosine of amplitudes", "with random signs"):
        table.add_column(column, justify="left" if column == "kind of matrix" else "right")
    for kind, (cosine, spread) in found["agreement"].items():
        table.add_row(kind, f"{cosine:.3f}", f"0 ± {spread:.3f}")
    out_console.print(table)


def told(learned: Any, place: Path) -> dict[str, Any]:
    """All that is told of learned directions, as JSON values."""
    file = place / LEARNED if place.is_dir() else place
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "matrices": len(learned.u),
        **asdict(learned.facts),
        "agreement": learned.agreement(),
    }


def show_siblings(learned: Any) -> None:
    """A table of the siblings: what each was trained on, and its held-out loss before and after."""
    table = Table(title="Siblings", title_justify="left")
    for column in ("sibling", "rows trained on", "tokens", "held-out loss before", "after"):
        table.add_column(column, justify="left" if column == "sibling" else "right")
    for one in learned.facts.siblings:
        table.add_row(one.name, f"{one.rows:,}", f"{one.tokens:,}", number(one.before, ".3f"), number(one.after, ".3f"))
    out_console.print(table)
