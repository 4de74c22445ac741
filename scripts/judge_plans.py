"""What came of the plans that `scripts/check_plans.py` made and swept: the tables of docs/planning.md.

python scripts/judge_plans.py
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from check_plans import EARLIER, PAIRS, RECORDS, TUNING, arms_of, due, ends_of, lines, trials_of
from scipy.stats import spearmanr

from ctsft.plan.budget import Budget, parse_budget, planning
from ctsft.plan.choose import FLAT, decide
from ctsft.plan.predict import GROWTH
from ctsft.plan.record import Trial
from ctsft.plan.told import read_plan

BUDGETS = ("1000 numbers", "5000 numbers", "20000 numbers", "100000 numbers", "5 KB", "20 KB", "100 KB")
LENGTHS = (120, 300, 600, 1800, 7200)  # seconds


def judged(pair: str, file: str = "plan.json") -> dict[str, Any]:
    """What came of a plan: losses of the swept arms, means over the judged seeds at their best rates."""
    plan, ends = read_plan(RECORDS / pair / file), ends_of(pair)
    trials = [Trial(**line) for line in lines(RECORDS / pair / "comparison.jsonl")]
    start = trials[0].heldout[0][1] or math.nan
    options = {o.candidate: o for o in plan.options if o.candidate in ends}
    ours = {name: ends[name] for name, o in options.items() if o.ours}
    best = min(ours, key=lambda name: ours[name])
    drop = start - ours[best]
    lone = smallest({name: o.loss for name, o in options.items()}, start)  # with one form
    return {
        "plan": plan,
        "start": start,
        "ends": ends,
        "options": options,
        "best": best,
        "regret": regret(ours, start, plan.decision.candidate),
        "usual": regret(ours, start, near_64(ours)),
        "most": regret(ours, start, max(ours, key=lambda name: options[name].trained)),
        "smallest": min((n for n in ours if ours[n] <= ours[best] + FLAT * drop), key=lambda n: options[n].trained),
        "octaves": math.log2(k_of(lone) / k_of(smallest(ours, start))),
        "inside": [o.low <= ends[name] <= o.high for name, o in options.items()],
        "off": [math.log(max(start - ends[n], 1e-3) / max(start - o.loss, 1e-3)) for n, o in options.items()],
        "rank": float(spearmanr([o.loss for o in options.values()], [ends[name] for name in options]).statistic),
        "sweep": sum(t.seconds for t in trials),
    }


def regret(ends: dict[str, float], start: float, name: str) -> float:
    """The part of the drop of the best arm of `ends` that the arm called `name` gives away."""
    best = min(ends.values())
    return (ends[name] - best) / (start - best)


def near_64(ours: Iterable[str]) -> str:
    """The diagonal arm with 64 directions, or with all that there are."""
    return max((n for n in ours if n.startswith("diagonal") and k_of(n) <= 64), key=k_of)


def k_of(name: str) -> int:
    return int(name.split("-")[1])


def smallest(losses: dict[str, float], start: float) -> str:
    """The diagonal arm of the smallest K within 1% of the best one's drop."""
    diagonal = {n: loss for n, loss in losses.items() if n.startswith("diagonal")}
    best = min(diagonal.values())
    return min((n for n, loss in diagonal.items() if loss <= best + FLAT * (start - best)), key=k_of)


def table(names: Iterable[str]) -> list[str]:
    """A row for every pair that is swept, as docs/planning.md has them."""
    rows = []
    for pair in names:
        if complete(pair):
            found = judged(pair)
            plan, ends, said = found["plan"], found["ends"], found["plan"].decision.candidate
            o = found["options"][said]
            verdict = "" if plan.decision.verdict == "recommended" else f" ({plan.decision.verdict})"
            rows.append(
                f"| {pair} | {plan.rows:,} | {found['start']:.2f} | {said}{verdict} | {o.loss:.2f} ({o.low:.2f} to "
                f"{o.high:.2f}) | {ends[said]:.2f} | {found['best']} {ends[found['best']]:.2f} | {found['smallest']} | "
                f"{found['regret']:.1%} | {found['usual']:.1%} | {found['octaves']:+.0f} | {found['rank']:.2f} | "
                f"{sum(found['inside'])} of {len(found['inside'])} | {plan.seconds:.0f} s | {found['sweep']:,.0f} s |"
            )
    return rows


