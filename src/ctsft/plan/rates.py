"""The rate of an arm: the best of a grid around the rule's, raced with equal effort for every arm. No torch."""

from collections.abc import Callable

FACTOR = 3.0  # between neighbours of a grid
MOST = 7  # rates of a grid


def raced(rule: float, loss: Callable[[float], float]) -> list[tuple[float, float]]:
    """(rate, loss) of the rates tried, ascending: a third of `rule`, `rule` and three times it, and further ones, up to
    `MOST`, while the best lies at an edge. `loss(rate)` is infinite where a race diverged."""
    tried: dict[int, float] = {}
    low, high = -1, 1
    while True:
        tried |= {i: loss(power(rule, i)) for i in range(low, high + 1) if i not in tried}
        best = min(sorted(tried), key=tried.__getitem__)
        if low < best < high or high - low + 1 >= MOST:
            return [(power(rule, i), tried[i]) for i in sorted(tried)]
        low, high = (low - 1, high) if best == low else (low, high + 1)


def power(rule: float, i: int) -> float:
    return float(f"{rule * FACTOR**i:.2g}")


def best_of(tried: list[tuple[float, float]]) -> float:
    """The rate with the lowest loss; of equal ones the smallest."""
    return min(tried, key=lambda pair: (pair[1], pair[0]))[0]
