"""Rows to token ids: the chat template, what of a row is learnt, and what generation starts from."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import datasets
import jinja2
from transformers import PreTrainedTokenizerBase

from ctsft.data.rows import Fields, Kind
from ctsft.errors import CTError

TEXT_PROMPT_TOKENS = 32


class Cut(NamedTuple):
    """Rows that lost tokens at their end, and rows left out whole, for want of room."""

    truncated: int
    dropped: int


def format_rows(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, kind: Kind, max_length: int
) -> tuple[datasets.Dataset, Cut]:
    """Tokenise rows for training: lists of ints `input_ids` and `labels`, of equal length.

    `labels` are the ids that count for the loss, those of the completion and the end of its turn, or all of a `text`,
    and -100 elsewhere; trl's SFTTrainer takes such rows as they are.
    A chat template is applied where the tokenizer has one, strings becoming one user and one assistant turn, stripped
    of outer blanks; else prompt, completion and end-of-text token are joined as they are.

    A row longer than `max_length` tokens loses its end, and is dropped if nothing of the completion is left; a long
    `text` becomes several rows, and loses nothing but a last token that would stand alone. Raises CTError if no row is
    left, and for messages without a chat template.
    """
    if max_length < 2:
        raise CTError(f"max_length={max_length} leaves nothing to predict: give at least 2.")
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    truncated = dropped = 0
    if kind == "text":
        for tokens in _tokenise(tokenizer, list(dataset["text"]), bos=True):
            chunks = [tokens[i : i + max_length] for i in range(0, len(tokens), max_length)]
            chunks = [chunk for chunk in chunks if len(chunk) > 1]
            dropped += not chunks
            ids += chunks
            labels += chunks
    else:
        heads, tails = zip(*(_head_and_tail(row, tokenizer) for row in dataset), strict=True)
        bos = not tokenizer.chat_template
        prompts = _tokenise(tokenizer, heads, bos)
        wholes = _tokenise(tokenizer, [head + tail for head, tail in zip(heads, tails, strict=True)], bos)
        for prompt, whole, tail in zip(prompts, wholes, tails, strict=True):
            if whole[: len(prompt)] != prompt:  # a token spans the border; what generation sees is the prompt alone
                whole = prompt + _tokenise(tokenizer, [tail], bos=False)[0]
            if len(prompt) >= max_length:
                dropped += 1
                continue
            truncated += len(whole) > max_length
            ids.append(whole[:max_length])
            labels.append(([-100] * len(prompt) + whole[len(prompt) :])[:max_length])
    if not ids:
        raise CTError(f"No row has anything to learn within {max_length} tokens: give a larger max_length.")
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}), Cut(truncated, dropped)


def prompt_ids(row: Fields, tokenizer: PreTrainedTokenizerBase, kind: Kind) -> list[int]:
    """The token ids to generate from: the prompt up to the place of the completion, exactly as in `format_rows`.

    Of a `text` they are the first half, at most 32 tokens.
    """
    if kind == "text":
        tokens = _tokenise(tokenizer, [row["text"]], bos=True)[0]
        return tokens[: min(TEXT_PROMPT_TOKENS, math.ceil(len(tokens) / 2))]
    head, _ = _head_and_tail(row, tokenizer)
    return _tokenise(tokenizer, [head], bos=not tokenizer.chat_template)[0]


def _head_and_tail(row: Fields, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A row as two strings, the prompt and what is to be generated after it."""
    prompt, completion = row["prompt"], row["completion"]
    if not tokenizer.chat_template:
        if not isinstance(prompt, str):
            raise CTError("This model has no chat template, so it cannot take messages: give prompt and completion.")
        return prompt, completion + tokenizer.eos_token
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt.strip()}]
        completion = [{"role": "assistant", "content": completion.strip()}]
    head = _render(tokenizer, prompt, generation_prompt=True)
    whole = _render(tokenizer, prompt + completion)
    if whole.startswith(head):
        return head, whole[len(head) :]
    return head, "\n".join(turn["content"] for turn in completion) + tokenizer.eos_token


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], generation_prompt: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt))
    except jinja2.TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise CTError(f"The model's chat template refuses turns of {roles} ({error}): give others.") from error


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], bos: bool) -> list[list[int]]:
    """Ids without special tokens, but, if `bos`, with the begin token of those tokenizers that put one."""
    start = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id][:1] if bos else []
    tokens = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [start + t for t in tokens]
