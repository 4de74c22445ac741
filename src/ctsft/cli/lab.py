"""`ctsft lab`: list the experiments, run what is missing, judge the claims, write the page."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ctsft.cli.console import MODEL_HELP, err, out_console, say
from ctsft.errors import CTError

lab = typer.Typer(
    help="Re-run the papers' experiments with honest controls, and judge every claim.", no_args_is_help=True
)

Folder = Annotated[
    Path | None,
    typer.Option(help="Folder of your own experiments (TOML), defaults.toml and claims.toml. (default: the papers')"),
]
RecordsFolder = Annotated[
    Path | None,
    typer.Option(help="Folder of the records, JSON lines, a line a run. (default: records; of your own, runs/lab)"),
]
OwnModel = Annotated[str | None, typer.Option("--model", help=f"In place of the papers' model. {MODEL_HELP}")]
OwnText = Annotated[
    str | None, typer.Option("--data", help="In place of the papers' text: sql, a file or a hub dataset.")
]
Seeds = Annotated[
    int | None, typer.Option(min=1, help="Of every arm; fewer than 3 give no verdict. (default: the profile's)")
]
ProfileName = Annotated[str, typer.Option(help="quick or full: how many seeds, and which of the long runs.")]
Protocol = Annotated[
    str, typer.Option(help="honest (tuned, several seeds) or paper (to the letter: lr 5e-3, one seed).")
]
WIDE = 200  # columns of a table that goes to a file or pipe


def opened(
    folder: Path | None,
    records: Path | None,
    model: str | None = None,
    data: str | None = None,
    seeds: int | None = None,
) -> tuple[Any, Any]:
    """The laboratory of a folder, on the user's own model and text if there are such, and its records."""
    from ctsft.lab.experiments import PAPERS, on_own, read_laboratory
    from ctsft.lab.records import Records

    laboratory = read_laboratory(folder or PAPERS)
    if seeds is not None:
        sizes = {name: size.model_copy(update={"seeds": seeds}) for name, size in laboratory.profiles.items()}
        laboratory = laboratory.model_copy(update={"profiles": sizes})
    if model is not None or data is not None:
        with err.status("reading the model and the text"):
            from ctsft.lab.sources import own

            laboratory = on_own(laboratory, own(model, data, laboratory.home))
    return laboratory, Records(records or Path("runs/lab" if laboratory.own else "records"))


def judged(folder: Path | None, laboratory: Any, known: Any, names: list[str], profile: str) -> Any:
    """The verdict on every claim; on the user's own model and text, on those that can be asked of `names`' runs."""
    from ctsft.lab.claims import applicable, lacking, read_claims
    from ctsft.lab.experiments import PAPERS
    from ctsft.lab.verdicts import judge

    aside: dict[str, str] = {}
    claims = read_claims((folder or PAPERS) / "claims.toml")
    if own := laboratory.own:
        claims, aside = applicable(claims, names, own.model, own.text)
        aside |= lacking([claim for claim in claims if claim.id not in aside], laboratory, profile)
    return judge(claims, laboratory, known, profile, aside)


def having_runs(laboratory: Any, known: Any, profile: str) -> Any:
    """The laboratory with only the experiments that were run on the user's own model and text."""
    from ctsft.lab.compare import arm_runs

    if not laboratory.own:
        return laboratory
    every, own = laboratory.experiments, laboratory.own
    ran = [n for n in every if any(arm.records for arm in arm_runs(laboratory, n, known, profile))]
    if not ran:
        raise CTError(f"{known.folder} has no runs of {own.model} on {own.text}; make them with: ctsft lab run")
    return laboratory.model_copy(update={"experiments": {name: every[name] for name in ran}})


def judged_records(
    folder: Path | None, records: Path | None, model: str | None, data: str | None, seeds: int | None, profile: str
) -> tuple[Any, Any, Any]:
    """What `opened` gives, with only what was run, and the verdict on every claim by these records."""
    laboratory, known = opened(folder, records, model, data, seeds)
    laboratory = having_runs(laboratory, known, profile)
    return laboratory, known, judged(folder, laboratory, known, list(laboratory.experiments), profile)


