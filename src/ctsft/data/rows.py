"""Files and names to rows: what is trained on, and what is held out and never trained on."""

import difflib
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets

from ctsft.data.read import OPENERS, READABLE, Located, read_file, read_hub
from ctsft.data.sql.examples import MAX_ONE, generate, generate_one
from ctsft.data.sql.execution import Example
from ctsft.errors import CTError, shown
from ctsft.files import HUB_ID

Kind = Literal["prompt_completion", "text"]
Fields = dict[str, Any]  # a row: its columns, or those of the file, and what stands in them
Layout = Callable[[str, Fields], Fields]  # from the place and fields of a raw row

BUILTIN = ("sql",)
HUB_DATA = re.compile(HUB_ID.pattern + r"(:[\w.-]+)?")

SQL_TRAIN, SQL_HELDOUT = 4000, 2000


@dataclass(frozen=True)
class Corpus:
    """Rows to train on and rows held out.

    Columns are `prompt` and `completion` (both strings, or both lists of {"role", "content"}), or `text`.
    `examples` are, for the built-in `sql`, the held-out `Example`s in the order of the held-out rows.
    `notes` are sentences that a user should see: what was left out, and why.
    """

    train: datasets.Dataset
    heldout: datasets.Dataset
    kind: Kind
    name: str
    examples: tuple[Example, ...] = ()
    notes: tuple[str, ...] = ()


def load_corpus(
    spec: str,
    *,
    seed: int = 0,
    heldout: float | int = 0.1,
    limit: int | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
) -> Corpus:
    """Load the rows that `spec` names and split them by `seed`.

    `spec` is the built-in `sql`, or one database of it, `sql:NAME`; a file in JSON (a list of objects, or one object a
    line), CSV, Parquet or plain text (split at blank lines into blocks of about 1,500 characters), the first two and
    text also as .gz, .bz2 or .xz; or a hub dataset `org/name` or `org/name:config` (its `train` split, or the one).
    `heldout` is a fraction of the rows or their number; `sql` has as many as one likes, there it is a fraction of
    2,000 (of one database 1,000). `limit` is the largest number of rows to train on (`sql`: the number, 4,000 if None).
    The databases held out from `sql` are never trained on; of one database, no SQL of a held-out row is.
    `prompt_column` and `completion_column` name the two fields to take where none of `LAYOUTS` fits (one alone: the
    other is as it is called): both texts, of which the prompt gets a line break at its end, or both lists of messages.

    A row equal to a held-out one is never trained on. Raises CTError, with the line of the file, for anything that
    cannot be read, has other fields than the layouts know, or mixes them; also if a side of the split would be empty.
    """
    if limit is not None and limit < 1:
        raise CTError(f"limit={limit} leaves nothing to train on: give at least 1.")
    if spec.partition(":")[0] == "sql":
        if prompt_column or completion_column:
            raise CTError("sql has columns of its own: leave the prompt column and the completion column out.")
        train, examples = _questions(spec, seed, heldout, limit)
        return _corpus(spec, "prompt_completion", _pairs(train), _pairs(examples), limit, examples=tuple(examples))

    name, located = located_rows(spec)
    layouts = layouts_for(prompt_column, completion_column)
    return split_rows(name, located, layouts, seed=seed, heldout=heldout, limit=limit)


