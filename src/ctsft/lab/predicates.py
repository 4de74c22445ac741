"""Predicates: what a claim's arms measured, as *sides*, numbers that it says are above a bound, or below it.

Every stochastic predicate comes down to sides: one number a seed (a difference of paired runs, a slope, ...) that the
claim says is above, or below, a bound.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ctsft.errors import CTError
from ctsft.lab.claims import OPEN, Claim, Selection, expanded
from ctsft.lab.compare import ArmRuns, chosen, measured, references
from ctsft.lab.spec import Spec
from ctsft.lab.stats import Test, correlation_z, crossed_test, fisher, slope, t_test
from ctsft.lab.tables import short
from ctsft.lab.windows import by_window

ONE = "the arm"  # where a claim reads only one

# ------------------------------------------------------------------------------------------------------- the arms


@dataclass(frozen=True)
class Reading:
    """An arm, read by one metric."""

    label: str
    arm: ArmRuns
    metric: str
    by_seed: dict[int, float]
    by_window: dict[int, list[float]] = field(default_factory=dict)  # by seed, where the runs hold it

    @property
    def mean(self) -> float:
        return math.fsum(self.by_seed.values()) / len(self.by_seed)

    @property
    def of(self) -> str:
        return "" if self.label == ONE else f" of {self.label}"


class NotRun(Exception):
    """Runs or measurements that a claim needs do not exist; the message says which."""


@dataclass
class Evidence:
    """The arms that one claim may read."""

    pools: dict[str, list[ArmRuns]]  # by experiment
    shared: Selection  # fields that a label need not repeat
    used: list[Reading] = field(default_factory=list)
    arms: dict[str, ArmRuns] = field(default_factory=dict)  # all that was read, references with it, by their spec

    def reading(self, arm: ArmRuns, pool: Sequence[ArmRuns], metric: str, label: str) -> Reading | None:
        """What `arm` measured, None where it does not measure this; NotRun where it, or what its metric is taken
        against, lacks seeds."""
        others = references(arm, pool, metric)
        every = [arm, *others]
        for one in every:
            if not one.complete or one.lr is None:
                told = f"{one.name} [{label if one is arm else one.spec.key}]"
                raise NotRun(f"{told} has {len(one.records)} of {len(one.seeds)} seeds")
        found = {s: v for s, v in zip(arm.seeds, measured(arm, pool, metric), strict=True) if v is not None}
        if not found and not any(r.diverged for r in arm.records):
            return None
        self.arms |= {one.spec.model_dump_json(): one for one in every}
        return Reading(label, arm, metric, found, by_window(arm, others, metric))

    def readings(self, selection: Selection, metric: str) -> list[Reading]:
        """The arms of a selection. All that are missing are told at once."""
        found, missing = [], []
        for one in expanded(self.shared | selection):
            try:
                found.append(self.pick(one, metric))
            except NotRun as error:
                missing.append(str(error))
        if missing:
            raise NotRun("; ".join(missing))
        self.used += found
        return found

    def every(self, selection: Selection, metric: str) -> list[Reading]:
        """All arms that a selection fits, whatever their other fields; NotRun where one is not complete."""
        found = []
        for one in expanded(self.shared | selection):
            for pool in self.pools.values():
                for arm in chosen(pool, {n: v for n, v in one.items() if n != "experiment"}):
                    read = self.reading(arm, pool, metric, arm.spec.key)
                    found.append(read or Reading(arm.spec.key, arm, metric, {}))
        if not found:
            raise NotRun(f"no arm with {' '.join(f'{n}={v}' for n, v in selection.items())}")
        return found

    def told(self, one: Selection, name: str) -> bool:
        """Is this field's value news, beside what all selections share and what its other fields say?"""
        shared, found = self.shared.get(name), one[name]
        said = (name == "steps" and isinstance(shared, str)) or (name == "k" and bool(one.get("schedule")))
        return shared != found and found != "" and not said

    def pick(self, one: Selection, metric: str) -> Reading:
        """The one arm with these fields. Where arms differ in a field that is left out, it stands at Spec's default."""
        where = {name: found for name, found in one.items() if name != "experiment"}
        label = ", ".join(f"{n} {v}" for n, v in one.items() if self.told(one, n)) or ONE
        pools = [pool for name, pool in self.pools.items() if one.get("experiment", name) == name]
        pairs = [(arm, pool) for pool in pools for arm in chosen(pool, where)]
        for name, info in Spec.model_fields.items():
            kept = [(arm, pool) for arm, pool in pairs if getattr(arm.spec, name) == info.default]
            if name not in where and name not in OPEN and kept:
                pairs = kept
        if not pairs:
            raise NotRun(f"no arm with {' '.join(f'{n}={v}' for n, v in one.items())}")
        alike = {arm.spec.model_dump_json(exclude=OPEN) for arm, _ in pairs}
        if len(alike) > 1:
            names = ", ".join(sorted({f"{arm.name} ({arm.spec.key})" for arm, _ in pairs}))
            raise CTError(f"the selection {one} fits several arms: {names}; name more fields.")
        told = []
        for arm, pool in pairs:  # arms that differ in what they probe only: the first that measures the metric
            try:
                if read := self.reading(arm, pool, metric, label):
                    return read
                told.append(f"{metric} is not measured in {arm.name} [{label}]")
            except NotRun as error:
                told.append(str(error))
        raise NotRun(told[0])


