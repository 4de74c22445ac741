"""Records of trials, plain values without torch: written by who trains, read by predictions and pages."""

import math

from pydantic import Field

from ctsft.tune.record import Accuracy, Part


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
