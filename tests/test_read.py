"""Rows come out of every type of file alike; what cannot be read is told with its place."""

import bz2
import gzip
import io
import json
import lzma
import tracemalloc

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from ctsft.data import read
from ctsft.data.read import read_file
from ctsft.data.rows import load_corpus
from ctsft.errors import CTError
from test_rows import PAIRS, write


def compressed(module):
    return lambda path: path.write_bytes(module.compress("".join(json.dumps(r) + "\n" for r in PAIRS).encode()))


def parquet(path):
    datasets.Dataset.from_list(PAIRS).to_parquet(path)


FILES = {
    "data.jsonl": lambda path: write(path, PAIRS),
    "lines.json": lambda path: write(path, PAIRS),
    "list.json": lambda path: path.write_text(json.dumps(PAIRS, indent=1)),
    "bom.json": lambda path: path.write_text(json.dumps(PAIRS), encoding="utf-8-sig"),
    "blank.jsonl": lambda path: path.write_text("\n\n".join(json.dumps(r) for r in PAIRS) + "\n\n"),
    "windows.jsonl": lambda path: path.write_bytes(b"\r\n".join(json.dumps(r).encode() for r in PAIRS)),
    "data.jsonl.bz2": compressed(bz2),
    "data.jsonl.gz": compressed(gzip),
    "data.json.xz": compressed(lzma),
    "data.csv": lambda path: datasets.Dataset.from_list(PAIRS).to_pandas().to_csv(path, index=False),
    "data.parquet": parquet,
}


@pytest.mark.parametrize("name", FILES)
def test_file_types(tmp_path, name):
    FILES[name](tmp_path / name)
    corpus = load_corpus(str(tmp_path / name))
    assert sorted([*corpus.train, *corpus.heldout], key=str) == sorted(PAIRS, key=str)
    assert len(corpus.heldout) == 2


def test_csv_values_stay_strings(tmp_path):
    (tmp_path / "data.csv").write_text('prompt,completion\n6*7,042\n"a ""b"",\nc",1e3\n')
    corpus = load_corpus(str(tmp_path / "data.csv"), heldout=1)
    assert {"prompt": "6*7", "completion": "042"} in [*corpus.train, *corpus.heldout]
    assert {"prompt": 'a "b",\nc', "completion": "1e3"} in [*corpus.train, *corpus.heldout]


def test_a_csv_field_may_be_long(tmp_path):
    rows = [{"prompt": f"{i}" + "p" * 200_000, "completion": "c"} for i in range(3)]
    datasets.Dataset.from_list(rows).to_pandas().to_csv(tmp_path / "data.csv", index=False)
    corpus = load_corpus(str(tmp_path / "data.csv"), heldout=1)
    assert sorted([*corpus.train, *corpus.heldout], key=str) == rows


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path):
    rows = [{"text": "one\u2028two"}, {"text": "three"}]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    assert len(load_corpus(str(tmp_path / "data.jsonl"), heldout=1).train) == 1


def test_plain_text_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"{i} " + "word " * 99 + "end" for i in range(12)] + ["long " * 400]
    (tmp_path / "book.txt").write_bytes("\r\n \r\n".join(paragraphs).encode())
    corpus = load_corpus(str(tmp_path / "book.txt"), heldout=1)
    blocks = [*corpus.train["text"], *corpus.heldout["text"]]
    assert corpus.kind == "text"
    assert sorted(p for b in blocks for p in b.split("\n\n")) == sorted(p.strip() for p in paragraphs)
    sizes = sorted(map(len, blocks))
    assert sizes[-1] == 1999 and sizes[-2] <= 1500  # a paragraph is never torn
    assert len(blocks) == 7  # two of 502 characters fit into 1,500 with their blank line, three do not


# ---- mistakes


def in_parquet(text):
    """A Parquet file with bytes where it promises text."""
    array = pyarrow.array([text]).cast(pyarrow.large_binary()).view(pyarrow.large_string())
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), sink)
    return sink.getvalue()


