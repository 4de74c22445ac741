"""Files and names to rows: what is trained on, and what is held out and never trained on."""

import bz2
import csv
import difflib
import gzip
import io
import json
import lzma
import math
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import jinja2
import pyarrow
import pyarrow.parquet
from transformers import PreTrainedTokenizerBase

from ctsft.data import sql
from ctsft.errors import CTError

Kind = Literal["prompt_completion", "text"]
Row = dict[str, Any]

BUILTIN = ("sql",)
READABLE = (".jsonl", ".json", ".csv", ".parquet", ".txt")
OPENERS: dict[str, Callable[..., Any]] = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")

SQL_TRAIN, SQL_HELDOUT = 4000, 2000
BLOCK_CHARACTERS = 1500
TEXT_PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Corpus:
    """Rows to train on and rows held out.

    Columns are `prompt` and `completion` (both strings, or both lists of {"role", "content"}), or `text`.
    `examples` are, for the built-in `sql`, the held-out `ctsft.sql.Example`s in the order of the held-out rows.
    `notes` are sentences that a user should see: what was left out, and why.
    """

    train: datasets.Dataset
    heldout: datasets.Dataset
    kind: Kind
    name: str
    examples: tuple[sql.Example, ...] = ()
    notes: tuple[str, ...] = ()


class Cut(NamedTuple):
    """Rows that lost tokens at their end, and rows left out whole, for want of room."""

    truncated: int
    dropped: int


