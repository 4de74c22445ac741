"""Rules for a learning rate that the laboratory holds against tuned ones."""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from ctsft.adapter.rate import gradient, learning_rate, line
from ctsft.adapter.store import layers_of

Batches = Sequence[Mapping[str, Tensor]]


def by_line(model: nn.Module, batches: Batches) -> float:
    """The line alone, by the norm of the first batch's gradient."""
    numbers = [layer.ctsft_coefficients["default"] for layer in layers_of(model).values()]
    squares = sum(float(g.square().sum()) for g in gradient(model, numbers, batches[0]))
    return line(math.sqrt(squares), sum(n.numel() for n in numbers))


# Each gives the peak rate for the adapter of a model that is not trained yet, and batches of its text.
RULES: dict[str, Callable[[nn.Module, Batches], float]] = {
    "auto": learning_rate,  # `ctsft tune --lr auto`
    "weights": lambda model, batches: learning_rate(model),
    "line": by_line,
    "constant": lambda model, batches: 0.05,  # the middle of the best rates of the arena
    "trl": lambda model, batches: 2e-4,  # what TRL's examples take for LoRA; the default of SFTConfig is 2e-5
    "peft": lambda model, batches: 1e-3,  # what PEFT's examples take for small adapters
}
