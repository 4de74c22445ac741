"""The rate of an arm: the best of a grid around the rule's, raced with equal effort for every arm. No torch."""

from collections.abc import Callable, Mapping

FACTOR = 3.0  # between neighbours of a grid
MOST = 7  # rates of a grid


def raced(rule: float, loss: Callable[[float], float]) -> list[tuple[float, float]]:
    """(rate, loss) of the rates tried, ascending: a third of `rule`, `rule` and three times it, and further ones, up to
    `MOST`, while the best lies at an edge. `loss(rate)` is infinite where a race diverged."""
    tried = {i: loss(power(rule, i)) for i in (-1, 0, 1)}
    while (i := further(tried)) is not None:
        tried[i] = loss(power(rule, i))
    return [(power(rule, i), tried[i]) for i in sorted(tried)]


def further(tried: Mapping[int, float]) -> int | None:
    """The power of FACTOR to race next, after those of `tried` with their losses: beside the best, the lower side
    first. None where both sides are known, or `MOST` were tried."""
    best = lowest(tried)
    beside = [i for i in (best - 1, best + 1) if i not in tried]
    return beside[0] if beside and len(tried) < MOST else None


def lowest(tried: Mapping[int, float]) -> int:
    """The power with the lowest loss; of equal ones the smallest."""
    return min(sorted(tried), key=tried.__getitem__)


def power(rule: float, i: int) -> float:
    return float(f"{rule * FACTOR**i:.2g}")


def best_of(tried: list[tuple[float, float]]) -> float:
    """The rate with the lowest loss; of equal ones the smallest."""
    return min(tried, key=lambda pair: (pair[1], pair[0]))[0]
