"""Claims as data, and the verdict on each: a predicate over runs, tested over seeds, corrected for all that is claimed.

Every stochastic predicate comes down to *sides*: one number a seed (a difference of paired runs, a slope, ...) that
the claim says is above, or below, a bound. It is confirmed if every side is shown to be so, refuted if the contrary is
shown of one, else inconclusive; "shown" is a one-sided t test at LEVEL after Holm's correction over all claims of the
file, for confirmations and for refutations apart. Nothing here imports torch: verdicts are made from records alone.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from ctsft.errors import CTError, wrong_fields
from ctsft.files import read_toml
from ctsft.lab.experiments import Laboratory
from ctsft.lab.metrics import UPDATES, Row, chosen, known, measured, rows, short, updates
from ctsft.lab.records import Record
from ctsft.lab.schedule import parse_schedule
from ctsft.lab.spec import Spec, Strict
from ctsft.lab.stats import LEVEL, SEEDS, Test, all_hold, correlation_z, fisher, holm, one_fails, slope, t_test

OPEN = {"lr", "seed", "probes", "evaluate", "probe_every"}  # fields that tell no arms of a claim apart
ONE = "the arm"  # where a claim reads only one
Selection = dict[str, Any]
Selections = Annotated[tuple[Selection, ...], BeforeValidator(lambda v: (v,) if isinstance(v, Mapping) else v)]

# ------------------------------------------------------------------------------------------------- what is claimed

# Predicate: (the arguments it needs, those it may have beside them). All have metric, where, a and effect.
ARGUMENTS: dict[str, tuple[set[str], set[str]]] = {
    "less": ({"b"}, {"against_metric"}),  # metric of a below against_metric of every b, by more than effect
    "near": ({"number"}, {"b", "against_metric", "of"}),  # a (less b, or over b) within effect of number
    "above": ({"number"}, {"b", "against_metric", "of"}),  # a (less b, or over b) above number by more than effect
    "below": ({"number"}, {"b", "against_metric", "of"}),
    "ordered": ({"along", "direction"}, {"gains"}),  # every neighbour along a field differs by more than effect
    "best": ({"along", "value", "mode"}, set()),  # the smallest or largest is at value, by more than effect
    "correlation": ({"against_metric", "number"}, set()),  # over the arms of a: beyond number, away from zero
    "slope": ({"along", "law", "number"}, set()),  # of metric on along over the arms of a: within effect of number
    "crossover": ({"b", "budgets"}, set()),  # a behind b at the first budget (K-steps), ahead of it at the second
    "exact": ({"number"}, {"per"}),  # every run: number (times the field `per`), within effect
}
SHARED = {"metric", "where", "a", "effect"}


class Artefact(Strict):
    """Why a claim may hold for another reason, and the arguments that change to show it."""

    cause: str
    control: dict[str, Any] = Field(description="arguments in place of the claim's own; `where` is merged into its own")


class Claim(Strict):
    """One sentence that can be tested. Selections name fields of Spec; see `Runs.pick` for those left out."""

    id: str
    source: str = Field(description="the paper's number; derived: arithmetic on its figures; ours: our expectation")
    text: str
    experiments: Annotated[tuple[str, ...], Field(min_length=1)]
    predicate: Literal[
        "less", "near", "above", "below", "ordered", "best", "correlation", "slope", "crossover", "exact"
    ]
    metric: str
    where: Selection = Field(default={}, description="part of every selection")
    a: Selection = {}
    b: Selections = ()
    against_metric: str = Field(default="", description="the metric of b, where it is another; of a if there is no b")
    of: Literal["difference", "ratio"] = "difference"
    along: str = ""
    direction: Literal["", "rises", "falls"] = ""
    gains: Literal["", "step", "unit"] = Field(default="", description="order the gains a step, or a unit of along")
    value: str | int | float | None = None
    mode: Literal["", "min", "max"] = ""
    law: Literal["", "linear", "power"] = ""
    number: float | None = None
    budgets: tuple[int, int] | None = None
    per: str = ""
    effect: Annotated[float, Field(ge=0)] = Field(description="the size that counts, in the metric's unit")
    protocol: Literal["honest", "paper"] = "honest"
    artefact: Artefact | None = None
    note: str = ""

    @model_validator(mode="after")
    def possible(self) -> "Claim":
        needed, allowed = ARGUMENTS[self.predicate]
        given = self.model_fields_set & {name for pair in ARGUMENTS.values() for name in pair[0] | pair[1]}
        if needed - given or given - needed - allowed:
            wrong = [f"needs {n}" for n in sorted(needed - given)]
            wrong += [f"has no {n}" for n in sorted(given - needed - allowed)]
            raise ValueError(f"the predicate {self.predicate} {' and '.join(wrong)}")
        for metric in filter(None, (self.metric, self.against_metric, self.along if self.predicate == "slope" else "")):
            if known(metric):
                raise ValueError(f"there is no metric {metric!r}")
        if self.predicate == "crossover" and self.metric not in ("train_loss", "heldout_loss"):
            raise ValueError("a crossover is of train_loss or of heldout_loss")
        every = expanded(self.where | self.a)
        for part in self.b:
            expanded(self.where | part)
        if self.predicate in ("ordered", "best"):
            found = [one.get(self.along) for one in every]
            if len(set(found)) != len(found) or len(found) < (3 if self.gains else 2):
                raise ValueError(f"the selection a must list two or more values of {self.along} and no other field")
            if self.predicate == "best" and self.value not in found:
                raise ValueError(f"value {self.value!r} is not among the values of {self.along} in a")
        if self.predicate in ("correlation", "slope") and len(every) < 3:
            raise ValueError("the selection a must hold three arms or more")
        if self.per and self.per not in Spec.model_fields:
            raise ValueError(f"per: there is no field {self.per!r}")
        if self.artefact:
            self.control()
        return self

    def control(self) -> "Claim":
        """The claim as its artefact's control asks it."""
        assert self.artefact
        changes = dict(self.artefact.control)
        changes["where"] = self.where | changes.get("where", {})
        own = {name: getattr(self, name) for name in self.model_fields_set - {"artefact"}}
        return Claim(**own | changes)


