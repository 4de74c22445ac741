"""Check plans against the whole sweeps that they replace; `scripts/judge_plans.py` prints what came of it.

    CTSFT_MODELS=... CTSFT_TEXTS=... python scripts/check_plans.py learn | fit | plans | sweeps [PAIR ...]

`learn` trains what predictions are fitted on (records/plans/fit.jsonl) and `fit` prints the constants of
`ctsft.plan.predict`. `plans` makes the plan of every pair (records/plans/PAIR/plan.json) before `sweeps` trains its
arms in full (records/plans/PAIR/comparison.jsonl): every rate of a grid for all steps on a seed that is not judged, the
grid grown at its edges, then the best rate on the seeds that are. Of the earlier pairs, whose sweeps are known,
`plans` makes the plan again (remade.json), for the fit. What is there is kept: a call goes on where the last one ended.
Seconds of plans are the processor's, as the machine is shared. Texts are those of `scripts/families.py`, in
CTSFT_MODELS/texts.
"""

import argparse
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ctsft.files import write_json
from ctsft.plan.record import Trial
from ctsft.plan.told import read_plan

RECORDS = Path(__file__).parents[1] / "records" / "plans"
SMALL = ("diagonal-4", "diagonal-16", "diagonal-32", "gains-32", "lora-1", "lora-8", "vera-256")  # 32: all it has
ALL = ("diagonal-4", "diagonal-16", "diagonal-64", "diagonal-256", "gains-64", "lora-1", "lora-8", "vera-256")
FEW = ("diagonal-16", "diagonal-64", "gains-64", "lora-8")  # of the largest model
TEXT = {"max_length": 128}
TUNING, SEEDS = 0, (1, 2)  # the plan races on seed 0, too
HELD = {"smollm2-135m": 24, "tinyllama-1.1b": 16}  # rows that a sweep scores, of the others 64

# Model and text of every pair, with what differs from a question's defaults.
EARLIER: dict[str, dict[str, Any]] = {  # checked first; predictions are fitted on them, too, since
    "stories260k-acts": {"data": "texts/bible-acts.txt", "steps": 100, "batch_size": 4, **TEXT},
    "stories260k-sql50": {"data": "sql", "limit": 50, "steps": 60, "batch_size": 2},
    "stories260k-sql5000": {"data": "sql", "limit": 5000, "steps": 60, "batch_size": 2},
    "stories260k-sympy500": {"data": "texts/libraries-sympy.txt", "limit": 500, "steps": 100, "batch_size": 4, **TEXT},
    "stories260k-museum30": {"data": "texts/databases-museum.jsonl", "limit": 30, "steps": 60, "batch_size": 2},
    "stories15m-melville": {"data": "texts/authors-melville.txt", "steps": 30, "batch_size": 2, **TEXT},
    "stories15m-airline50": {"data": "texts/databases-airline.jsonl", "limit": 50, "steps": 30, "batch_size": 2},
    "photonic-sql500": {"data": "sql", "limit": 500, "steps": 30, "batch_size": 2},
}
PAIRS = EARLIER | {
    "photonic-matthew": {"data": "texts/bible-matthew.txt", "steps": 30, "batch_size": 2, **TEXT},
    "stories15m-sql": {"data": "sql", "steps": 24, "batch_size": 2},
    "smollm2-135m-sql": {"data": "sql", "steps": 12, "batch_size": 2, "arms": [*FEW], "spend": 180.0},
    "stories260k-numpy": {"data": "texts/libraries-numpy.txt", "steps": 60, "batch_size": 2, **TEXT},
    "stories260k-zoo40": {"data": "texts/databases-zoo.jsonl", "limit": 40, "steps": 60, "batch_size": 2},
    "stories260k-austen": {"data": "texts/authors-austen.txt", "steps": 400, "batch_size": 2, "max_length": 64},
    "stories15m-numpy": {"data": "texts/libraries-numpy.txt", "steps": 40, "batch_size": 2, **TEXT},
    "stories15m-sql50000": {"data": "sql", "limit": 50_000, "steps": 40, "batch_size": 2},
    "tinyllama-1.1b-sql": {"data": "sql", "limit": 200, "steps": 12, "batch_size": 2, "arms": [*FEW], "spend": 600.0},
}
TWICE = ("stories260k-acts",)  # on two seeds
WHOLE = (*TWICE, "stories260k-numpy", "stories260k-zoo40")  # with VeRA and LoRA r1, too
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
    return next(
        m for m in ("stories260k", "stories15m", "photonic", "smollm2-135m", "tinyllama-1.1b") if pair.startswith(m)
    )


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

    Pairs of `learn`; the earlier ones, from the races of their plans made again to the ends of their sweeps; and those
    of the laboratory's records: arms tuned there on several seeds, whose loss on the way is the mean training loss of
    steps 9 to 12. Texts on which it hardly falls are left out, and those of PAIRS.
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
    for pair in EARLIER:
        plan, ends = read_plan(RECORDS / pair / "remade.json"), ends_of(pair)
        start = lines(RECORDS / pair / "comparison.jsonl")[0]["heldout"][0][1]
        for o in plan.options:
            if o.race and o.candidate in ends:
                longer, size = math.log(o.steps / plan.race.steps), math.log10(o.trained) - 3
                known = [longer, longer * size, math.log(PAIRS[pair]["batch_size"] / plan.race.rows)]
                grown = (start - ends[o.candidate]) / (plan.start - o.race)
                found[pair].append((o.candidate, known, math.log(grown)))
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
    """The constants of `predict`: of all pairs the growth, of the pairs left out in turn what it misses.

    PAIR and ARM are what the pairs' median misses and the rest spread, times one factor: the 90% quantile of the misses
    of pairs left out, in units of the interval that they would have had. Pairs are taken as exchangeable, arms of one
    pair are not, so each pair has the weight 1 / (n + 1), shared by its arms, and the next pair the rest (conformal
    prediction for data in groups: Dunn, Wasserman and Ramdas, 2023).
    """
    data = growths()
    missed: dict[str, list[tuple[float, float]]] = {}
    common, rest = {}, defaultdict(list)
    for pair, rows in data.items():
        others = solved(data, (p for p in data if p != pair))
        missed[pair] = [
            (known[0], y - np.dot(known, others)) for _, known, y in rows if not known[2] or pair in EARLIER
        ]
        common[pair] = float(np.median([left / longer for longer, left in missed[pair]]))
        rest[pair] = [left - common[pair] * longer for longer, left in missed[pair]]
        print(f"{pair}: {len(rows)} trials, left out: off by {common[pair]:+.3f} for every log of the steps")
    pair_miss = 1.64 * float(np.std([*common.values()]))
    arm, relative = (quantile(np.abs(np.concatenate([rest[p] for p in of]))) for of in (data, FIT))
    factor = conformal(
        [[abs(left) / math.hypot(arm, pair_miss * longer) for longer, left in rows] for rows in missed.values()]
    )
    print(f"of {len(data)} pairs, intervals {factor:.2f} times as wide hold 90%")
    return (*map(float, solved(data, data)), factor * pair_miss, factor * arm, relative)


