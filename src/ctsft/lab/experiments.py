"""Experiments as data: what a run is, which runs an experiment needs, and which of them are still to be computed.

A *spec* is one training run, whole. An *arm* is a spec without its learning rate and seed: the rate is tuned for every
arm by the same rule, then the arm is run with every seed. An *experiment* is a TOML file: arms, the paper's own figures
and the columns of its table. Nothing here imports torch.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import xxhash
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from ctsft.choices import BasisKind, Probe, UniversalMode, WeightFrom
from ctsft.errors import CTError, wrong_fields
from ctsft.files import read_json, read_toml, write_text
from ctsft.lab.schedule import parse_schedule

FORMAT = 1
TUNE_SEEDS = range(1000, 1100)  # never among the seeds that a claim is judged on
GRID = 10**0.5  # neighbouring learning rates of a grid differ by this factor
MAX_RATES = 9  # an optimum that is still at the edge of so many rates is reported as not bracketed
PAPER_LR = 5e-3

Method = Literal["diagonal", "core", "scores", "full", "lora", "lora-fa", "lora-xs", "vera", "ia3", "norms"]
Model = TypeVar("Model", bound=BaseModel)
Protocol = Literal["honest", "paper"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spec(Strict):
    """One training run. Two equal specs give the same numbers on the same machine."""

    model: str = "photonic"
    tied: bool = Field(default=True, description="False: a random output head of its own, the bug of papers 81 and 82")
    text: str = Field(default="sql", description="what `corpus.load_corpus` takes; read as one stream of tokens")
    method: Method = "diagonal"
    k: Annotated[int, Field(ge=0)] = Field(default=32, description="directions, or rank; 0 where there are none")
    basis: BasisKind = "weight"
    weight_from: WeightFrom = "top"
    universal_mode: UniversalMode = "residual"
    allocation: Literal["uniform", "effective_rank"] = Field(default="uniform", description="K per matrix (paper 84)")
    targets: Literal["paper", "blocks", "last2", "last2+head"] = Field(
        default="paper", description="paper: all block matrices and the token embedding, the tied head with it"
    )
    schedule: str = Field(default="", description="K over the steps, such as 8>16@1/2; then k is its first K")
    carry: bool = Field(default=False, description="carry the optimizer's state over a change of K; papers reset it")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batches: Literal["fixed", "fresh"] = Field(default="fixed", description="the same batch every step, or new text")
    batch: Annotated[int, Field(ge=1)] = Field(default=2, description="sequences a step")
    length: Annotated[int, Field(ge=2)] = Field(default=127, description="tokens a sequence")
    steps: Annotated[int, Field(ge=0)] = 40
    decay: Literal["constant", "linear"] = "constant"
    lr: Annotated[float, Field(gt=0)] = PAPER_LR
    dtype: Literal["float32", "bfloat16"] = "float32"
    evaluate: tuple[int, ...] = Field(default=(), description="steps with a held-out loss, beside the first and last")
    probes: tuple[Probe, ...] = ()
    probe_every: Annotated[int, Field(ge=1)] = 10
    ablate: bool = Field(default=False, description="zero trained directions after training (paper 85)")
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def possible(self) -> "Spec":
        if self.schedule and parse_schedule(self.schedule)[0][1] != self.k:
            raise ValueError(f"k={self.k} is not the first K of the schedule {self.schedule}")
        return self

    @property
    def key(self) -> str:
        """The name of this run's record: readable, and ended by a hash of every field that is not the default."""
        text = json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
        short = Path(self.model).name.lower()
        return f"{short}-{self.method}-k{self.k}-{xxhash.xxh3_64_hexdigest(text.encode())}"


class Arm(Strict):
    """A spec whose learning rate and seed are open."""

    name: str
    spec: Spec
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = Field(description="where the grid starts; one rate only: it is not tuned")
    tune_seeds: int = 1
    tune_steps: int | None = Field(default=None, description="tune on runs of so many steps, None: of all steps")

    @property
    def tunes(self) -> bool:
        return len(self.rates) > 1 and self.spec.steps > 0

    def tuning(self, lr: float) -> list[Spec]:
        steps = self.spec.steps if self.tune_steps is None else min(self.tune_steps, self.spec.steps)
        measuring = ("probes", "probe_every", "ablate", "evaluate")  # so that arms that differ in these share the runs
        plain: dict[str, Any] = {name: Spec.model_fields[name].default for name in measuring}
        plain |= {"lr": lr, "steps": steps}
        return [replaced(self.spec, **plain, seed=seed) for seed in TUNE_SEEDS[: self.tune_seeds]]

    def final(self, lr: float) -> list[Spec]:
        return [replaced(self.spec, lr=lr, seed=seed) for seed in self.seeds]


def replaced(spec: Spec, **changes: Any) -> Spec:
    return Spec(**spec.model_dump() | changes)


# ------------------------------------------------------------------------------------------------------ what is due


def tuned_for(record: Mapping[str, Any]) -> float:
    """What a tuning run is judged by: its last loss on the fixed batch, or held-out; infinity if it diverged."""
    value = record["train_loss"][-1] if record["spec"]["batches"] == "fixed" else record["heldout"][-1][1]
    return math.inf if value is None else float(value)


class Choice(Strict):
    """The state of an arm's search for its learning rate."""

    lr: float | None  # None: more runs are needed
    due: tuple[Spec, ...] = ()
    bracketed: bool = False  # worse rates were seen on both sides
    tried: tuple[tuple[float, float], ...] = ()  # (rate, mean loss over the tuning seeds), ascending