def complete(pair: str) -> bool:
    """Whether every arm of the pair has its judged trials."""
    return (RECORDS / pair / "comparison.jsonl").exists() and not any(
        [*due(name, trials_of(pair, name), pair)] for name in arms_of(pair)
    )


def remade(names: Iterable[str]) -> list[str]:
    """A row for every earlier pair: its plan as it was made first, and made again when the sweep was known."""
    rows = []
    for pair in names:
        first, again = judged(pair), judged(pair, "remade.json")
        rates = sum(o.again for o in again["options"].values())
        rows.append(
            f"| {pair} | {first['plan'].decision.candidate} | {again['plan'].decision.candidate} | "
            f"{first['regret']:.1%} | {again['regret']:.1%} | {first['rank']:.2f} | {again['rank']:.2f} | "
            f"{rates} of {len(again['options'])} | {again['plan'].seconds:.0f} s |"
        )
    return rows


def budgets(names: Iterable[str]) -> list[str]:
    """A row for every budget, over the pairs where it leaves out some of our arms, and leaves a choice: in how many the
    plan's arm is the best that fits or within 1% of its drop, and what part of that drop rules give away."""
    rows = []
    for text in BUDGETS:
        found = [given for pair in names if (given := under(pair, parse_budget(text)))]
        if not found:
            continue
        right = sum(one[0] <= FLAT for one in found)
        means = " | ".join(f"{mean:.1%} ({worst:.0%})" for mean, worst in zip(*spread(found), strict=True))
        rows.append(f"| {text} | {len(found)} | {right} | {means} |")
    return rows


def spread(found: list[tuple[float, ...]]) -> tuple[Any, Any]:
    return np.mean(found, axis=0), np.max(found, axis=0)


def under(pair: str, budget: Budget) -> tuple[float, ...] | None:
    """Regrets of the plan's decision, of most numbers and of K = 64 or the largest smaller one, under `budget`."""
    found = judged(pair)
    options = [
        o.model_copy(update={"fits": budget.fits(o.trained, o.adapter_bytes)}) for o in found["options"].values()
    ]
    ours = [o for o in options if o.ours]
    fitting = {o.candidate: found["ends"][o.candidate] for o in ours if o.fits}
    if not 2 <= len(fitting) < len(ours):
        return None
    plan = found["plan"]
    said = decide(plan.start, options, budget, plan.rows, plan.heldout).candidate
    most = max((o for o in ours if o.fits), key=lambda o: o.trained).candidate
    return tuple(regret(fitting, found["start"], name) for name in (said, most, near_64(fitting)))


def automatic(names: Iterable[str]) -> list[str]:
    """A row for every length of a training: what a run without --k, one with --form diagonal, and the largest K gain
    over 64 in the same time on the seed of the tuning, in parts of the drop of 64.

    The first two have arm and rate of the plan, whose time is not trained; the others have the rule's rate. Seconds a
    step are those of the plan's races; the drop grows with the power of the steps that the pair has shown. Pairs of
    which the plan could not tell are left out: auto takes 64 there.
    """
    found = [shown(pair) for pair in names if judged(pair)["plan"].decision.verdict == "recommended"]
    rows = []
    for seconds in LENGTHS:
        left = 1 - planning(seconds) / seconds
        gains = np.array([(auto * left**power, lone * left**power, k) for auto, lone, k, power in found]) - 1
        mean, lone, largest = gains.mean(0)
        better = f"{sum(gains[:, 0] > 0)} of {len(gains)}"
        rows.append(
            f"| {seconds / 60:.0f} min | {mean:+.1%} | {gains[:, 0].min():+.1%} | {better} | {lone:+.1%} | "
            f"{largest:+.1%} |"
        )
    return rows