def quantile(misses: Any) -> float:
    return float(np.quantile(misses, 0.9))


def conformal(groups: Sequence[Sequence[float]], level: float = 0.9) -> float:
    """The score that one of a new group exceeds in 1 - `level` of cases; infinite where the groups are too few."""
    each = sorted((score, 1 / len(group) / (len(groups) + 1)) for group in groups for score in group)
    total = np.cumsum([weight for _, weight in each])
    return next((score for (score, _), sofar in zip(each, total, strict=True) if sofar >= level - 1e-9), math.inf)


def fit() -> None:
    names = ("GROWTH", "BY_SIZE", "BY_ROWS", "PAIR", "ARM", "RELATIVE")
    print(*(f"{name} = {value:.3f}" for name, value in zip(names, constants(), strict=True)), sep="\n")


# ---- plans and sweeps


def plans(names: Iterable[str]) -> None:
    """The plan of every pair, before its sweep; of EARLIER pairs once more."""
    from ctsft.plan import plan
    from ctsft.plan.question import make_question

    clock_of_the_processor()
    for pair in names:
        path = RECORDS / pair / ("remade.json" if pair in EARLIER else "plan.json")
        if path.exists():
            continue
        if pair not in EARLIER and (RECORDS / pair / "comparison.jsonl").exists():
            raise SystemExit(f"{pair} was swept before it was planned")
        found = plan.answered(make_question({"model": model_of(pair), "threads": 1} | PAIRS[pair]))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found.model_dump())
        print(pair, found.decision.candidate, f"{found.seconds:.0f} s", flush=True)


def sweeps(names: Iterable[str]) -> None:
    """Every arm of every pair in full."""
    for pair in names:
        if not (RECORDS / pair / "plan.json").exists():
            raise SystemExit(f"{pair} has no plan yet; it is made before the sweep")
        bench = None
        for name in arms_of(pair):
            have = [Trial(**line) for line in lines(RECORDS / pair / "comparison.jsonl")]
            for seed, rate in due(name, [t for t in have if t.candidate == name], pair):
                bench = bench or bench_of(pair, PAIRS[pair], HELD.get(model_of(pair), 64))
                swept(bench, pair, name, seed, rate)
            while more := list(due(name, trials_of(pair, name), pair)):
                bench = bench or bench_of(pair, PAIRS[pair], HELD.get(model_of(pair), 64))
                for seed, rate in more:
                    swept(bench, pair, name, seed, rate)


def arms_of(pair: str) -> list[str]:
    """The arms that are swept."""
    arms = PAIRS[pair].get("arms") or (SMALL if model_of(pair) == "stories260k" else ALL)
    return [a for a in arms if pair in WHOLE or a not in ("lora-1", "vera-256")]


def trials_of(pair: str, name: str) -> list[Trial]:
    return [t for t in map(lambda d: Trial(**d), lines(RECORDS / pair / "comparison.jsonl")) if t.candidate == name]


def ends_of(pair: str) -> dict[str, float]:
    """By arm the loss at the end, a mean over the judged seeds at its best rate."""
    runs: dict[str, list[float]] = defaultdict(list)
    for line in lines(RECORDS / pair / "comparison.jsonl"):
        if line["seed"] != TUNING:
            runs[line["candidate"]].append(Trial(**line).end)
    return {name: sum(losses) / len(losses) for name, losses in runs.items()}


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
    seeds = SEEDS if pair in TWICE else SEEDS[:1]
    yield from ((seed, best) for seed in seeds if seed not in judged)


def clock_of_the_processor() -> None:
    """Plans and trials count its seconds from here on."""
    from ctsft.plan import plan, trial

    plan.time = trial.time = SimpleNamespace(monotonic=time.process_time, perf_counter=time.process_time)


# ---- lines


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("learn", "fit", "plans", "sweeps"))
    parser.add_argument("pairs", nargs="*", help="of PAIRS, or of FIT for learn; all if none is given")
    given = parser.parse_args()
    if "CTSFT_MODELS" in os.environ:
        os.chdir(os.environ["CTSFT_MODELS"])
    names = given.pairs or [*(FIT if given.what == "learn" else PAIRS)]
    if given.what == "fit":
        fit()
    else:
        {"learn": learn, "plans": plans, "sweeps": sweeps}[given.what](names)


if __name__ == "__main__":
    main()
