"""What an arm measured by windows of held-out text, for tests that cover other text too.

Runs with more windows than usual (`heldout_windows`) keep the loss of every part, in the same order for all arms and
seeds. Here stands what the metrics on held-out loss are by part: their mean over the parts is the metric itself.
"""

from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from ctsft.lab.compare import ArmRuns
from ctsft.lab.metrics import METRICS
from ctsft.lab.records import Record

Parts = NDArray[numpy.float64]


def by_window(arm: ArmRuns, against: Sequence[ArmRuns], metric: str) -> dict[int, list[float]]:
    """(windows,) numbers of `metric` by seed; {} where the runs have none, or the metric is not on held-out loss.

    against: the arm whose drop a relative metric divides by. A ratio is made linear around its seed's own: with drops
    a and b of both arms by part, r = mean(a) / mean(b) becomes r + (a - r b) / mean(b), whose mean is r.
    """
    ends, out = parts(arm, "last"), {}
    reference = METRICS[metric].against if metric in METRICS else None
    if metric == "heldout_loss":
        out = ends
    elif metric == "heldout_drop":
        out = {seed: first - ends[seed] for seed, first in parts(arm, "first").items()}
    elif reference and reference.last == "heldout_loss" and len(against) == 1:
        firsts, others = parts(against[0], "first"), parts(against[0], "last")
        for seed in ends.keys() & firsts.keys():
            own, whole = firsts[seed] - ends[seed], firsts[seed] - others[seed]
            ratio = own.mean() / whole.mean()
            out[seed] = ratio + (own - ratio * whole) / whole.mean()
    return {seed: found.tolist() for seed, found in out.items()}


def parts(arm: ArmRuns, which: str) -> dict[int, Parts]:
    """(windows,) held-out losses of the "first" or "last" evaluation by seed, of the runs that have them."""
    return {r.spec.seed: numpy.array(found[which]) for r in arm.records if (found := kept(r))}


def kept(record: Record) -> dict[str, list[float]]:
    found = None if record.diverged else record.measures.get("heldout_parts")
    return found if isinstance(found, dict) else {}
