import json

import pytest

from ctsft.data import rows as rows_module
from ctsft.data.rows import load_corpus
from ctsft.data.sql.examples import generate, generate_one
from ctsft.errors import CTError

PAIRS = [{"prompt": f"question {i}?", "completion": f"answer {i}"} for i in range(20)]
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
SYSTEM, MORE = {"role": "system", "content": "be kind"}, {"role": "user", "content": "more"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- layouts


@pytest.mark.parametrize(
    ("raw", "row"),
    [
        ({"prompt": "a", "completion": "b", "id": 3}, {"prompt": "a", "completion": "b"}),
        ({"prompt": [USER], "completion": [ASSISTANT]}, {"prompt": [USER], "completion": [ASSISTANT]}),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}),
        (
            {"messages": [USER, ASSISTANT, MORE, ASSISTANT | {"x": 1}, MORE]},
            {"prompt": [USER, ASSISTANT, MORE], "completion": [ASSISTANT]},
        ),
        ({"instruction": "do", "input": "this", "output": "done"}, {"prompt": "do\n\nthis\n", "completion": "done"}),
        ({"instruction": "do", "input": "", "output": "done"}, {"prompt": "do\n", "completion": "done"}),
        ({"instruction": "do", "output": "done"}, {"prompt": "do\n", "completion": "done"}),
        ({"question": "why?", "answer": "so"}, {"prompt": "why?\n", "completion": "so"}),
        ({"text": "once"}, {"text": "once"}),
    ],
)
def test_layouts(tmp_path, raw, row):
    other = json.loads(json.dumps(raw).replace("hello", "bye").replace('"b"', '"c"').replace("so", "or"))
    other = json.loads(json.dumps(other).replace("done", "not").replace("once", "twice"))
    corpus = load_corpus(write(tmp_path / "data.jsonl", [raw, other]), heldout=1)
    assert row in [corpus.train[0], corpus.heldout[0]]
    assert corpus.kind == ("text" if "text" in raw else "prompt_completion")
    assert (corpus.name, corpus.examples, corpus.notes) == ("data.jsonl", (), ())


def test_a_row_with_nothing_to_learn_is_left_out_and_counted(tmp_path):
    rows = [*PAIRS, {"prompt": "a", "completion": " \n"}, {"prompt": "b", "completion": ""}]
    corpus = load_corpus(write(tmp_path / "data.jsonl", rows))
    assert len(corpus.train) + len(corpus.heldout) == 20
    assert corpus.notes == ("2 rows with nothing to learn (empty) are left out, data.jsonl line 21 first",)


# ---- named columns


def test_columns_can_be_named(tmp_path):
    rows = [{"input": f"{i}", "target": f"is {i}", "question": "q", "answer": "a", "id": i} for i in range(5)]
    (tmp_path / "data.csv").write_text("input,target\n" + "".join(f"{r['input']},{r['target']}\n" for r in rows))
    wanted = [{"prompt": f"{i}\n", "completion": f"is {i}"} for i in range(5)]
    for spec in (write(tmp_path / "data.jsonl", rows), str(tmp_path / "data.csv")):
        corpus = load_corpus(spec, prompt_column="input", completion_column="target", heldout=1)
        assert sorted([*corpus.train, *corpus.heldout], key=str) == wanted


@pytest.mark.parametrize("known", [("question", "answer"), ("prompt", "completion")])
def test_naming_the_columns_of_a_layout_changes_nothing(tmp_path, known):
    spec = write(tmp_path / "data.jsonl", [dict(zip(known, row.values(), strict=True)) for row in PAIRS])
    plain, named = load_corpus(spec), load_corpus(spec, prompt_column=known[0], completion_column=known[1])
    assert plain.train[:] == named.train[:] and plain.heldout[:] == named.heldout[:]


def test_one_column_named_alone_leaves_the_other_as_it_is_called(tmp_path):
    spec = write(tmp_path / "data.jsonl", [{"input": str(i), "completion": "b"} for i in range(3)])
    assert load_corpus(spec, prompt_column="input", heldout=1).heldout[0]["completion"] == "b"


def test_named_columns_may_hold_messages(tmp_path):
    spec = write(tmp_path / "data.jsonl", [{"a": [SYSTEM, USER], "b": [ASSISTANT]}, {"a": [USER], "b": [ASSISTANT]}])
    corpus = load_corpus(spec, prompt_column="a", completion_column="b", heldout=1)
    assert sorted(len(row["prompt"]) for row in [*corpus.train, *corpus.heldout]) == [1, 2]


