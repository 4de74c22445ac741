"""Standings: what a comparison's trials say of each arm, and the sentences that follow. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from ctsft.files import wilson
from ctsft.plan.record import Arm, Comparison, Trial
from ctsft.tune.record import Accuracy

GOAL = "lora-8"  # the arm whose loss the others are timed to


@dataclass(frozen=True)
class Standing:
    """An arm in numbers, means over its seeds; `spread` is their standard deviation, None for one seed, and `seconds`
    those of one training. to_goal: seconds until the arm is at the loss that `GOAL` ends at, None if it never is."""

    arm: Arm
    loss: float
    spread: float | None
    share: float  # of the drop in loss of the best arm
    diverged: int
    trained: int
    adapter_bytes: int
    memory_bytes: int
    seconds: float
    to_goal: float | None
    accuracy: Accuracy | None
    level: bool | None  # with the best arm: not above it on every seed; None where one seed cannot tell


def curve(arm: Arm) -> list[tuple[int, float, float]]:
    """(steps, seconds, held-out loss) at every look, means over the seeds; up to the first that diverged."""
    looks = [{step: loss for step, loss in t.heldout if loss is not None} for t in arm.trials]
    steps = sorted(set.intersection(*map(set, looks)))
    seconds = {step: mean(t.clock[step - 1] if step else 0.0 for t in arm.trials) for step in steps}
    return [(step, seconds[step], mean(look[step] for look in looks)) for step in steps]


def reaches(points: Sequence[tuple[int, float, float]], goal: float) -> float | None:
    """Seconds until a `curve` is at the loss `goal`, on straight lines between looks; None if it never is."""
    for i, (_, seconds, loss) in enumerate(points):
        if loss <= goal:
            _, before, above = points[i - 1] if i else points[0]
            return seconds if loss == above else before + (seconds - before) * (above - goal) / (above - loss)
    return None


def standings(found: Comparison) -> list[Standing]:
    """All arms, the lowest loss first; arms that diverged on a seed come last."""
    ends = {arm.name: mean(t.end for t in arm.trials) for arm in found.arms}
    order = sorted(found.arms, key=lambda arm: ends[arm.name])
    best, goal = order[0], ends.get(GOAL)
    drop = found.before - ends[best.name]
    return [
        Standing(
            arm=arm,
            loss=ends[arm.name],
            spread=stdev(t.end for t in arm.trials) if len(arm.trials) > 1 and finite(arm) else None,
            share=(found.before - ends[arm.name]) / drop if drop > 0 else math.nan,
            diverged=sum(t.diverged for t in arm.trials),
            trained=arm.trials[0].trained,
            adapter_bytes=arm.trials[0].adapter_bytes,
            memory_bytes=arm.trials[0].memory_bytes,
            seconds=mean(t.seconds for t in arm.trials),
            to_goal=None if goal is None or not finite(arm) else reaches(curve(arm), goal),
            accuracy=pooled(arm.trials),
            level=None if len(arm.trials) < 2 else arm is best or not above(arm, best),
        )
        for arm in order
    ]


def finite(arm: Arm) -> bool:
    return not any(t.diverged for t in arm.trials)


def above(arm: Arm, best: Arm) -> bool:
    """Whether `arm` ended higher than `best` on every seed: on each of them both saw the same batches."""
    return all(own.end > other.end for own, other in zip(arm.trials, best.trials, strict=True))


def pooled(trials: Sequence[Trial]) -> Accuracy | None:
    """The answers of all seeds together; the interval takes them as different questions, which they are not quite."""
    found = [t.accuracy for t in trials if t.accuracy]
    if len(found) < len(trials):
        return None
    correct, total = sum(a.correct for a in found), sum(a.total for a in found)
    low, high = wilson(correct, total)
    return Accuracy(correct=correct, total=total, low=low, high=high)


def sentences(found: Comparison) -> list[str]:
    """What a person should know of it, the main result first."""
    rows = standings(found)
    best, seeds = rows[0], len(rows[0].arm.trials)
    fewer = [row for row in rows if row.trained < best.trained]
    told = [
        f"{best.arm.name} ends lowest, at {best.loss:.3f} nats per token (before: {found.before:.3f}), with "
        f"{best.trained:,} numbers."
    ]
    if seeds == 1:
        told.append("One seed has no spread: another could order the arms otherwise; give --seeds 3.")
    elif small := [row for row in fewer if row.level]:
        least = min(small, key=lambda row: row.trained)
        told.append(
            f"{least.arm.name} is level with it, {least.loss - best.loss:.3f} above in the mean but not on each of "
            f"{seeds} seeds, and trains {best.trained / least.trained:,.0f} times fewer numbers."
        )
    elif fewer:
        told.append(f"No arm with fewer numbers is level with it: each ends higher on all {seeds} seeds.")
    told += [
        f"{row.arm.name} is no better than the model as it is, {row.loss:.3f}."
        for row in rows
        if row.loss >= found.before
    ]
    if edge := [row.arm.name for row in rows if row.arm.at_edge]:
        told.append(f"A better rate may lie outside those tried for {', '.join(edge)}: the best was at the edge.")
    return told
