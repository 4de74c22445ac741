"""Claims as data: one sentence of a paper, the runs that it speaks of, and the predicate that tests it."""

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from ctsft.errors import CTError, wrong_fields
from ctsft.files import read_toml
from ctsft.lab.compare import ArmRuns, arm_runs, chosen
from ctsft.lab.experiments import Laboratory
from ctsft.lab.metrics import UPDATES, check_metric, updates
from ctsft.lab.schedule import parse_schedule
from ctsft.lab.spec import Spec, Strict

OPEN = {"lr", "seed", "probes", "evaluate", "probe_every"}  # fields that tell no arms of a claim apart
Selection = dict[str, Any]
Selections = Annotated[tuple[Selection, ...], BeforeValidator(lambda v: (v,) if isinstance(v, Mapping) else v)]

# Predicate: (the arguments it needs, those it may have beside them). All have metric, where, a and effect.
ARGUMENTS: dict[str, tuple[set[str], set[str]]] = {
    "less": ({"b"}, {"against_metric"}),  # metric of a below against_metric of every b, by more than effect
    "near": ({"number"}, {"b", "against_metric", "of"}),  # a (less b, or over b) within effect of number
    "above": (
        {"number"},
        {"b", "against_metric", "of", "over"},
    ),  # a (less b, or over b) above number by more than effect
    "below": ({"number"}, {"b", "against_metric", "of", "over"}),  # over: the mean or largest of all arms that fit a
    "ordered": ({"along", "direction"}, {"gains"}),  # every neighbour along a field differs by more than effect
    "best": ({"along", "value", "mode"}, set()),  # the smallest or largest is at value, by more than effect
    "correlation": ({"against_metric", "number"}, set()),  # over the arms of a: beyond number, away from zero
    "slope": ({"along", "law", "number"}, set()),  # of metric on along over the arms of a: within effect of number
    "crossover": ({"b", "budgets"}, set()),  # a behind b at the first budget (K-steps), ahead of it at the second
    "exact": ({"number"}, {"per"}),  # every run: number (times the field `per`), within effect
}


class Artefact(Strict):
    """Why a claim may hold for another reason, and the arguments that change to show it."""

    cause: str
    control: dict[str, Any] = Field(description="arguments in place of the claim's own; `where` is merged into its own")


class Claim(Strict):
    """One sentence that can be tested. Selections name fields of Spec; see `Evidence.pick` for those left out."""

    id: str
    source: str = Field(description="the paper's number; derived: arithmetic on its figures; ours: our expectation")
    family: str = Field(
        default_factory=lambda given: given.get("source", ""), description="claims that are corrected together"
    )
    text: str
    experiments: Annotated[tuple[str, ...], Field(min_length=1)]
    predicate: Literal[
        "less", "near", "above", "below", "ordered", "best", "correlation", "slope", "crossover", "exact"
    ]
    metric: str
    where: Selection = Field(
        default={}, description="part of every selection; where it lists values, a is held against b at each of them"
    )
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
    over: Literal["", "mean", "max"] = Field(
        default="", description="of all arms that fit, whatever their other fields"
    )
    effect: Annotated[float, Field(ge=0)] = Field(description="the size that counts, in the metric's unit")
    protocol: Literal["honest", "paper"] = "honest"
    any_model: bool = Field(
        default=False,
        description="the model and text that it names are only those it was run on: it can be asked of any",
    )
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
            check_metric(metric)
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

    @property
    def told(self) -> str:
        """The sentence; of one that is about no model in particular also the model and text that it was asked of."""
        where = [str(self.where[name]) for name in ("model", "text") if self.any_model and name in self.where]
        return f"{self.text.removesuffix('.')} ({', '.join(where)})." if where else self.text

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


# ------------------------------------------------------------------------------------------- on a user's own model


def applicable(
    claims: Sequence[Claim], experiments: Collection[str], model: str, text: str = ""
) -> tuple[list[Claim], dict[str, str]]:
    """The claims as one asks them of runs of `experiments` on another `model` and `text`, and why some cannot be asked.

    All claims are returned, in order; those that apply have the model (and the text, unless "") in place of their own.
    The reasons are clauses, by id, for `judge`: such a claim is about runs that were not made, arithmetic on the
    papers' figures, about a model that it names or whose number it gives, or the same as one before.
    """
    asked, aside, first = [], {}, dict[str, str]()
    for claim in claims:
        reason = _particular(claim, experiments)
        one = claim if reason else _asked_of(claim, {"model": model} | ({"text": text} if text else {}))
        question = one.model_dump_json(exclude={"id", "source", "family", "text", "note"})
        if not reason and first.setdefault(question, claim.id) != claim.id:
            reason = f"of another model it asks the same as {first[question]}"
        if reason:
            aside[claim.id] = reason
        asked.append(claim if reason else one.model_copy(update={"any_model": False}))  # it is of this one now
    return asked, aside


def lacking(claims: Sequence[Claim], laboratory: Laboratory, profile: str) -> dict[str, str]:
    """The claims that read an arm which `laboratory` does not have, by id, and which arm that is."""
    pools: dict[tuple[str, str], list[ArmRuns]] = {}
    missing: dict[str, str] = {}
    for claim in claims:
        for name in claim.experiments:
            if (name, claim.protocol) not in pools:
                pools[name, claim.protocol] = arm_runs(laboratory, name, {}, profile, claim.protocol)
        for one in [claim, claim.control()] if claim.artefact else [claim]:
            for selection in (each for part in (one.a, *one.b) for each in expanded(one.where | part)):
                named = {n: v for n, v in selection.items() if n not in ("experiment", "model", "text")}
                every = [selection["experiment"]] if "experiment" in selection else one.experiments
                if not any(chosen(pools[name, one.protocol], named) for name in every):
                    told = ", ".join(f"{n} {v}" for n, v in named.items())
                    missing.setdefault(claim.id, f"it needs an arm that is left out here ({told})")
    return missing


def _particular(claim: Claim, experiments: Collection[str]) -> str:
    """Why a claim can be asked of its own runs only; empty if it can be asked of any."""
    if missing := [name for name in claim.experiments if name not in experiments]:
        return f"experiment {', '.join(missing)} was not run"
    if claim.source == "derived":
        return "it is arithmetic on the papers' figures"
    named = [
        str(one["model"]) for part in (claim.a, *claim.b) for one in expanded(claim.where | part) if "model" in one
    ]
    if named and not claim.any_model:
        return f"it is about {', '.join(dict.fromkeys(named))}"
    if claim.predicate in ("near", "slope", "exact") and claim.number not in (0, 1):
        return f"its number, {claim.number:g}, was measured on the model of its source"
    return ""


def _asked_of(claim: Claim, given: Selection) -> Claim:
    """The claim with `given` (the model, the text) in place of what it names."""

    def plain(part: Selection) -> Selection:
        return {name: found for name, found in part.items() if name not in given}

    changes: dict[str, Any] = {"where": plain(claim.where) | given, "a": plain(claim.a)}
    if claim.b:  # else it stays unset: most predicates have none, nor have their controls
        changes["b"] = tuple(plain(part) for part in claim.b)
    return claim.model_copy(update=changes)
