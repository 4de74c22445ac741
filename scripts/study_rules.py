"""Rules that give a K without a race, on the pairs that plans were checked on: a row a rule, for docs/planning.md.

    CTSFT_MODELS=... python scripts/study_rules.py measure [PAIR ...]    # gradients at the start, once
    python scripts/study_rules.py

A rule takes the diagonal arm whose K is nearest to its own, at the arm's best rate. Regret is the part that this gives
away of the drop of the best arm of ours; octaves are log2 of the K over the right one, the smallest within 1% of the
best diagonal arm. Pairs of which the plan could not tell are left out.
"""

import math
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from check_plans import PAIRS, RECORDS, add, bench_of, lines, model_of
from judge_plans import complete, judged, k_of, regret, smallest
from study_plans import WIDTHS

from ctsft.plan.choose import FLAT

FILE = RECORDS / "gradients.jsonl"
ROWS = 8  # a batch, of four


def measured(pair: str) -> dict[str, Any]:
    """The mean effective rank of the gradient of a matrix, and how many of its random directions, in the mean, have a
    slope that four batches tell from zero (twice its standard error)."""
    import torch

    from ctsft.adapter.config import CTConfig
    from ctsft.adapter.targets import find_targets
    from ctsft.plan.arms import Candidate
    from ctsft.plan.plan import KS
    from ctsft.plan.trial import narrowest
    from ctsft.quantities.gradients import amplitude_gradients
    from ctsft.spectral.collect import mean_gradients
    from ctsft.spectral.decompose import effective_rank, singular_values

    bench = bench_of(pair, PAIRS[pair] | {"batch_size": ROWS}, 8)
    matrices = find_targets(bench.model, CTConfig())[0]
    gradients = mean_gradients(bench.model, dict(matrices), bench.first())
    rank = float(np.mean([effective_rank(singular_values(g)) for g in gradients.values()]))
    most, slopes = min(KS[-1], narrowest(bench.model)), []
    with bench.equipped(Candidate("diagonal", most)) as equipped:
        for batch in bench.first():
            equipped.model.zero_grad()
            equipped.model(**batch).loss.backward()
            slopes.append(torch.stack([g.double() for g in amplitude_gradients(equipped.model).values()]))
    each = torch.stack(slopes)  # batches, matrices, directions
    clear = each.mean(0).abs() > 2 * each.std(0) / len(slopes) ** 0.5
    return {"pair": pair, "effective_rank": rank, "clear": float(clear.sum(1).double().mean()), "of": most}


def by_rows(rows: int) -> int:
    """LoRA's rank by the number of rows, as axolotl's pull request 3691 has it."""
    return next((k for most, k in ((1_000, 8), (10_000, 16), (100_000, 32)) if rows < most), 64)


# Rule: what it says of a pair, from what was judged of it and its line of `measured`.
RULES: dict[str, Callable[[str, dict[str, Any], dict[str, Any]], float]] = {
    "always K = 4 (most drop a number, paper 81)": lambda pair, found, seen: 4,
    "always K = 16": lambda pair, found, seen: 16,
    "always K = 64 (papers 84 to 88)": lambda pair, found, seen: 64,
    "always the largest K": lambda pair, found, seen: 10**6,
    "K = d / 32 (paper 78)": lambda pair, found, seen: WIDTHS[model_of(pair)] / 32,
    "effective rank of the gradient / 0.62 (paper 83)": lambda pair, found, seen: seen["effective_rank"] / 0.62,
    "directions with a clear slope (paper 85)": lambda pair, found, seen: max(seen["clear"], 1),
    "rank by number of rows (axolotl 3691)": lambda pair, found, seen: by_rows(found["plan"].rows),
}


def table() -> list[str]:
    """A row for every rule, then most numbers and the plan."""
    seen = {line["pair"]: line for line in lines(FILE)}
    found = {pair: judged(pair) for pair in PAIRS if complete(pair) and pair in seen}
    found = {pair: one for pair, one in found.items() if one["plan"].decision.verdict == "recommended"}
    rows = []
    for name, rule in RULES.items():
        taken = {pair: nearest(one, rule(pair, one, seen[pair])) for pair, one in found.items()}
        off = [math.log2(k_of(arm) / right(found[pair])) for pair, arm in taken.items()]
        rows.append(
            row(name, [regret(ours(found[pair]), found[pair]["start"], arm) for pair, arm in taken.items()], off)
        )
    rows.append(row("most numbers, gains or not", [one["most"] for one in found.values()]))
    rows.append(
        row("**the plan**", [one["regret"] for one in found.values()], [one["octaves"] for one in found.values()])
    )
    return rows


def row(name: str, lost: list[float], octaves: list[float] | None = None) -> str:
    k = "" if octaves is None else f"{sum(abs(x) <= 1 for x in octaves)} of {len(octaves)}"
    few = sum(x <= FLAT for x in lost)
    return f"| {name} | {np.mean(lost):.1%} | {max(lost):.0%} | {few} of {len(lost)} | {k} |"


def ours(found: dict[str, Any]) -> dict[str, float]:
    """The ends of our arms by name."""
    return {n: found["ends"][n] for n, o in found["options"].items() if o.ours}


def diagonals(found: dict[str, Any]) -> dict[str, float]:
    """The ends of the diagonal arms by name."""
    return {n: found["ends"][n] for n, o in found["options"].items() if n.startswith("diagonal")}


def nearest(found: dict[str, Any], k: float) -> str:
    """The diagonal arm whose K is nearest to `k`, in octaves; of two the larger."""
    return min(sorted(diagonals(found), key=k_of, reverse=True), key=lambda n: abs(math.log2(k_of(n) / k)))


def right(found: dict[str, Any]) -> int:
    return k_of(smallest(diagonals(found), found["start"]))


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        os.chdir(os.environ.get("CTSFT_MODELS", "."))
        for pair in sys.argv[2:] or PAIRS:
            if pair not in {line["pair"] for line in lines(FILE)}:
                add(FILE, measured(pair))
    else:
        print(*table(), sep="\n")


if __name__ == "__main__":
    main()
