"""Check plans against the whole sweeps that they replace.

    CTSFT_MODELS=... CTSFT_TEXTS=... python scripts/check_plans.py learn | fit | plans | sweeps | table [PAIR ...]

`learn` trains what predictions are fitted on (records/plans/fit.jsonl) and `fit` prints the constants of
`ctsft.plan.predict`. `plans` makes the plan of every pair (records/plans/PAIR/plan.json) before `sweeps` trains its
arms in full (records/plans/PAIR/comparison.jsonl): every rate of a grid for all steps on a seed that is not judged, the
grid grown at its edges, then the best rate on the seeds that are. `table` prints predicted against actual. What is
there is kept: a call goes on where the last one ended. Texts are those of `scripts/families.py`, in
CTSFT_MODELS/texts.
"""

import argparse
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from ctsft.files import write_json
from ctsft.plan.record import Trial

RECORDS = Path(__file__).parents[1] / "records" / "plans"
SMALL = ("diagonal-4", "diagonal-16", "diagonal-32", "gains-32", "lora-1", "lora-8", "vera-256")  # 32: all it has
ALL = ("diagonal-4", "diagonal-16", "diagonal-64", "diagonal-256", "gains-64", "lora-1", "lora-8", "vera-256")
TEXT = {"max_length": 128}
TUNING, SEEDS = 0, (1, 2)  # the plan races on seed 0, too

# Model and text of every pair, with what differs from a question's defaults. The last three are not swept yet.
PAIRS: dict[str, dict[str, Any]] = {
    "stories260k-acts": {"data": "texts/bible-acts.txt", "steps": 100, "batch_size": 4, **TEXT},
    "stories260k-sql50": {"data": "sql", "limit": 50, "steps": 60, "batch_size": 2},
    "stories260k-sql5000": {"data": "sql", "limit": 5000, "steps": 60, "batch_size": 2},
    "stories260k-sympy500": {"data": "texts/libraries-sympy.txt", "limit": 500, "steps": 100, "batch_size": 4, **TEXT},
    "stories260k-museum30": {"data": "texts/databases-museum.jsonl", "limit": 30, "steps": 60, "batch_size": 2},
    "stories15m-melville": {"data": "texts/authors-melville.txt", "steps": 30, "batch_size": 2, **TEXT},
    "stories15m-airline50": {"data": "texts/databases-airline.jsonl", "limit": 50, "steps": 30, "batch_size": 2},
    "photonic-sql500": {"data": "sql", "limit": 500, "steps": 30, "batch_size": 2},
    "photonic-matthew": {"data": "texts/bible-matthew.txt", "steps": 30, "batch_size": 2, **TEXT},
    "stories15m-sql": {"data": "sql", "steps": 24, "batch_size": 2},
    "smollm2-135m-sql": {"data": "sql", "steps": 12, "batch_size": 2},
}
WHOLE = ("stories260k-acts",)  # with every arm of its plan and two seeds; the others without VeRA and LoRA r1, on one
# Of the fit: no text of these is in a pair above.
FIT: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "stories260k-whitman": (
        {"data": "texts/authors-whitman.txt", "limit": 200, "steps": 90, "batch_size": 4, **TEXT},
        SMALL,
    ),
    "stories260k-bakery": (
        {"data": "texts/databases-bakery.jsonl", "limit": 80, "steps": 90, "batch_size": 4, "max_length": 256},
        SMALL,
    ),
    "stories15m-isaiah": ({"data": "texts/bible-isaiah.txt", "limit": 60, "steps": 40, "batch_size": 2, **TEXT}, ALL),
    "photonic-bank": ({"data": "texts/databases-bank.jsonl", "limit": 200, "steps": 40, "batch_size": 2, **TEXT}, ALL),
}
METHODS = ("diagonal", "gains", "core", "lora", "vera")  # of the records, that growth is learned from
LOOKS = (0, 6, 12, 20, 30, 40, 60, 90)


def model_of(pair: str) -> str:
    """The model of a pair, as it is called in CTSFT_MODELS, or built in."""
    return next(m for m in ("stories260k", "stories15m", "photonic", "smollm2-135m") if pair.startswith(m))


def bench_of(pair: str, asked: dict[str, Any], heldout: int) -> Any:
    """The bench of a pair: its model and rows, of the split that `ctsft tune` makes with seed 0."""
    from rich.console import Console

    from ctsft.plan.question import make_question
    from ctsft.plan.trial import Bench
    from ctsft.tune.material import gathered

    question = make_question({"model": model_of(pair)} | asked)
    found = gathered(question.recipe(eval_rows=heldout), Console(stderr=True))
    pad = found.loaded.tokenizer.pad_token_id
    return Bench(found.loaded.model, pad, found.train, found.heldout, question.batch_size)