def expanded(selection: Selection) -> list[Selection]:
    """Lists of values multiplied out, `steps` such as "1280/k" computed; ValueError for what no Spec can have."""
    lists = {name: found if isinstance(found, list) else [found] for name, found in selection.items()}
    out = []
    for values in itertools.product(*lists.values()):
        one = dict(zip(lists, values, strict=True))
        if one.get("schedule"):
            one.setdefault("k", parse_schedule(one["schedule"])[0][1])
        if isinstance(one.get("steps"), str):
            if not UPDATES.fullmatch(one["steps"]) or "k" not in one:
                raise ValueError(f"steps {one['steps']!r} is no number, nor one over k such as 1280/k with k given")
            one["steps"] = updates(one["steps"], one["k"])
        wrong = [name for name in one if name in OPEN or name not in {*Spec.model_fields, "experiment"}]
        if wrong:
            raise ValueError(f"a selection cannot have {', '.join(wrong)}: take fields of Spec, or experiment")
        try:
            Spec(**{name: found for name, found in one.items() if name != "experiment"})
        except ValidationError as error:
            raise ValueError(wrong_fields(error)) from None
        out.append(one)
    return out


def read_claims(path: Path) -> list[Claim]:
    """The claims of a TOML file of [[claim]] tables, in order; CTError tells every wrong key of every claim."""
    read = read_toml(path)
    found = read.get("claim", [])
    wrong = [f"{name}: no such table, use [[claim]]" for name in read if name != "claim"]
    claims = []
    for i, values in enumerate(found):
        name = values.get("id", f"number {i + 1}")
        try:
            claims.append(Claim(**values))
        except ValidationError as error:
            wrong.append(f"{name}: {wrong_fields(error)}")
    wrong += [f"{name}: the id is used {n} times" for name, n in Counter(c.id for c in claims).items() if n > 1]
    if wrong or not found:
        raise CTError(f"{path} is wrong: {'; '.join(wrong) or 'it holds no claim'}.")
    return claims


# ------------------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Cell:
    """An arm, read by one metric."""

    label: str
    row: Row
    metric: str
    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        return math.fsum(self.by_seed.values()) / len(self.by_seed)

    @property
    def of(self) -> str:
        return "" if self.label == ONE else f" of {self.label}"


class NotRun(Exception):
    """Runs or measurements that a claim needs do not exist; the message says which."""


