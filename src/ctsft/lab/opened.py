"""What can be said of a claim that stays open: the sizes that the runs rule out, and how many seeds would settle it."""

import math
import statistics
from collections.abc import Sequence

from ctsft.lab.claims import Claim
from ctsft.lab.metrics import METRICS
from ctsft.lab.predicates import Side
from ctsft.lab.stats import bounds, seeds_needed
from ctsft.lab.tables import short

MOST = 1000  # seeds that are counted to


def unsettled(claim: Claim, sides: Sequence[Side], side: Side, level: float) -> str:
    """Two sentences on an open claim, from its `sides` and the one that is told of (one where it is tested over
    windows); "" where seeds are too few.

    `level` is what one test may spend at one look: were the claim's bound ruled out, that would be a verdict. The seeds
    are those with which four of five such experiments would settle it, if means and spreads stay as they are.
    """
    low, high = bounds(side.test, level)
    if math.isinf(low):
        return ""
    told = f"Ruled out: below {short(side.show(low))} and above {short(side.show(high))}{unit(claim)}."
    if side.windows:  # more seeds make the part that windows have no smaller
        return told
    seeds, word = settled_by(sides, level)
    count = f"more than {MOST:,}" if seeds is None else f"{seeds:,}"
    return f"{told} To settle it takes {count} seeds, if it is {word} as it now looks."


def settled_by(sides: Sequence[Side], level: float) -> tuple[int | None, str]:
    """How many seeds settle a claim, and which way; None: more than MOST."""
    apart = [side.margin / (statistics.stdev(side.numbers) or math.nan) for side in sides if side.test.n > 1]
    if all(d > 0 for d in apart):
        found = [seeds_needed(d, level, MOST) for d in apart]
        return (None if None in found else max(n for n in found if n)), "confirmed"
    counts = [n for d in apart if d < 0 and (n := seeds_needed(-d, level / len(sides), MOST))]
    return min(counts, default=None), "refuted"


def unit(claim: Claim) -> str:
    """The unit of a claim's numbers, as it stands behind them; "" for a ratio and for what has none."""
    words = METRICS[root].words if (root := claim.metric.partition("@")[0].partition(".")[0]) in METRICS else ""
    plain = claim.of != "ratio" and claim.predicate not in ("correlation", "slope")
    return " nats per token" if plain and words.endswith("nats per token") else ""