def paired(readings: Sequence[Reading], compute: Callable[..., float | None]) -> list[float]:
    """`compute` of the readings' numbers, for every seed that all of them have."""
    seeds = [s for s in readings[0].by_seed if all(s in reading.by_seed for reading in readings)]
    found = [compute(*(reading.by_seed[s] for reading in readings)) for s in seeds]
    return [number for number in found if number is not None]


def windowed(readings: Sequence[Reading], compute: Callable[..., float | None]) -> list[list[float]]:
    """`compute` of the readings' numbers, (seeds, windows), for a function that is linear; [] where a run has none."""
    seeds = [s for s in readings[0].by_seed if all(s in reading.by_seed for reading in readings)]
    if compute not in (subtract, float) or not all(s in reading.by_window for s in seeds for reading in readings):
        return []
    return [[*map(compute, *(reading.by_window[s] for reading in readings))] for s in seeds]  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- the predicates


@dataclass(frozen=True)
class Side:
    """The claim says that the mean of `numbers` (one a seed) is above `bound`, or below it; tested over seeds, or over
    seeds and windows where `windows` has them."""

    label: str
    numbers: list[float]
    bound: float
    above: bool = True
    show: Callable[[float], float] = float  # from the scale of the test to that of the sentence
    windows: list[list[float]] = field(default_factory=list)  # (seeds, windows), of which `numbers` are the means

    @classmethod
    def of(
        cls,
        label: str,
        readings: Sequence[Reading],
        compute: Callable[..., float | None],
        bound: float,
        above: bool = True,
    ) -> "Side":
        """That of a number computed from every seed of the readings."""
        return cls(label, paired(readings, compute), bound, above, windows=windowed(readings, compute))

    @cached_property  # verdicts ask for it many times
    def test(self) -> Test:
        if not self.numbers:
            return Test(0, math.nan, math.nan, math.nan, 1.0, 1.0)
        return crossed_test(self.windows, self.bound) if self.windows else t_test(self.numbers, self.bound)

    @property
    def holds(self) -> float:
        return self.test.above if self.above else self.test.below

    @property
    def fails(self) -> float:
        return self.test.below if self.above else self.test.above

    @property
    def margin(self) -> float:
        """How far the mean is on the claim's side."""
        return (self.test.mean - self.bound) * (1 if self.above else -1)

    def told(self) -> str:
        test, word = self.test, "above" if self.above else "below"
        if not test.n:
            return f"{self.label} is not known: all runs diverged, or do not vary"
        mean, low, high = (short(self.show(v)) for v in (test.mean, test.low, test.high))
        over = f" over {len(self.windows[0])} windows" if self.windows else ""
        return f"{self.label} is {mean} [{low}, {high}]{over}, claimed {word} {short(self.show(self.bound))}"


def subtract(x: float, y: float) -> float:
    return x - y


def divide(x: float, y: float) -> float | None:
    return x / y if y else None


def couples(claim: Claim, evidence: Evidence) -> list[tuple[Reading, Reading]]:
    """Every arm of a with every arm of b; where `where` lists values of a field, with those of the same value."""
    lists = {name: found for name, found in claim.where.items() if isinstance(found, list)}
    out = []
    for values in itertools.product(*lists.values()):
        same = dict(zip(lists, values, strict=True))
        first = evidence.readings(same | claim.a, claim.metric)
        metric = claim.against_metric or claim.metric
        others = [reading for part in claim.b for reading in evidence.readings(same | part, metric)]
        out += list(itertools.product(first, others))
    return out


def less(claim: Claim, evidence: Evidence) -> list[Side]:
    return [Side.of(f"{y.label} minus {x.label}", [y, x], subtract, claim.effect) for x, y in couples(claim, evidence)]