def choose_rate(arm: Arm, records: Mapping[str, Mapping[str, Any]]) -> Choice:
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


def due(arm: Arm, records: Mapping[str, Mapping[str, Any]]) -> list[Spec]:
    """The runs that this arm needs next; none if it is complete."""
    choice = choose_rate(arm, records)
    if choice.lr is None:
        return list(choice.due)
    return [spec for spec in arm.final(choice.lr) if spec.key not in records]


# ------------------------------------------------------------------------------------------------------ experiments


class Profile(Strict):
    """How much of every experiment is run."""

    seeds: Annotated[int, Field(ge=1)]
    tune_seeds: Annotated[int, Field(ge=1)]
    rates: Annotated[int, Field(ge=3)] = Field(description="learning rates that a grid starts with")


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
    law: str = Field(default="", description="a named curve that is drawn beside the points, see lab_report")


class Table(Strict):
    """The paper's own table: its columns by the metric that fills each, and its rows."""

    title: str
    columns: dict[str, str]
    where: dict[str, Any] = {}
    paper: list[dict[str, Any]] = Field(default=[], description="rows of the paper, keyed like `columns`")


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
    """All that `experiments/` says."""

    base: dict[str, Any]
    rates: dict[str, PositiveFloat] = Field(description="the middle of the first grid, by method or by model.method")
    profiles: dict[str, Profile]
    experiments: dict[str, Experiment]

    @model_validator(mode="after")
    def methods_have_rates(self) -> "Laboratory":
        if wrong := [name for name in self.rates if name.rpartition(".")[2] not in get_args(Method)]:
            raise ValueError(f"rates: {wrong[0]} does not end in a method; take one of {', '.join(get_args(Method))}")
        return self


def read_laboratory(folder: Path) -> Laboratory:
    """`defaults.toml` and every other experiment of `folder`; CTError names the file and every wrong key."""
    defaults = read_toml(folder / "defaults.toml")
    experiments = {}
    for path in sorted(folder.glob("*.toml"), key=lambda path: path.stem):
        if path.name not in ("defaults.toml", "claims.toml"):
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


def arms(laboratory: Laboratory, name: str, profile: str = "full", protocol: str = "honest") -> Iterator[Arm]:
    """The arms of an experiment, lists of values multiplied out.

    `honest`: the profile's seeds and a tuned rate. `paper`: one seed, lr 5e-3, the fixed batch, constant rate.
    """
    if name not in laboratory.experiments:
        raise CTError(f"there is no experiment {name!r}; there are {', '.join(laboratory.experiments)}.")
    if profile not in laboratory.profiles:
        raise CTError(f"there is no profile {profile!r}; there are {', '.join(laboratory.profiles)}.")
    if protocol not in get_args(Protocol):
        raise CTError(f"there is no protocol {protocol!r}; there are {', '.join(get_args(Protocol))}.")
    experiment, size = laboratory.experiments[name], laboratory.profiles[profile]
    for arm in experiment.arms:
        if profile not in (arm.profiles or (profile,)) or protocol not in arm.protocols:
            continue
        grid = laboratory.base | experiment.base | (arm.model_extra or {})
        lists = {k: v for k, v in grid.items() if isinstance(v, list) and k not in ("probes", "evaluate")}
        if empty := [k for k, v in lists.items() if not v]:
            raise CTError(f"experiment {name}, arm {arm.name!r}: {empty[0]} is an empty list, so the arm has no runs.")
        for values in itertools.product(*lists.values()):
            fields = grid | dict(zip(lists, values, strict=True))
            if protocol == "paper":
                fields |= {"batches": "fixed", "decay": "constant", "lr": PAPER_LR}
            try:
                spec = Spec(**_computed(fields))
            except ValidationError as error:
                raise CTError(f"experiment {name}, arm {arm.name!r}: {wrong_fields(error, whole='arm')}.") from None
            except CTError as error:
                raise CTError(f"experiment {name}, arm {arm.name!r}: {error}") from None
            yield Arm(
                name=arm.name,
                spec=spec,
                seeds=(0,) if protocol == "paper" else tuple(range(min(arm.seeds or size.seeds, size.seeds))),
                rates=(PAPER_LR,) if protocol == "paper" else arm.rates or _grid(laboratory, spec, size.rates),
                tune_seeds=size.tune_seeds,
                tune_steps=arm.tune_steps,
            )


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


# ------------------------------------------------------------------------------------------------------------ records


class Records(dict[str, dict[str, Any]]):
    """Finished runs by key, read from and written to a folder of JSON files, one a run."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        for path in sorted(folder.glob("*.json")):
            record = read_json(path)
            if not isinstance(record, dict) or record.get("format") != FORMAT:
                raise CTError(f"{path} is no record of this ctsft; move it away and run the experiment again.")
            self[path.stem] = record

    def add(self, record: dict[str, Any]) -> None:
        """Keep `record`, in memory and whole on disk; numbers that are not finite become null."""
        spec = Spec(**record["spec"])
        text = json.dumps(_finite(record | {"format": FORMAT}), allow_nan=False, separators=(",", ":"))
        write_text(self.folder / f"{spec.key}.json", text + "\n")
        self[spec.key] = json.loads(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def finals(arm: Arm, records: Mapping[str, dict[str, Any]]) -> tuple[Choice, list[dict[str, Any]]]:
    """The arm's choice of rate and the records of its seeds that exist, in the order of the seeds."""
    choice = choose_rate(arm, records)
    if choice.lr is None:
        return choice, []
    return choice, [records[s.key] for s in arm.final(choice.lr) if s.key in records]
