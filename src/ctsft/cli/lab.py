"""`ctsft lab`: list the experiments, run what is missing, judge the claims, write the page."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ctsft.errors import CTError

lab = typer.Typer(
    help="Re-run the papers' experiments with honest controls, and judge every claim.", no_args_is_help=True
)
err = Console(stderr=True)
out_console = Console()

Folder = Annotated[
    Path | None,
    typer.Option(help="Folder of your own experiments (TOML), defaults.toml and claims.toml. (default: the papers')"),
]
RecordsFolder = Annotated[Path, typer.Option(help="Folder of the records, JSON lines, one line a run.")]
ProfileName = Annotated[str, typer.Option(help="quick or full: how many seeds, and which of the long runs.")]
Protocol = Annotated[
    str, typer.Option(help="honest (tuned, several seeds) or paper (to the letter: lr 5e-3, one seed).")
]
RECORDS = Path("records")
WIDE = 200  # columns of a table that goes to a file or pipe


def opened(folder: Path | None, records: Path) -> tuple[Any, Any]:
    """The laboratory of a folder and its records."""
    from ctsft.lab.experiments import PAPERS, read_laboratory
    from ctsft.lab.records import Records

    return read_laboratory(folder or PAPERS), Records(records)


def claims_of(folder: Path | None) -> Any:
    """The claims of a folder of experiments."""
    from ctsft.lab.claims import read_claims
    from ctsft.lab.experiments import PAPERS

    return read_claims((folder or PAPERS) / "claims.toml")


@lab.command("list", epilog="Example: ctsft lab list --profile quick")
def list_experiments(
    experiments: Folder = None,
    records: RecordsFolder = RECORDS,
    profile: ProfileName = "full",
    protocol: Protocol = "honest",
) -> None:
    """Show the experiments, and how much of each has been run."""
    from ctsft.lab.experiments import arms
    from ctsft.lab.rates import due, finals

    laboratory, known = opened(experiments, records)
    table = Table("experiment", "source", "title", "arms", "complete", "runs kept")
    for name, experiment in laboratory.experiments.items():
        every = list(arms(laboratory, name, profile, protocol))
        complete = sum(not due(arm, known) for arm in every)
        runs = sum(len(finals(arm, known)[1]) for arm in every)
        table.add_row(name, experiment.source, experiment.title, str(len(every)), str(complete), str(runs))
    out_console.print(table)


@lab.command("run", epilog="Example: ctsft lab run 81 88 --profile quick --records runs/lab --workers 2")
def run_experiments(
    names: Annotated[list[str] | None, typer.Argument(help="Experiments; without names, all of them.")] = None,
    experiments: Folder = None,
    records: RecordsFolder = RECORDS,
    profile: ProfileName = "full",
    protocol: Protocol = "honest",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes, one thread each. (default: all cores)")] = None,
    engine: Annotated[str, typer.Option(help="process (this machine) or ray (pip install 'ctsft[ray]').")] = "process",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. (default: a local one)")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Folder of models that are not built in. (default: CTSFT_MODELS)")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Folder of texts that are not built in. (default: CTSFT_TEXTS)")
    ] = None,
) -> None:
    """Compute what is missing, and print each experiment's tables beside the paper's figures."""
    from ctsft.lab.experiments import arms

    for variable, folder in (("CTSFT_MODELS", models), ("CTSFT_TEXTS", texts)):
        if folder is not None:
            os.environ[variable] = str(folder.absolute())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    laboratory, known = opened(experiments, records)
    chosen = list(names or laboratory.experiments)
    every = [arm for name in chosen for arm in arms(laboratory, name, profile, protocol)]
    with err.status("starting"):
        from ctsft.lab.engines import make_engine
        from ctsft.lab.run import run
        from ctsft.lab.sources import absent
        from ctsft.lab.sweep import sweep
    reasons = [absent(arm.spec) for arm in every]
    for why in sorted({why for why in reasons if why}):
        err.print(f"left out: {why}", style="yellow", highlight=False)
    every = [arm for arm, why in zip(every, reasons, strict=True) if not why]
    chosen_engine = make_engine(engine, workers=workers, address=address)
    try:
        report = sweep(every, known, run, chosen_engine, console=err)
    except KeyboardInterrupt:
        err.print("stopped; what was finished is kept: the same command goes on from there", style="yellow")
        raise typer.Exit(130) from None
    for name in chosen:
        show_tables(laboratory, name, known, profile, protocol)
    if probed := [known[key] for key in report.finished if known[key].spec.probes]:
        share = sum(sum(r.probe_seconds.values()) for r in probed) / sum(max(r.seconds, 1e-9) for r in probed)
        every_n = sorted({r.spec.probe_every for r in probed})
        err.print(
            f"probes took {share:.0%} of the training time of {len(probed)} runs, at an interval of {every_n} updates"
        )
    if report.failed:
        for key, sentence in report.failed.items():
            err.print(f"failed: {key}: {sentence}", style="red", highlight=False)
        raise CTError(f"{len(report.failed)} of the runs failed; the others are kept.")


def show_tables(laboratory: Any, name: str, records: Any, profile: str, protocol: str) -> None:
    """An experiment's tables on standard output."""
    from ctsft.lab import tables
    from ctsft.lab.compare import arm_runs, chosen

    experiment = laboratory.experiments[name]
    found = arm_runs(laboratory, name, records, profile, protocol)
    console = out_console if out_console.is_terminal else Console(width=WIDE)
    for wanted in experiment.tables:
        if not chosen(found, wanted.where):
            continue  # its arms are not in this profile
        heads, cells = tables.table(experiment, wanted, found)
        table = Table(title=f"{name}: {wanted.title}", title_justify="left")
        for head in heads:
            table.add_column(head, overflow="fold")
        for line in cells:
            table.add_row(*line)
        console.print(table, markup=False)


@lab.command("verdicts", epilog="Example: ctsft lab verdicts --check")
def verdicts(
    experiments: Folder = None,
    records: RecordsFolder = RECORDS,
    profile: ProfileName = "full",
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("VERDICTS.md"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the file is stale.")] = False,
) -> None:
    """Judge every claim from the records alone (no torch), and write VERDICTS.md."""
    from collections import Counter

    from ctsft.files import write_text
    from ctsft.lab.verdicts import judge, markdown

    laboratory, known = opened(experiments, records)
    judged = judge(claims_of(experiments), laboratory, known, profile)
    text = markdown(judged)
    if check:
        if not out.exists() or out.read_text(encoding="utf-8") != text:
            raise CTError(f"{out} is stale; run: ctsft lab verdicts")
        print(f"{out} is what the records say")
        return
    write_text(out, text)
    counts = Counter(v.verdict for v in judged)
    print(f"wrote {out}: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))


@lab.command("report", epilog="Example: ctsft lab report --out lab.html")
def report(
    experiments: Folder = None,
    records: RecordsFolder = RECORDS,
    profile: ProfileName = "full",
    protocol: Protocol = "honest",
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("runs/lab.html"),
) -> None:
    """Write one self-contained page: the claims first, then every experiment with its plots."""
    from ctsft.lab.page import write_lab_report
    from ctsft.lab.verdicts import judge

    laboratory, known = opened(experiments, records)
    judged = judge(claims_of(experiments), laboratory, known, profile)
    write_lab_report(laboratory, known, judged, out, profile, protocol)
    print(f"wrote {out} ({out.stat().st_size:,} bytes)")