# ---- learning what a race tells


def learn(names: Iterable[str]) -> None:
    """Races of 12 steps at two rates; at the better, one of 6 and one of 8 rows, and a whole training."""
    from ctsft.plan.arms import candidate

    done = {(d["pair"], d["candidate"]) for d in lines(RECORDS / "fit.jsonl")}
    for pair in names:
        asked, arms = FIT[pair]
        bench = None
        for name in arms:
            if (pair, name) in done:
                continue
            bench = bench or bench_of(pair, asked, 48)
            arm, rate = candidate(name), bench.rate(candidate(name))
            first, again = (bench.trial(arm, 0, 12, lr=lr) for lr in (rate, rate / 3))
            rate = min(first, again, key=lambda t: t.end).rate
            looks = [n for n in LOOKS if n < asked["steps"]] + [asked["steps"]]
            found = [first, again, bench.trial(arm, 0, 6, lr=rate), bench.trial(arm, 0, 8, lr=rate, batch_size=1)]
            found.append(bench.trial(arm, 0, asked["steps"], lr=rate, looks=looks))
            for trial in found:
                add(RECORDS / "fit.jsonl", {"pair": pair, "rows": len(bench.rows)} | trial.model_dump())


def growths() -> dict[str, list[tuple[str, list[float], float]]]:
    """By pair: arm, what `predict.growth` knows of it, and the log of the growth of its drop that came.

    Pairs of `learn`, and those of the laboratory's records: arms tuned there on several seeds, whose loss on the way is
    the mean training loss of steps 9 to 12. Texts on which it hardly falls are left out, and those of PAIRS.
    """
    whole: dict[tuple[str, str], Trial] = {}
    races: dict[tuple[str, str], list[Trial]] = defaultdict(list)
    for line in lines(RECORDS / "fit.jsonl"):
        pair, trial = line.pop("pair"), Trial(**{n: v for n, v in line.items() if n != "rows"})
        if trial.steps > 12:
            whole[pair, trial.candidate] = trial
        else:
            races[pair, trial.candidate].append(trial)
    found: dict[str, list[tuple[str, list[float], float]]] = defaultdict(list)
    for (pair, arm), full in whole.items():
        start = full.heldout[0][1] or math.nan
        for race in races[pair, arm]:
            if math.isclose(race.rate, full.rate):
                longer, size = math.log(full.steps / race.steps), math.log10(full.trained) - 3
                known = [longer, longer * size, math.log(full.batch_size / race.batch_size)]
                found[pair].append((arm, known, math.log((start - full.end) / (start - race.end))))
    checked = {(model_of(pair), Path(asked["data"]).stem) for pair, asked in PAIRS.items()}
    for file in sorted(RECORDS.parent.glob("*.jsonl")):
        for line in lines(file):
            spec, heldout, train = line["spec"], line["heldout"], line["train_loss"]
            tuned = spec["seed"] < 1000 and len(heldout) > 1 and heldout[0][0] == 0 and heldout[-1][1] is not None
            usual = spec["batches"] == "fresh" and spec["decay"] == "linear" and spec.get("start") != "mean"
            if (spec["model"], spec["text"]) in checked:
                continue
            if not (tuned and usual and spec["steps"] >= 40 and spec["method"] in METHODS and not spec.get("rule")):
                continue
            start, middle, end = heldout[0][1], float(np.mean(train[8:12])), heldout[-1][1]
            if min(start - middle, start - end) > 0.1 * start:
                longer = math.log(spec["steps"] / 10)
                known = [longer, longer * (math.log10(line["trained"]) - 3), 0.0]
                arm = f"{spec['method']}-{spec['k']}"
                found[f"{spec['model']} {spec['text']} {spec['steps']}"].append(
                    (arm, known, math.log((start - end) / (start - middle)))
                )
    return {pair: rows for pair, rows in found.items() if len(rows) > 3}


def solved(data: dict[str, Any], pairs: Iterable[str]) -> Any:
    """GROWTH, BY_SIZE, BY_ROWS by least squares, every pair with the same weight."""
    table = np.array([np.array([*known, y]) / len(data[p]) ** 0.5 for p in pairs for _, known, y in data[p]])
    return np.linalg.lstsq(table[:, :-1], table[:, -1], rcond=None)[0]


