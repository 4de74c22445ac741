"""Experiments as data: which runs an experiment needs.

An *experiment* is a TOML file: arms, the paper's own figures and the columns of its table. Nothing here imports torch.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from ctsft.errors import CTError, wrong_fields
from ctsft.files import read_toml
from ctsft.lab.own import Own
from ctsft.lab.rates import GRID, rate
from ctsft.lab.schedule import parse_schedule
from ctsft.lab.spec import PAPER_LR, Arm, Method, Protocol, Spec, Strict

WHOLE = ("probes", "evaluate", "siblings")  # fields of a spec that hold several values
PAPERS = Path(__file__).with_name("papers")  # the experiments and claims that come with the package
Model = TypeVar("Model", bound=BaseModel)


class Profile(Strict):
    """How much of every experiment is run."""

    seeds: Annotated[int, Field(ge=1)]
    tune_seeds: Annotated[int, Field(ge=1)]
    rates: Annotated[int, Field(ge=3)] = Field(description="learning rates that a grid starts with")
    second: int = Field(default=0, description="seeds at the second look, for what open claims read; 0: there is none")

    @property
    def looks(self) -> int:
        """How often a claim may be judged: on the planned seeds, and once more on `second`."""
        return 2 if self.second > self.seeds else 1


class Figure(Strict):
    """One plot of the report: metric `y` against `x` (a metric, a field, or "step" for curves), a line per `by`."""

    title: str
    x: str
    y: str
    by: str = ""
    where: dict[str, Any] = {}
    log_x: bool = False
    log_y: bool = Field(default=False, description="for values above 0 only")
    paper: list[tuple[float, float]] = Field(default=[], description="the paper's own points (x, y)")
    law: str = Field(default="", description="a named curve that is drawn beside the points, see LAWS in drawing")


class Table(Strict):
    """The paper's own table: its columns by the metric that fills each, and its rows."""

    title: str
    columns: dict[str, str]
    where: dict[str, Any] = {}
    per: str = Field(default="", description="a field: a row for each of its values, over all arms that have it")
    paper: list[dict[str, Any]] = Field(default=[], description="rows of the paper, keyed like `columns`")
    elsewhere: bool = Field(default=False, description="the paper's rows are of another setting than the arms")


class Arms(Strict):
    """One [[arms]] table: what is named here, and fields of Spec (or k_steps), lists of which multiply out."""

    model_config = ConfigDict(extra="allow")
    name: str = "arm"
    profiles: tuple[str, ...] = Field(default=(), description="only in these; none: in all")
    protocols: tuple[Protocol, ...] = get_args(Protocol)
    seeds: PositiveInt | None = Field(default=None, description="at most so many, however many the profile has")
    rates: tuple[PositiveFloat, ...] = Field(default=(), description="the grid, in place of that of defaults.toml")
    tune_steps: PositiveInt | None = None


class Experiment(Strict):
    name: str
    title: str
    question: str
    source: str = Field(description="the paper's number, or ours")
    notes: list[str] = []
    base: dict[str, Any] = {}
    arms: list[Arms]
    tables: list[Table] = []
    figures: list[Figure] = []


class Laboratory(Strict):
    """All that a folder of experiments says."""

    base: dict[str, Any]
    rates: dict[str, PositiveFloat] = Field(description="the middle of the first grid, by method or by model.method")
    profiles: dict[str, Profile]
    experiments: dict[str, Experiment]
    own: Own | None = Field(default=None, description="what takes the place of the model and text of `base`")

    @property
    def home(self) -> Spec:
        """The model and text that arms have which name none."""
        return Spec(**{name: self.base[name] for name in ("model", "text") if name in self.base})

    @model_validator(mode="after")
    def methods_have_rates(self) -> "Laboratory":
        if wrong := [name for name in self.rates if name.rpartition(".")[2] not in get_args(Method)]:
            raise ValueError(f"rates: {wrong[0]} does not end in a method; take one of {', '.join(get_args(Method))}")
        return self


def read_laboratory(folder: Path = PAPERS) -> Laboratory:
    """`defaults.toml` and every experiment of `folder`; CTError names the file and every wrong key."""
    defaults = read_toml(folder / "defaults.toml")
    experiments = {}
    for path in sorted(folder.glob("*.toml"), key=lambda path: path.stem):
        if path.name not in ("defaults.toml", "claims.toml", "summary.toml"):
            experiments[path.stem] = _checked(path, Experiment, {"name": path.stem} | read_toml(path))
    if not experiments:
        raise CTError(f"{folder} holds no experiment (*.toml).")
    laboratory = _checked(folder / "defaults.toml", Laboratory, defaults | {"experiments": experiments})
    for name, experiment in experiments.items():
        if wrong := _wrong_name(experiment, laboratory.profiles):
            raise CTError(f"{folder / name}.toml is wrong: {wrong}.")
        for protocol in get_args(Protocol):
            for profile in laboratory.profiles:
                list(arms(laboratory, name, profile, protocol))
    return laboratory


def _wrong_name(experiment: Experiment, profiles: Iterable[str]) -> str:
    """What is wrong with the profiles, fields and columns that `experiment` names; empty if nothing is."""
    for arm in experiment.arms:
        for name in arm.profiles:
            if name not in profiles:
                return f"there is no profile {name!r}; there are {', '.join(profiles)}"
    every: list[Table | Figure] = [*experiment.tables, *experiment.figures]
    for shown in every:
        for name in shown.where:
            if name not in {*Spec.model_fields, "name"}:
                return f"{shown.title!r}: where names {name!r}, which is no field of a run"
    for table in experiment.tables:
        for name in itertools.chain(*table.paper):
            if name not in table.columns:
                return f"{table.title!r}: the paper's row names {name!r}, which is no column"
    return ""


