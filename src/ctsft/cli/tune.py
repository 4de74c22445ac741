"""`ctsft tune`: its options are the fields of the recipe, and what it shows is the record."""

import inspect
import json
import os
import shlex
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from rich.table import Table

from ctsft.cli.console import err, out_console, printable, say
from ctsft.errors import CTError, shown
from ctsft.files import cores
from ctsft.pages.words import duration, size
from ctsft.progress import waiting
from ctsft.tune.recipe import FIELDS, Recipe, make_recipe, read_recipe
from ctsft.tune.record import RunRecord, Sample

WORSE = 3  # exit code of a run whose held-out loss rose
NAMES = {"target_modules": "target"}  # options that are not called as their field
METAVARS = {"k": "K|PATTERN=K,...", "lr": "RATE|auto"}
DEFAULTS = {"threads": "OMP_NUM_THREADS, else all cores"}


def parse_k(text: str) -> int | dict[str, int]:
    """`64`, or `q_proj=64,.*=16`: K by module pattern, the first that fits counts."""
    try:
        if "=" not in text:
            return int(text)
        return {p: int(k) for p, _, k in (part.rpartition("=") for part in text.split(","))}
    except ValueError:
        raise CTError(f"--k {shown(text)!r} is neither a number nor pattern=number,pattern=number.") from None


def parse_lr(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise CTError(f"--lr {shown(text)!r} is neither a number nor auto.") from None


PARSERS: dict[str, Callable[[str], Any]] = {"k": parse_k, "lr": parse_lr}


def default_threads() -> int:
    """OMP_NUM_THREADS where it is set, else the cores this process may use."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else cores()


# ---- options from fields


def flat(hint: Any) -> list[Any]:
    """The types and words that a field's type allows: of `int | Literal["auto"] | None` int, "auto" and None."""
    if get_origin(hint) is Annotated:
        return flat(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [found for part in get_args(hint) for found in flat(part)]
    return list(get_args(hint)) if get_origin(hint) is Literal else [get_origin(hint) or hint]


def option_of(name: str, hint: Any) -> inspect.Parameter:
    """The option of the recipe's field `name`, of type `hint`; not given it is None."""
    field = Recipe.__dataclass_fields__[name]
    allowed = [kind for kind in flat(hint) if kind is not type(None)]
    words = all(isinstance(kind, str) for kind in allowed)
    kind: Any = list[str] if allowed == [list] else allowed[0] if len(allowed) == 1 and not words else str
    told = field.metadata["description"].replace("`", "")
    if field.default is not None and kind is not bool:
        told += f" (default: {DEFAULTS.get(name, str(field.default).removesuffix('.0'))})"
    declared = typer.Option(
        "--" + NAMES.get(name, name).replace("_", "-"),
        help=told,
        metavar="|".join(allowed) if words else METAVARS.get(name),
        rich_help_panel=group(name),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, declared]
    )


def group(name: str) -> str:
    """The heading that the recipe's field `name` stands under in the help."""
    return Recipe.__dataclass_fields__[name].metadata.get("group", "Adapter")


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with an option for every field of the recipe, in place of its `**given`."""
    hints = get_type_hints(Recipe, include_extras=True)
    fields = [option_of(name, hints[name]) for name in sorted(FIELDS, key=lambda n: group(n) != "Model and data")]
    own = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(command).parameters.values() if p.name != "given"]
    command.__signature__ = inspect.Signature([*fields, *own])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*fields, *own]}
    return command


@recipe_options
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
    values = {n: PARSERS[n](v) if n in PARSERS else v for n, v in given.items() if v is not None}
    if resume and overwrite:
        raise CTError("--resume continues the run in --out and --overwrite replaces it; give one of them.")
    known = out / "recipe.json"
    if resume and known.exists():
        values = read_recipe(known).values() | values
    recipe = make_recipe({"threads": default_threads()} | values)

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
    if as_json:
        print(json.dumps(run.values(), indent=1))
    else:
        show_run(run, out)
    if run.warning:
        say(run.warning, "red")
        if not allow_worse:
            raise typer.Exit(WORSE)


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
        f"adapter {out / 'adapter'}   record {out / 'run.json'}   report {out / 'report.html'}", highlight=False
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
