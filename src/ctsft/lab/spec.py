"""What one run is: a *spec* is one training run, whole; an *arm* is a spec without its learning rate and seed.

The rate is tuned for every arm by the same rule, then the arm is run with every seed. Nothing here imports torch.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ctsft.choices import BasisKind, Probe, Start, UniversalMode, WeightFrom
from ctsft.lab.schedule import parse_schedule

TUNE_SEEDS = range(1000, 1100)  # never among the seeds that a claim is judged on
PAPER_LR = 5e-3

Forms = Literal["diagonal", "core", "scores", "gains"]
Published = Literal["full", "lora", "lora-fa", "lora-xs", "vera", "ia3", "norms"]
Lone = Literal["tinylora", "unilora", "grouped", "moved", "with-norms", "components"]  # see lone.py
Method = Literal[Forms, Published, Lone]
Protocol = Literal["honest", "paper"]
Learning = Literal["joint", "nested", "fixed", "pairs", "mean", "hosvd"]
Spread = Literal["uniform", "effective_rank", "energy", "gradient", "slope", "fisher", "gora"]
Allocation = Literal[Spread, "attention", "down", "one_down"]  # see ALLOCATIONS in allocations.py
Rule = Literal["", "auto", "alone", "floor", "weights", "line", "constant", "trl", "peft"]  # see RULES in lab/rules.py


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spec(Strict):
    """One training run. Two equal specs give the same numbers on the same machine."""

    model: str = "photonic"
    tied: bool = Field(default=True, description="False: a random output head of its own, the bug of papers 81 and 82")
    text: str = Field(default="sql", description="what `load_corpus` takes; read as one stream of tokens")
    method: Method = "diagonal"
    k: Annotated[int, Field(ge=0)] = Field(default=32, description="directions, or rank; 0 where there are none")
    basis: BasisKind = "weight"
    weight_from: WeightFrom = "top"
    universal_mode: UniversalMode = "residual"
    siblings: tuple[str, ...] = Field(default=(), description="texts that directions are learned from, see siblings.py")
    learning: Learning = Field(default="joint", description="how, see LEARNINGS in siblings.py")
    learned_k: Annotated[int, Field(ge=0)] = Field(default=0, description="directions that are learned, 0: k")
    learned_steps: Annotated[int, Field(ge=0)] = Field(default=160, description="each on `learned_batch` windows")
    learned_batch: Annotated[int, Field(ge=0)] = Field(
        default=0, description="windows of a step, of the siblings in turn; 0: one of every sibling"
    )
    learned_pace: Annotated[float, Field(gt=0)] = Field(default=1.0, description="a factor on joint training's rates")
    start: Start = Field(
        default="zero", description="mean: of the siblings; methods without directions merge it into W"
    )
    strength: float = Field(default=1.0, description="a factor on the siblings' mean")
    shuffled: bool = Field(default=False, description="left and right sides of the learned directions permuted")
    allocation: Allocation = Field(default="uniform", description="K per matrix, k in the mean")
    targets: Literal["paper", "blocks", "last2", "last2+head"] = Field(
        default="paper", description="paper: all block matrices and the token embedding, the tied head with it"
    )
    schedule: str = Field(default="", description="K over the steps, such as 8>16@1/2; then k is its first K")
    carry: bool = Field(default=False, description="carry the optimizer's state over a change of K; papers reset it")
    refreshes: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="times, evenly spread, that what was learned is folded into W and random directions drawn",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batches: Literal["fixed", "fresh"] = Field(default="fixed", description="the same batch every step, or new text")
    batch: Annotated[int, Field(ge=1)] = Field(default=2, description="sequences a step")
    length: Annotated[int, Field(ge=2)] = Field(default=127, description="tokens a sequence")
    steps: Annotated[int, Field(ge=0)] = 40
    decay: Literal["constant", "linear"] = "constant"
    lr: Annotated[float, Field(gt=0)] = PAPER_LR
    rule: Rule = Field(default="", description="what gives the rate in place of lr; without it the rate is tuned")
    dtype: Literal["float32", "bfloat16"] = "float32"
    evaluate: tuple[int, ...] = Field(default=(), description="steps with a held-out loss, beside the first and last")
    heldout_windows: Annotated[int, Field(ge=1)] = Field(
        default=16, description="windows of held-out text that are read, evenly spread over it"
    )
    probes: tuple[Probe, ...] = ()
    probe_every: Annotated[int, Field(ge=1)] = 10
    ablate: bool = Field(default=False, description="zero trained directions after training (paper 85)")
    seed: Annotated[int, Field(ge=0)] = 0
    weights: str = Field(default="", description="fingerprint of a user's own model, see `key`")
    corpus: str = Field(default="", description="hash of a user's own text, see `key`")

    @model_validator(mode="after")
    def possible(self) -> "Spec":
        if self.schedule and parse_schedule(self.schedule)[0][1] != self.k:
            raise ValueError(f"k={self.k} is not the first K of the schedule {self.schedule}")
        return self

    @property
    def key(self) -> str:
        """The name of this run's record: readable, and ended by a hash of every field that is not the default.

        A model or text that is a user's own counts by its name and content, wherever it lies.
        """
        told = self.model_dump(mode="json", exclude_defaults=True)
        if self.weights:
            told["model"] = self.short
        if self.corpus:
            told["text"] = Path(self.text).name
        text = json.dumps(told, sort_keys=True)
        return f"{self.short}-{self.method}-k{self.k}-{xxhash.xxh3_64_hexdigest(text.encode())}"

    @property
    def learns(self) -> bool:
        """Whether it trains along directions that are learned, or begins at what siblings have learned."""
        return self.basis == "learned" or self.start == "mean"

    @property
    def short(self) -> str:
        """The model in one word."""
        return Path(self.model).name.lower()


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
        return len(self.rates) > 1 and self.spec.steps > 0 and not self.spec.rule

    def tuning(self, lr: float) -> list[Spec]:
        steps = self.spec.steps if self.tune_steps is None else min(self.tune_steps, self.spec.steps)
        measuring = (
            "probes",
            "probe_every",
            "ablate",
            "evaluate",
            "heldout_windows",
        )  # arms that differ here share runs
        plain: dict[str, Any] = {name: Spec.model_fields[name].default for name in measuring}
        plain |= {"lr": lr, "steps": steps}
        return [replaced(self.spec, **plain, seed=seed) for seed in TUNE_SEEDS[: self.tune_seeds]]

    def final(self, lr: float) -> list[Spec]:
        return [replaced(self.spec, lr=lr, seed=seed) for seed in self.seeds]


def replaced(spec: Spec, **changes: Any) -> Spec:
    return Spec(**spec.model_dump() | changes)