def _checked(path: Path, kind: type[Model], values: dict[str, Any]) -> Model:
    try:
        return kind(**values)
    except ValidationError as error:
        raise CTError(f"{path} is wrong: {wrong_fields(error)}.") from None


def on_own(laboratory: Laboratory, own: Own) -> Laboratory:
    """The laboratory with a user's own model and text in place of its own. Arms that cannot be placed are left out."""
    home = laboratory.home

    def placed(shown: Any) -> Any:
        where, title = dict(shown.where), shown.title
        for name in ("model", "text"):
            named = where.get(name)
            if getattr(home, name) in (named if isinstance(named, list) else [named]):
                del where[name]
                title = f"{shown.title} (here: {Path(own.model).name}, {Path(own.text).name})"
        return shown.model_copy(update={"where": where, "title": title})

    experiments = {
        name: one.model_copy(
            update={"tables": [placed(t) for t in one.tables], "figures": [placed(f) for f in one.figures]}
        )
        for name, one in laboratory.experiments.items()
    }
    return laboratory.model_copy(update={"experiments": experiments, "own": own})


def left_out(laboratory: Laboratory, name: str, profile: str = "full", protocol: str = "honest") -> Counter[str]:
    """Why arms of an experiment cannot be placed on the user's own model and text, and how many."""
    home = laboratory.home
    if not laboratory.own:
        return Counter()
    every = _specs(laboratory, name, profile, protocol)
    return Counter(filter(None, (laboratory.own.refusal(spec, home) for _, spec in every)))


def arms(
    laboratory: Laboratory, name: str, profile: str = "full", protocol: str = "honest", second: bool = False
) -> Iterator[Arm]:
    """The arms of an experiment, lists of values multiplied out; on the user's own model and text where there are such.

    `honest`: the profile's seeds (`second`: those of the second look) and a tuned rate. `paper`: one seed, lr 5e-3, the
    fixed batch, constant rate.
    """
    home, seen = laboratory.home, set[tuple[str, str]]()
    for arm, found in _specs(laboratory, name, profile, protocol):
        spec, size = found, laboratory.profiles[profile]
        seeds = size.second if second else min(arm.seeds or size.seeds, size.seeds)
        if laboratory.own:
            if laboratory.own.refusal(found, home):
                continue
            spec = laboratory.own.placed(found)
            if (arm.name, spec.key) in seen:
                continue
            seen.add((arm.name, spec.key))
        yield Arm(
            name=arm.name,
            spec=spec,
            seeds=(0,) if protocol == "paper" else tuple(range(seeds)),
            rates=(PAPER_LR,) if protocol == "paper" or spec.rule else arm.rates or _grid(laboratory, spec, size.rates),
            tune_seeds=size.tune_seeds,
            tune_steps=arm.tune_steps,
        )


def _specs(laboratory: Laboratory, name: str, profile: str, protocol: str) -> Iterator[tuple[Arms, Spec]]:
    """The arms as they are written, each with a spec for every combination of its values."""
    if name not in laboratory.experiments:
        raise CTError(f"there is no experiment {name!r}; there are {', '.join(laboratory.experiments)}.")
    if profile not in laboratory.profiles:
        raise CTError(f"there is no profile {profile!r}; there are {', '.join(laboratory.profiles)}.")
    if protocol not in get_args(Protocol):
        raise CTError(f"there is no protocol {protocol!r}; there are {', '.join(get_args(Protocol))}.")
    experiment = laboratory.experiments[name]
    for arm in experiment.arms:
        if profile not in (arm.profiles or (profile,)) or protocol not in arm.protocols:
            continue
        grid = laboratory.base | experiment.base | (arm.model_extra or {})
        lists = {k: v for k, v in grid.items() if isinstance(v, list) and k not in WHOLE}
        if empty := [k for k, v in lists.items() if not v]:
            raise CTError(f"experiment {name}, arm {arm.name!r}: {empty[0]} is an empty list, so the arm has no runs.")
        for values in itertools.product(*lists.values()):
            fields = grid | dict(zip(lists, values, strict=True))
            if protocol == "paper":
                fields |= {"batches": "fixed", "decay": "constant", "lr": PAPER_LR}
            try:
                yield arm, Spec(**_computed(fields))
            except ValidationError as error:
                raise CTError(f"experiment {name}, arm {arm.name!r}: {wrong_fields(error, whole='arm')}.") from None
            except CTError as error:
                raise CTError(f"experiment {name}, arm {arm.name!r}: {error}") from None


def _computed(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with a schedule's first K, and `steps` in place of `k_steps` (K x steps, the budget of paper 88)."""
    fields = dict(fields)
    if fields.get("schedule") and isinstance(fields["schedule"], str):
        fields["k"] = parse_schedule(fields["schedule"])[0][1]
    if "k_steps" in fields:
        budget, k = fields.pop("k_steps"), fields.get("k", Spec.model_fields["k"].default)
        if not isinstance(budget, int) or not isinstance(k, int) or k < 1:
            raise CTError(f"k_steps={budget!r} needs a whole number and a k of at least 1.")
        fields["steps"] = max(1, round(budget / k))
    return fields


def _grid(laboratory: Laboratory, spec: Spec, count: int) -> tuple[float, ...]:
    """`count` rates around the middle that defaults.toml names for the model's method."""
    for name in (f"{Path(spec.model).name}.{spec.method}", spec.method):
        if name in laboratory.rates:
            middle = laboratory.rates[name]
            return tuple(rate(middle * GRID ** (i - count // 2)) for i in range(count))
    raise CTError(f"defaults.toml names no learning rate for {spec.method}: add it under [rates].")
