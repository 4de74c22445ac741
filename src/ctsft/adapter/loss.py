"""The loss of a causal language model where tokens count, by the least work that gives it.

The output head sees only the positions whose next token counts. What all rows of a batch begin with (the system prompt
of a chat template, an instruction, a schema) runs once for all of them, and its keys and values are shared.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

WORTH = 1 / 16  # of the tokens of a batch: as much must sharing save, for two passes cost more calls than one

Batch = Mapping[str, Tensor]


def summed_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum over the batch of -log p (nats) of every labelled token, and the number of those tokens.

    `batch` holds input_ids and labels (-100 where nothing counts), each (b, t), and whatever else the model takes; its
    attention_mask, if any, is 1 for tokens and 0 for padding. Nothing predicts a row's first token.
    """
    inputs: dict[str, Any] = {k: v for k, v in batch.items() if k != "labels"}
    targets = predicted(batch["labels"])
    if p := shared(model, batch):
        inputs, targets = after_shared(model, inputs, p) | {"use_cache": True}, targets[:, p:]
    else:
        inputs["use_cache"] = False
    chosen = targets != -100
    logits = logits_at(model, inputs, chosen)
    return F.cross_entropy(logits.float(), targets[chosen], reduction="sum"), chosen.sum()


def predicted(labels: Tensor) -> Tensor:
    """`labels` (b, t), each at the position that predicts it; -100 at the last."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def logits_at(model: nn.Module, inputs: dict[str, Any], chosen: Tensor) -> Tensor:
    """The logits (n, vocabulary) of `model` at the n positions of the mask `chosen` (b, t); its head sees no others."""
    head = bare(model).get_output_embeddings()
    handle = head and head.register_forward_pre_hook(lambda _, args: (args[0][chosen], *args[1:]))
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        if handle:
            handle.remove()
    return logits if logits.ndim == 2 else logits[chosen]


def bare(model: nn.Module) -> Any:
    """The transformers model in `model`, with or without an adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


# ---- what all rows begin with


def shared(model: nn.Module, batch: Batch) -> int:
    """How many tokens the rows of `batch` begin with alike, before the first that predicts one that counts.

    0 where that saves too little, or cannot be: padding not on the left, positions that do not count from the first
    token of a row, inputs such as token_type_ids, layers that do not attend to all of a row, or a dropout, which every
    row draws for itself.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    b, t = ids.shape
    others = batch.keys() - {"input_ids", "attention_mask", "position_ids", "labels"}
    if b == 1 or others or mask.ndim != 2 or (mask[:, 1:] < mask[:, :-1]).any():
        return 0
    positions = batch.get("position_ids", torch.arange(t, device=ids.device))
    if ((positions != mask.cumsum(1) - 1) & mask.bool()).any():
        return 0
    length = mask.sum(1)
    least = int(length.min())
    begin = (t - length)[:, None] + torch.arange(least, device=ids.device)
    rows = ids.gather(1, begin)
    alike = (rows == rows[:1]).all(0)[:-1] & (labels.gather(1, begin) == -100).all(0)[1:]
    p = int(alike.long().cumprod(0).sum())
    return p if (b - 1) * p > WORTH * b * t and attends_to_all(model) and not drops(model) else 0


def after_shared(model: nn.Module, inputs: dict[str, Any], p: int) -> dict[str, Any]:
    """The inputs (b, t - p) that go on where the first `p` tokens of every row have run once, in a cache."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    b, t = ids.shape
    length = mask.sum(1)
    first = int(length.argmax())
    begin = slice(t - int(length[first]), t - int(length[first]) + p)
    cache = DynamicCache(config=bare(model).config)
    nothing = torch.zeros(1, p, dtype=torch.bool, device=ids.device)
    start = {"input_ids": ids[first : first + 1, begin], "past_key_values": cache, "use_cache": True}
    logits_at(model, start, nothing)
    cache.batch_repeat_interleave(b)
    # rows end together: of shorter ones the last p columns of padding and the beginning stand where others go on
    own = torch.arange(p, t, device=ids.device) >= (t - length + p)[:, None]
    mask = torch.cat([mask.new_ones(b, p), own.to(mask.dtype)], 1)
    positions = (torch.arange(t, device=ids.device) - (t - length)[:, None]).clamp(min=0)[:, p:]
    return inputs | {
        "input_ids": ids[:, p:],
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": cache,
    }


def attends_to_all(model: nn.Module) -> bool:
    """Whether every layer of `model` attends to all tokens before, through a cache of keys and values."""
    cache = DynamicCache(config=bare(model).config)
    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


def drops(model: nn.Module) -> bool:
    """Whether `model` trains with a dropout, its own or an adapter's."""
    configs = [bare(model).config, *getattr(model, "peft_config", {}).values()]
    values = [v for config in configs for k, v in config.to_dict().items() if "drop" in k and isinstance(v, float)]
    return model.training and any(values)