@dataclass
class Runs:
    """The arms that one claim may read."""

    pools: dict[str, list[Row]]  # by experiment
    shared: Selection  # fields that a label need not repeat
    used: list[Cell] = field(default_factory=list)

    def cells(self, selection: Selection, metric: str) -> list[Cell]:
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

    def told(self, one: Selection, name: str) -> bool:
        """Is this field's value news, beside what all selections share and what its other fields say?"""
        shared, found = self.shared.get(name), one[name]
        said = (name == "steps" and isinstance(shared, str)) or (name == "k" and bool(one.get("schedule")))
        return shared != found and found != "" and not said

    def pick(self, one: Selection, metric: str) -> Cell:
        """The one arm with these fields. Where arms differ in a field that is left out, it stands at Spec's default."""
        where = {name: found for name, found in one.items() if name != "experiment"}
        label = ", ".join(f"{n} {v}" for n, v in one.items() if self.told(one, n)) or ONE
        pools = [pool for name, pool in self.pools.items() if one.get("experiment", name) == name]
        pairs = [(row, pool) for pool in pools for row in chosen(pool, where)]
        for name, info in Spec.model_fields.items():
            kept = [(row, pool) for row, pool in pairs if getattr(row.spec, name) == info.default]
            if name not in where and name not in OPEN and kept:
                pairs = kept
        if not pairs:
            raise NotRun(f"no arm with {' '.join(f'{n}={v}' for n, v in one.items())}")
        alike = {row.spec.model_dump_json(exclude=OPEN) for row, _ in pairs}
        if len(alike) > 1:
            names = ", ".join(sorted({f"{row.name} ({row.spec.key})" for row, _ in pairs}))
            raise CTError(f"the selection {one} fits several arms: {names}; name more fields.")
        told = []
        for row, pool in pairs:  # arms that differ in what they probe only: the first that measures the metric
            if not row.complete or row.lr is None:
                told.append(f"{row.name} [{label}] has {len(row.records)} of {len(row.seeds)} seeds")
                continue
            found = {s: v for s, v in zip(row.seeds, measured(row, pool, metric), strict=True) if v is not None}
            if found or any(r.diverged for r in row.records):
                return Cell(label, row, metric, found)
            told.append(f"{metric} is not measured in {row.name} [{label}]")
        raise NotRun(told[0])


def paired(cells: Sequence[Cell], compute: Callable[..., float | None]) -> list[float]:
    """`compute` of the cells' numbers, for every seed that all of them have."""
    seeds = [s for s in cells[0].by_seed if all(s in cell.by_seed for cell in cells)]
    found = [compute(*(cell.by_seed[s] for cell in cells)) for s in seeds]
    return [number for number in found if number is not None]


# ------------------------------------------------------------------------------------------------- the predicates


@dataclass(frozen=True)
class Side:
    """The claim says that the mean of `numbers` (one a seed) is above `bound`, or below it."""

    label: str
    numbers: list[float]
    bound: float
    above: bool = True
    show: Callable[[float], float] = float  # from the scale of the test to that of the sentence

    @property
    def test(self) -> Test:
        if not self.numbers:
            return Test(0, math.nan, math.nan, math.nan, 1.0, 1.0)
        return t_test(self.numbers, self.bound)

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
        return f"{self.label} is {mean} [{low}, {high}], claimed {word} {short(self.show(self.bound))}"


def subtract(x: float, y: float) -> float:
    return x - y


def divide(x: float, y: float) -> float | None:
    return x / y if y else None


def less(claim: Claim, runs: Runs) -> list[Side]:
    first = runs.cells(claim.a, claim.metric)
    others = [cell for part in claim.b for cell in runs.cells(part, claim.against_metric or claim.metric)]
    return [Side(f"{y.label} minus {x.label}", paired([y, x], subtract), claim.effect) for x in first for y in others]


def quantity(claim: Claim, runs: Runs) -> list[Side]:
    """near, above and below: the metric of every arm of a, or its difference to (its ratio over) every arm of b."""
    assert claim.number is not None
    combine, word = (divide, "over") if claim.of == "ratio" else (subtract, "minus")
    first, metric = runs.cells(claim.a, claim.metric), claim.against_metric or claim.metric
    numbers: list[tuple[str, list[float]]] = []
    if claim.b:
        others = [cell for part in claim.b for cell in runs.cells(part, metric)]
        numbers = [(f"{x.label} {word} {y.label}", paired([x, y], combine)) for x in first for y in others]
    elif claim.against_metric:
        pairs = zip(first, runs.cells(claim.a, metric), strict=True)
        numbers = [(f"{claim.metric} {word} {metric}{x.of}", paired([x, y], combine)) for x, y in pairs]
    else:
        numbers = [(claim.metric + x.of, paired([x], float)) for x in first]
    out = []
    for label, found in numbers:
        if claim.predicate in ("near", "above"):
            out.append(Side(label, found, claim.number + claim.effect * (1 if claim.predicate == "above" else -1)))
        if claim.predicate in ("near", "below"):
            sign = -1 if claim.predicate == "below" else 1
            out.append(Side(label, found, claim.number + claim.effect * sign, above=False))
    return out


