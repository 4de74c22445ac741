"""`ctsft tune`: its options are the fields of the recipe, and what it shows is the record."""

import json
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ctsft.choices import BASES, LEARNED
from ctsft.cli.console import err, out_console, printable, say
from ctsft.cli.options import default_threads, options_of, parsed
from ctsft.cli.plan import headline, keep
from ctsft.errors import CTError, shown
from ctsft.pages.words import duration, size
from ctsft.plan.question import FIELDS, make_question
from ctsft.plan.told import Plan
from ctsft.progress import waiting
from ctsft.tune.recipe import ADAPTER, Recipe, make_recipe, read_recipe
from ctsft.tune.record import RunRecord, Sample

PLANNED = {"k", "form", "basis", "basis_file", "basis_dtype", "save_dtype", "store_basis", "seed"}  # with --k auto
WORSE = 3  # exit code of a run whose held-out loss rose


def with_directions(values: dict[str, Any]) -> dict[str, Any]:
    """`values` of a recipe, where the basis may be a path in place of a kind: of directions that were learned."""
    basis = values.get("basis")
    if basis is None or basis in BASES:
        return values
    place = Path(basis).expanduser()
    if not (place.is_file() or (place / LEARNED).is_file()):
        raise CTError(
            f"--basis {shown(basis)!r} is neither a kind of basis ({', '.join(BASES)}) nor a folder of learned "
            "directions; ctsft basis learn makes one."
        )
    return {"basis_file": os.path.abspath(place)} | values | {"basis": "learned"}


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
    planned = None
    if resume and known.exists():
        if values.get("k") == "auto":
            del values["k"]  # what was chosen then stays
        values = read_recipe(known).values() | values
    values = {"threads": default_threads()} | values
    if values.get("k") == "auto":
        planned = plan_of(values, out, resume, overwrite)
        values |= chosen(planned)
    recipe = make_recipe(values)

    try:
        with waiting(err, "starting"):
            from ctsft.tune import run as train
        run = train.tune(recipe, out, resume, overwrite, err)
    except KeyboardInterrupt as stop:  # Stopped is one
        if known.exists() and not (out / "run.json").exists() and read_recipe(known) == recipe:
            then = f"continue with: ctsft tune --resume --out {shlex.quote(str(out))}"
        else:
            then = "nothing was begun, so start it again with the same command"
        say(f"{str(stop) or 'stopped'}; {then}", "yellow")
        raise typer.Exit(130) from None
    if planned:
        keep(planned, out)
    if as_json:
        print(json.dumps(run.values(), indent=1))
    else:
        show_run(run, out)
    if run.warning:
        say(run.warning, "red")
        if not allow_worse:
            raise typer.Exit(WORSE)


def plan_of(values: dict[str, Any], out: Path, resume: bool, overwrite: bool) -> Plan:
    """The plan for a run of `values` whose K is auto: its own form and basis at several K, and no peers."""
    fixed = make_recipe({n: v for n, v in values.items() if n != "k"})
    other = [n for n in ADAPTER if n not in PLANNED and getattr(fixed, n) != Recipe.__dataclass_fields__[n].default]
    if other:
        raise CTError(f"--k auto tries adapters without {', '.join(other)}; leave that out, or give a number for --k.")
    with waiting(err, "starting"):
        from ctsft.plan.plan import answered
        from ctsft.tune.folder import check_folder
    check_folder(fixed, out, resume, overwrite)
    where = "" if fixed.basis == "random" else f"@{fixed.basis_file or fixed.basis}"
    asked = {n: v for n, v in fixed.values().items() if n in FIELDS and n != "basis"}
    found = answered(make_question(asked | {"arms": [fixed.form + where]}), err)
    say(headline(found), "bold")
    for sentence in found.decision.why:
        say(sentence, "dim")
    return found


def chosen(found: Plan) -> dict[str, Any]:
    """The fields of the recipe that the plan decides: K, and the rate where another than the measured one is better."""
    option = found.chosen
    assert option  # without a budget one always fits
    k = int(option.candidate.partition("@")[0].partition("-")[2])
    return {"k": k} | ({"lr": option.rate} if option.again else {})


def show_run(run: RunRecord, out: Path) -> None:
    """The result of a run for a person: scores, generations, costs, files."""
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
        f"adapter {out / 'adapter'}   record {out / 'run.json'}   report {out / 'report.html'}",
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
