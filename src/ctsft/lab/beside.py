"""The papers' figures beside ours at the papers' own settings: one run each, lr 5e-3, the same batch at every step."""

from collections.abc import Mapping
from dataclasses import dataclass

from ctsft.lab.compare import arm_runs, mean, measured
from ctsft.lab.experiments import Laboratory
from ctsft.lab.records import Record
from ctsft.lab.tables import cell, matched, short


@dataclass(frozen=True)
class Beside:
    """One figure of a paper, and ours."""

    paper: str
    table: str
    row: str
    figure: str
    theirs: float
    ours: float | None  # None: its run is missing

    @property
    def ratio(self) -> float | None:
        return None if self.ours is None or not self.theirs else self.ours / self.theirs

    @property
    def cells(self) -> list[str]:
        """All of it in words; a dash for what is missing."""
        numbers = (cell(None) if n is None else short(n) for n in (self.theirs, self.ours, self.ratio))
        return [self.paper, self.table, self.row, self.figure, *numbers]


HEADS = ["paper", "table", "row", "figure", "the paper", "ours", "ratio"]


def beside(laboratory: Laboratory, records: Mapping[str, Record], profile: str = "full") -> list[Beside]:
    """Every figure that the papers print in a table of their own experiment, in order."""
    out = []
    for name, experiment in laboratory.experiments.items():
        if name != experiment.source:
            continue  # ours, which shows a paper's figures once more
        arms = arm_runs(laboratory, name, records, profile, "paper")
        for table in experiment.tables:
            for arm, own, figures in matched(table, arms):
                for head, theirs in figures.items():
                    if head in own or table.elsewhere:
                        continue
                    ours = mean(measured(arm, arms, table.columns[head])) if arm else None
                    row = ", ".join(f"{key} {cell(found)}" for key, found in own.items() if key in figures)
                    out.append(Beside(experiment.source, table.title, row, head, float(theirs), ours))
    return out


def beside_markdown(found: list[Beside]) -> str:
    """A section of VERDICTS.md."""
    there = sum(one.ours is not None for one in found)
    lines = [
        "",
        "## The papers' figures at their own settings",
        "",
        "By `ctsft lab run --protocol paper`: one run each, lr 5e-3, one fixed batch. "
        f"{there} of the {len(found)} figures in the papers' tables have a run of ours; a dash: it is not run, no "
        "arm of ours has that setting, or it is a share of a drop and nothing dropped (full fine-tuning of TinyLlama "
        "explodes at this rate). The model, text and batch size are not theirs, so losses need not agree.",
        "",
        "| " + " | ".join(HEADS) + " |",
        "|" + "---|" * len(HEADS),
        *("| " + " | ".join(text.replace("|", "\\|") for text in one.cells) + " |" for one in found),
    ]
    return "\n".join(lines) + "\n"