def ordered(claim: Claim, runs: Runs) -> list[Side]:
    cells = sorted(runs.cells(claim.a, claim.metric), key=lambda cell: getattr(cell.row.spec, claim.along))
    rises, sides = claim.direction == "rises", []
    if not claim.gains:
        for x, y in itertools.pairwise(cells):
            pair = [y, x] if rises else [x, y]
            sides.append(Side(f"{pair[0].label} minus {pair[1].label}", paired(pair, subtract), claim.effect))
        return sides
    for trio in zip(cells, cells[1:], cells[2:], strict=False):
        p, q, r = (getattr(cell.row.spec, claim.along) if claim.gains == "unit" else i for i, cell in enumerate(trio))

        def growth(x: float, y: float, z: float, p: float = p, q: float = q, r: float = r) -> float:
            return ((z - y) / (r - q) - (y - x) / (q - p)) * (1 if rises else -1)

        label = f"gain to {trio[2].label} against gain to {trio[1].label}, {'rise' if rises else 'fall'},"
        sides.append(Side(label, paired(trio, growth), claim.effect))
    return sides


def best(claim: Claim, runs: Runs) -> list[Side]:
    cells = runs.cells(claim.a, claim.metric)
    winner = next(cell for cell in cells if getattr(cell.row.spec, claim.along) == claim.value)
    sides = []
    for cell in cells:
        if cell is not winner:
            pair = [cell, winner] if claim.mode == "min" else [winner, cell]
            sides.append(Side(f"{pair[0].label} minus {pair[1].label}", paired(pair, subtract), claim.effect))
    return sides


def correlation(claim: Claim, runs: Runs) -> list[Side]:
    """Pearson's r over the arms, once for every seed, tested as Fisher's z."""
    assert claim.number is not None
    x, y = runs.cells(claim.a, claim.metric), runs.cells(claim.a, claim.against_metric)
    numbers = paired([*x, *y], lambda *v: correlation_z(v[: len(x)], v[len(x) :]))
    up = claim.number >= 0
    bound = claim.number + (claim.effect if up else -claim.effect)
    return [Side(f"r of {claim.metric} and {claim.against_metric}", numbers, fisher(bound), up, math.tanh)]


def slopes(claim: Claim, runs: Runs) -> list[Side]:
    """The slope over the arms, once for every seed."""
    assert claim.number is not None
    x, y = runs.cells(claim.a, claim.along), runs.cells(claim.a, claim.metric)
    numbers = paired([*x, *y], lambda *v: slope(v[: len(x)], v[len(x) :], claim.law == "power"))
    label = f"{'exponent' if claim.law == 'power' else 'slope'} of {claim.metric} in {claim.along}"
    low, high = claim.number - claim.effect, claim.number + claim.effect
    return [Side(label, numbers, low), Side(label, numbers, high, above=False)]


def crossover(claim: Claim, runs: Runs) -> list[Side]:
    assert claim.budgets is not None
    sides = []
    for budget, ahead in zip(claim.budgets, (False, True), strict=True):
        metric = f"{claim.metric}@{budget}/k"
        for x in runs.cells(claim.a, metric):
            for y in (cell for part in claim.b for cell in runs.cells(part, metric)):
                pair = [y, x] if ahead else [x, y]
                label = f"at {budget} K-steps {pair[0].label} minus {pair[1].label}"
                sides.append(Side(label, paired(pair, subtract), claim.effect))
    return sides


