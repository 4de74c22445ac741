"""Cells to read: a paper's table beside our figures, and numbers as they are shown to people."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ctsft.choices import FORMS
from ctsft.errors import CTError
from ctsft.lab.compare import ArmRuns, chosen, mean, measured, sd
from ctsft.lab.experiments import Experiment, Table
from ctsft.lab.metrics import check_metric
from ctsft.lab.spec import Spec

UNREAD: dict[str, Callable[[Spec], bool]] = {  # fields that some methods do not read, and which
    "basis": lambda spec: spec.method not in (*FORMS, "lora-xs"),
    "weight_from": lambda spec: spec.method not in FORMS or spec.basis != "weight",
    "siblings": lambda spec: not spec.learns,
    "learning": lambda spec: not spec.learns,
    "start": lambda spec: not spec.learns,
    "universal_mode": lambda spec: spec.method not in FORMS or spec.basis != "universal",
}


def table(experiment: Experiment, table: Table, arms: Sequence[ArmRuns]) -> tuple[list[str], list[list[str]]]:
    """Column heads and cells: the paper's columns from our arms, and its own figures in columns "HEAD (paper)".

    A row of the paper stands beside the arm of ours that agrees in every column that is a field of Spec (or the arm's
    name); one without a partner has a line of its own, in its place if numbers tell which. A cell is mean ± sample sd
    (number of seeds).
    """
    for head, metric in table.columns.items():
        try:
            if metric != "name":
                check_metric(metric)
        except CTError as error:
            raise CTError(f"experiment {experiment.name}, table {table.title!r}, column {head!r}: {error}") from None
    if table.per:
        return summary(table, arms)
    keys = keys_of(table)
    printed = [head for head in table.columns if head not in keys and any(head in figures for figures in table.paper)]
    heads = [name for head in table.columns for name in ([head, f"{head} (paper)"] if head in printed else [head])]
    body: list[tuple[list[Any], list[str]]] = []  # the fields that a line is placed by, and the line
    for arm, own, figures in matched(table, arms):
        cells = {head: cell(found) for head, found in own.items()}
        if arm:
            cells |= {head: spread(measured(arm, arms, m)) for head, m in table.columns.items() if head not in own}
        body.append((list(own.values()), _line(table, printed, cells, figures)))
    if all(isinstance(found, int | float) for place, _ in body for found in place):
        body.sort(key=lambda one: one[0])  # else the paper's lines come last
    return heads, [line for _, line in body]


def keys_of(table: Table) -> list[str]:
    """The columns that say which arm a row is of."""
    return [head for head, metric in table.columns.items() if metric == "name" or metric in Spec.model_fields]


def matched(table: Table, arms: Sequence[ArmRuns]) -> list[tuple[ArmRuns | None, dict[str, Any], Mapping[str, Any]]]:
    """Rows of a table: the arm of ours, its cells in the key columns, and the paper's row that agrees in all of them.

    Our arms in order, {} where the paper has no such row; then the paper's rows that no arm of ours agrees with.
    """
    keys, left, out = (
        keys_of(table),
        list(table.paper),
        list[tuple[ArmRuns | None, dict[str, Any], Mapping[str, Any]]](),
    )
    for arm in in_order(chosen(arms, table.where), [table.columns[head] for head in keys]):
        own = {head: field_of(arm, table.columns[head]) for head in keys}
        figures = next((f for f in left if all(own[h] == f[h] for h in keys if h in f)), {})
        left = [f for f in left if f is not figures]
        out.append((arm, own, figures))
    return out + [(None, {head: figures.get(head) for head in keys}, figures) for figures in left]


def summary(table: Table, arms: Sequence[ArmRuns]) -> tuple[list[str], list[list[str]]]:
    """A row for every value of the field `table.per`: of each column the mean over its arms, and the largest; of an arm
    the mean of its seeds."""
    rows: dict[Any, list[ArmRuns]] = {}
    for arm in chosen(arms, table.where):
        rows.setdefault(getattr(arm.spec, table.per), []).append(arm)
    heads = [table.per, "arms", *(name for head in table.columns for name in (head, f"{head}, largest"))]
    body = []
    for found, alike in rows.items():
        line = [cell(found)]
        for metric in table.columns.values():
            means = [m for m in (mean(measured(arm, arms, metric)) for arm in alike) if m is not None]
            line += [cell(None)] * 2 if not means else [short(statistics.fmean(means)), short(max(means))]
        done = sum(arm.complete for arm in alike)
        body.append([line[0], f"{done:,}", *line[1:]])
    return heads, body


def in_order(arms: Sequence[ArmRuns], fields: Sequence[str]) -> list[ArmRuns]:
    """The arms by `fields`: numbers ascending, words in the order in which they first come."""
    words = {name: list(dict.fromkeys(field_of(arm, name) for arm in arms)) for name in fields}

    def place(arm: ArmRuns, name: str) -> float:
        found = field_of(arm, name)
        return float(found) if isinstance(found, int | float) else words[name].index(found)

    return sorted(arms, key=lambda arm: [place(arm, name) for name in fields if name != "lr"])


def field_of(arm: ArmRuns, name: str) -> Any:
    """A field of the arm's spec, its name, or the rate that was chosen; "" for one that its method does not read."""
    if name in UNREAD and UNREAD[name](arm.spec):
        return ""
    return arm.name if name == "name" else arm.lr if name == "lr" else getattr(arm.spec, name)


def _line(table: Table, printed: list[str], cells: dict[str, str], figures: Mapping[str, Any]) -> list[str]:
    line = []
    for head in table.columns:
        line.append(cells.get(head, cell(None)))
        if head in printed:
            line.append(cell(figures.get(head)))
    return line


def cell(found: Any) -> str:
    """A value for people; a dash for None. Numbers as they are, with commas."""
    if found is None or found == "":
        return "\N{EN DASH}"
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, float) and found.is_integer() and abs(found) >= 1000:
        found = int(found)
    return f"{found:,}" if isinstance(found, int | float) else str(found)


def short(number: float) -> str:
    """Four digits that count; whole from a thousand up, 1.23e+12 for the largest."""
    if abs(number) >= 1e9:
        return f"{number:.3g}"
    return f"{number:,.0f}" if abs(number) >= 1000 or number == int(number) else f"{number:.4g}"


def spread(values: Sequence[float | None]) -> str:
    """`6.123 ± 0.02 (5)`: mean, sample sd, seeds; the number alone if all runs agree; a dash if there are none."""
    there = [v for v in values if v is not None]
    if not there:
        return cell(None)
    centre, width = statistics.fmean(there), sd(there)
    missing = f" of {len(values)}" if len(there) < len(values) else ""
    if len(set(there)) == 1 and len(there) > 1:
        return short(centre)
    return short(centre) + (f" ± {width:.2g}" if width is not None else "") + f" ({len(there)}{missing})"
