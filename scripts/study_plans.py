"""Which cheap quantity tells the best arm? Judged on the laboratory's records, a row a rule, for docs/planning.md.

    python scripts/study_plans.py

A pair is a model, a text and a number of steps. Its arms are those of ours that start at the model as it is, each at
the rate that was tuned for it; what they reach is the held-out loss at the end, a mean over seeds. A rule chooses an
arm from what one seed has shown early; its regret is the part of the best arm's drop that it gives away. Constants of a
rule are fitted on the other pairs.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

RECORDS = Path(__file__).parents[1] / "records"
OURS = ("diagonal", "gains", "core", "scores")
WIDTHS = {"stories260k": 64, "stories15m": 288, "photonic": 256, "smollm2-135m": 576}
ARM = ("method", "k", "basis", "weight_from", "batch", "siblings", "universal_mode", "nested", "shuffled")
Pair = list[dict[str, Any]]  # the arms: their specs, ends, and what was seen early


def pairs() -> dict[tuple[Any, ...], Pair]:
    """The arms of every pair that has five or more of ours."""
    found: dict[tuple[Any, ...], dict[str, dict[Any, list[Any]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for path in sorted(RECORDS.glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            spec, heldout = line["spec"], line["heldout"]
            plain = (
                spec["method"] in OURS and spec.get("start") != "mean" and not spec["dropout"] and not spec["schedule"]
            )
            judged = spec["batches"] == "fresh" and spec["steps"] >= 40 and len(heldout) > 1 and heldout[0][0] == 0
            if plain and judged and not spec.get("rule"):
                at = tuple(spec[n] for n in ("model", "text", "steps", "length", "targets", "decay"))
                found[at][str([spec.get(n) for n in ARM])][spec["lr"]].append(line)
    kept = {at: [arm_of(by_rate) for by_rate in arms.values()] for at, arms in found.items()}
    return {at: arms for at, arms in kept.items() if len(arms) >= 5}


def arm_of(by_rate: dict[float, list[Any]]) -> dict[str, Any]:
    """An arm at the rate that has most seeds; of several the best."""
    runs = max(by_rate.values(), key=lambda rs: (len(rs) > 1, -end_of(rs)))
    first, train = runs[0], [99.0 if loss is None else loss for loss in runs[0]["train_loss"]]
    norms = dict(first["probes"].get("gradient_norm", []))
    return {
        "spec": first["spec"],
        "start": first["heldout"][0][1],
        "end": end_of(runs),
        "numbers": math.log(first["trained"]),
        "gradient": norms.get(1, 0.0),
        "gain": norms.get(1, 0.0) * first["spec"]["lr"] * first["trained"] ** 0.5,
        "train": train + [99.0] * 40,
    }


def end_of(runs: list[Any]) -> float:
    return float(np.mean([99.0 if r["heldout"][-1][1] is None else r["heldout"][-1][1] for r in runs]))


def seen(arm: dict[str, Any], n: int) -> float:
    """The mean training loss of the last steps up to step n: one of 4, two of 8, else four."""
    return float(np.mean(arm["train"][n - {4: 1, 8: 2}.get(n, 4) : n]))


def drop(arm: dict[str, Any], n: int = 0) -> float:
    """log of the drop: at the end, or as the training loss shows it after n steps."""
    return math.log(max(arm["start"] - (seen(arm, n) if n else arm["end"]), 0.02 * arm["start"]))


def halving(arms: Pair) -> list[float]:
    """Scores of successive halving after 4, 8, 16 and 32 steps: how long an arm stays in."""
    score, live = [0.0] * len(arms), list(range(len(arms)))
    for n in (4, 8, 16, 32):
        live = sorted(live, key=lambda i: seen(arms[i], n))[: max(1, -(-len(live) // 2))]
        for i in live:
            score[i] += 1
    return score


def at_k(wanted: Callable[[dict[str, Any]], float]) -> Callable[[Pair], list[float]]:
    """The diagonal arm whose K is nearest to `wanted`; of several the first random, weight's or other directions."""

    def score(arms: Pair) -> list[float]:
        def far(arm: dict[str, Any]) -> float:
            if arm["spec"]["method"] != "diagonal":
                return math.inf
            return abs(math.log(arm["spec"]["k"] / wanted(arm["spec"]))) + 0.01 * (arm["spec"]["basis"] != "random")

        return [-far(arm) for arm in arms]

    return score


def features(arms: Pair, n: int) -> np.ndarray[Any, Any]:
    """Of every arm beside the mean of its pair: log numbers, log early drop; and what came."""
    table = np.array([[arm["numbers"], drop(arm, n), drop(arm)] for arm in arms])
    return (table - table.mean(0)) / len(arms) ** 0.5


def fitted(every: dict[Any, Pair], at: Any, n: int) -> list[float]:
    """log numbers and log early drop together, weighed as the pairs of other models and texts say."""
    others = np.concatenate([features(arms, n) for other, arms in every.items() if other[:2] != at[:2]])
    weights = np.linalg.lstsq(others[:, :2], others[:, 2], rcond=None)[0]
    return list(features(every[at], n)[:, :2] @ weights)


def main() -> None:
    every = pairs()
    rules: dict[str, Callable[[Pair], list[float]]] = {
        "norm of the gradient at the start": lambda arms: [arm["gradient"] for arm in arms],
        "first-order gain at the tuned rate": lambda arms: [arm["gain"] for arm in arms],
        "always K = 64, diagonal": at_k(lambda spec: 64),
        "K = d / 32, diagonal": at_k(lambda spec: WIDTHS[spec["model"]] / 32),
        "most numbers": lambda arms: [arm["numbers"] for arm in arms],
        **{
            f"training loss after {n} steps": (lambda arms, n=n: [-seen(arm, n) for arm in arms])
            for n in (4, 8, 12, 20)
        },
        "successive halving, 4 to 32 steps": halving,
    }
    told = f"rule ({len(every)} pairs, {sum(map(len, every.values()))} arms)"
    print(f"| {told} | rank correlation, mean (least) | regret, mean | worst |")
    print("|---|---|---|---|")
    for name, rule in rules.items():
        row(name, [(arms, rule(arms)) for arms in every.values()], "K =" not in name)
    for n in (8, 12, 20):
        row(
            f"loss after {n} steps and numbers, fitted on other pairs",
            [(arms, fitted(every, at, n)) for at, arms in every.items()],
        )


def row(name: str, judged: list[tuple[Pair, list[float]]], ranks: bool = True) -> None:
    regrets, rhos = [], []
    for arms, scores in judged:
        ends = np.array([arm["end"] for arm in arms])
        regrets.append((ends[int(np.argmax(scores))] - ends.min()) / (arms[0]["start"] - ends.min()))
        rhos.append(spearmanr(scores, -ends).statistic if len(set(scores)) > 1 else 0.0)
    told = f"{np.mean(rhos):.2f} ({min(rhos):.2f})" if ranks else ""
    print(f"| {name} | {told} | {np.mean(regrets):.1%} | {max(regrets):.0%} |")


if __name__ == "__main__":
    main()
