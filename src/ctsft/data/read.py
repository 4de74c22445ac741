"""Files and hub data sets to raw rows, each with the place that an error would name: `a.jsonl line 3`."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from ctsft.errors import CTError, shown

READABLE = (".jsonl", ".json", ".csv", ".parquet", ".txt")
OPENERS: dict[str, Callable[..., Any]] = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open}
BLOCK_CHARACTERS = 1500
UNPACKED = 2**30  # bytes that are read of a compressed file

Located = tuple[str, Any]  # a place, and what stands there


def read_file(path: Path) -> Iterator[Located]:
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
            raw: bytes = file.read(UNPACKED + 1 if path.suffix in OPENERS else -1)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise CTError(f"{path.name} cannot be read ({error}).") from error
    if path.suffix in OPENERS and len(raw) > UNPACKED:
        raise CTError(
            f"{path.name} holds more than {UNPACKED / 2**30:g} GiB once it is unpacked; if that is meant, unpack it "
            "first and give the file that comes out."
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CTError(f"{path.name} line {line} is not UTF-8 text: save the file as UTF-8.") from error


def _json(name: str, text: str, line: int | None = None) -> Any:
    """The value of a JSON text, the whole of a file or its one `line`."""
    where = name if line is None else f"{name} line {line}"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = line or error.lineno
        raise CTError(f"{name} line {line} is no JSON: {error.msg} at column {error.colno}.") from error
    except RecursionError:
        raise CTError(
            f"{where} is nested too deep: lists and objects inside each other are needed few times."
        ) from None
    except ValueError as error:  # a limit of Python, on what takes the square of the time
        raise CTError(f"{where} has a number of thousands of digits: write it as a string.") from error


def _read_json_lines(name: str, text: str) -> Iterator[Located]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if line.strip():
            yield f"{name} line {number}", _json(name, line, number)


def _read_json_list(name: str, text: str) -> Iterator[Located]:
    for number, row in enumerate(_json(name, text), 1):
        yield f"{name} item {number}", row


def _read_csv(name: str, text: str) -> Iterator[Located]:
    """All values stay strings: no guess turns the completion "42" into a number."""
    csv.field_size_limit(2**31 - 1)  # of all that reads CSV here; 131,072 characters otherwise
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise CTError(f"{name} line {reader.line_num} has more values than the head has fields.")
            yield f"{name} line {reader.line_num}", row
    except csv.Error as error:
        raise CTError(f"{name} line {reader.line_num + 1} is no CSV: {error}.") from error


def _read_parquet(path: Path) -> Iterator[Located]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError, MemoryError, OverflowError, pyarrow.ArrowException) as error:  # text no UTF-8, too
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CTError(f"{path.name} is no readable Parquet file ({shown(reason)}).") from error
    for number, row in enumerate(rows, 1):
        yield f"{path.name} row {number}", row


def _read_blocks(text: str) -> Iterator[Located]:
    """Paragraphs, joined while they fit into a block."""
    block = ""
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n").strip()):
        if block and len(block) + 2 + len(paragraph) > BLOCK_CHARACTERS:
            yield "", {"text": block}
            block = ""
        block = f"{block}\n\n{paragraph}" if block else paragraph
    yield "", {"text": block}


def read_hub(spec: str) -> Iterator[Located]:
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
