"""Rows to token ids: the chat template, what of a row is learnt, and what generation starts from."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import datasets
import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctsft.data.rows import Fields, Kind
from ctsft.data.template import is_bounded
from ctsft.errors import CTError, shown

TEXT_PROMPT_TOKENS = 32
BATCH = 2**20  # characters that are tokenised together: what that takes is many times their size
PIECE = 2**17  # characters of a long text that are tokenised apart
# Where a long text may be cut, the best first: before a blank between words, after a sign, anywhere.
PLACES = tuple(map(re.compile, (r"(?<=\w)\s(?=\w)", r"(?<=[^\w\s])(?=\w)", "")))
SEAM = 256  # characters on either side that show whether tokens end at a place
TRIES = 20  # places of a kind that are looked at


class Cut(NamedTuple):
    """Rows that lost tokens at their end, and rows left out whole, for want of room."""

    truncated: int
    dropped: int

    def told(self, which: str, most: int) -> list[str]:
        """What befell the rows, which are called `which`, at `most` tokens a row: a sentence, or none."""
        if not any(self):
            return []
        return [f"{self.truncated} {which}s were cut to {most} tokens and {self.dropped} dropped as too long"]


def format_rows(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    max_length: int,
    *,
    context: int | None = None,
    which: str = "row",
) -> tuple[datasets.Dataset, Cut]:
    """Tokenise rows for training: lists of ints `input_ids` and `labels`, of equal length.

    `labels` are the ids that count for the loss, those of the completion and the end of its turn, or all of a `text`,
    and -100 elsewhere; trl's SFTTrainer takes such rows as they are.
    A chat template is applied where the tokenizer has one, strings becoming one user and one assistant turn, stripped
    of outer blanks; else prompt, completion and end-of-text token are joined as they are.

    A row longer than `max_length` tokens loses its end, and is dropped if nothing of the completion is left; a long
    `text` becomes several rows, and loses nothing but a last token that would stand alone. Raises CTError if no row is
    left, called `which` (it says so where `max_length` is the model's `context`), and for messages without a chat
    template.
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
        prompts = _tokenise(tokenizer, heads, bos, max_length)
        wholes = _tokenise(tokenizer, [head + tail for head, tail in zip(heads, tails, strict=True)], bos, max_length)
        for prompt, whole, tail in zip(prompts, wholes, tails, strict=True):
            if len(prompt) >= max_length:
                dropped += 1
                continue
            if whole[: len(prompt)] != prompt:  # a token spans the border; what generation sees is the prompt alone
                whole = prompt + _tokenise(tokenizer, [tail], False, max_length)[0]
            truncated += len(whole) > max_length
            ids.append(whole[:max_length])
            labels.append(([-100] * len(prompt) + whole[len(prompt) :])[:max_length])
    if not ids:
        way = ", the model's context: give shorter ones" if max_length == context else ": give a larger max_length"
        raise CTError(f"No {which} has anything to learn within {max_length} tokens{way}.")
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}), Cut(truncated, dropped)


def prompt_ids(row: Fields, tokenizer: PreTrainedTokenizerBase, kind: Kind, most: int | None = None) -> list[int]:
    """The token ids to generate from: the prompt up to the place of the completion, exactly as in `format_rows`.

    Of a `text` they are the first half, at most 32 tokens. Of a prompt of more than `most` tokens, more than `most` of
    the first. Raises CTError for an empty prompt where the tokenizer has no begin token.
    """
    if kind == "text":
        tokens = _tokenise(tokenizer, [row["text"]], True, 2 * TEXT_PROMPT_TOKENS)[0]
        return tokens[: min(TEXT_PROMPT_TOKENS, math.ceil(len(tokens) / 2))]
    head, _ = _head_and_tail(row, tokenizer)
    if ids := _tokenise(tokenizer, [head], not tokenizer.chat_template, most)[0]:
        return ids
    raise CTError("an empty prompt leaves nothing to start from, this model has no begin token: put a word into it.")


def fits(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """CTError where the tokenizer gives ids that the model has no embedding for."""
    embedding: Any = model.get_input_embeddings()
    has = len(embedding.weight)
    needed = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if needed > has:
        raise CTError(
            f"The tokenizer has {needed:,} tokens and the model embeddings for {has:,}: take the model's own tokenizer."
        )


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
    if isinstance(tokenizer.chat_template, str) and not is_bounded(tokenizer.chat_template):
        raise CTError("The model's chat template takes too much time or memory: use another.")
    roles = shown(", ".join(turn["role"] for turn in turns))
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt))
    except jinja2.TemplateError as error:
        raise CTError(
            f"The model's chat template refuses turns of {roles} ({shown(str(error))}): give others."
        ) from error
    except Exception as error:  # the template is a program
        why = shown(f"{type(error).__name__}: {error}")
        raise CTError(f"The model's chat template fails for turns of {roles} ({why}): mend it.") from error


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], bos: bool, most: int | None = None
) -> list[list[int]]:
    """Ids without special tokens, but, if `bos`, with the begin token of those tokenizers that put one.

    With `most`, a text of more tokens than that may lose all but the first `most` + 1, which are those of the whole
    text: of a long one only the beginning is read, up to as many tokens again after the last that is kept.
    """
    start = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id][:1] if bos else []
    if most is None:
        whole = [list(start) for _ in texts]
        pieces = [(ids, *piece) for ids, text in zip(whole, texts, strict=True) for piece in _pieces(tokenizer, text)]
        for (ids, _, known), more in zip(pieces, _encode(tokenizer, (piece for _, piece, _ in pieces)), strict=True):
            ids += more[known:]
        return whole
    found: dict[int, list[int]] = {}
    size = 64 + 16 * most  # characters
    while left := [i for i in range(len(texts)) if i not in found]:
        for i, ids in zip(left, _encode(tokenizer, (texts[i][:size] for i in left)), strict=True):
            if len(texts[i]) <= size:
                found[i] = start + ids
            elif len(ids) >= 64 + 2 * most:
                found[i] = start + ids[: most + 1]
        size *= 4
    return [found[i] for i in range(len(texts))]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[list[int]]:
    """The ids of each text, tokenised in batches."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield from _ids(tokenizer, batch)
            batch, size = [], 0
    yield from _ids(tokenizer, batch)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    found = tokenizer(
        texts, add_special_tokens=False, verbose=False, return_attention_mask=False, return_token_type_ids=False
    )
    return list(found["input_ids"])


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[tuple[str, int]]:
    """A long text in pieces whose tokens, one after the other, are those of the whole. Each is cut at the first of
    PLACES where tokens end, as the text around it shows, and has the last characters of the piece before in front,
    with the number of their tokens. Where no token ends it is cut all the same, and its tokens may be others there."""
    begin = cut = known = 0
    while len(text) - cut > 2 * PIECE:
        first, last = cut + PIECE, cut + 2 * PIECE
        for end in (m.start() for place in PLACES for m in islice(place.finditer(text, first, last), TRIES)):
            before = max(cut, end - SEAM)
            left, both = _ids(tokenizer, [text[before:end], text[before : end + SEAM]])
            if both[: len(left)] == left:
                break
        else:
            before, end, left = first, first, []
        yield text[begin:end], known
        begin, cut, known = before, end, len(left)
    yield text[begin:], known
