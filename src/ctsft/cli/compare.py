"""`ctsft compare`: our recommendation beside LoRA, VeRA and norm gains, on one's own data."""

import json
import math
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ctsft.cli.console import err, out_console, say
from ctsft.cli.options import default_threads, options_of, parsed
from ctsft.errors import CTError
from ctsft.pages.words import duration, number, size
from ctsft.plan.contest import Contest, make_contest, read_contest
from ctsft.plan.record import Comparison
from ctsft.plan.standing import GOAL, Standing, sentences, standings
from ctsft.progress import waiting


@options_of(Contest)
def compare(
    out: Annotated[Path, typer.Option(help="Folder of the comparison.")] = Path("runs/comparison"),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue in --out; --arms adds arms, --seeds and --rates may be other ones."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the comparison in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print comparison.json on standard output.")] = False,
    **given: Any,
) -> None:
    """Train our default, LoRA, VeRA and norm gains on your data, each at its own rate, and show them side by side."""
    values = parsed(given)
    if resume and overwrite:
        raise CTError("--resume continues in --out and --overwrite replaces what is there; give one of them.")
    known = out / "contest.json"
    if resume and known.exists():
        values = read_contest(known).values() | values
    contest = make_contest({"threads": default_threads()} | values)
    try:
        with waiting(err, "starting"):
            from ctsft.plan.compare import contested
        found = contested(contest, out, resume, overwrite, err)
    except KeyboardInterrupt:
        if known.exists() and read_contest(known) == contest:
            then = f"finished trials are kept; continue with: ctsft compare --resume --out {shlex.quote(str(out))}"
        else:
            then = "nothing was begun, so start it again with the same command"
        say(f"stopped; {then}", "yellow")
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(found.model_dump(), indent=1))
        return
    out_console.print(table_of(found))
    for told in sentences(found):
        out_console.print(told, markup=False, highlight=False)
    out_console.print(
        f"page {out / 'comparison.html'}   record {out / 'comparison.json'}", highlight=False, soft_wrap=True
    )


def loss(row: Standing) -> str:
    """The mean loss and its spread, or how many seeds diverged."""
    if row.diverged:
        return f"{row.diverged} of {len(row.arm.trials)} diverged"
    return f"{row.loss:.3f}" + ("" if row.spread is None else f" ± {row.spread:.3f}")


def share_of(row: Standing) -> str:
    """The part of the best arm's drop; a dash where nothing dropped."""
    return f"{row.share:.0%}" if math.isfinite(row.share) else number(None)


def table_of(found: Comparison) -> Table:
    """All arms side by side, the lowest loss first."""
    rows, seeds = standings(found), len(found.arms[0].trials)
    table = Table(title=f"{found.name}, {found.contest['steps']} steps, seeds: {seeds}", title_justify="left")
    heads = ["arm", "held-out loss", "of best drop", "numbers", "on disk", "memory", "time", f"to {GOAL}"]
    asked = found.before_accuracy is not None
    for head in [*heads, *(["right answers"] if asked else [])]:
        whole = head in ("arm", "held-out loss")
        table.add_column(head, justify="left" if head == "arm" else "right", no_wrap=whole)
    right = [f"{a.correct / a.total:.0%}" for a in [found.before_accuracy] if a]
    table.add_row("as it is", f"{found.before:.3f}", *[""] * (len(heads) - 2), *right)
    for row in rows:
        table.add_row(
            row.arm.name,
            loss(row),
            share_of(row),
            f"{row.trained:,}",
            size(row.adapter_bytes),
            size(row.memory_bytes),
            duration(row.seconds),
            number(None) if row.to_goal is None else duration(row.to_goal),
            *([f"{row.accuracy.correct / row.accuracy.total:.0%}" if row.accuracy else number(None)] if asked else []),
        )
    return table