PREDICATES: dict[str, Callable[[Claim, Runs], list[Side]]] = {
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


# ------------------------------------------------------------------------------------------------------- verdicts

WORDS = ("confirmed", "refuted", "artefact", "inconclusive", "not run")


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    verdict: str  # one of WORDS
    detail: str  # what was measured, in one sentence
    p: float | None = None  # corrected; of the verdict's direction, of the likelier one if inconclusive
    seeds: int = 0
    control: str = ""  # the control's verdict and detail
    side: Side | None = None  # the side that decided it, or came nearest to it


class Verdicts(list[Verdict]):
    """The verdicts on all claims of a file, in its order, and what they were made from."""

    def __init__(self, verdicts: Sequence[Verdict], profile: str, records: int, tests: int) -> None:
        super().__init__(verdicts)
        self.profile, self.records, self.tests = profile, records, tests


@dataclass(frozen=True)
class _Judged:
    """A claim, or its control, before the correction."""

    claim: Claim
    done: str = ""  # a verdict that needs no test: "not run", or that of exact
    detail: str = ""
    sides: list[Side] = field(default_factory=list)

    @property
    def holds(self) -> float:
        return all_hold([side.holds for side in self.sides]) if self.sides else 1.0

    @property
    def fails(self) -> float:
        return one_fails([side.fails for side in self.sides]) if self.sides else 1.0


def judge(
    claims: Sequence[Claim],
    laboratory: Laboratory,
    records: Mapping[str, Record],
    profile: str = "full",
) -> Verdicts:
    """The verdict on every claim from the records that exist. The correction counts all claims, run or not.

    CTError where a claim names an experiment that is not there, or a selection fits several arms.
    """
    pools: dict[tuple[str, str], list[Row]] = {}
    for claim in claims:
        for name in claim.experiments:
            key = (name, claim.protocol)
            if key not in pools:
                pools[key] = rows(laboratory, name, records, profile, claim.protocol)
    every = [one for claim in claims for one in ([claim, claim.control()] if claim.artefact else [claim])]
    judged = [_judged(one, {n: pools[n, one.protocol] for n in one.experiments}) for one in every]
    tests = [i for i, one in enumerate(every) if one.predicate != "exact"]
    holds = dict(zip(tests, holm([judged[i].holds for i in tests]), strict=True))
    fails = dict(zip(tests, holm([judged[i].fails for i in tests]), strict=True))
    single = [_single(one, holds.get(i, 1.0), fails.get(i, 1.0)) for i, one in enumerate(judged)]
    out, left = [], iter(single)
    for claim in claims:
        verdict = next(left)
        out.append(_with_control(claim, verdict, next(left)) if claim.artefact else verdict)
    return Verdicts(out, profile, len(records), len(tests))


def _judged(claim: Claim, pools: dict[str, list[Row]]) -> _Judged:
    runs = Runs(pools, claim.where)
    try:
        if claim.predicate == "exact":
            return _equals(claim, runs)
        sides = PREDICATES[claim.predicate](claim, runs)
    except NotRun as error:
        return _Judged(claim, "not run", f"missing: {error}")
    return _Judged(claim, "", "; ".join(filter(None, (_means(runs.used), *_remarks(runs.used)))), sides)


def _equals(claim: Claim, runs: Runs) -> _Judged:
    assert claim.number is not None
    cells = runs.cells(claim.a, claim.metric)
    text, n = short(claim.number) + (f" x {claim.per}" if claim.per else ""), 0
    for cell in cells:
        wanted = claim.number * (getattr(cell.row.spec, claim.per) if claim.per else 1)
        for seed, found in cell.by_seed.items():
            n += 1
            if abs(found - wanted) > claim.effect:
                told = f"{claim.metric}{cell.of} is {_digits(found)} at seed {seed}, not {_digits(wanted)}"
                return _Judged(claim, "refuted", told + (f" ({text})" if claim.per else ""))
    if not n:
        raise NotRun(f"{claim.metric} is not measured, all runs diverged")
    within = f" within {short(claim.effect)}" if claim.effect else ""
    means = f" ({_means(cells)})" if len(cells) > 1 else ""
    return _Judged(claim, "confirmed", f"{claim.metric} is {text}{within} in all {n} runs{means}")


def _digits(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) else f"{number:,.6g}"


def _means(cells: Sequence[Cell]) -> str:
    """`train_loss 8.46 (k 32), 9.13 (k 8)`, by metric, each arm once; nothing for an arm alone."""
    by_metric: dict[str, dict[str, str]] = {}
    for cell in cells if len(cells) > 1 else ():
        if cell.metric not in Spec.model_fields:
            shown = short(cell.mean) if cell.by_seed else "diverged"
            by_metric.setdefault(cell.metric, {})[cell.label] = (
                shown if cell.label == ONE else f"{shown} ({cell.label})"
            )
    return "; ".join(f"{metric} {', '.join(arms.values())}" for metric, arms in by_metric.items())


def _remarks(cells: Sequence[Cell]) -> list[str]:
    """What a reader must know of the runs: rates that are not bracketed, runs that diverged."""
    loose = {c.label: None for c in cells if c.row.tuned and not c.row.bracketed}
    lost = {c.label: sum(r.diverged for r in c.row.records) for c in cells}
    out = [f"learning rate not bracketed: {'; '.join(loose)}"] if loose else []
    return out + [f"{n} runs of {label} diverged" for label, n in lost.items() if n]


def _single(one: _Judged, holds: float, fails: float) -> Verdict:
    if one.done:
        return Verdict(one.claim, one.done, one.detail, seeds=0)
    word, p = "inconclusive", min(holds, fails)
    if holds <= LEVEL:
        word, p = "confirmed", holds
    elif fails <= LEVEL:
        word, p = "refuted", fails
    if word == "refuted":
        side = min(one.sides, key=lambda s: (s.fails, s.margin))
    else:
        side = max(one.sides, key=lambda s: (s.holds, -s.margin))
    seeds = min(s.test.n for s in one.sides)
    few = f" (fewer than {SEEDS}: no verdict)" if seeds < SEEDS else ""
    detail = "; ".join(filter(None, (side.told(), f"p {_p(p)}, {seeds} seeds{few}", one.detail)))
    return Verdict(one.claim, word, detail, p, seeds, side=side)


def _p(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def _with_control(claim: Claim, verdict: Verdict, control: Verdict) -> Verdict:
    """A claim that holds, and whose control is refuted, is an artefact; it waits for a control that is open."""
    assert claim.artefact
    told = f"control ({_changes(claim)}) {control.verdict}: {control.detail}"
    word, detail = verdict.verdict, verdict.detail
    if word == "confirmed" and control.verdict == "refuted":
        word, detail = "artefact", f"{claim.artefact.cause} As the paper has it: {detail}"
    elif word == "confirmed" and control.verdict != "confirmed":
        word, detail = "inconclusive", f"holds as the paper has it, its control is open; {detail}"
    return replace(verdict, verdict=word, detail=detail, control=told)


def _changes(claim: Claim) -> str:
    assert claim.artefact
    told = []
    for name, found in claim.artefact.control.items():
        parts = found.items() if name == "where" else [(name, found)]
        told += [f"{n} {v}" for n, v in parts]
    return ", ".join(told)


# ------------------------------------------------------------------------------------------------------- markdown


def markdown(verdicts: Verdicts) -> str:
    """VERDICTS.md: the same text for the same records, so that comparing it shows whether it is stale."""
    counts = Counter(v.verdict for v in verdicts)
    lines = [
        "# Verdicts",
        "",
        "Made by `ctsft lab verdicts` from the committed records; do not edit.",
        "",
        ", ".join(f"{counts[word]} {word}" for word in WORDS) + f": {len(verdicts)} claims.",
        "",
        f"Profile `{verdicts.profile}`, {verdicts.records:,} records. Losses are in nats per token; intervals are 95% "
        f"(t, over seeds). A claim is confirmed, or refuted, at p <= {LEVEL} after Holm's correction over the "
        f"{verdicts.tests} tests of all claims and controls, for either direction apart; fewer than {SEEDS} seeds give "
        "no verdict. *Artefact*: it holds as the paper has it, and the control without the named cause refutes it. "
        "The effect sizes stand in `experiments/claims.toml` and were written before the runs were read.",
    ]
    titles = {"derived": "Arithmetic on the papers' figures", "ours": "Our own expectations"}
    sources = list(dict.fromkeys(v.claim.source for v in verdicts))
    for source in sorted(sources, key=lambda s: list(titles).index(s) if s in titles else -1):
        lines += ["", f"## {titles.get(source, f'Paper {source}')}", "", "| | claim | verdict | what was measured |"]
        lines.append("|---|---|---|---|")
        for v in verdicts:
            if v.claim.source == source:
                told = "<br>".join(filter(None, (v.detail, v.control, v.claim.note and f"Note: {v.claim.note}")))
                lines.append(f"| {v.claim.id} | {_cell(v.claim.text)} | **{v.verdict}** | {_cell(told)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