GOOD = json.dumps(PAIRS[0])
MISTAKES = {
    "broken line": ("data.jsonl", f"{GOOD}\n\n{GOOD[:-3]}\n", "^data.jsonl line 3 is no JSON: Unterminated string"),
    "broken list": ("data.json", f"[{GOOD},\n{GOOD}\n", "^data.json line 3 is no JSON: Expecting ',' delimiter"),
    "digits": (
        "data.jsonl",
        f'{GOOD}\n{{"text": {"7" * 10_000}}}',
        "^data.jsonl line 2 has a number of thousands of dig",
    ),
    "digits in a list": (
        "data.json",
        f'[{{"text": {"7" * 10_000}}}]',
        "^data.json has a number of thousands of digits",
    ),
    "nested": ("data.jsonl", f"{GOOD}\n{'[' * 100_000}{']' * 100_000}", "^data.jsonl line 2 is nested too deep"),
    "nested objects": ("data.json", "[" + '{"a":' * 100_000, "^data.json is nested too deep"),
    "empty": ("data.jsonl", " \n", "^data.jsonl is empty"),
    "empty text": ("data.txt", "\n\n", "^data.txt is empty"),
    "not UTF-8": ("data.jsonl", f"{GOOD}\n".encode() + b'{"text": "\xff"}', "^data.jsonl line 2 is not UTF-8 text"),
    "csv too long": ("data.csv", "prompt,completion\na,b\na,b,c\n", "^data.csv line 3 has more values than the head"),
    "csv quote": ("data.csv", 'prompt,completion\na,"b\n', "^data.csv line 2 is no CSV"),
    "parquet": ("data.parquet", "hello", "^data.parquet is no readable Parquet file"),
    "parquet no UTF-8": ("data.parquet", in_parquet(b"\xff"), "^data.parquet is no readable Parquet file .*utf-8"),
    "bz2": ("data.jsonl.bz2", "hello", "^data.jsonl.bz2 cannot be read"),
    "gz": ("data.jsonl.gz", gzip.compress(b"hello" * 99)[:-9], "^data.jsonl.gz cannot be read"),
    "xz": ("data.jsonl.xz", "hello", "^data.jsonl.xz cannot be read"),
    "type of file": ("data.docx", "hello", "^data.docx is of no known type: give .jsonl"),
    "compressed parquet": ("data.parquet.gz", "hello", "^data.parquet.gz is of no known type"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence(tmp_path, case):
    name, content, sentence = MISTAKES[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CTError, match=sentence) as error:
        list(read_file(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("suffix", "module"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_a_small_file_that_unpacks_to_gigabytes_is_not_unpacked(suffix, module, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "UNPACKED", 2**25)
    path = tmp_path / f"rows.jsonl.{suffix}"
    path.write_bytes(module.compress(b" " * 2**24) * 512)  # one after the other is one file of 8 GiB
    assert path.stat().st_size < 10_000_000
    tracemalloc.start()
    with pytest.raises(
        CTError, match=rf"^rows\.jsonl\.{suffix} holds more than 0\.03125 GiB once it is unpacked; .*\.$"
    ):
        read_file(path)
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()


def test_what_unpacks_to_just_the_limit_is_read(tmp_path, monkeypatch):
    row = json.dumps(PAIRS[0]).encode()
    monkeypatch.setattr(read, "UNPACKED", len(row))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(row))
    assert [r for _, r in read_file(tmp_path / "rows.jsonl.gz")] == [PAIRS[0]]
    (tmp_path / "rows.jsonl").write_bytes(row + b"\n" + row)  # what is not compressed is as large as it looks
    assert len(list(read_file(tmp_path / "rows.jsonl"))) == 2


# ---- the hub


def test_a_hub_dataset_is_its_train_split(monkeypatch):
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        return {"test": datasets.Dataset.from_list(PAIRS[:1]), "train": datasets.Dataset.from_list(PAIRS)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load_corpus("some-org/some-data:main")
    assert asked == [("some-org/some-data", "main")]
    assert (corpus.name, len(corpus.train), len(corpus.heldout)) == ("some-org/some-data:main", 18, 2)
    load_corpus("some-org/some-data")
    assert asked[1] == ("some-org/some-data", None)


def test_a_hub_dataset_without_train_split(monkeypatch):
    rows = datasets.Dataset.from_list(PAIRS)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: {"all": rows})
    assert len(load_corpus("some-org/some-data").train) == 18
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: {"a": rows, "b": rows})
    with pytest.raises(CTError, match="has the splits a, b and none called train"):
        load_corpus("some-org/some-data")
