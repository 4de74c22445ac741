"""An arm with its runs, and what they measured: alone, or relative to another arm of the experiment."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctsft.errors import CTError
from ctsft.lab.experiments import Laboratory, arms
from ctsft.lab.metrics import AHEAD, DROP_LOST, METRICS, drop, value
from ctsft.lab.rates import finals
from ctsft.lab.records import Record
from ctsft.lab.spec import Spec

REFERENCES = {name: metric.against for name, metric in METRICS.items() if metric.against}
# What both arms of a relative metric share.
SETTING = (
    "model",
    "tied",
    "text",
    "batches",
    "batch",
    "length",
    "steps",
    "decay",
    "dtype",
)


@dataclass(frozen=True)
class ArmRuns:
    """One arm of an experiment and the records of its seeds, as far as they exist."""

    name: str
    spec: Spec
    lr: float | None  # None: the learning rate is still being tuned
    bracketed: bool  # worse rates were seen on both sides of lr
    seeds: tuple[int, ...]
    records: list[Record]
    tuned: bool = field(default=True)  # False: the arm has one given rate, so there is nothing to bracket

    @property
    def complete(self) -> bool:
        return len(self.records) == len(self.seeds)

    def values(self, metric: str) -> list[float | None]:
        """One number for every seed in `seeds`, in order; None for a run that is missing, or lacks the metric."""
        found = {r.spec.seed: value(r, metric) for r in self.records}
        return [found.get(seed) for seed in self.seeds]

    def mean(self, metric: str) -> float | None:
        return mean(self.values(metric))


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the numbers that are there; None if there are none."""
    there = [v for v in values if v is not None]
    return statistics.fmean(there) if there else None


def sd(values: Sequence[float | None]) -> float | None:
    """The sample standard deviation of the numbers that are there; None for fewer than two."""
    there = [v for v in values if v is not None]
    return statistics.stdev(there) if len(there) > 1 else None


def arm_runs(
    laboratory: Laboratory,
    name: str,
    records: Mapping[str, Record],
    profile: str = "full",
    protocol: str = "honest",
    second: bool = False,
) -> list[ArmRuns]:
    """One for every arm of the experiment `name`, complete or not; `second`: with the seeds of the second look."""
    out = []
    for arm in arms(laboratory, name, profile, protocol, second):
        choice, found = finals(arm, records)
        out.append(ArmRuns(arm.name, arm.spec, choice.lr, choice.bracketed, arm.seeds, found, arm.tunes))
    return out


def chosen(arms: Sequence[ArmRuns], where: Mapping[str, Any]) -> list[ArmRuns]:
    """Those whose spec has all the values of `where` (a list: any of them); `name` is the arm's name.

    A model that is a folder is known by the folder's name.
    """
    return [arm for arm in arms if all(_fits(arm, name, wanted) for name, wanted in where.items())]


def _fits(arm: ArmRuns, name: str, wanted: Any) -> bool:
    found = {arm.name} if name == "name" else {getattr(arm.spec, name)}
    if name == "model":
        found.add(Path(arm.spec.model).name)
    return any(value in found for value in (wanted if isinstance(wanted, list) else [wanted]))


def measured(arm: ArmRuns, arms: Sequence[ArmRuns], metric: str) -> list[float | None]:
    """Any metric of `arm`, one number a seed; relative ones are taken against their reference among `arms`."""
    if rival := AHEAD.fullmatch(metric):
        return ahead(arm, arms, int(rival[1]))
    if metric == DROP_LOST:
        return lost(arm, arms)
    return relative(arm, arms, metric) if metric in REFERENCES else arm.values(metric)


def references(arm: ArmRuns, arms: Sequence[ArmRuns], metric: str) -> list[ArmRuns]:
    """The other arms that `measured` takes the metric of `arm` against: none for a metric that is its own."""
    if rival := AHEAD.fullmatch(metric):
        return _rivals(arm, arms, int(rival[1]))
    if metric == DROP_LOST:
        return _tuned(arm, arms)
    return _bases(arm, arms, metric) if metric in REFERENCES else []


