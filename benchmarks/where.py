"""Where the extra time of a `diagonal` step goes: milliseconds by operation beyond those of the frozen model's step,
and the same for PEFT's LoRA at rank K, by torch.profiler. The limit is what the two skinny products need.

    python benchmarks/where.py --dtype bfloat16 --threads 1
"""

from collections import Counter

import common as c
from torch.profiler import ProfilerActivity, profile

Key = tuple[str, str]


def by_operation(step: c.Step, device: str) -> tuple[Counter[Key], Counter[Key]]:
    """Milliseconds and calls of one step by operation and the shapes of its inputs, time of inner operations apart."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as seen:
        step()
        c.synchronise()
    times: Counter[Key] = Counter()
    calls: Counter[Key] = Counter()
    for event in seen.key_averages(group_by_input_shape=True):
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        key = event.key, " ".join("x".join(map(str, shape)) for shape in event.input_shapes if shape)
        times[key] += own / 1000
        calls[key] += event.count
    return times, calls


def main(argv: list[str] | None = None) -> str:
    p = c.parser(__doc__, repeats=9)
    p.add_argument("--rows", type=int, default=14, help="operations in a table")
    args = c.parse(p, argv)
    base = c.load(args)
    batch = c.batch_for(base, args.tokens)
    arms = c.standard_arms(base, args, [f"diagonal K={args.k}", f"LoRA r={args.k}"])
    steps = {n: c.training_step(m, batch) for n, m in arms.items() if "float32" not in n}
    seen: dict[str, list[tuple[Counter[Key], Counter[Key]]]] = {n: [] for n in steps}
    for step in steps.values():
        step()
    for round_ in range(args.repeats):
        for name, step in steps.items():
            seen[name].append(by_operation(step, args.device))
        c.say(f"round {round_ + 1} of {args.repeats}")
    keys = {key for rounds in seen.values() for times, _ in rounds for key in times}
    # the fastest round of each operation: what else the machine does can only add to it
    fastest = {n: {key: min(t[key] for t, _ in rounds) for key in keys} for n, rounds in seen.items()}

    tables = []
    frozen = fastest.pop("frozen")
    for name, times in fastest.items():
        calls = seen[name][-1][1] - seen["frozen"][-1][1]
        extra = {key: times[key] - frozen[key] for key in keys}
        top = sorted(extra, key=lambda key: -abs(extra[key]))[: args.rows]
        rows = [[f"{key[0]} ({key[1]})", calls[key], f"{extra[key]:+.1f}"] for key in top]
        rows.append(["all operations", sum(calls.values()), f"{sum(extra.values()):+.1f}"])
        total = f"{name}: {sum(times.values()):.0f} ms in all, frozen {sum(frozen.values()):.0f} ms."
        tables += [total, c.table(["operation (shapes of its inputs)", "more calls", "ms beyond frozen"], rows)]
    return c.show(c.setting(args, base), *tables)


if __name__ == "__main__":
    main()