def constants() -> tuple[float, ...]:
    """The constants of `predict`: of all pairs the growth, of the pairs left out in turn what it misses."""
    data = growths()
    common, own, raced = [], [], []
    for pair, rows in data.items():
        others = solved(data, (p for p in data if p != pair))
        plain = [(known[0], y - np.dot(known, others)) for _, known, y in rows if not known[2]]
        miss = float(np.median([left / longer for longer, left in plain]))
        common.append(miss)
        own += [left - miss * longer for longer, left in plain]
        raced += [left - miss * longer for longer, left in plain] if pair in FIT else []
        print(f"{pair}: {len(rows)} trials, left out: off by {miss:+.3f} for every log of the steps")
    arm, relative = (float(np.quantile(np.abs(left), 0.9)) for left in (own, raced))
    return (*map(float, solved(data, data)), 1.64 * float(np.std(common)), arm, relative)


def fit() -> None:
    names = ("GROWTH", "BY_SIZE", "BY_ROWS", "PAIR", "ARM", "RELATIVE")
    print(*(f"{name} = {value:.3f}" for name, value in zip(names, constants(), strict=True)), sep="\n")


# ---- plans and sweeps


def plans(names: Iterable[str], spend: float | None) -> None:
    """The plan of every pair, before its sweep."""
    from ctsft.plan.frontier import write_plan
    from ctsft.plan.plan import answered
    from ctsft.plan.question import make_question

    for pair in names:
        out = RECORDS / pair
        if (out / "plan.json").exists():
            continue
        if (out / "comparison.jsonl").exists():
            raise SystemExit(f"{pair} was swept before it was planned")
        busy = time.process_time()
        found = answered(make_question({"model": model_of(pair), "threads": 1, "spend": spend} | PAIRS[pair]))
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "plan.json", found.model_dump())
        if "PAGES" in os.environ:  # a folder for the pages, too
            write_plan(found, Path(os.environ["PAGES"]) / f"{pair}.html")
        print(pair, found.decision.candidate, f"{time.process_time() - busy:.0f} s of the processor", flush=True)


def sweeps(names: Iterable[str]) -> None:
    """Every arm of every pair in full."""
    for pair in names:
        if not (RECORDS / pair / "plan.json").exists():
            raise SystemExit(f"{pair} has no plan yet; it is made before the sweep")
        bench = None
        for name in arms_of(pair):
            have = [Trial(**line) for line in lines(RECORDS / pair / "comparison.jsonl")]
            for seed, rate in due(name, [t for t in have if t.candidate == name], pair):
                bench = bench or bench_of(pair, PAIRS[pair], 64)
                swept(bench, pair, name, seed, rate)
            while more := list(due(name, trials_of(pair, name), pair)):
                bench = bench or bench_of(pair, PAIRS[pair], 64)
                for seed, rate in more:
                    swept(bench, pair, name, seed, rate)


def arms_of(pair: str) -> list[str]:
    """The arms that are swept."""
    arms = SMALL if model_of(pair) == "stories260k" else ALL
    return [a for a in arms if pair in WHOLE or a not in ("lora-1", "vera-256")]


def trials_of(pair: str, name: str) -> list[Trial]:
    return [t for t in map(lambda d: Trial(**d), lines(RECORDS / pair / "comparison.jsonl")) if t.candidate == name]


def swept(bench: Any, pair: str, name: str, seed: int, rate: float | None) -> None:
    """One trial for all steps, written down; without a rate, at that of the rule."""
    from ctsft.plan.arms import candidate

    steps = PAIRS[pair]["steps"]
    found = bench.trial(candidate(name), seed, steps, lr=rate)
    add(RECORDS / pair / "comparison.jsonl", found.model_dump())
    print(pair, name, seed, f"{found.rate:.3g}", found.heldout[-1], f"{found.seconds:.0f} s", flush=True)


def due(name: str, have: list[Trial], pair: str) -> Iterator[tuple[int, float | None]]:
    """(seed, rate) of the trials that come next: the rule's rate, a third and three times it, further where the best
    lies at an edge (at most 5 rates); then the seeds that are judged, at the best."""
    tried = {t.rate: t.end for t in have if t.seed == TUNING}
    if not tried:
        yield TUNING, None
        return
    first = next(t.rate for t in have if t.seed == TUNING)
    wanted = [first / 3, first, first * 3]
    missing = [r for r in wanted if not any(math.isclose(r, t) for t in tried)]
    if missing:
        yield from ((TUNING, r) for r in missing)
        return
    best = min(tried, key=lambda r: tried[r])
    if len(tried) < 5 and best in (min(tried), max(tried)):
        yield TUNING, best / 3 if best == min(tried) else best * 3
        return
    judged = {t.seed for t in have if t.seed != TUNING and math.isclose(t.rate, best)}
    seeds = SEEDS if pair in WHOLE else SEEDS[:1]
    yield from ((seed, best) for seed in seeds if seed not in judged)


