"""What the probes cost: time they add to a training step at their default interval (limit 10%), each alone and all
together.

    python benchmarks/probes.py --model ~/models/smollm2-135m
"""

import common as c
import torch

from ctsft.choices import PROBES
from ctsft.models.load import resolve
from ctsft.probe import SAMPLES, Probes

ROWS = SAMPLES  # of a batch: as few as gradient_snr takes
SEEN = 50  # updates that diversity has behind it: its cost grows with them


def main(argv: list[str] | None = None) -> str:
    args = c.parse(c.parser(__doc__, model=str(resolve("photonic")), tokens=64 * ROWS, repeats=9), argv)
    base = c.load(args, inputs=False)
    batch = c.batch_for(base, args.tokens, ROWS)
    model = c.adapt(base, c.ours(args))
    optimizer = torch.optim.AdamW(c.trained(model), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    step()
    sets = {"none: norms and cosines alone": (), **{n: (n,) for n in PROBES}, "all four in one pass": PROBES}
    ways: dict[str, c.Step] = {"step": step}
    for name, names in sets.items():
        probes = Probes(names, batches=[batch])
        for update in range(2, SEEN):
            probes.before_step(model, update)
        ways[f"light {name}"] = lambda p=probes: (p.before_step(model, SEEN), p.after_step(model, SEEN))
        if set(names) - {"diversity"}:
            ways[f"heavy {name}"] = lambda p=probes: p.measure(model, SEEN)
    times = c.interleaved(ways, args)

    every = probes.every  # the default, in all of them
    rows = [["a training step", c.spread(1000 * times["step"], 1), "-", "-"]]
    for name in sets:
        light, heavy = times[f"light {name}"], times.get(f"heavy {name}")
        share = light if heavy is None else light + heavy / every
        shown = "-" if heavy is None else c.spread(1000 * heavy, 1)
        rows.append([name, c.spread(1000 * light, 1), shown, c.spread(100 * share / times["step"], 1)])
    head = ["probe", "ms at every step", f"ms before every {every}th step", "% of a step"]
    note = f"{ROWS} rows of {args.tokens // ROWS} tokens, diagonal K={args.k}."
    return c.show(c.setting(args, base), c.table(head, rows), note)


if __name__ == "__main__":
    main()
