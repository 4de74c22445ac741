"""Comparisons made up for tests: every number is chosen."""

from ctsft.plan.record import Arm, Comparison, Trial

LOOKS = (0, 4, 8)


def trial(name, seed, losses, seconds=1.0, trained=100, **changes):
    """A trial of 8 steps whose held-out losses at `LOOKS` are `losses`, `seconds` a step."""
    values = {
        "candidate": name,
        "seed": seed,
        "rate": 0.1,
        "steps": 8,
        "horizon": 8,
        "batch_size": 4,
        "train": [3.0] * 8,
        "heldout": list(zip(LOOKS, losses, strict=False)),
        "clock": [seconds * (i + 1) for i in range(8)],
        "trained": trained,
        "adapter_bytes": 4 * trained + 500,
        "memory_bytes": 16 * trained,
        "diverged": None in losses,
    }
    return Trial(**values | changes)


def arm(name, ends, trained=100, seconds=1.0, middle=3.0, **changes):
    """An arm that starts at 4.0, is at `middle` half-way, and ends on each seed at one of `ends`."""
    trials = [trial(name, i + 1, (4.0, middle, end), seconds, trained) for i, end in enumerate(ends)]
    tried = [(0.03, 3.5), (0.1, 3.0), (0.3, None)]
    values = {"told": "K numbers", "rule": 0.1, "tried": tried, "race_steps": 2, "rate": 0.1, "trials": trials}
    return Arm(name=name, **values | changes)


def comparison(*arms, **changes):
    values = {
        "created": "2026-01-02T03:04:05+00:00",
        "contest": {"model": "m", "data": "d", "steps": 8, "batch_size": 4, "seeds": len(arms[0].trials)},
        "versions": {"torch": "1"},
        "machine": {"platform": "p", "cpu": "c", "threads": 1, "device": "cpu"},
        "model": {"name": "small & <b>", "parameters": 1000, "dtype": "float32", "note": None},
        "data": {
            **{"name": "rows.jsonl", "kind": "text", "train_rows": 32, "heldout_rows": 8},
            **{"truncated": 0, "dropped": 0, "notes": []},
        },
        "before": 4.0,
        "before_accuracy": None,
        "arms": list(arms),
    }
    return Comparison(**values | changes)
