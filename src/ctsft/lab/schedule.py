"""K over the steps of a run, and the budgets that papers 81 to 88 count."""

import re
from fractions import Fraction

from ctsft.errors import CTError

STAGE = re.compile(r"([1-9]\d*)(?:@(\d+/[1-9]\d*))?", re.ASCII)


def parse_schedule(text: str) -> list[tuple[Fraction, int]]:
    """Stages (start as a share of all steps, K): "2>4@1/4>8@1/2>16@3/4" -> [(0, 2), (1/4, 4), (1/2, 8), (3/4, 16)].

    Raises CTError for anything else, and for starts that do not rise from 0 to below 1.
    """
    stages = []
    for i, part in enumerate(text.split(">")):
        found = STAGE.fullmatch(part.strip())
        if not found or (found[2] is None) != (i == 0):
            raise CTError(f"the schedule {text!r} is not like 8>16@1/2 (K, then K@start, starts as shares of the run).")
        stages.append((Fraction(found[2] or 0), int(found[1])))
    starts = [start for start, _ in stages]
    if starts != sorted(set(starts)) or starts[-1] >= 1:
        raise CTError(f"the schedule {text!r} needs starts that rise and stay below 1.")
    return stages


def k_at(text: str, step: int, steps: int) -> int:
    """K in force for the update `step` (0 is the first) of `steps`. A start between two steps begins with the later."""
    return [k for start, k in parse_schedule(text) if step >= start * steps][-1]


def counted_parameters(k: int, shapes: list[tuple[int, int]]) -> int:
    """What papers 81 and 82 print as trainable: K (d_out + d_in) over the matrices, LoRA's count. Not what trains."""
    return k * sum(d_out + d_in for d_out, d_in in shapes)