def located_rows(spec: str) -> tuple[str, Iterable[Located]]:
    """The name and the raw rows of a file or hub dataset; CTError where there is none."""
    path = _path(spec)
    if path.is_file():
        return path.name, read_file(path)
    if HUB_DATA.fullmatch(spec) and not path.exists() and not path.name.endswith((*READABLE, *OPENERS)):
        return spec, read_hub(spec)
    close = difflib.get_close_matches(spec, BUILTIN, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"give sql, a file ({', '.join(READABLE)}) or org/name."
    raise CTError(f"There is no data {spec!r} (built in: {', '.join(BUILTIN)}): {hint}")


def split_rows(
    name: str,
    located: Iterable[Located],
    layouts: Mapping[tuple[str, ...], Layout],
    *,
    seed: int,
    heldout: float | int,
    limit: int | None,
) -> Corpus:
    """Raw rows as `load_corpus` gives those of a file called `name`."""
    kind, rows, notes = _normalise(name, located, layouts)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    count = _heldout_count(heldout, len(rows))
    if count >= len(rows):
        raise CTError(f"{name} has {len(rows)} rows, of which {count} are to be held out: none is left to train on.")
    held = [rows[i] for i in order[:count]]
    return _corpus(name, kind, [rows[i] for i in order[count:]], held, limit, notes)


def _questions(spec: str, seed: int, heldout: float | int, limit: int | None) -> tuple[list[Example], list[Example]]:
    """What to train on and what is held out, of all databases (`sql`) or of one (`sql:NAME`)."""
    _, colon, name = spec.partition(":")
    if not colon:
        held = generate(_heldout_count(heldout, SQL_HELDOUT), seed, "heldout")
        return generate(limit or SQL_TRAIN, seed, "train"), held
    examples = generate_one(MAX_ONE, seed, name)
    held = examples[: _heldout_count(heldout, MAX_ONE // 2)]
    answers = {e.completion for e in held}  # another question with the same answer would be half of it
    return [e for e in examples[len(held) :] if e.completion not in answers], held


def _path(spec: str) -> Path:
    """The file that `spec` may name; CTError for what no record could name after it."""
    try:
        spec.encode()
        path = Path(spec).expanduser()
        path.is_file()
    except UnicodeEncodeError:
        raise CTError(f"the data's name {spec!r} is not UTF-8: rename the file.") from None
    except (OSError, RuntimeError) as error:  # too long a name; no such user's home
        raise CTError(f"There is no data {shown(spec)!r}: {getattr(error, 'strerror', None) or error}.") from None
    return path


def _pairs(examples: Iterable[Example]) -> list[Fields]:
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
    train: list[Fields],
    held: list[Fields],
    limit: int | None,
    notes: tuple[str, ...] = (),
    examples: tuple[Example, ...] = (),
) -> Corpus:
    seen = {json.dumps(row, sort_keys=True) for row in held}
    fresh = [row for row in train if json.dumps(row, sort_keys=True) not in seen]
    if not fresh:
        raise CTError(f"{name} has no row to train on that is not also held out: it needs more different rows.")
    if twins := len(train) - len(fresh):
        notes += (f"{twins} rows equal to a held-out row are not trained on",)
    make = datasets.Dataset.from_list
    return Corpus(make(fresh[:limit]), make(held), kind, name, examples, notes)


# ---- layouts


def _normalise(
    name: str, located: Iterable[Located], layouts: Mapping[tuple[str, ...], Layout]
) -> tuple[Kind, list[Fields], tuple[str, ...]]:
    """Rows of any one layout to `prompt` and `completion`, or `text`; those with nothing to learn are only counted."""
    layout: tuple[str, ...] = ()
    shape: type | None = None
    rows: list[Fields] = []
    empty: list[str] = []
    for where, raw in located:
        if not isinstance(raw, dict):
            raise CTError(f'{where} is no object with fields: write {{"prompt": ..., "completion": ...}}.')
        found = next((fields for fields in layouts if all(field in raw for field in fields)), None)
        if found is None:
            known = "; ".join(" and ".join(fields) for fields in layouts)
            hint = "; or name two with --prompt-column and --completion-column" if layouts is LAYOUTS else ""
            raise CTError(
                f"{where} has the fields {shown(', '.join(map(str, raw))) or '(none)'}: needed are {known}{hint}."
            )
        layout = layout or found
        if found != layout:
            raise CTError(f"{where} has the fields {' and '.join(found)}, rows before it {' and '.join(layout)}.")
        row = layouts[layout](where, raw)
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


def _string(where: str, raw: Fields, field: str) -> str:
    found = raw[field]
    if isinstance(found, str):
        return found
    hint = ' (numbers are not turned into text: write "7" for 7)' if isinstance(found, int | float) else ""
    try:
        value = json.dumps(found, default=str)
    except RecursionError:
        value = "nested too deep to be shown"
    raise CTError(f"{where}: {shown(field)} must be a string, and is {shown(value, 60)}{hint}.")


def _messages(where: str, raw: Fields, field: str) -> list[dict[str, str]]:
    turns = raw[field]
    if not isinstance(turns, list) or not all(
        isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns
    ):
        raise CTError(f'{where}: {field} must be a list of {{"role": "...", "content": "..."}}.')
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _pair(prompt: str, completion: str, end: str = "\n") -> Layout:
    """Two fields, both lists of messages, or both texts, of which the first gets `end` at its end."""

    def make(where: str, raw: Fields) -> Fields:
        if isinstance(raw[prompt], list) and isinstance(raw[completion], list):
            row = {"prompt": _messages(where, raw, prompt), "completion": _messages(where, raw, completion)}
            if not row["prompt"] or not row["completion"]:
                raise CTError(f"{where}: {prompt} and {completion} must each have at least one message.")
            return row
        return {"prompt": _string(where, raw, prompt) + end, "completion": _string(where, raw, completion)}

    return make


def _from_messages(where: str, raw: Fields) -> Fields:
    """The completion is the last assistant turn, the prompt all before it; what follows is dropped."""
    turns = _messages(where, raw, "messages")
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if not last:
        raise CTError(f"{where}: messages need an assistant turn after another turn.")
    return {"prompt": turns[:last], "completion": [turns[last]]}


def _from_instruction(where: str, raw: Fields) -> Fields:
    parts = [_string(where, raw, "instruction"), _string(where, raw, "input") if raw.get("input") else ""]
    return {"prompt": "\n\n".join(filter(None, parts)) + "\n", "completion": _string(where, raw, "output")}


def _from_text(where: str, raw: Fields) -> Fields:
    return {"text": _string(where, raw, "text")}


LAYOUTS: dict[tuple[str, ...], Layout] = {  # the fields that tell each, in the order of the search
    ("prompt", "completion"): _pair("prompt", "completion", end=""),
    ("messages",): _from_messages,
    ("instruction", "output"): _from_instruction,
    ("question", "answer"): _pair("question", "answer"),
    ("text",): _from_text,
}


def layouts_for(prompt: str | None, completion: str | None) -> Mapping[tuple[str, ...], Layout]:
    """All layouts, or the one of two fields that a user names."""
    if prompt is None and completion is None:
        return LAYOUTS
    named = (prompt or "prompt", completion or "completion")
    if named[0] == named[1]:
        raise CTError(f"{named[0]} cannot be both the prompt column and the completion column: name two.")
    return {named: LAYOUTS.get(named) or _pair(*named)}
