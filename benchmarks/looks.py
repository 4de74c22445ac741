"""Check the rule of verdicts on made-up records: how often a family of claims has a false verdict, and what is found.

    python benchmarks/looks.py --families 1000 --write      # the tables of docs/laboratory.md; minutes

Numbers are drawn, one a seed, and go through the laboratory's own tests: t tests, their intersection, two looks,
Holm's correction. Only claims that are open after the first look have a second.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctsft.files import write_text
from ctsft.lab.stats import LEVEL, all_hold, corrected, crossed_test, one_fails, over_looks, t_test

PAGE = Path(__file__).parents[1] / "docs" / "laboratory.md"
SEEDS = 5, 12  # of the first look and of the second


@dataclass(frozen=True)
class World:
    """A family of claims. Each says of all its sides that their mean is above 0."""

    told: str
    means: Sequence[Sequence[float]]  # by claim and side, in standard deviations over seeds
    shared: float = 0.0  # correlation of all numbers of one seed
    first: int = SEEDS[0]
    noise: str = "normal"


def at_bound(claims: int, *others: float) -> list[list[float]]:
    """Claims with one side at its bound, and more sides at `others`."""
    return [[0.0, *others]] * claims


WORLDS = [
    World("22 claims at their bound", at_bound(22)),
    World("41 claims at their bound", at_bound(41)),
    World("22 at their bound that share their runs (correlation 0.8)", at_bound(22), shared=0.8),
    World("22, a first look of 3 seeds", at_bound(22), first=3),
    World("11 at their bound, 11 that are true by 3 sd", [*at_bound(11), *[[3.0]] * 11]),
    World("11 at their bound, 11 that are false by 3 sd", [*at_bound(11), *[[-3.0]] * 11]),
    World("22 of three sides, one at its bound, two true by 3 sd", at_bound(22, 3.0, 3.0)),
    World("22 of three sides at their bounds", at_bound(22, 0.0, 0.0)),
    World("22 with heavy tails (t, 3 degrees of freedom)", at_bound(22), noise="heavy"),
    World("22 with skewed noise, skewness 1 either way", at_bound(22), noise="skewed"),
    World("22 with very skewed noise, exponential either way", at_bound(22), noise="very skewed"),
]
SKEWED = {"skewed": 4.0, "very skewed": 1.0}
CROSSED = {  # seeds, windows and the standard deviations of seeds, windows and rest, as in records of `heldout`
    "3 seeds, 46 windows that differ more than seeds": (3, 46, (1.0, 3.0, 4.5)),
    "3 seeds, 63 windows that differ less": (3, 63, (1.0, 0.75, 0.8)),
    "5 seeds, 46 windows that differ more": (5, 46, (1.0, 3.0, 4.5)),
    "5 seeds, 63 windows that differ less": (5, 63, (1.0, 0.75, 0.8)),
}
LEVELS = 0.05, 0.0025, 0.0005
DISTANCES = 0.5, 1.0, 1.5, 2.0, 3.0, 5.0


def draw(world: World, rng: np.random.Generator) -> list[list[np.ndarray]]:
    """Numbers by claim and side, one for each seed of the second look."""

    def noise() -> np.ndarray:
        if world.noise == "heavy":
            return rng.standard_t(3, SEEDS[1]) / 3**0.5
        if world.noise in SKEWED:
            alpha = SKEWED[world.noise]  # of a gamma distribution; its skewness is 2 over the root
            return rng.choice([-1, 1]) * (rng.gamma(alpha, size=SEEDS[1]) - alpha) / alpha**0.5
        return rng.normal(size=SEEDS[1])

    common = noise()
    mixed = [world.shared**0.5, (1 - world.shared) ** 0.5]
    return [[mean + mixed[0] * common + mixed[1] * noise() for mean in sides] for sides in world.means]


def looked(world: World, rng: np.random.Generator) -> list[list[tuple[float, float]]]:
    """By look and claim of one family: p that the claim holds, and that it fails."""
    claims = draw(world, rng)
    looks = []
    for seeds in (world.first, SEEDS[1]):
        tests = [[t_test(numbers[:seeds].tolist()) for numbers in sides] for sides in claims]
        looks.append([(all_hold([t.above for t in one]), one_fails([t.below for t in one])) for one in tests])
    return looks


def verdicts(looks: list[list[tuple[float, float]]], split: bool = True) -> list[list[str]]:
    """The verdicts of a family after each look; without `split` each look has the whole 5%."""
    words = ["inconclusive"] * len(looks[0])
    read: list[list[tuple[float, float]]] = [
        [] for _ in words
    ]  # what is read of each claim: not the second look of all
    out = []
    for look in looks:
        for claim, p, word in zip(read, look, words, strict=True):
            if word == "inconclusive":
                claim.append(p)
        ways = [[over_looks([p[way] for p in claim], 2 if split else 1) for claim in read] for way in (0, 1)]
        pairs = zip(*(corrected([""] * len(read), ps) for ps in ways), strict=True)
        words = ["confirmed" if h <= LEVEL < f else "refuted" if f <= LEVEL < h else "inconclusive" for h, f in pairs]
        out.append(words)
    return out


def false_verdicts(world: World, words: Sequence[str]) -> tuple[bool, bool]:
    """Whether a claim is confirmed that is not true, and whether one is refuted that is not false."""
    pairs = list(zip(world.means, words, strict=True))
    return (
        any(word == "confirmed" and min(sides) <= 0 for sides, word in pairs),
        any(word == "refuted" and min(sides) >= 0 for sides, word in pairs),
    )


def errors(world: World, families: int, rng: np.random.Generator) -> list[float]:
    """The share of families with a false confirmation, with a false refutation, and both again without the split."""
    count = np.zeros(4)
    for _ in range(families):
        looks = looked(world, rng)
        by_rule, loose = (verdicts(looks, split)[1] for split in (True, False))
        count += [*false_verdicts(world, by_rule), *false_verdicts(world, loose)]
    return list(count / families)


def found(distance: float, families: int, rng: np.random.Generator) -> list[float]:
    """The share of claims, of 12 that are true by `distance`, that are confirmed at the first look and after both."""
    world = World("", [[distance]] * 12)
    looks = [verdicts(looked(world, rng)) for _ in range(families)]
    return [float(np.mean([word == "confirmed" for look in looks for word in look[i]])) for i in (0, 1)]


def crossed(shape: tuple[int, int, tuple[float, ...]], tests: int, rng: np.random.Generator) -> list[float]:
    """How often the p of a mean at its bound, over seeds and windows, lies at or below each of LEVELS; then the same
    over seeds alone, as if there were no other text."""
    seeds, windows, (by_seed, by_window, rest) = shape
    count = np.zeros(2 * len(LEVELS))
    for _ in range(tests):
        x = by_seed * rng.normal(size=(seeds, 1)) + by_window * rng.normal(size=windows)
        x = (x + rest * rng.normal(size=(seeds, windows))).tolist()
        ps = crossed_test(x).above, t_test([sum(row) / windows for row in x]).above
        count += [p <= level for p in ps for level in LEVELS]
    return list(count / tests)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def tables(families: int, seed: int = 0) -> str:
    """The three tables, in Markdown."""
    rng = np.random.default_rng(seed)
    rows = []
    for world in WORLDS:
        rows.append([world.told, *(f"{share:.1%}" for share in errors(world, families, rng))])
        print(" | ".join(rows[-1]), flush=True)
    heads = ["family", "a false confirmation", "a false refutation", "unsplit: confirmation", "unsplit: refutation"]
    power = [[f"{d:g} sd", *(f"{share:.0%}" for share in found(d, max(1, families // 10), rng))] for d in DISTANCES]
    return (
        f"{table(heads, rows)}\n\nOf {families:,} families each, `benchmarks/looks.py`, seed {seed}; unsplit: each "
        "look has the whole 5%.\n\n"
        + table(["a claim is true by", "confirmed at the first look", "after the second"], power)
        + f"\n\n{crossed_table(20 * families)}"
    )


def crossed_table(tests: int, seed: int = 1) -> str:
    rng = np.random.default_rng(seed)
    rows = [[told, *(f"{share:.2%}" for share in crossed(shape, tests, rng))] for told, shape in CROSSED.items()]
    ways = [f"{way}: {level:.2%}" for way in ("over seeds and windows", "over seeds alone") for level in LEVELS]
    return (
        table(["one claim at its bound", *ways], rows) + f"\n\nOf {tests:,} made-up tables each; by column, the level."
    )


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    p.add_argument("--families", type=int, default=1000, help="that are made up for each row")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--write", action="store_true", help=f"into {PAGE.name}, in place of the tables there")
    args = p.parse_args(argv)
    text = tables(args.families, args.seed)
    print(text)
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        write_text(PAGE, re.sub(r"(?<=<!-- looks -->\n).*?(?=\n<!-- end -->)", lambda _: text, page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
