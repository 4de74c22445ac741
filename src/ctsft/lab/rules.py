"""Rules for a learning rate that the laboratory holds against tuned ones."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ctsft.adapter.rate import Valley, gradient, learning_rate, line, valley

Batches = Sequence[Mapping[str, Tensor]]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def measured(model: nn.Module, batches: Batches) -> Valley:
    """What `--lr auto` measures, of whatever trains in `model`: our forms or what peers train."""
    return valley(model, trained(model), batches)


def by_line(model: nn.Module, batches: Batches) -> float:
    """The line alone, by the norm of the first batch's gradient."""
    numbers = trained(model)
    squares = sum(float(g.square().sum()) for g in gradient(model, numbers, batches[0]))
    return line(math.sqrt(squares), sum(n.numel() for n in numbers))


# Each gives the peak rate for what trains in a model that is not trained yet, and batches of its text.
RULES: dict[str, Callable[[nn.Module, Batches], float]] = {
    "floor": lambda model, batches: measured(model, batches).rate,  # `ctsft tune --lr auto`
    "auto": lambda model, batches: measured(model, batches).rate_above(1 / 16),  # what it was until `rate-small`
    "alone": lambda model, batches: replace(measured(model, batches), growth=0.0).rate_above(1 / 16),
    "weights": lambda model, batches: learning_rate(model),
    "line": by_line,
    "constant": lambda model, batches: 0.05,  # the middle of the best rates of the arena
    "trl": lambda model, batches: 2e-4,  # what TRL's examples take for LoRA; the default of SFTConfig is 2e-5
    "peft": lambda model, batches: 1e-3,  # what PEFT's examples take for small adapters
}
