"""Records of trials, plain values without torch: written by who trains, read by predictions and pages."""

import math
from typing import Any, Literal

from pydantic import Field

from ctsft.tune.record import Accuracy, DataFacts, Machine, ModelFacts, Part


class Trial(Part):
    """One candidate trained once. Losses are in nats per token; None stands for one that is not finite."""

    candidate: str = Field(description="its name, see arms.candidate")
    seed: int = Field(description="of the order of the rows, of random directions and of what the method draws")
    rate: float = Field(description="peak of the linear schedule")
    steps: int
    horizon: int = Field(description="steps that the schedule is for; `steps`, unless the trial ended early")
    batch_size: int
    train: list[float | None] = Field(description="loss of every step's batch before its update")
    heldout: list[tuple[int, float | None]] = Field(description="(steps done, loss on the held-out rows)")
    clock: list[float] = Field(description="seconds of training after every step, looks at the held-out rows left out")
    trained: int = Field(description="how many numbers train")
    adapter_bytes: int = Field(description="of the file that holds them, really written")
    memory_bytes: int = Field(description="beyond the bare model: directions, numbers, gradients, optimizer state")
    diverged: bool = Field(description="a loss was not finite, and the trial ended there")
    accuracy: Accuracy | None = None

    @property
    def seconds(self) -> float:
        return self.clock[-1] if self.clock else 0.0

    @property
    def end(self) -> float:
        """The last loss on the held-out rows; infinite where it is not finite, or the trial diverged."""
        last = self.heldout[-1][1] if self.heldout else None
        return math.inf if last is None or self.diverged else last


class Start(Part):
    """The rule's rate of a candidate, measured on the first rows."""

    candidate: str
    rule: float
    directions: str | None = Field(default=None, description="checksum of the file that they are read from")


class Arm(Part):
    """One arm of a comparison: the rates that were raced, and its trials, one a seed, at the best of them."""

    name: str
    told: str
    rule: float
    tried: list[tuple[float, float | None]] = Field(description="(rate, held-out loss of its race), rates ascending")
    race_steps: int
    rate: float
    trials: list[Trial] = Field(min_length=1)

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest that was tried, so that a better one may lie outside."""
        return len(self.tried) > 1 and self.rate in (self.tried[0][0], self.tried[-1][0])


class Comparison(Part):
    """comparison.json: what `ctsft compare` found."""

    format: Literal[1] = 1
    created: str
    contest: dict[str, Any]
    versions: dict[str, str]
    machine: Machine
    model: ModelFacts
    data: DataFacts
    before: float = Field(description="held-out loss of the model as it is")
    before_accuracy: Accuracy | None
    arms: list[Arm] = Field(min_length=1)

    @property
    def name(self) -> str:
        return f"{self.model.name} on {self.data.name}"