def shown(pair: str) -> tuple[float, float, float, float]:
    """The drops of the plan's arm and of its best diagonal one at their rates, and of the largest K at the rule's, in
    the time of 64 and in parts of its drop; and the power of the steps with which the drop grew from the race on, the
    fit's if the race was as long as the training."""
    found = judged(pair, "remade.json" if pair in EARLIER else "plan.json")
    start, plan, options = found["start"], found["plan"], found["options"]
    diagonal = {n: o for n, o in options.items() if n.startswith("diagonal")}
    raced = [o for o in diagonal.values() if o.race]
    grown = np.median([math.log((start - found["ends"][o.candidate]) / (plan.start - o.race)) for o in raced])
    longer = math.log(raced[0].steps / plan.race.steps)
    power = grown / longer if longer else GROWTH
    usual = options[near_64(diagonal)]

    def gain(name: str, rate: float | None = None) -> float:
        slower = options[name].seconds / options[name].steps / (usual.seconds / usual.steps)
        return drop(name, rate) / drop(usual.candidate) / slower**power

    def drop(name: str, rate: float | None = None) -> float:
        tuning = [t for t in trials_of(pair, name) if t.seed == TUNING]
        return start - (min(tuning, key=lambda t: abs(math.log(t.rate / rate))) if rate else tuning[0]).end

    auto, lone = plan.decision.candidate, smallest({n: o.loss for n, o in diagonal.items()}, start)
    return gain(auto, options[auto].rate), gain(lone, options[lone].rate), gain(max(diagonal, key=k_of)), power


def beside() -> list[str]:
    """A row for every pair that `scripts/check_auto.py` trained: without --k, and with K = 64 in the same time."""
    rows = []
    for line in lines(RECORDS / "auto.jsonl"):
        sides = [line["auto"], line["usual"]]
        (start, end), (_, usual) = ([loss for _, loss in side["heldout"]] for side in sides)
        told = [f"{side['candidate']}, {side['steps']:,} steps, {side['seconds']:.0f} s" for side in sides]
        rows.append(
            f"| {line['pair']} | {start:.3f} | {line['planning']:.0f} s | {told[0]} | {end:.3f} | {told[1]} | "
            f"{usual:.3f} | {(usual - end) / (start - usual):+.1%} |"
        )
    return rows


def sums(names: Iterable[str]) -> str:
    found = [judged(pair) for pair in names if complete(pair)]
    inside = [hit for one in found for hit in one["inside"]]
    off = [miss for one in found for miss in one["off"]]
    told = {name: f"{np.mean([one[name] for one in found]):.2%}" for name in ("regret", "usual", "most")}
    few = sum(one["regret"] <= FLAT for one in found)
    return (
        f"{told}; regret at most 1% in {few} of {len(found)}; inside {sum(inside)} of {len(inside)}; log of the drop "
        f"off by {np.mean(off):+.2f} +- {np.std(off):.2f}; rank {np.mean([one['rank'] for one in found]):.2f}"
    )


def spans(names: Iterable[str]) -> list[str]:
    """Least and most over the pairs: seconds a step, over those of K = 64, and the power of the steps."""
    found: dict[str, list[float]] = {"gains": [], "diagonal-256": [], "power": []}
    for pair in names:
        options = judged(pair, "remade.json" if pair in EARLIER else "plan.json")["options"]
        usual = options[near_64(n for n in options if n.startswith("diagonal"))]
        for name, o in options.items():
            kind = "gains" if name.startswith("gains") else name
            if kind in found:
                found[kind].append(o.seconds / o.steps / (usual.seconds / usual.steps))
        found["power"].append(shown(pair)[-1])
    return [f"{kind}: {min(values):.2f} to {max(values):.2f}" for kind, values in found.items()]


def parts() -> list[list[str]]:
    """The rows of the page's tables."""
    done = [pair for pair in PAIRS if complete(pair)]
    new = [pair for pair in done if pair not in EARLIER]
    return [table(EARLIER), remade(EARLIER), table(new), budgets(done), automatic(done), beside()]


def main() -> None:
    told = [pair for pair in PAIRS if complete(pair) and judged(pair)["plan"].decision.verdict == "recommended"]
    new = [pair for pair in told if pair not in EARLIER]
    print(*("\n".join(part) for part in parts()), sums(EARLIER), sums(new), sums(told), *spans(told), sep="\n\n")


if __name__ == "__main__":
    main()
