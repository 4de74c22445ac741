"""Damaged data files: the rows that a plain reader gets from the same bytes, or one sentence."""

import bz2
import csv
import gzip
import io
import json
import lzma

import datasets
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctsft.data.read import read_file
from ctsft.data.rows import load_corpus
from ctsft.data.tokens import format_rows
from ctsft.errors import CTError
from fuzz import TOKENS, budget, changed, outcome, seeds
from test_rows import ASSISTANT, PAIRS, SYSTEM, USER
from test_tokens import tokenizer_with

MORE = (*TOKENS, b'"prompt"', b'"completion"', b'"text":', b"\xef\xbb\xbf", b"\r\n\r\n", b"\xe2\x80\xa8", b"[/red]")
MORE += (b"7" * 5_000, b"[" * 2_000, b'{"a":' * 2_000, b"\xed\xa0\xbd", b" \n \n", b'""', b"\r")


def lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def as_csv(rows):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def as_parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


ODD = [{"prompt": f'{i} "a",\n', "completion": f"é\U0001f600 \u2028{i}"} for i in range(6)]
FILES = {
    "pairs.jsonl": lines(PAIRS[:6]),
    "turns.jsonl": lines([{"messages": [SYSTEM, USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}] * 3),
    "tasks.jsonl": lines([{"instruction": f"{i}", "input": "a", "output": "b"} for i in range(6)]),
    "list.json": json.dumps(ODD, indent=1).encode(),
    "rows.csv": as_csv(ODD),
    "book.txt": "\n\n".join(f"{i} " + "word " * 150 for i in range(6)).encode(),
    "pairs.jsonl.gz": gzip.compress(lines(ODD), mtime=0),
    "pairs.jsonl.bz2": bz2.compress(lines(ODD)),
    "pairs.json.xz": lzma.compress(lines(ODD)),
    "rows.parquet": as_parquet(ODD),
}


def reference(name, raw):
    """The rows of a file, read the plainest way; any exception says that there are none."""
    if name.endswith(".parquet"):
        return pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    for suffix, module in ((".gz", gzip), (".bz2", bz2), (".xz", lzma)):
        if name.endswith(suffix):
            return reference(name.removesuffix(suffix), module.open(io.BytesIO(raw)).read())
    text = raw.decode("utf-8-sig")
    if not text.strip():
        raise ValueError("empty")
    if name.endswith(".csv"):
        head, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows = [row for row in rows if row]
        if max(map(len, rows), default=0) > len(head):
            raise ValueError("too long")
        return [dict(zip(head, row + [None] * (len(head) - len(row)), strict=True)) for row in rows]
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    return [json.loads(line) for line in text.split("\n") if line.strip()]


@pytest.mark.parametrize("name", [name for name in FILES if name != "book.txt"])
@budget(150)
@given(seed=seeds())
def test_a_damaged_file_is_read_as_it_is_or_refused_in_one_sentence(tmp_path_factory, name, seed):
    raw = changed(FILES[name], seed, MORE)
    path = tmp_path_factory.getbasetemp() / f"fuzz-{name}"
    path.write_bytes(raw)
    found = outcome(lambda: list(read_file(path)))
    try:
        wanted = reference(name, raw)
    except Exception:
        assert isinstance(found, CTError)
    else:
        assert repr([row for _, row in found]) == repr(wanted)  # NaN is no NaN's equal


@pytest.mark.parametrize("name", FILES)
@budget(40)
@given(seed=seeds(), count=st.integers(1, 3))
def test_a_damaged_file_is_learnt_as_it_is_or_refused_in_one_sentence(tmp_path_factory, name, seed, count):
    raw = changed(FILES[name], seed, MORE)
    path = tmp_path_factory.getbasetemp() / f"fuzz-{name}"
    path.write_bytes(raw)
    corpus = outcome(lambda: load_corpus(str(path), heldout=count))
    if isinstance(corpus, CTError):
        return
    rows = [*corpus.train, *corpus.heldout]
    assert len(corpus.heldout) == count
    if name.startswith(("pairs", "list", "rows")):
        wanted = reference(name, raw)
        assert all(any(all(given.get(k) == row[k] for k in row) for given in wanted) for row in rows)
    if name == "book.txt":
        assert "".join("".join(row["text"] for row in rows).split()).strip() != ""
    outcome(lambda: format_rows(datasets.Dataset.from_list(rows), tokenizer_with(), corpus.kind, 64))


@budget(100)
@given(raw=st.binary(max_size=200), name=st.sampled_from(sorted(FILES)))
def test_any_bytes_are_rows_or_one_sentence(tmp_path_factory, raw, name):
    path = tmp_path_factory.getbasetemp() / f"fuzz-{name}"
    path.write_bytes(raw)
    found = outcome(lambda: list(read_file(path)))
    assert isinstance(found, CTError) or all(len(item) == 2 for item in found)