def load_corpus(spec: str, *, seed: int = 0, heldout: float | int = 0.1, limit: int | None = None) -> Corpus:
    """Load the rows that `spec` names and split them by `seed`.

    `spec` is the built-in `sql`; a file in JSON (a list of objects, or one object a line), CSV, Parquet or plain text
    (split at blank lines into blocks of about 1,500 characters), the first two and text also as .gz, .bz2 or .xz; or
    a hub dataset `org/name` or `org/name:config` (its `train` split, or the only one).
    `heldout` is a fraction of the rows or their number; `sql` has as many as one likes, there it is a fraction of
    2,000. `limit` is the largest number of rows to train on (`sql`: the number, 4,000 if None).

    A row equal to a held-out one is never trained on. Raises CTError, with the line of the file, for anything that
    cannot be read, has other fields than the layouts know, or mixes them; also if a side of the split would be empty.
    """
    if limit is not None and limit < 1:
        raise CTError(f"limit={limit} leaves nothing to train on: give at least 1.")
    if spec == "sql":
        examples = sql.generate(_heldout_count(heldout, SQL_HELDOUT), seed, "heldout")
        train = sql.generate(limit or SQL_TRAIN, seed, "train")
        return _corpus("sql", "prompt_completion", _pairs(train), _pairs(examples), limit, examples=tuple(examples))

    path = Path(spec).expanduser()
    if path.is_file():
        name, located = path.name, _read(path)
    elif HUB_ID.fullmatch(spec) and not path.exists() and not path.name.endswith((*READABLE, *OPENERS)):
        name, located = spec, _read_hub(spec)
    else:
        close = difflib.get_close_matches(spec, BUILTIN, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"give sql, a file ({', '.join(READABLE)}) or org/name."
        raise CTError(f"There is no data {spec!r} (built in: {', '.join(BUILTIN)}): {hint}")

    kind, rows, notes = _normalise(name, located)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    count = _heldout_count(heldout, len(rows))
    if count >= len(rows):
        raise CTError(f"{name} has {len(rows)} rows, of which {count} are to be held out: none is left to train on.")
    held = [rows[i] for i in order[:count]]
    return _corpus(name, kind, [rows[i] for i in order[count:]], held, limit, notes)


def _pairs(examples: Iterable[sql.Example]) -> list[Row]:
    return [{"prompt": e.prompt, "completion": e.completion} for e in examples]


def _heldout_count(heldout: float | int, rows: int) -> int:
    if isinstance(heldout, int) and heldout >= 1:
        return heldout
    if isinstance(heldout, float) and 0 < heldout < 1:
        return max(1, round(heldout * rows))
    raise CTError(f"heldout={heldout} is neither a fraction between 0 and 1 nor a number of rows of at least 1.")


def _corpus(
    name: str,
    kind: Kind,
    train: list[Row],
    held: list[Row],
    limit: int | None,
    notes: tuple[str, ...] = (),
    examples: tuple[sql.Example, ...] = (),
) -> Corpus:
    seen = {json.dumps(row, sort_keys=True) for row in held}
    fresh = [row for row in train if json.dumps(row, sort_keys=True) not in seen]
    if not fresh:
        raise CTError(f"{name} has no row to train on that is not also held out: it needs more different rows.")
    if twins := len(train) - len(fresh):
        notes += (f"{twins} rows equal to a held-out row are not trained on",)
    make = datasets.Dataset.from_list
    return Corpus(make(fresh[:limit]), make(held), kind, name, examples, notes)


# ------------------------------------------------------------------------------------------------------- reading files


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """Every row of a file, with the place that an error would name."""
    compressed = path.suffix in OPENERS
    suffix = Path(path.stem).suffix if compressed else path.suffix
    if suffix not in READABLE or (compressed and suffix == ".parquet"):
        raise CTError(f"{path.name} is of no known type: give {', '.join(READABLE)} (text types also .gz, .bz2, .xz).")
    if suffix == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    if not text.strip():
        raise CTError(f"{path.name} is empty.")
    if suffix == ".txt":
        return _read_blocks(text)
    if suffix == ".csv":
        return _read_csv(path.name, text)
    return _read_json_list(path.name, text) if text.lstrip()[0] == "[" else _read_json_lines(path.name, text)


def _read_text(path: Path) -> str:
    try:
        with OPENERS.get(path.suffix, Path.open)(path, "rb") as file:
            raw: bytes = file.read()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise CTError(f"{path.name} cannot be read ({error}).") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CTError(f"{path.name} line {line} is not UTF-8 text: save the file as UTF-8.") from error


def _read_json_lines(name: str, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if line.strip():
            try:
                yield f"{name} line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise CTError(f"{name} line {number} is no JSON: {error.msg} at column {error.colno}.") from error


def _read_json_list(name: str, text: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise CTError(f"{name} line {error.lineno} is no JSON: {error.msg} at column {error.colno}.") from error
    for number, row in enumerate(rows, 1):
        yield f"{name} item {number}", row


def _read_csv(name: str, text: str) -> Iterator[tuple[str, Any]]:
    """All values stay strings: no guess turns the completion "42" into a number."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise CTError(f"{name} line {reader.line_num} has more values than the head has fields.")
            yield f"{name} line {reader.line_num}", row
    except csv.Error as error:
        raise CTError(f"{name} line {reader.line_num + 1} is no CSV: {error}.") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise CTError(f"{path.name} is no readable Parquet file ({str(error).splitlines()[0]}).") from error
    for number, row in enumerate(rows, 1):
        yield f"{path.name} row {number}", row


def _read_blocks(text: str) -> Iterator[tuple[str, Any]]:
    """Paragraphs, joined while they fit into a block."""
    block = ""
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n").strip()):
        if block and len(block) + 2 + len(paragraph) > BLOCK_CHARACTERS:
            yield "", {"text": block}
            block = ""
        block = f"{block}\n\n{paragraph}" if block else paragraph
    yield "", {"text": block}


def _read_hub(spec: str) -> Iterator[tuple[str, Any]]:
    name, _, config = spec.partition(":")
    try:
        splits = datasets.load_dataset(name, config or None)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(" .:")
        raise CTError(
            f"{spec} is no file here and could not be had from the hub ({reason}): check the name and the network."
        ) from error
    if "train" not in splits and len(splits) > 1:
        raise CTError(f"{spec} has the splits {', '.join(splits)} and none called train: download the one you want.")
    rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    for number, row in enumerate(rows, 1):
        yield f"{spec} row {number}", row


# -------------------------------------------------------------------------------------------------------------- layouts


def _normalise(name: str, located: Iterable[tuple[str, Any]]) -> tuple[Kind, list[Row], tuple[str, ...]]:
    """Rows of any one layout to `prompt` and `completion`, or `text`; those with nothing to learn are only counted."""
    layout: tuple[str, ...] = ()
    shape: type | None = None
    rows: list[Row] = []
    empty: list[str] = []
    for where, raw in located:
        if not isinstance(raw, dict):
            raise CTError(f'{where} is no object with fields: write {{"prompt": ..., "completion": ...}}.')
        found = next((fields for fields in LAYOUTS if all(field in raw for field in fields)), None)
        if found is None:
            known = "; ".join(" and ".join(fields) for fields in LAYOUTS)
            raise CTError(f"{where} has the fields {', '.join(map(str, raw)) or '(none)'}: needed are {known}.")
        layout = layout or found
        if found != layout:
            raise CTError(f"{where} has the fields {' and '.join(found)}, rows before it {' and '.join(layout)}.")
        row = LAYOUTS[layout](where, raw)
        target = row["text"] if layout == ("text",) else row["completion"]
        sort = type(target)
        shape = shape or sort
        if sort is not shape:
            raise CTError(f"{where} mixes strings and messages: all rows must be of one sort.")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise CTError(f"{where} holds half of a Unicode character (a lone surrogate): remove it.") from error
        if (target if isinstance(target, str) else "".join(turn["content"] for turn in target)).strip():
            rows.append(row)
        else:
            empty.append(where)
    notes = (f"{len(empty)} rows with nothing to learn (empty) are left out, {empty[0]} first",) if empty else ()
    if not rows:
        raise CTError(f"{name} has only empty rows, {empty[0]} first." if empty else f"{name} has no rows.")
    return ("text" if layout == ("text",) else "prompt_completion"), rows, notes


def _string(where: str, raw: Row, field: str) -> str:
    if not isinstance(raw[field], str):
        raise CTError(f"{where}: {field} must be a string, and is {json.dumps(raw[field], default=str)[:60]}.")
    return raw[field]


def _messages(where: str, raw: Row, field: str) -> list[dict[str, str]]:
    turns = raw[field]
    if not isinstance(turns, list) or not all(
        isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns
    ):
        raise CTError(f'{where}: {field} must be a list of {{"role": "...", "content": "..."}}.')
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _from_prompt(where: str, raw: Row) -> Row:
    if isinstance(raw["prompt"], list) and isinstance(raw["completion"], list):
        row = {field: _messages(where, raw, field) for field in ("prompt", "completion")}
        if not row["prompt"] or not row["completion"]:
            raise CTError(f"{where}: prompt and completion must each have at least one message.")
        return row
    return {field: _string(where, raw, field) for field in ("prompt", "completion")}


def _from_messages(where: str, raw: Row) -> Row:
    """The completion is the last assistant turn, the prompt all before it; what follows is dropped."""
    turns = _messages(where, raw, "messages")
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if not last:
        raise CTError(f"{where}: messages need an assistant turn after another turn.")
    return {"prompt": turns[:last], "completion": [turns[last]]}


def _from_instruction(where: str, raw: Row) -> Row:
    parts = [_string(where, raw, "instruction"), _string(where, raw, "input") if raw.get("input") else ""]
    return {"prompt": "\n\n".join(filter(None, parts)) + "\n", "completion": _string(where, raw, "output")}


def _from_question(where: str, raw: Row) -> Row:
    return {"prompt": _string(where, raw, "question") + "\n", "completion": _string(where, raw, "answer")}


def _from_text(where: str, raw: Row) -> Row:
    return {"text": _string(where, raw, "text")}


LAYOUTS: dict[tuple[str, ...], Callable[[str, Row], Row]] = {  # the fields that tell each, in the order of the search
    ("prompt", "completion"): _from_prompt,
    ("messages",): _from_messages,
    ("instruction", "output"): _from_instruction,
    ("question", "answer"): _from_question,
    ("text",): _from_text,
}


# --------------------------------------------------------------------------------------------------------------- tokens


def format_rows(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, kind: Kind, max_length: int
) -> tuple[datasets.Dataset, Cut]:
    """Tokenise rows for training: lists of ints `input_ids`, `completion_mask` and `labels`, of equal length.

    The mask is 1 on tokens that count for the loss: the completion and the end of its turn, or all of a `text`.
    `labels` are the ids where the mask is 1 and -100 elsewhere; trl's SFTTrainer takes rows with `input_ids` and
    `labels` as they are. A chat template is applied where the tokenizer has one, strings becoming one user and one
    assistant turn, stripped of outer blanks; else prompt, completion and end-of-text token are joined as they are.

    A row longer than `max_length` tokens loses its end, and is dropped if nothing of the completion is left; a long
    `text` becomes several rows, and loses nothing but a last token that would stand alone. Raises CTError if no row is
    left, and for messages without a chat template.
    """
    if max_length < 2:
        raise CTError(f"max_length={max_length} leaves nothing to predict: give at least 2.")
    ids: list[list[int]] = []
    masks: list[list[int]] = []
    truncated = dropped = 0
    if kind == "text":
        for tokens in _tokenise(tokenizer, list(dataset["text"]), bos=True):
            chunks = [tokens[i : i + max_length] for i in range(0, len(tokens), max_length)]
            chunks = [chunk for chunk in chunks if len(chunk) > 1]
            dropped += not chunks
            ids += chunks
            masks += [[1] * len(chunk) for chunk in chunks]
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
            masks.append(([0] * len(prompt) + [1] * (len(whole) - len(prompt)))[:max_length])
    if not ids:
        raise CTError(f"No row has anything to learn within {max_length} tokens: give a larger max_length.")
    labels = [[i if m else -100 for i, m in zip(*pair, strict=True)] for pair in zip(ids, masks, strict=True)]
    columns = {"input_ids": ids, "completion_mask": masks, "labels": labels}
    return datasets.Dataset.from_dict(columns), Cut(truncated, dropped)


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase, kind: Kind) -> list[int]:
    """The token ids to generate from: the prompt up to the place of the completion, exactly as in `format_rows`.

    Of a `text` they are the first half, at most 32 tokens.
    """
    if kind == "text":
        tokens = _tokenise(tokenizer, [row["text"]], bos=True)[0]
        return tokens[: min(TEXT_PROMPT_TOKENS, math.ceil(len(tokens) / 2))]
    head, _ = _head_and_tail(row, tokenizer)
    return _tokenise(tokenizer, [head], bos=not tokenizer.chat_template)[0]


def _head_and_tail(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
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
