"""Frozen blocks that many runs share are passed once: what they give for a batch is kept and replayed."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ctsft.lab.sources import base, blocks, named_batch
from ctsft.lab.spec import Spec


class Replay(nn.Module):
    """Stands for frozen blocks: returns what they gave for the batch at hand, whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.now = torch.empty(0)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.now


class Reached(Exception):
    """Ends a forward pass at the block whose input was wanted."""


@lru_cache(maxsize=64)
def prefix(spec: Spec, kept: int, *name: object) -> Tensor:
    """What the base feeds to its last `kept` blocks for the batch `name` of `spec`, (batch, length, d_model)."""
    model = base(spec.model).model
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise Reached

    handle = blocks(model)[-kept].register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            model(input_ids=named_batch(spec, *name), use_cache=False)
    except Reached:
        return found[0]
    finally:
        handle.remove()
    raise AssertionError("the block was never reached")


def replay_prefix(model: nn.Module, kept: int) -> Replay:
    """Put a Replay in the place of all blocks but the last `kept`. Exact where nothing before those trains."""
    replay, layers = Replay(), blocks(model)
    del layers[1 : len(layers) - kept]
    layers[0] = replay
    return replay
