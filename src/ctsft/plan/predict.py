"""From a short race to the held-out loss after many steps, with an interval: what records teach, in a few constants.

`scripts/check_plans.py fit` makes them from races beside whole trainings of the same arms (records/plans/fit.jsonl, and
the pairs that were checked first) and from the laboratory's arms. Each pair has the same weight.
"""

import math
from dataclasses import dataclass

GROWTH = 0.17  # log of the drop gained for every log of the steps, for an arm of 1,000 numbers
BY_SIZE = 0.035  # more of it for every tenfold of the numbers that train
BY_ROWS = 0.08  # log of the drop gained for every log of the rows a step
SIZE = 0.14  # log of the drop for every log of the numbers that train: for an arm that did not run, beside one that did

# What these miss on pairs left out, as half a 90% interval of the log of the drop: for every log of the steps, alike
# for all arms of a pair; of each arm by itself; of an arm beside another that raced on the same rows; of one that did
# not race. The first two hold together on 90% of pairs that are drawn as those of the fit were.
PAIR, ARM, RELATIVE, UNRACED = 0.27, 0.25, 0.15, 0.3

HARDLY = 0.005  # of the untouched loss: a drop that is no more tells nothing, nor is half an interval less
FAR = 40  # times the race's steps: the longest training that was seen; drops are not taken to grow beyond it
LOW = 0.1  # of the untouched loss: below it the law runs out, and losses are squeezed towards 0 in their order
LEAST = 1e-3  # nats per token: a drop that is smaller, or a rise, counts as this


@dataclass(frozen=True)
class Prediction:
    """A held-out loss, nats per token, and the interval that holds the true one in 90% of cases."""

    loss: float
    low: float
    high: float


def growth(race_steps: int, steps: int, race_rows: int, rows: int, trained: int) -> float:
    """log(drop after `steps` steps of `rows` rows / drop after a race of `race_steps` steps of `race_rows`), as if they
    were at most `FAR` times as many steps."""
    longer = math.log(min(steps / race_steps, FAR))
    return longer * (GROWTH + BY_SIZE * (math.log10(trained) - 3)) + BY_ROWS * math.log(rows / race_rows)


def predicted(start: float, drop: float, log_growth: float, longer: float, raced: bool = True) -> Prediction:
    """The prediction for an arm whose `drop`, of a race or of another arm, grows by exp(`log_growth`) from `start`.

    longer: how many times as many steps as the race the training has.
    """
    middle = math.log(max(drop, LEAST)) + log_growth
    half = math.hypot(ARM, PAIR * math.log(longer), 0.0 if raced else UNRACED)
    loss, best, worst = (squeezed(start - math.exp(middle + x), LOW * start) for x in (0.0, half, -half))
    least = HARDLY * start
    return Prediction(loss, max(min(best, loss - least), 0.0), max(worst, loss + least))


def squeezed(loss: float, least: float) -> float:
    """`loss` down to `least`, and from there on, smoothly and in order, what goes to 0 and never below."""
    return loss if loss >= least else least * math.exp((loss - least) / least)


def by_size(raced: int, trained: int) -> float:
    """log(drop of an arm of `trained` numbers / drop of one of `raced` numbers after as many steps)."""
    return SIZE * math.log(trained / raced)