@lab.command("list", epilog="Example: ctsft lab list --profile quick")
def list_experiments(
    experiments: Folder = None,
    records: RecordsFolder = None,
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


@lab.command(
    "run", epilog="Example: ctsft lab run arena --model path/or/hub-id --data my.txt --profile quick --seeds 3"
)
def run_experiments(
    names: Annotated[list[str] | None, typer.Argument(help="Experiments; without names, all of them.")] = None,
    model: OwnModel = None,
    data: OwnText = None,
    experiments: Folder = None,
    records: RecordsFolder = None,
    profile: ProfileName = "full",
    protocol: Protocol = "honest",
    seeds: Seeds = None,
    second: Annotated[
        bool, typer.Option("--second", help="More seeds for what open claims read, the cheapest claim first.")
    ] = False,
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
    """Compute what is missing, and print each experiment's tables beside the paper's figures.

    With --second open claims get the seeds of their second look (docs/laboratory.md), at the rates that are known.
    With --model or --data the experiments run on your own, and the claims that can be asked of it are judged.
    """
    from ctsft.lab.experiments import arms

    for variable, folder in (("CTSFT_MODELS", models), ("CTSFT_TEXTS", texts)):
        if folder is not None:
            os.environ[variable] = str(folder.absolute())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    laboratory, known = opened(experiments, records, model, data, seeds)
    chosen = list(names or laboratory.experiments)
    every = (
        due_again(judged(experiments, laboratory, known, chosen, profile), chosen, known, laboratory.profiles[profile])
        if second
        else [arm for name in chosen for arm in arms(laboratory, name, profile, protocol)]
    )
    tell_left_out(laboratory, chosen, profile, protocol, empty=bool(names) and not second)
    report = swept(every, known, engine, workers, address)
    for name in chosen:
        show_tables(laboratory, name, known, profile, protocol)
    if laboratory.own:
        show_verdicts(judged(experiments, laboratory, known, chosen, profile))
    if probed := [known[key] for key in report.finished if known[key].spec.probes]:
        share = sum(sum(r.probe_seconds.values()) for r in probed) / sum(max(r.seconds, 1e-9) for r in probed)
        every_n = sorted({r.spec.probe_every for r in probed})
        err.print(
            f"probes took {share:.0%} of the training time of {len(probed)} runs, at an interval of {every_n} updates"
        )
    if report.failed:
        for key, sentence in report.failed.items():
            say(f"failed: {key}: {sentence}", "red")
        raise CTError(f"{len(report.failed)} of the runs failed; the others are kept.")


def tell_left_out(laboratory: Any, chosen: list[str], profile: str, protocol: str, empty: bool) -> None:
    """Say which arms the user's own model cannot have, and why; `empty`: also which experiments have no arms here."""
    from ctsft.lab.experiments import arms, left_out

    for name in chosen:
        refused = left_out(laboratory, name, profile, protocol)
        for why, count in refused.items():
            say(f"left out of {name}: {count} arms ({why})", "yellow")
        if empty and not refused and not list(arms(laboratory, name, profile, protocol)):
            say(f"{name} has no arms for --profile {profile} --protocol {protocol}", "yellow")


def due_again(verdicts: Any, chosen: list[str], known: Any, size: Any) -> list[Any]:
    """The arms that open claims on the experiments `chosen` read, with the seeds of the second look."""
    from ctsft.lab.second import second_look

    if size.looks < 2:
        raise CTError(f"this profile has no second look: its `second` must be above its {size.seeds} seeds.")
    found = [one for one in second_look(verdicts, known, size.second) if {*one[0].claim.experiments} & {*chosen}]
    for verdict, every, seconds in found:
        say(f"{verdict.claim.id}: {len(every)} arms, {seconds / 60:.0f} minutes", "dim")
    return [arm for _, every, _ in found for arm in every]


def swept(every: list[Any], known: Any, engine: str, workers: int | None, address: str | None) -> Any:
    """What a sweep over the arms did; those whose model or text is not here are left out, and that is said."""
    with err.status("starting"):
        from ctsft.lab.engines import make_engine
        from ctsft.lab.run import run
        from ctsft.lab.sources import absent
        from ctsft.lab.sweep import sweep
    reasons = [absent(arm.spec) for arm in every]
    for why in sorted({why for why in reasons if why}):
        say(f"left out: {why}", "yellow")
    there = [arm for arm, why in zip(every, reasons, strict=True) if not why]
    try:
        return sweep(there, known, run, make_engine(engine, workers=workers, address=address), console=err)
    except KeyboardInterrupt:
        say("stopped; what was finished is kept: the same command goes on from there", "yellow")
        raise typer.Exit(130) from None


def show_verdicts(verdicts: Any) -> None:
    """What the runs say of the claims on standard output; those that cannot be asked are counted by their reasons."""
    from collections import Counter

    from ctsft.lab.verdicts import told_counts

    table = Table("", "claim", "verdict", "what was measured", title="Claims", title_justify="left")
    for one in (v for v in verdicts if v.verdict != "not applicable"):
        table.add_row(one.claim.id, one.claim.text, one.verdict, "\n".join(filter(None, (one.detail, one.control))))
    console = out_console if out_console.is_terminal else Console(width=WIDE, markup=False)
    console.print(table, markup=False)
    console.print(told_counts(verdicts), markup=False)
    for why, count in Counter(v.detail for v in verdicts if v.verdict == "not applicable").most_common():
        console.print(f"{count} not applicable: {why}", markup=False, highlight=False)


def show_tables(laboratory: Any, name: str, records: Any, profile: str, protocol: str) -> None:
    """An experiment's tables on standard output."""
    from ctsft.lab import tables
    from ctsft.lab.compare import arm_runs, chosen

    experiment = laboratory.experiments[name]
    found = arm_runs(laboratory, name, records, profile, protocol)
    console = out_console if out_console.is_terminal else Console(width=WIDE, markup=False)
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
    model: OwnModel = None,
    data: OwnText = None,
    experiments: Folder = None,
    records: RecordsFolder = None,
    profile: ProfileName = "full",
    seeds: Seeds = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write. (default: VERDICTS.md; of your own, among its records)")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the file is stale.")] = False,
) -> None:
    """Judge every claim from the records alone (no torch), and write VERDICTS.md."""
    from ctsft.files import write_text
    from ctsft.lab.beside import beside, beside_markdown
    from ctsft.lab.experiments import PAPERS
    from ctsft.lab.summary import summary
    from ctsft.lab.verdicts import markdown, told_counts

    laboratory, known, found = judged_records(experiments, records, model, data, seeds, profile)
    own = laboratory.own
    if own:
        text = markdown(found, f"runs of {own.model} on {own.text}")
    else:
        text = markdown(found, summary=summary(experiments or PAPERS, found))
        text += beside_markdown(beside(laboratory, known, profile))
    path = out or (known.folder if own else Path()) / "VERDICTS.md"
    if check:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            raise CTError(f"{path} is stale; run: ctsft lab verdicts")
        print(f"{path} is what the records say")
        return
    write_text(path, text)
    print(f"wrote {path}: {told_counts(found)}")


@lab.command("report", epilog="Example: ctsft lab report --out lab.html")
def report(
    model: OwnModel = None,
    data: OwnText = None,
    experiments: Folder = None,
    records: RecordsFolder = None,
    profile: ProfileName = "full",
    protocol: Protocol = "honest",
    seeds: Seeds = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("runs/lab.html"),
) -> None:
    """Write one self-contained page: the claims first, then every experiment with its plots."""
    from ctsft.lab.experiments import PAPERS
    from ctsft.lab.page import write_lab_report
    from ctsft.lab.summary import summary

    laboratory, known, found = judged_records(experiments, records, model, data, seeds, profile)
    sentences = [] if laboratory.own else summary(experiments or PAPERS, found)
    write_lab_report(laboratory, known, found, out, profile, protocol, sentences)
    print(f"wrote {out} ({out.stat().st_size:,} bytes)")
