"""Time of whole training steps over that of the frozen model (limit 1.10 for `diagonal` K=64 at width 2,048 and up,
1.25 on SmolLM2-135M) and over PEFT's LoRA at rank K (limit 0.85) and at rank 8 (limit 1).

A step is forward, loss, backward, AdamW and zero_grad on one batch; frozen is forward and backward to the embedding's
output. In every arm backward runs through the first block too, as if something below it trained.

    python benchmarks/step_time.py --dtype bfloat16
    python benchmarks/step_time.py --model ~/models/smollm2-135m --threads 2
"""

import common as c


def main(argv: list[str] | None = None) -> str:
    p = c.parser(__doc__)
    p.add_argument("--arms", nargs="+", help="only the arms whose names begin so; frozen is always there")
    args = c.parse(p, argv)
    base = c.load(args)
    batch = c.batch_for(base, args.tokens)
    arms = c.standard_arms(base, args, args.arms)
    times = c.interleaved({n: c.training_step(m, batch) for n, m in arms.items()}, args)

    over = [n for n in dict.fromkeys(("frozen", f"LoRA r={args.k}", "LoRA r=8")) if n in arms]
    rows = [
        [n, sum(q.numel() for q in c.trained(m)), c.spread(1000 * times[n], 0)]
        + [c.spread(times[n] / times[o]) if n != o else "1" for o in over]
        for n, m in arms.items()
    ]
    head = ["arm", "trained numbers", "ms a step", *(f"over {o}" for o in over)]
    return c.show(c.setting(args, base), c.table(head, rows))


if __name__ == "__main__":
    main()
