"""What a forward pass keeps for backward, counted with saved_tensors_hooks: beside the frozen model's own at most
2 x tokens x K numbers a matrix, and never a second copy of a layer's input.

Every storage counts once; the parameters and the frozen bases do not count. `copies` are kept tensors that have the
values of an adapted layer's input, in either dtype, and another storage, beside those that the frozen model keeps.
What a custom autograd function hides from the hooks, in attributes of its context, is looked for and counted too.

    python benchmarks/saved_activations.py --dtype bfloat16
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import common as c
import torch
from torch import Tensor, nn


@dataclass
class Kept:
    bytes: int
    numbers: int
    copies: int


def hidden(loss: Tensor) -> Iterator[Tensor]:
    """Tensors that custom functions in the graph of `loss` keep as attributes of their contexts."""
    seen: set[Any] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield from c.tensors_in(getattr(node, "__dict__", {}))
        stack += [parent for parent, _ in node.next_functions]


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether one is the other, but for a rounding to the other's dtype and the shape."""
    if a.numel() != b.numel() or not (a.is_floating_point() and b.is_floating_point()):
        return False
    a, b = a.flatten(), b.flatten()
    return torch.equal(a.to(b.dtype), b) or torch.equal(a, b.to(a.dtype))


def kept(model: nn.Module, batch: Mapping[str, Tensor], names: set[str]) -> Kept:
    """What one forward pass of `model` keeps; `names` ends the names of the modules that are adapted."""
    own = c.held(model)
    saved: list[Tensor] = []
    inputs: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.detach())
        return t

    def watch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach())

    outer = [m for n, m in model.named_modules() if any(n == name or n.endswith(f".{name}") for name in names)]
    handles = [m.register_forward_pre_hook(watch) for m in outer]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(**batch).loss
    finally:
        for handle in handles:
            handle.remove()
    saved += list(hidden(loss))
    storages = {t.untyped_storage().data_ptr(): t for t in saved}
    activations = [t for address, t in storages.items() if address not in own]
    addresses = {x.untyped_storage().data_ptr() for x in inputs}
    others = [t for t in activations if t.untyped_storage().data_ptr() not in addresses]
    copies = [t for t in others if any(same_values(t, x) for x in inputs)]
    sizes = [t.untyped_storage().nbytes() for t in activations]
    numbers = sum(size // t.element_size() for size, t in zip(sizes, activations, strict=True))
    return Kept(sum(sizes), numbers, len(copies))


def adapted_names(base: nn.Module) -> set[str]:
    """The linear layers of the blocks, which every arm adapts."""
    head: Any = base.get_output_embeddings()  # type: ignore[operator]
    return {n for n, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head}


def measure(args: Any) -> tuple[nn.Module, dict[str, Kept]]:
    """The base, and what every arm keeps, by its name."""
    base = c.load(args)
    batch, names = c.batch_for(base, args.tokens), adapted_names(base)
    return base, {n: kept(m, batch, names) for n, m in c.standard_arms(base, args).items()}


def main(argv: list[str] | None = None) -> str:
    args = c.parse(c.parser(__doc__), argv)
    base, found = measure(args)
    frozen, count, unit = found["frozen"], len(adapted_names(base)), args.tokens * args.k
    rows = []
    for name, k in found.items():
        extra = (k.numbers - frozen.numbers) / count
        rows.append(
            [
                name,
                f"{k.bytes / 1e6:.1f}",
                f"{(k.bytes - frozen.bytes) / 1e6:.1f}",
                f"{extra:.0f}",
                f"{extra / unit:.2f}",
                k.copies - frozen.copies,
            ]
        )
    head = ["arm", "MB kept", "over frozen", "numbers a matrix over frozen", "the same / (tokens x K)", "copies"]
    return c.show(c.setting(args, base, timed=False), c.table(head, rows))


if __name__ == "__main__":
    main()
