"""The laboratory's page: every claim with its verdict first, then for each experiment the plots it should have had."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctsft.lab.beside import HEADS, beside
from ctsft.lab.compare import ArmRuns, arm_runs, chosen
from ctsft.lab.drawing import GLYPHS, RAMP, axis
from ctsft.lab.experiments import Laboratory, arms
from ctsft.lab.figures import check, picture, told, varying
from ctsft.lab.predicates import Side
from ctsft.lab.rates import choose_rate
from ctsft.lab.records import Record
from ctsft.lab.tables import table
from ctsft.lab.verdicts import NOT_APPLICABLE, VERDICTS, Verdict
from ctsft.pages.plot import COLOURS, LINE_COLOURS
from ctsft.pages.render import write_page
from ctsft.pages.words import words

SOURCES = {"derived": "arithmetic on the papers' figures", "ours": "our own expectation"}


def write_lab_report(
    laboratory: Laboratory,
    records: Mapping[str, Record],
    verdicts: Sequence[Verdict],
    path: Path,
    profile: str = "full",
    protocol: str = "honest",
    summary: Sequence[str] = (),
) -> None:
    """Write the page of all experiments of `laboratory` to `path`, whole or not at all; `summary` opens it.

    The page needs nothing from outside it. The part of its address behind the # filters the claims, such as
    `#paper=82&verdict=refuted&q=dead zone`; without scripts all are shown. Losses are in nats per token, bars and bands
    are 95% t intervals over the seeds. Raises CTError for a figure that names a metric, a field or a law wrongly.
    """
    sections = [section(laboratory, name, records, profile, protocol) for name in laboratory.experiments]
    counts = Counter(verdict.verdict for verdict in verdicts)
    values = {
        "glyphs": GLYPHS,
        "colours": len(LINE_COLOURS),  # with more lines than these, colours come again with another dash and marker
        "verdicts": sorted(verdicts, key=lambda verdict: verdict.verdict == NOT_APPLICABLE),
        "judged": len(verdicts) - counts[NOT_APPLICABLE],
        "counts": [
            (word, meaning, counts[word])
            for word, meaning in VERDICTS.items()
            if counts[word] or word != NOT_APPLICABLE
        ],
        "papers": sorted({verdict.claim.source for verdict in verdicts}),
        "sections": sections,
        "summary": summary,
        "beside": [] if laboratory.own else [one.cells for one in beside(laboratory, records, profile)],
        "heads": HEADS,
        "shown": laboratory.experiments,
        "runs": len({id(record) for s in sections for arm in s["arms"] for record in arm.records}),
        "own": laboratory.own,
        "profile": profile,
        "protocol": protocol,
    }
    filters: dict[str, Callable[..., Any]] = {"source": source, "p": shown_p, "places": places, "axis": axis}
    write_page("lab.html", path, values, filters, COLOURS | RAMP)


# ------------------------------------------------------------------------------------------------- one experiment


def section(
    laboratory: Laboratory, name: str, records: Mapping[str, Record], profile: str, protocol: str
) -> dict[str, Any]:
    """All that the page says of the experiment `name`."""
    experiment, found = laboratory.experiments[name], arm_runs(laboratory, name, records, profile, protocol)
    ran = [record for arm in found for record in arm.records]
    for figure in experiment.figures:
        check(name, figure)
    return {
        "experiment": experiment,
        "arms": found,
        "done": len(ran),
        "wanted": sum(len(arm.seeds) for arm in found),
        "tables": [
            (t.title, *table(experiment, t, found)) for t in experiment.tables if ran and chosen(found, t.where)
        ],
        "pictures": [
            picture(f"e{name}-{i}", figure, found, experiment.figures)
            for i, figure in enumerate(experiment.figures)
            if ran and chosen(found, figure.where)
        ],
        "how": how_run(laboratory, name, found, records, profile, protocol),
        "common": common(found),
        "machines": sorted({words(record.machine) for record in ran}),
    }


def source(name: str) -> str:
    """Where a claim or an experiment comes from, in words."""
    return f"paper {name}" if name[:1].isdigit() else SOURCES.get(name, name)


def shown_p(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"= {p:.2g}"


def places(side: Side, width: float = 300, margin: float = 14) -> dict[str, float] | None:
    """Where a strip `width` wide shows the bound, the mean and its interval; None if there is no number."""
    test = side.test
    shown = {"low": test.low, "mean": test.mean, "high": test.high, "bound": side.bound}
    found = {name: side.show(number) for name, number in shown.items()}
    first, last = min(found.values()), max(found.values())
    if math.isnan(found["mean"]) or math.isclose(first, last):
        return None
    return {name: round(margin + (v - first) / (last - first) * (width - 2 * margin), 1) for name, v in found.items()}


def common(found: Sequence[ArmRuns]) -> dict[str, Any]:
    """What all arms share and is not the default."""
    if not found:
        return {}
    changed = found[0].spec.model_dump(exclude_defaults=True)
    return {name: v for name, v in changed.items() if name not in (*varying(found), "lr", "seed")}


def how_run(
    laboratory: Laboratory,
    name: str,
    found: Sequence[ArmRuns],
    records: Mapping[str, Record],
    profile: str,
    protocol: str,
) -> list[dict[str, Any]]:
    """How every arm was run: what sets it apart, the learning rates that were tried, and its four costs."""
    out = []
    fields = varying(found)
    for arm, runs in zip(arms(laboratory, name, profile, protocol), found, strict=True):
        costs = {cost: runs.mean(cost) for cost in ("matrices", "trained", "adapter_bytes", "memory_bytes", "seconds")}
        out.append(
            {
                "runs": runs,
                "fields": ", ".join(told(field, getattr(runs.spec, field)) for field in fields),
                "tried": choose_rate(arm, records).tried,
                "tune_steps": arm.tune_steps,
            }
            | costs
        )
    return out