def quantity(claim: Claim, evidence: Evidence) -> list[Side]:
    """near, above and below: the metric of every arm of a, or its difference to (its ratio over) every arm of b."""
    assert claim.number is not None
    if claim.over:
        every = evidence.every(claim.a, claim.metric)
        reduce: Callable[[Sequence[float]], float] = max if claim.over == "max" else statistics.fmean
        label = f"{'largest' if claim.over == 'max' else 'mean'} {claim.metric} of {len(every)} arms"
        bound = claim.number + claim.effect * (1 if claim.predicate == "above" else -1)
        return [Side(label, paired(every, lambda *found: reduce(found)), bound, claim.predicate == "above")]
    combine: Callable[..., float | None]
    combine, word = (divide, "over") if claim.of == "ratio" else (subtract, "minus")
    numbers: list[tuple[str, list[Reading]]] = []
    if claim.b:
        numbers = [(f"{x.label} {word} {y.label}", [x, y]) for x, y in couples(claim, evidence)]
    elif claim.against_metric:
        both = (evidence.readings(claim.a, metric) for metric in (claim.metric, claim.against_metric))
        numbers = [(f"{claim.metric} {word} {claim.against_metric}{x.of}", [x, y]) for x, y in zip(*both, strict=True)]
    else:
        combine = float
        numbers = [(claim.metric + x.of, [x]) for x in evidence.readings(claim.a, claim.metric)]
    out = []
    for label, found in numbers:
        if claim.predicate in ("near", "above"):
            bound = claim.number + claim.effect * (1 if claim.predicate == "above" else -1)
            out.append(Side.of(label, found, combine, bound))
        if claim.predicate in ("near", "below"):
            bound = claim.number + claim.effect * (-1 if claim.predicate == "below" else 1)
            out.append(Side.of(label, found, combine, bound, above=False))
    return out


def ordered(claim: Claim, evidence: Evidence) -> list[Side]:
    readings = sorted(
        evidence.readings(claim.a, claim.metric), key=lambda reading: getattr(reading.arm.spec, claim.along)
    )
    rises, sides = claim.direction == "rises", []
    if not claim.gains:
        for x, y in itertools.pairwise(readings):
            pair = [y, x] if rises else [x, y]
            sides.append(Side(f"{pair[0].label} minus {pair[1].label}", paired(pair, subtract), claim.effect))
        return sides
    for trio in zip(readings, readings[1:], readings[2:], strict=False):
        p, q, r = (
            getattr(reading.arm.spec, claim.along) if claim.gains == "unit" else i for i, reading in enumerate(trio)
        )

        def growth(x: float, y: float, z: float, p: float = p, q: float = q, r: float = r) -> float:
            return ((z - y) / (r - q) - (y - x) / (q - p)) * (1 if rises else -1)

        label = f"gain to {trio[2].label} against gain to {trio[1].label}, {'rise' if rises else 'fall'},"
        sides.append(Side(label, paired(trio, growth), claim.effect))
    return sides


def best(claim: Claim, evidence: Evidence) -> list[Side]:
    readings = evidence.readings(claim.a, claim.metric)
    winner = next(reading for reading in readings if getattr(reading.arm.spec, claim.along) == claim.value)
    sides = []
    for reading in readings:
        if reading is not winner:
            pair = [reading, winner] if claim.mode == "min" else [winner, reading]
            sides.append(Side(f"{pair[0].label} minus {pair[1].label}", paired(pair, subtract), claim.effect))
    return sides


def correlation(claim: Claim, evidence: Evidence) -> list[Side]:
    """Pearson's r over the arms, once for every seed, tested as Fisher's z."""
    assert claim.number is not None
    x, y = evidence.readings(claim.a, claim.metric), evidence.readings(claim.a, claim.against_metric)
    numbers = paired([*x, *y], lambda *v: correlation_z(v[: len(x)], v[len(x) :]))
    up = claim.number >= 0
    bound = claim.number + (claim.effect if up else -claim.effect)
    return [Side(f"r of {claim.metric} and {claim.against_metric}", numbers, fisher(bound), up, math.tanh)]


def slopes(claim: Claim, evidence: Evidence) -> list[Side]:
    """The slope over the arms, once for every seed."""
    assert claim.number is not None
    x, y = evidence.readings(claim.a, claim.along), evidence.readings(claim.a, claim.metric)
    numbers = paired([*x, *y], lambda *v: slope(v[: len(x)], v[len(x) :], claim.law == "power"))
    label = f"{'exponent' if claim.law == 'power' else 'slope'} of {claim.metric} in {claim.along}"
    low, high = claim.number - claim.effect, claim.number + claim.effect
    return [Side(label, numbers, low), Side(label, numbers, high, above=False)]


def crossover(claim: Claim, evidence: Evidence) -> list[Side]:
    assert claim.budgets is not None
    sides = []
    for budget, ahead in zip(claim.budgets, (False, True), strict=True):
        metric = f"{claim.metric}@{budget}/k"
        for x in evidence.readings(claim.a, metric):
            for y in (reading for part in claim.b for reading in evidence.readings(part, metric)):
                pair = [y, x] if ahead else [x, y]
                label = f"at {budget} K-steps {pair[0].label} minus {pair[1].label}"
                sides.append(Side(label, paired(pair, subtract), claim.effect))
    return sides


PREDICATES: dict[str, Callable[[Claim, Evidence], list[Side]]] = {
    "less": less,
    "near": quantity,
    "above": quantity,
    "below": quantity,
    "ordered": ordered,
    "best": best,
    "correlation": correlation,
    "slope": slopes,
    "crossover": crossover,
}
