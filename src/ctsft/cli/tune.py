"""`ctsft tune`: its options are the fields of the recipe, and what it shows is the record."""

import json
import os
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ctsft.choices import BASES, LEARNED
from ctsft.cli.console import err, out_console, printable, say
from ctsft.cli.options import default_threads, options_of, parsed
from ctsft.cli.plan import headline, keep
from ctsft.errors import CTError, shown
from ctsft.pages.words import duration, size
from ctsft.progress import waiting
from ctsft.tune.recipe import Recipe, make_recipe, read_recipe
from ctsft.tune.record import RunRecord, Sample

if TYPE_CHECKING:
    from ctsft.plan.automatic import Chosen

WORSE = 3  # exit code of a run whose held-out loss rose


def with_directions(values: dict[str, Any]) -> dict[str, Any]:
    """`values` of a recipe, where the basis may be a path in place of a kind: of directions that were learned."""
    basis = values.get("basis")
    if basis is None or basis in BASES:
        return values
    if "basis_file" in values:
        raise CTError(f"--basis {shown(basis)!r} says where the directions lie; leave --basis-file out.")
    place = Path(basis).expanduser()
    if not (place.is_file() or (place / LEARNED).is_file()):
        raise CTError(
            f"--basis {shown(basis)!r} is neither a kind of basis ({', '.join(BASES)}) nor a folder of learned "
            "directions; ctsft basis learn makes one."
        )
    return values | {"basis": "learned", "basis_file": os.path.abspath(place)}


@options_of(Recipe)
def tune(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/latest"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out with its own recipe.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    allow_worse: Annotated[
        bool, typer.Option("--allow-worse", help="Exit with 0, and not with 3, also where the held-out loss rose.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print run.json on standard output.")] = False,
    **given: Any,
) -> None:
    """Fine-tune a model, score it before and after, and write adapter, record and report."""
    values = with_directions(parsed(given))
    if resume and overwrite:
        raise CTError("--resume continues the run in --out and --overwrite replaces it; give one of them.")
    known = out / "recipe.json"
    always, form = values.get("k") == "auto", "form" in values
    if always:
        del values["k"]
    if resume and known.exists():
        values = read_recipe(known).values() | values  # a K that was chosen then stays
    recipe = make_recipe({"threads": default_threads()} | values)
    planned = found = None

    try:
        with waiting(err, "starting"):
            from ctsft.plan.automatic import automatic
            from ctsft.tune import run as train
            from ctsft.tune.folder import check_folder
        if "k" not in values:
            check_folder(recipe, out, resume, overwrite)
            chosen = automatic(recipe, err, form, always)
            recipe, planned, found = chosen.recipe, chosen.plan, chosen.found
            show_choice(chosen)
        begun = partial(keep, planned, out) if planned else None
        run = train.tune(recipe, out, resume, overwrite, err, found, begun)
    except KeyboardInterrupt as stop:  # Stopped is one
        if known.exists() and not (out / "run.json").exists() and read_recipe(known) == recipe:
            then = f"continue with: ctsft tune --resume --out {shlex.quote(str(out))}"
        else:
            then = "nothing was begun, so start it again with the same command"
        say(f"{str(stop) or 'stopped'}; {then}", "yellow")
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(run.values(), indent=1))
    else:
        show_run(run, out, (out / "plan.html").exists())
    if run.warning:
        say(run.warning, "red")
        if not allow_worse:
            raise typer.Exit(WORSE)


def show_choice(chosen: "Chosen") -> None:
    """What is trained where no K was given, and why."""
    if chosen.plan:
        say(headline(chosen.plan), "bold")
    for sentence in chosen.plan.decision.why if chosen.plan else [chosen.why]:
        say(sentence, "dim")


def show_run(run: RunRecord, out: Path, planned: bool = False) -> None:
    """The result of a run for a person: scores, generations, costs, files; `planned`: a plan chose its K."""
    if run.after.accuracy and run.samples:
        out_console.print(
            "Held-out questions, in turn the first that came out right and the first that came out wrong:"
        )
    for sample in run.samples:
        show_sample(sample)
    out_console.print(score_table(run))
    costs = run.costs
    out_console.print(
        f"cost: {costs.trainable:,} trained numbers, adapter {size(costs.adapter_bytes)}, extra memory "
        f"{size(costs.extra_memory_bytes)}, training {duration(costs.seconds)} (one seed: no spread)",
        highlight=False,
    )
    out_console.print(
        f"adapter {out / 'adapter'}   record {out / 'run.json'}   report {out / 'report.html'}"
        + (f"   plan {out / 'plan.html'}" if planned else ""),
        highlight=False,
        soft_wrap=True,
    )


def show_sample(sample: Sample) -> None:
    """A prompt, what was wanted, and what was written before and after, cut to 600 characters."""
    out_console.rule(style="dim")
    shown = {
        "prompt": (sample.prompt, None),
        "wanted": (sample.reference, None),
        "before": (sample.before, sample.before_ok),
        "after": (sample.after, sample.after_ok),
    }
    for label, (text, ok) in shown.items():
        mark = "" if ok is None else "[green]right[/] " if ok else "[red]wrong[/] "
        out_console.print(f"[bold]{label:7}[/] {mark}", end="", markup=True)
        out_console.print(printable(text if len(text) < 600 else text[:600] + " ..."), markup=False, highlight=False)


def score_table(run: RunRecord) -> Table:
    """The scores before and after, side by side."""
    table = Table(title=run.name, title_justify="left")
    for column in ("held out", "before", "after"):
        table.add_column(column, justify="left" if column == "held out" else "right")
    both = (run.before, run.after)
    table.add_row("loss, nats per token", *(f"{side.heldout_loss:.3f}" for side in both))
    asked = [side.accuracy for side in both if side.accuracy]
    if len(asked) == len(both):
        table.add_row("execution accuracy", *(f"{a.correct} of {a.total}" for a in asked))
        table.add_row("95% interval", *(f"{a.low:.0%} to {a.high:.0%}" for a in asked))
    return table
