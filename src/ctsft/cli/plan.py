"""`ctsft plan`: its options are the fields of the question, and what it shows is the plan."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ctsft.cli.console import err, out_console, say
from ctsft.cli.options import default_threads, options_of, parsed
from ctsft.errors import CTError
from ctsft.files import write_json
from ctsft.pages.words import duration, size
from ctsft.plan.choose import Option
from ctsft.plan.question import Question, make_question
from ctsft.plan.told import Plan
from ctsft.progress import waiting


@options_of(Question)
def plan(
    out: Annotated[Path | None, typer.Option(help="Folder for plan.json and plan.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON on standard output.")] = False,
    **given: Any,
) -> None:
    """Say which adapter to train: K, form, rate and steps for a budget, by short races on your own rows."""
    question = make_question({"threads": default_threads()} | parsed(given))
    if out is not None and out.exists() and not out.is_dir():
        raise CTError(f"{out} is no folder; give another --out.")
    try:
        with waiting(err, "starting"):
            from ctsft.plan.plan import answered
        found = answered(question, err)
    except KeyboardInterrupt:
        say("stopped; nothing was written", "yellow")
        raise typer.Exit(130) from None
    if out is not None:
        keep(found, out)
    if as_json:
        print(json.dumps(found.model_dump(), indent=1))
    else:
        show_plan(found, out)


def keep(found: Plan, out: Path) -> None:
    """plan.json and plan.html in folder `out`."""
    from ctsft.plan.frontier import write_plan

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "plan.json", found.model_dump())
    write_plan(found, out / "plan.html")


def show_plan(found: Plan, out: Path | None) -> None:
    """The plan for a person: the frontier, what is recommended and why, and how to go on."""
    out_console.print(plan_table(found))
    out_console.print(headline(found), style="bold", highlight=False)
    for sentence in (*found.decision.why, *found.measured):
        out_console.print(sentence, markup=False, highlight=False)
    out_console.print(
        f"planning took {duration(found.seconds)}, {found.share:.0%} of the training it plans", highlight=False
    )
    if found.tune:
        out_console.print(f"next: {found.tune}", markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        out_console.print(f"plan {out / 'plan.json'}   page {out / 'plan.html'}", highlight=False, soft_wrap=True)


def headline(found: Plan) -> str:
    """The answer in one line."""
    chosen, verdict = found.chosen, found.decision.verdict
    if chosen is None:
        return "Nothing fits this budget."
    rate = "" if chosen.rate is None else f", rate {chosen.rate:g}"
    what = f"{chosen.candidate}, {chosen.steps:,} steps{rate}"
    return f"Recommended: {what}" if verdict == "recommended" else f"Cannot tell; the usual choice is {what}"


def plan_table(found: Plan) -> Table:
    """All arms, the smallest first; peers are yardsticks."""
    table = Table(title=f"{found.model} on {found.data}, untouched {found.start:.3f}", title_justify="left")
    for column in ("arm", "numbers", "file", "training", "loss", "90% range", ""):
        left = column in ("arm", "")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "", overflow="fold")
    for o in found.options:
        style = "bold" if o.candidate == found.decision.candidate else None if o.ours else "dim"
        cells = (f"{o.trained:,}", size(o.adapter_bytes), duration(o.seconds), f"{o.loss:.3f}")
        table.add_row(o.candidate, *cells, f"{o.low:.2f} to {o.high:.2f}", remark(found, o), style=style)
    return table


def remark(found: Plan, option: Option) -> str:
    """What sets an arm apart, in words that a line of 80 characters has room for."""
    decision = found.decision
    words = [
        "take" if decision.verdict == "recommended" and option.candidate == decision.candidate else "",
        "as good" if option.candidate in decision.as_good and option.candidate != decision.candidate else "",
        "better" if option.candidate == decision.better_peer else "",
        "" if option.fits else "over",
        "" if option.raced else "not run",
    ]
    return ", ".join(filter(None, words))
