"""Gradients of the amplitudes for every sample of a batch (quantities.look) over a plain forward and backward of the
same adapter (limit 1.3), beside a loop over the samples and torch.func's vmap of grad.

    python benchmarks/per_sample.py --model ~/models/smollm2-135m
"""

from collections.abc import Mapping

import common as c
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ctsft.quantities.look import look

ROWS = 8


def plain(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The mean gradient of every trained piece, as one step of training makes it."""
    return list(torch.autograd.grad(model(**batch).loss, c.trained(model)))


def by_look(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Gradients (samples, K) of every trained piece, in the model's order."""
    return list(look(model, [batch], gradients=False, samples=True).samples.values())


def by_loop(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    rows = zip(*(v.split(1) for v in batch.values()), strict=True)
    each = [plain(model, dict(zip(batch, row, strict=True))) for row in rows]
    return [torch.stack(gradients) for gradients in zip(*each, strict=True)]


def by_vmap(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    pieces = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(pieces: dict[str, Tensor], sample: dict[str, Tensor]) -> Tensor:
        row = {n: v[None] for n, v in sample.items()}
        return functional_call(model, pieces, (), row).loss

    return list(vmap(grad(loss), in_dims=(None, 0))(pieces, dict(batch)).values())


def main(argv: list[str] | None = None) -> str:
    args = c.parse(c.parser(__doc__, tokens=64 * ROWS, repeats=9), argv)
    base = c.load(args, inputs=False)
    batch = c.batch_for(base, args.tokens, ROWS)
    model = c.adapt(base, c.ours(args))
    with torch.no_grad():
        for piece in c.trained(model):
            piece.normal_(std=0.01)
    ways = {"plain forward and backward": plain, "look": by_look, "loop over samples": by_loop, "vmap(grad)": by_vmap}
    exact, failed = by_loop(model, batch), {}
    off = {"plain forward and backward": "-", "loop over samples": "0"}
    for name in ("look", "vmap(grad)"):
        try:
            found = ways[name](model, batch)
            worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
            off[name] = f"{worst:.0e}"
        except (RuntimeError, ValueError) as error:  # what vmap cannot batch
            failed[name] = str(error).strip().splitlines()[0][:100]
            del ways[name]
    times = c.interleaved({n: lambda way=way: way(model, batch) for n, way in ways.items()}, args)
    first = times["plain forward and backward"]
    rows = [[n, c.spread(1000 * t, 0), c.spread(t / first), off[n]] for n, t in times.items()]
    rows += [[n, "does not run", reason, ""] for n, reason in failed.items()]
    head = ["way", "ms", "over plain", "largest relative difference to the loop, of a matrix"]
    note = f"{ROWS} samples of {args.tokens // ROWS} tokens, diagonal K={args.k}."
    return c.show(c.setting(args, base), c.table(head, rows), note)


if __name__ == "__main__":
    main()