def relative(arm: ArmRuns, arms: Sequence[ArmRuns], metric: str) -> list[float | None]:
    """A loss drop divided by the same seed's drop of the reference arm: same experiment, model, text and training.

    Both drops start at the reference's first loss, the bare model's: an arm that begins by damaging the model (78's
    `replace`) gets no credit for repairing it. `fraction_of_full_sft` (paper 78) is held out, `_train` on the step's
    batch; `fraction_of_headless_sft` is against full SFT without the output head; `fraction_of_lora_r8` is the arena's.
    None where either drop is missing or the reference's is not above 0.
    """
    if metric not in REFERENCES:
        raise CTError(f"{metric!r} is no relative metric; there are {', '.join(REFERENCES)}.")
    first, last, _ = REFERENCES[metric]
    found = _bases(arm, arms, metric)
    if not found:
        return [None] * len(arm.seeds)
    starts = dict(zip(found[0].seeds, found[0].values(first), strict=True))
    ends = dict(zip(found[0].seeds, found[0].values(last), strict=True))

    def fraction(seed: int, reached: float | None) -> float | None:
        whole, part = drop(starts.get(seed), ends.get(seed)), drop(starts.get(seed), reached)
        return None if part is None or whole is None or whole <= 0 else part / whole

    return [fraction(seed, reached) for seed, reached in zip(arm.seeds, arm.values(last), strict=True)]


def _bases(arm: ArmRuns, arms: Sequence[ArmRuns], metric: str) -> list[ArmRuns]:
    """The reference arm of a metric of REFERENCES, if there is one; CTError for several."""
    where = REFERENCES[metric][2]
    same_in = [f for f in SETTING if f != "steps" or arm.spec.steps]  # what is untrained stands beside any training
    found = [r for r in chosen(arms, where) if all(getattr(r.spec, f) == getattr(arm.spec, f) for f in same_in)]
    same = [r for r in found if r.spec.targets == arm.spec.targets]
    found = same if len(same) == 1 else list({r.spec.key: r for r in found}.values())
    if len(found) > 1:
        raise CTError(f"{metric} has {len(found)} reference arms for {arm.name!r} ({where}); leave only one of them.")
    return found


def lost(arm: ArmRuns, arms: Sequence[ArmRuns]) -> list[float | None]:
    """The share of the held-out loss drop of the same arm with a tuned rate that `arm`, whose rate is by a rule, lacks
    at the same seed: 0 where it ends as low, below 0 where lower, above 1 where it ends above its start; 1 if diverged.

    None for the tuned arm itself and where its drop is missing or not above 0.
    """
    tuned = _tuned(arm, arms)
    if not arm.spec.rule or len(tuned) != 1:
        return [None] * len(arm.seeds)
    whole = dict(zip(tuned[0].seeds, tuned[0].values("heldout_drop"), strict=True))
    own = dict(zip(arm.seeds, arm.values("heldout_drop"), strict=True))
    diverged = {r.spec.seed for r in arm.records if r.diverged}

    def share(seed: int) -> float | None:
        full, part = whole.get(seed), 0.0 if seed in diverged else own[seed]
        return None if full is None or full <= 0 or part is None else 1 - part / full

    return [share(seed) for seed in arm.seeds]


def _tuned(arm: ArmRuns, arms: Sequence[ArmRuns]) -> list[ArmRuns]:
    """Those like `arm` whose rate is tuned and by no rule."""
    but = {"rule", "lr", "seed"}
    alike = arm.spec.model_dump(exclude=but)
    return [r for r in arms if not r.spec.rule and r.tuned and r.spec.model_dump(exclude=but) == alike]


def ahead(arm: ArmRuns, arms: Sequence[ArmRuns], rival: int) -> list[float | None]:
    """`ahead_of_kN`, paper 82's crossover: the budget in K-steps from which on `arm` ends below the arm with K = N.

    Its loss on the step's batch, at every budget that pays whole updates of both; it must stay below up to the largest
    that both have reached, and the budgets before that do not count. None where it is not below at
    the end, where the arm of K = N has no run, and for N itself. That arm has the same name and setting.
    """
    others = _rivals(arm, arms, rival)
    if rival == arm.spec.k or len(others) != 1:
        return [None] * len(arm.seeds)
    runs = [{r.spec.seed: r.train_loss for r in one.records} for one in (arm, others[0])]
    return [_from(runs[0].get(seed, []), runs[1].get(seed, []), arm.spec.k, rival) for seed in arm.seeds]


def _rivals(arm: ArmRuns, arms: Sequence[ArmRuns], k: int) -> list[ArmRuns]:
    same = [field for field in SETTING if field != "steps"]
    others = [r for r in arms if r.name == arm.name and r.spec.k == k and not r.spec.schedule]
    return [r for r in others if all(getattr(r.spec, f) == getattr(arm.spec, f) for f in same)]


def _from(losses: Sequence[float | None], rival: Sequence[float | None], k: int, its_k: int) -> float | None:
    unit, start = math.lcm(k, its_k), None
    for budget in range(unit, min((len(losses) - 1) * k, (len(rival) - 1) * its_k) + 1, unit):
        own, other = losses[budget // k], rival[budget // its_k]
        if own is None or other is None or own >= other:
            start = None
        elif start is None:
            start = float(budget)
    return start
