"""From a short race to the held-out loss after many steps, with an interval: what records teach, in a few constants.

`scripts/check_plans.py fit` makes the constants from records/plans/fit.jsonl: races of 12 steps (and 6) beside whole
trainings of the same arms on models and texts that no plan was checked on.
"""

import math
from dataclasses import dataclass

GROWTH = 0.17  # log of the drop gained for every log of the steps, for an arm of 1,000 numbers
BY_SIZE = -0.03  # more of it for every tenfold of the numbers that train
BY_ROWS = 0.22  # log of the drop gained for every log of the rows a step
SIZE = 0.14  # log of the drop for every log of the numbers that train: for an arm that did not run, beside one that did

# Residuals of the log of the drop on pairs left out of the fit, 5% and 95%; of an arm beside the others of its pair
# (half of that interval); of an arm that did not run.
LOW, HIGH = -0.25, 0.25
RELATIVE = 0.12
UNRACED = 0.3

LEAST = 1e-3  # nats per token: a drop that is smaller, or a rise, counts as this


@dataclass(frozen=True)
class Prediction:
    """A held-out loss, nats per token, and the interval that holds the true one in 90% of cases."""

    loss: float
    low: float
    high: float


def growth(race_steps: int, steps: int, race_rows: int, rows: int, trained: int) -> float:
    """log(drop after `steps` steps of `rows` rows / drop after a race of `race_steps` steps of `race_rows`)."""
    longer = math.log(steps / race_steps)
    return longer * (GROWTH + BY_SIZE * (math.log10(trained) - 3)) + BY_ROWS * math.log(rows / race_rows)


def predicted(start: float, drop: float, log_growth: float, raced: bool = True) -> Prediction:
    """The prediction for an arm whose `drop`, of a race or of another arm, grows by exp(`log_growth`) from `start`."""
    middle = math.log(max(drop, LEAST)) + log_growth
    more = 0.0 if raced else UNRACED
    low, high = -math.hypot(LOW, more), math.hypot(HIGH, more)
    loss, worst, best = (start - math.exp(middle + x) for x in (0.0, low, high))
    return Prediction(max(loss, 0.0), max(best, 0.0), max(worst, 0.0))


def by_size(raced: int, trained: int) -> float:
    """log(drop of an arm of `trained` numbers / drop of one of `raced` numbers after as many steps)."""
    return SIZE * math.log(trained / raced)