# ---- predicted against actual


def judged(pair: str) -> dict[str, Any]:
    """What came of a plan: losses of the swept arms, means over the judged seeds at their best rates."""
    from ctsft.plan.told import read_plan

    plan = read_plan(RECORDS / pair / "plan.json")
    trials = [Trial(**line) for line in lines(RECORDS / pair / "comparison.jsonl")]
    runs: dict[str, list[float]] = defaultdict(list)
    for trial in trials:
        if trial.seed != TUNING:
            runs[trial.candidate].append(trial.end)
    ends = {name: sum(losses) / len(losses) for name, losses in runs.items()}
    start = trials[0].heldout[0][1] or math.nan
    options = {o.candidate: o for o in plan.options if o.candidate in ends}
    ours = {name: ends[name] for name, o in options.items() if o.ours}
    best = min(ours, key=lambda name: ours[name])
    drop = start - ours[best]
    auto = smallest({name: o.loss for name, o in options.items()}, start)  # what --k auto takes
    return {
        "plan": plan,
        "start": start,
        "ends": ends,
        "options": options,
        "best": best,
        "regret": (ours[plan.decision.candidate] - ours[best]) / drop,
        "usual": (ours[near_64(ours)] - ours[best]) / drop,
        "most": (ours[max(ours, key=lambda name: options[name].trained)] - ours[best]) / drop,
        "smallest": min((n for n in ours if ours[n] <= ours[best] + 0.01 * drop), key=lambda n: options[n].trained),
        "octaves": math.log2(k_of(auto) / k_of(smallest(ours, start))),
        "auto": (ours[near_64(ours)] - ours[auto]) / drop,
        "inside": [o.low <= ends[name] <= o.high for name, o in options.items()],
        "off": [math.log(max(start - ends[n], 1e-3) / max(start - o.loss, 1e-3)) for n, o in options.items()],
        "rank": float(spearmanr([o.loss for o in options.values()], [ends[name] for name in options]).statistic),
        "sweep": sum(t.seconds for t in trials),
    }


def near_64(ours: Iterable[str]) -> str:
    """The diagonal arm with 64 directions, or with all that there are."""
    return max((n for n in ours if n.startswith("diagonal") and k_of(n) <= 64), key=k_of)


def k_of(name: str) -> int:
    return int(name.split("-")[1])


def smallest(losses: dict[str, float], start: float) -> str:
    """The diagonal arm of the smallest K within 1% of the best one's drop."""
    diagonal = {n: loss for n, loss in losses.items() if n.startswith("diagonal")}
    best = min(diagonal.values())
    return min((n for n, loss in diagonal.items() if loss <= best + 0.01 * (start - best)), key=k_of)


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


def sums(names: Iterable[str]) -> str:
    found = [judged(pair) for pair in names if complete(pair)]
    inside = [hit for one in found for hit in one["inside"]]
    off = [miss for one in found for miss in one["off"]]
    told = {name: f"{np.mean([one[name] for one in found]):.2%}" for name in ("regret", "usual", "most", "auto")}
    few = sum(one["regret"] <= 0.01 for one in found)
    return (
        f"{told}; regret at most 1% in {few} of {len(found)}; inside {sum(inside)} of {len(inside)}; log of the drop "
        f"off by {np.mean(off):+.2f} +- {np.std(off):.2f}; rank {np.mean([one['rank'] for one in found]):.2f}"
    )


# ---- lines


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("learn", "fit", "plans", "sweeps", "table"))
    parser.add_argument("pairs", nargs="*", help="of PAIRS, or of FIT for learn; all if none is given")
    parser.add_argument("--spend", type=float, help="seconds for a plan, on a machine that others use too")
    given = parser.parse_args()
    if "CTSFT_MODELS" in os.environ:
        os.chdir(os.environ["CTSFT_MODELS"])
    names = given.pairs or [*(FIT if given.what == "learn" else PAIRS)]
    if given.what == "fit":
        fit()
    elif given.what == "table":
        print(*table(names), sums(names), sep="\n")
    elif given.what == "plans":
        plans(names, given.spend)
    else:
        {"learn": learn, "sweeps": sweeps}[given.what](names)


if __name__ == "__main__":
    main()
