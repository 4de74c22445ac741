"""What a model is scored by: held-out loss, greedy generations, and for `sql` the accuracy of the queries it writes."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ctsft.adapter.loss import summed_loss
from ctsft.adapter.store import adapted
from ctsft.data.rows import Corpus
from ctsft.data.sql.execution import execution_match, extract_sql
from ctsft.data.tokens import prompt_ids
from ctsft.errors import CTError
from ctsft.files import wilson
from ctsft.spectral.weights import clean_name
from ctsft.tune.inspect import spectra_of
from ctsft.tune.recipe import Recipe
from ctsft.tune.record import Accuracy, Measured, Spectrum

Tokens = dict[str, list[int]]  # a row in token ids: input_ids, and labels, -100 where nothing counts


class NotFinite(CTError):
    """The held-out loss is no number that can be compared."""


def untold(rows: int) -> None:
    """Progress that nobody watches."""


def collate(rows: Sequence[Tokens], pad_id: int) -> dict[str, Tensor]:
    """Rows padded on the left to one batch: input_ids, attention_mask, position_ids, labels, each (b, t).

    Labels are -100 where nothing counts, and at a row's first token, which nothing predicts.
    """
    t = max(len(r["input_ids"]) for r in rows)

    def stack(lists: Iterable[list[int]], fill: int) -> Tensor:
        return torch.tensor([[fill] * (t - len(items)) + items for items in lists])

    mask = stack(([1] * len(r["input_ids"]) for r in rows), 0)
    return {
        "input_ids": stack((r["input_ids"] for r in rows), pad_id),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": stack(([-100, *r["labels"][1:]] for r in rows), -100),
    }


def heldout_loss(
    model: torch.nn.Module,
    rows: Sequence[Tokens],
    pad_id: int,
    batch_size: int = 16,
    progress: Callable[[int], object] = untold,
) -> tuple[float, int]:
    """Mean loss in nats per token over all labelled tokens of `rows`, and their number. NotFinite if it is none.

    `progress(n)` is called after every n rows.
    """
    rows = sorted(rows, key=lambda r: len(r["input_ids"]))
    total, tokens = 0.0, 0
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for i in range(0, len(rows), batch_size):
            picked = rows[i : i + batch_size]
            batch = {k: v.to(device) for k, v in collate(picked, pad_id).items()}
            loss, count = summed_loss(model, batch)
            total, tokens = total + float(loss), tokens + int(count)
            progress(len(picked))
    if not math.isfinite(total):
        raise NotFinite(f"the held-out loss is {total}; use dtype float32 or bfloat16, or a smaller lr.")
    return total / tokens, tokens


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 16,
    progress: Callable[[int], object] = untold,
) -> list[str]:
    """Greedy completions (text) of prompts given as token ids, in their order; "" where the context has no room.

    Each has `max_new_tokens` tokens at most, and what is left of the context, whatever the other prompts are.
    """
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    order = sorted((i for i, ids in enumerate(prompts) if len(ids) < context), key=lambda i: len(prompts[i]))
    roomy = sum(len(prompts[i]) + max_new_tokens <= context for i in order)  # the longer ones run alone
    batches = [order[i : min(i + batch_size, roomy)] for i in range(0, roomy, batch_size)]
    batches += [[i] for i in order[roomy:]]
    texts = [""] * len(prompts)
    settings = GenerationConfig(
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
    )
    model.eval()
    with torch.inference_mode():
        for picked in batches:
            batch = collate([{"input_ids": prompts[j], "labels": prompts[j]} for j in picked], tokenizer.pad_token_id)
            ids, mask = (batch[n].to(model.device) for n in ("input_ids", "attention_mask"))
            settings.max_new_tokens = int(min(max_new_tokens, context - ids.shape[1]))
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            for j, tokens in zip(picked, out[:, ids.shape[1] :], strict=True):
                texts[j] = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            progress(len(picked))
    if roomless := len(prompts) - len(order):
        progress(roomless)
    return texts


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    rows: Sequence[Tokens],
    recipe: Recipe,
    watch: Callable[[int], Any],
    generating: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Measured:
    """Held-out loss, generations, and for `sql` the execution accuracy with its 95% interval.

    `watch(total)` gives a progress bar over rows scored and prompts answered. `generating()` is around all that follows
    the loss: where it lets an error pass, there are no texts.
    """
    wanted = len(corpus.examples[: recipe.eval_rows]) or min(recipe.samples, len(corpus.heldout))
    context = getattr(model.config, "max_position_embeddings", None)
    prompts = [prompt_ids(corpus.heldout[i], tokenizer, corpus.kind, context) for i in range(wanted)]
    accuracy: Accuracy | None = None
    texts: list[str] = []
    ok: list[bool | None] = []
    with watch(len(rows) + len(prompts)) as shown:
        loss, tokens = heldout_loss(model, rows, tokenizer.pad_token_id, progress=shown.update)
        with generating():
            texts, ok, accuracy = answers(model, tokenizer, corpus, prompts, recipe, shown.update)
    return Measured(heldout_loss=loss, heldout_tokens=tokens, accuracy=accuracy, texts=texts, ok=ok)


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    prompts: Sequence[list[int]],
    recipe: Recipe,
    progress: Callable[[int], object],
) -> tuple[list[str], list[bool | None], Accuracy | None]:
    """What the model writes for `prompts`, and for `sql` whether each is right and how many are."""
    texts = generate(model, tokenizer, prompts, recipe.max_new_tokens, progress=progress)
    if not corpus.examples:
        return texts, [None] * len(texts), None
    texts = [extract_sql(t) for t in texts]
    ok: list[bool | None] = [execution_match(t, e) for t, e in zip(texts, corpus.examples, strict=False)]
    return texts, ok, accuracy_of(ok, [e.kind for e in corpus.examples[: len(ok)]])


def accuracy_of(ok: Sequence[bool | None], kinds: Sequence[str]) -> Accuracy:
    """How many of the questions, each of its kind, were answered as wanted."""
    by_kind: dict[str, list[int]] = {}
    for hit, kind in zip(ok, kinds, strict=True):
        counts = by_kind.setdefault(kind, [0, 0])
        counts[0] += bool(hit)
        counts[1] += 1
    correct = sum(map(bool, ok))
    low, high = wilson(correct, len(ok))
    return Accuracy(correct=correct, total=len(ok), low=low, high=high, by_kind=by_kind)


def spectra(model: PeftModel, progress: Callable[[int, int, str], None]) -> list[Spectrum]:
    """Per adapted matrix: its spectrum's summary, and how far training moved it (|dW| / |W|, Frobenius norms).

    Of a matrix of zeros, |dW| / |W| is 0 where training left it so, and None where it moved.
    """
    layers = {clean_name(n): m for n, m in adapted(model, "default")}
    table = spectra_of(
        model.get_base_model(), list(layers), {n: m.ready("default").k for n, m in layers.items()}, progress
    )
    for row in table:
        layer = layers[row["name"]]
        left, right = (f.detach() for f in layer.factors("default"))
        if layer.replaces("default"):
            moved = float(layer.get_delta_weight("default").detach().norm())
        else:  # |L R|^2 = tr(L'L R R')
            moved = float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())
        row["coefficient_norm"] = float(layer.ctsft_coefficients["default"].detach().norm())
        weight = float(layer.base_weight().float().norm())
        row["delta_over_weight"] = moved / weight if weight else 0.0 if moved == 0 else None
        del row["spectrum"]
    return [Spectrum(**row) for row in table]
