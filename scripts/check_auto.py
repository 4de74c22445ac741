"""Does a run without --k end lower than K = 64 in the same time? Both in full, the plan counted.

    CTSFT_MODELS=... python scripts/check_auto.py [PAIR ...]

The records are records/plans/auto.jsonl; `scripts/judge_plans.py` prints what came of it. Each pair trains for about
`SECONDS` as `ctsft tune` would without --k, after its plan; then K = 64 along random directions, at the rate of the
rule, for as many steps as fit into the seconds of both. Seconds are the processor's, as the machine is shared. What is
there is kept.
"""

import os
import sys
from typing import Any

from check_plans import RECORDS, add, clock_of_the_processor, lines
from rich.console import Console

FILE = RECORDS / "auto.jsonl"
SECONDS = 300.0  # the shortest training that is planned
SEED = 1  # of the training; plans race on seed 0
PAIRS: dict[str, dict[str, Any]] = {
    "stories15m-melville": {"model": "stories15m", "data": "texts/authors-melville.txt", "max_length": 128},
    "photonic-sql": {"model": "photonic", "data": "sql"},
    "stories15m-sql": {"model": "stories15m", "data": "sql"},
    "stories260k-austen": {"model": "stories260k", "data": "texts/authors-austen.txt", "max_length": 128},
    "smollm2-135m-sql": {"model": "smollm2-135m", "data": "sql", "eval_rows": 32},
}


def checked(pair: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The plan and both trainings of a pair, as a line of the records."""
    from ctsft.plan.arms import candidate
    from ctsft.plan.automatic import automatic
    from ctsft.plan.choose import USUAL
    from ctsft.plan.plan import BACK, seconds_a_row
    from ctsft.plan.trial import Bench, narrowest
    from ctsft.tune.material import gathered
    from ctsft.tune.recipe import make_recipe

    console = Console(stderr=True)
    recipe = make_recipe({"threads": 1, "eval_rows": 64} | asked)
    steps = int(SECONDS / (BACK * recipe.batch_size * seconds_a_row(gathered(recipe, console))))
    chosen = automatic(make_recipe(recipe.values() | {"steps": steps}), console, form=False, always=True)
    assert chosen.plan and chosen.found
    lr = None if chosen.recipe.lr == "auto" else chosen.recipe.lr
    arm = candidate(f"{chosen.recipe.form}-{chosen.recipe.k}")
    pad = chosen.found.loaded.tokenizer.pad_token_id
    bench = Bench(chosen.found.loaded.model, pad, chosen.found.train, chosen.found.heldout, recipe.batch_size)
    usual = candidate(f"diagonal-{min(USUAL, narrowest(bench.model))}")
    found = bench.trial(arm, SEED, steps, lr)
    pace = bench.trial(usual, SEED, 12, looks=()).seconds / 12
    other = bench.trial(usual, SEED, round((chosen.plan.seconds + found.seconds) / pace))
    return {
        "pair": pair,
        "rows": len(chosen.found.train),
        "planning": chosen.plan.seconds,
        "predicted": chosen.plan.chosen.loss if chosen.plan.chosen else None,
        "auto": short(found.model_dump()),
        "usual": short(other.model_dump()),
    }


def short(trial: dict[str, Any]) -> dict[str, Any]:
    """A trial without what it lost and when on the way, but for its seconds in all."""
    seconds = trial["clock"][-1]
    return {name: value for name, value in trial.items() if name not in ("train", "clock")} | {"seconds": seconds}


def main() -> None:
    clock_of_the_processor()
    if "CTSFT_MODELS" in os.environ:
        os.chdir(os.environ["CTSFT_MODELS"])
    for pair in sys.argv[1:] or PAIRS:
        if pair not in {line["pair"] for line in lines(FILE)}:
            line = checked(pair, PAIRS[pair])
            add(FILE, line)
            print(pair, line["auto"]["candidate"], line["auto"]["heldout"], line["usual"]["heldout"], flush=True)


if __name__ == "__main__":
    main()