@pytest.mark.parametrize(
    ("row", "named", "sentence"),
    [
        (
            {"input": "a", "target": "b"},
            (None, None),
            r"the fields input, target: needed are .*--prompt-column and",
        ),
        ({"input": "a", "target": "b"}, ("input", "label"), r"the fields input, target: needed are input and label\.$"),
        ({"input": "a", "target": 7}, ("input", "target"), 'target must be a string, and is 7 .*write "7" for 7'),
        (
            {"input": "a", "target": "b"},
            ("input", None),
            r"the fields input, target: needed are input and completion\.$",
        ),
        ({"input": "a", "target": "b"}, ("input", "input"), "input cannot be both the prompt column and"),
    ],
)
def test_a_wrong_column_is_one_sentence(tmp_path, row, named, sentence):
    spec = write(tmp_path / "data.jsonl", [row] * 3)
    with pytest.raises(CTError, match=sentence):
        load_corpus(spec, prompt_column=named[0], completion_column=named[1])


def test_sql_has_columns_of_its_own():
    with pytest.raises(CTError, match="sql has columns of its own"):
        load_corpus("sql", prompt_column="a", completion_column="b")


# ---- mistakes

GOOD = json.dumps(PAIRS[0])
MISTAKES = {
    "no object": ("data.jsonl", f"{GOOD}\n[1]\n", "^data.jsonl line 2 is no object with fields"),
    "no object in a list": ("data.json", f'[{GOOD}, "a"]', "^data.json item 2 is no object with fields"),
    "fields": ("data.jsonl", '{"a": 1, "b": 2}', "^data.jsonl line 1 has the fields a, b: needed are prompt and compl"),
    "no fields": (
        "data.jsonl",
        f"{GOOD}\n{{}}",
        r"^data.jsonl line 2 has the fields \(none\): needed are prompt and c",
    ),
    "half the fields": ("data.jsonl", '{"prompt": "a"}', "^data.jsonl line 1 has the fields prompt: needed are"),
    "type": (
        "data.jsonl",
        '{"prompt": "a", "completion": 7}',
        "^data.jsonl line 1: completion must be a string, and is 7",
    ),
    "null": (
        "data.jsonl",
        f'{GOOD}\n{{"text": null}}',
        "^data.jsonl line 2 has the fields text, rows before it prompt",
    ),
    "null text": ("data.jsonl", '{"text": null}', "^data.jsonl line 1: text must be a string, and is null"),
    "turns": ("data.jsonl", '{"messages": [{"role": "user"}]}', "line 1: messages must be a list of"),
    "no assistant": ("data.jsonl", json.dumps({"messages": [USER]}), "line 1: messages need an assistant turn after"),
    "only assistant": ("data.jsonl", json.dumps({"messages": [ASSISTANT]}), "messages need an assistant turn after"),
    "no turns": ("data.jsonl", '{"prompt": [], "completion": []}', "must each have at least one message"),
    "sorts": (
        "data.jsonl",
        f"{GOOD}\n" + json.dumps({"prompt": [USER], "completion": [ASSISTANT]}),
        "^data.jsonl line 2 mixes strings and messages",
    ),
    "surrogate": ("data.jsonl", '{"text": "\\ud83d"}', "^data.jsonl line 1 holds half of a Unicode character"),
    "surrogate role": (
        "data.jsonl",
        json.dumps({"prompt": [{"role": "\ud83d", "content": "a"}], "completion": [ASSISTANT]}),
        "^data.jsonl line 1 holds half of a Unicode character",
    ),
    "odd fields": (
        "data.jsonl",
        '{"\\ud83d\\n\\u001b[1m": 1}',
        "^data.jsonl line 1 has the fields \N{REPLACEMENT CHARACTER}{3}\\[1m: needed are",
    ),
    "long field": ("data.jsonl", json.dumps({"a" * 999: 1}), "^data.jsonl line 1 has the fields a{200}: needed are"),
    "long value": ("data.jsonl", json.dumps({"text": [7] * 999}), r"text must be a string, and is \[[7, ]{59}\.$"),
    "deep value": ("data.jsonl", f'{{"text": {"[" * 985}{"]" * 985}}}', "^data.jsonl line 1"),
    "empty list": ("data.json", "[]", "^data.json has no rows"),
    "only a head": ("data.csv", "prompt,completion\n", "^data.csv has no rows"),
    "only empty rows": ("data.jsonl", '{"text": " "}', "^data.jsonl has only empty rows, data.jsonl line 1 first"),
    "csv too short": (
        "data.csv",
        "prompt,completion\na\n",
        "^data.csv line 2: completion must be a string, and is null",
    ),
    "one row": ("data.jsonl", GOOD, "^data.jsonl has 1 rows, of which 1 are to be held out: none is left to train on"),
    "one block": ("data.txt", "only one", "^data.txt has 1 rows"),
    "all equal": ("data.jsonl", f"{GOOD}\n" * 5, "^data.jsonl has no row to train on that is not also held out"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence(tmp_path, case):
    name, content, sentence = MISTAKES[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CTError, match=sentence) as error:
        load_corpus(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("sqll", r"There is no data 'sqll' \(built in: sql\): did you mean 'sql'"),
        ("missing.jsonl", "There is no data 'missing.jsonl' .*give sql, a file .* or org/name"),
        ("folder/missing.jsonl.gz", "There is no data"),
        ("a" * 5_000, "There is no data 'a{200}': File name too long"),
        ("~no-such-user/rows.jsonl", r"There is no data '~no-such-user/rows.jsonl': Could not determine home"),
        ("rows\udcff.jsonl", r"^the data's name 'rows\\udcff.jsonl' is not UTF-8: rename the file"),
        ("some-org/some-data", "some-org/some-data is no file here and could not be had from the hub .*the network"),
    ],
)
def test_a_wrong_name(spec, sentence):
    with pytest.raises(CTError, match=sentence):
        load_corpus(spec)


@pytest.mark.parametrize("heldout", [0, -1, 0.0, 1.0, 2.5, float("nan")])
def test_a_wrong_heldout(tmp_path, heldout):
    with pytest.raises(CTError, match="is neither a fraction between 0 and 1 nor a number of rows"):
        load_corpus(write(tmp_path / "data.jsonl", PAIRS), heldout=heldout)


def test_a_wrong_limit():
    with pytest.raises(CTError, match="limit=0 leaves nothing"):
        load_corpus("sql", limit=0)


# ---- the split


def test_the_split_is_made_by_seed(tmp_path):
    spec = write(tmp_path / "data.jsonl", PAIRS)
    one, same, other = load_corpus(spec), load_corpus(spec), load_corpus(spec, seed=1)
    assert one.heldout[:] == same.heldout[:] and one.train[:] == same.train[:]
    assert one.heldout[:] != other.heldout[:]


@pytest.mark.parametrize(("heldout", "count"), [(0.1, 2), (0.001, 1), (0.5, 10), (1, 1), (19, 19)])
def test_heldout_is_a_fraction_or_a_number(tmp_path, heldout, count):
    corpus = load_corpus(write(tmp_path / "data.jsonl", PAIRS), heldout=heldout)
    assert (len(corpus.heldout), len(corpus.train)) == (count, 20 - count)


def test_limit_cuts_only_what_is_trained_on(tmp_path):
    spec = write(tmp_path / "data.jsonl", PAIRS)
    corpus = load_corpus(spec, limit=3)
    assert (len(corpus.train), len(corpus.heldout)) == (3, 2)
    assert corpus.heldout[:] == load_corpus(spec).heldout[:]


def test_a_heldout_row_is_never_trained_on(tmp_path):
    rows = PAIRS * 3 + [{"prompt": row["prompt"], "completion": "another"} for row in PAIRS]
    corpus = load_corpus(write(tmp_path / "data.jsonl", rows), heldout=8)
    held = {str(row) for row in corpus.heldout}
    kept = [row for row in corpus.train if str(row) not in held]
    assert len(kept) == len(corpus.train) == sum(str(row) not in held for row in rows)
    assert corpus.notes == (f"{80 - 8 - len(kept)} rows equal to a held-out row are not trained on",)


def test_sql():
    corpus = load_corpus("sql", limit=30, heldout=7)
    assert (corpus.name, corpus.kind, len(corpus.train), len(corpus.heldout)) == ("sql", "prompt_completion", 30, 7)
    assert list(corpus.examples) == generate(7, 0, "heldout")
    assert [(e.prompt, e.completion) for e in corpus.examples] == [
        (row["prompt"], row["completion"]) for row in corpus.heldout
    ]
    assert corpus.train[0]["prompt"] == generate(1, 0, "train")[0].prompt
    assert load_corpus("sql", limit=2, heldout=7, seed=1).heldout[:] != corpus.heldout[:]


def test_one_database_of_sql():
    corpus = load_corpus("sql:zoo", limit=30, heldout=7)
    assert (corpus.name, corpus.kind, len(corpus.train), len(corpus.heldout)) == (
        "sql:zoo",
        "prompt_completion",
        30,
        7,
    )
    assert {e.schema for e in corpus.examples} == {"zoo"}
    assert len({p.split("Question")[0] for part in (corpus.train, corpus.heldout) for p in part["prompt"]}) == 1
    assert not set(corpus.train["completion"]) & set(corpus.heldout["completion"])
    other = load_corpus("sql:zoo", limit=30, heldout=7, seed=1)
    assert other.examples[0].ddl == corpus.examples[0].ddl and other.heldout[:] != corpus.heldout[:]
    assert len(load_corpus("sql:zoo").heldout) == 100
    with pytest.raises(CTError, match="sql has no database 'zo': did you mean 'zoo'"):
        load_corpus("sql:zo")
    with pytest.raises(CTError, match="sql has no database '': there are airline, bakery"):
        load_corpus("sql:")
    with pytest.raises(CTError, match="1 to 2000 examples of one database"):
        generate_one(2001, 0, "zoo")


def test_sql_by_default(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        rows_module, "generate", lambda n, seed, split: asked.update({split: n}) or generate(2, seed, split)
    )
    load_corpus("sql")
    assert asked == {"heldout": 200, "train": 4000}
