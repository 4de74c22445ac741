"""The search for every arm's learning rate, and the runs that an arm still needs. Nothing here imports torch."""

import math
from collections.abc import Mapping

from ctsft.lab.records import Record
from ctsft.lab.spec import Arm, Spec, Strict

GRID = 10**0.5  # neighbouring learning rates of a grid differ by this factor
MAX_RATES = 9  # an optimum that is still at the edge of so many rates is reported as not bracketed


def tuned_for(record: Record) -> float:
    """What a tuning run is judged by: its last loss on the fixed batch, or held-out; infinity if it diverged."""
    value = record.train_loss[-1] if record.spec.batches == "fixed" else record.heldout[-1][1]
    return math.inf if value is None else value


class Choice(Strict):
    """The state of an arm's search for its learning rate."""

    lr: float | None  # None: more runs are needed
    due: tuple[Spec, ...] = ()
    bracketed: bool = False  # worse rates were seen on both sides
    tried: tuple[tuple[float, float], ...] = ()  # (rate, mean loss over the tuning seeds), ascending


def choose_rate(arm: Arm, records: Mapping[str, Record]) -> Choice:
    """The arm's best rate so far, or the runs that are needed next. The grid grows while its best lies at an edge."""
    if not arm.tunes:
        return Choice(lr=arm.rates[0])
    rates = sorted(arm.rates)
    while True:
        runs = {lr: arm.tuning(lr) for lr in rates}
        due = tuple(s for specs in runs.values() for s in specs if s.key not in records)
        if due:
            return Choice(lr=None, due=due)
        losses = {lr: sum(tuned_for(records[s.key]) for s in specs) / len(specs) for lr, specs in runs.items()}
        tried = tuple(losses.items())
        best = min(losses, key=lambda lr: losses[lr])
        inside = rates[0] < best < rates[-1]
        if inside or len(rates) >= MAX_RATES:
            return Choice(lr=best, bracketed=inside, tried=tried)
        rates = sorted([*rates, rate(rates[0] / GRID) if best == rates[0] else rate(rates[-1] * GRID)])


def rate(value: float) -> float:
    """`value` to two digits, so that grids that meet share their runs."""
    return float(f"{value:.2g}")


def due(arm: Arm, records: Mapping[str, Record]) -> list[Spec]:
    """The runs that this arm needs next; none if it is complete."""
    choice = choose_rate(arm, records)
    if choice.lr is None:
        return list(choice.due)
    return [spec for spec in arm.final(choice.lr) if spec.key not in records]


def finals(arm: Arm, records: Mapping[str, Record]) -> tuple[Choice, list[Record]]:
    """The arm's choice of rate and the records of its seeds that exist, in the order of the seeds."""
    choice = choose_rate(arm, records)
    if choice.lr is None:
        return choice, []
    return choice, [records[s.key] for s in arm.final(choice.lr) if s.key in records]
