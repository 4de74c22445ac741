import bz2
import gzip
import json
import lzma

import datasets
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ctsft.data import sql
from ctsft.data.rows import Cut, format_rows, load_corpus, prompt_ids
from ctsft.errors import CTError

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PAIRS = [{"prompt": f"question {i}?", "completion": f"answer {i}"} for i in range(20)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tokenizer_with(chat_template=None, merges=(), bos=False):
    """One token a byte, "<s>" = 0, "</s>" = 1, and the merged pairs after the bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(["<s>", "</s>", *letters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = chat_template
    return fast


def dataset(*rows):
    return datasets.Dataset.from_list(list(rows))


def spelled(tokenizer, ids):
    """The text of a row's ids; the byte-level spelling is plain ASCII but for blanks."""
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", " ").replace("Ċ", "\n")


def learnt(tokenizer, row):
    assert row["labels"] == [i if m else -100 for i, m in zip(row["input_ids"], row["completion_mask"], strict=True)]
    return spelled(tokenizer, [i for i in row["labels"] if i >= 0])


# ---- layouts ---------------------------------------------------------------------------------------------------------

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
SYSTEM, MORE = {"role": "system", "content": "be kind"}, {"role": "user", "content": "more"}


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


# ---- file types ------------------------------------------------------------------------------------------------------


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


def test_a_row_with_nothing_to_learn_is_left_out_and_counted(tmp_path):
    rows = [*PAIRS, {"prompt": "a", "completion": " \n"}, {"prompt": "b", "completion": ""}]
    corpus = load_corpus(write(tmp_path / "data.jsonl", rows))
    assert len(corpus.train) + len(corpus.heldout) == 20
    assert corpus.notes == ("2 rows with nothing to learn (empty) are left out, data.jsonl line 21 first",)


# ---- mistakes --------------------------------------------------------------------------------------------------------

GOOD = json.dumps(PAIRS[0])
MISTAKES = {
    "broken line": ("data.jsonl", f"{GOOD}\n\n{GOOD[:-3]}\n", "^data.jsonl line 3 is no JSON: Unterminated string"),
    "broken list": ("data.json", f"[{GOOD},\n{GOOD}\n", "^data.json line 3 is no JSON: Expecting ',' delimiter"),
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
    "empty": ("data.jsonl", " \n", "^data.jsonl is empty"),
    "empty text": ("data.txt", "\n\n", "^data.txt is empty"),
    "empty list": ("data.json", "[]", "^data.json has no rows"),
    "only a head": ("data.csv", "prompt,completion\n", "^data.csv has no rows"),
    "only empty rows": ("data.jsonl", '{"text": " "}', "^data.jsonl has only empty rows, data.jsonl line 1 first"),
    "not UTF-8": ("data.jsonl", f"{GOOD}\n".encode() + b'{"text": "\xff"}', "^data.jsonl line 2 is not UTF-8 text"),
    "csv too long": ("data.csv", "prompt,completion\na,b\na,b,c\n", "^data.csv line 3 has more values than the head"),
    "csv too short": (
        "data.csv",
        "prompt,completion\na\n",
        "^data.csv line 2: completion must be a string, and is null",
    ),
    "csv quote": ("data.csv", 'prompt,completion\na,"b\n', "^data.csv line 2 is no CSV"),
    "parquet": ("data.parquet", "hello", "^data.parquet is no readable Parquet file"),
    "bz2": ("data.jsonl.bz2", "hello", "^data.jsonl.bz2 cannot be read"),
    "gz": ("data.jsonl.gz", gzip.compress(b"hello" * 99)[:-9], "^data.jsonl.gz cannot be read"),
    "xz": ("data.jsonl.xz", "hello", "^data.jsonl.xz cannot be read"),
    "type of file": ("data.docx", "hello", "^data.docx is of no known type: give .jsonl"),
    "compressed parquet": ("data.parquet.gz", "hello", "^data.parquet.gz is of no known type"),
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


# ---- the hub ---------------------------------------------------------------------------------------------------------


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


# ---- the split -------------------------------------------------------------------------------------------------------


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
    assert list(corpus.examples) == sql.generate(7, 0, "heldout")
    assert [(e.prompt, e.completion) for e in corpus.examples] == [
        (row["prompt"], row["completion"]) for row in corpus.heldout
    ]
    assert corpus.train[0]["prompt"] == sql.generate(1, 0, "train")[0].prompt
    assert load_corpus("sql", limit=2, heldout=7, seed=1).heldout[:] != corpus.heldout[:]


def test_sql_by_default(monkeypatch):
    asked = {}
    generate = sql.generate
    monkeypatch.setattr(sql, "generate", lambda n, seed, split: asked.update({split: n}) or generate(2, seed, split))
    load_corpus("sql")
    assert asked == {"heldout": 200, "train": 4000}


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_chat_template_is_applied_to_strings():
    tokenizer = tokenizer_with(CHAT)
    rows, cut = format_rows(dataset({"prompt": "hi \n", "completion": " yo"}), tokenizer, "prompt_completion", 100)
    assert cut == Cut(0, 0)
    assert set(rows.column_names) == {"input_ids", "completion_mask", "labels"}
    assert spelled(tokenizer, rows[0]["input_ids"]) == "<user>hi</s><assistant>yo</s>"
    assert learnt(tokenizer, rows[0]) == "yo</s>"
    assert rows[0]["input_ids"][-1] == tokenizer.eos_token_id


def test_chat_template_is_applied_to_messages():
    tokenizer = tokenizer_with(CHAT)
    row = {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}
    rows, _ = format_rows(dataset(row), tokenizer, "prompt_completion", 100)
    assert spelled(tokenizer, rows[0]["input_ids"]) == "<system>be kind</s><user>hi</s><assistant>hello</s>"
    assert learnt(tokenizer, rows[0]) == "hello</s>"


def test_a_template_that_renders_the_prompt_alone_otherwise():
    tokenizer = tokenizer_with(CHAT.replace("<assistant>", "<assistant><think>"))
    row = {"prompt": "hi", "completion": "yo"}
    rows, _ = format_rows(dataset(row), tokenizer, "prompt_completion", 100)
    assert spelled(tokenizer, rows[0]["input_ids"]) == "<user>hi</s><assistant><think>yo</s>"
    assert learnt(tokenizer, rows[0]) == "yo</s>"


def test_a_template_that_refuses_a_role():
    tokenizer = tokenizer_with("{{ raise_exception('no system turn') }}")
    with pytest.raises(CTError, match=r"chat template refuses turns of system, user \(no system turn\)"):
        prompt_ids({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, tokenizer, "prompt_completion")


def test_without_chat_template_strings_are_joined():
    tokenizer = tokenizer_with()
    rows, _ = format_rows(dataset({"prompt": "1+1=", "completion": "2"}), tokenizer, "prompt_completion", 100)
    assert spelled(tokenizer, rows[0]["input_ids"]) == "1+1=2</s>"
    assert learnt(tokenizer, rows[0]) == "2</s>"


def test_without_chat_template_messages_are_refused():
    with pytest.raises(CTError, match="has no chat template, so it cannot take messages"):
        format_rows(dataset({"prompt": [USER], "completion": [ASSISTANT]}), tokenizer_with(), "prompt_completion", 100)


def test_a_token_across_the_border_is_taken_apart():
    tokenizer = tokenizer_with(merges=[("a", "b")])
    row = {"prompt": "xa", "completion": "by"}
    assert len(tokenizer("xaby")["input_ids"]) == 3
    rows, _ = format_rows(dataset(row), tokenizer, "prompt_completion", 100)
    assert tokenizer.convert_ids_to_tokens(rows[0]["input_ids"]) == ["x", "a", "b", "y", "</s>"]
    assert learnt(tokenizer, rows[0]) == "by</s>"


@pytest.mark.parametrize("chat_template", [None, CHAT])
def test_begin_token_where_the_tokenizer_puts_one(chat_template):
    tokenizer = tokenizer_with(chat_template, bos=True)
    rows, _ = format_rows(dataset({"prompt": "a", "completion": "b"}), tokenizer, "prompt_completion", 100)
    assert (rows[0]["input_ids"][0] == 0) == (chat_template is None)
    assert rows[0]["input_ids"].count(0) == (chat_template is None)
    texts, _ = format_rows(dataset({"text": "abc"}), tokenizer, "text", 100)
    assert texts[0]["input_ids"] == tokenizer("abc")["input_ids"]


def test_long_rows_lose_their_end_or_are_dropped():
    tokenizer = tokenizer_with()
    rows = [{"prompt": "p" * n, "completion": "c" * 4} for n in (3, 5, 6, 9, 10, 11)]
    formatted, cut = format_rows(dataset(*rows), tokenizer, "prompt_completion", 10)
    assert cut == Cut(truncated=2, dropped=2)
    assert [learnt(tokenizer, row) for row in formatted] == ["cccc</s>", "cccc</s>", "cccc", "c"]
    assert max(map(len, formatted["input_ids"])) == 10


def test_nothing_left_is_an_error():
    row = {"prompt": "p" * 10, "completion": "c"}
    with pytest.raises(CTError, match="No row has anything to learn within 10 tokens: give a larger max_length"):
        format_rows(dataset(row), tokenizer_with(), "prompt_completion", 10)
    with pytest.raises(CTError, match="max_length=1 leaves nothing to predict"):
        format_rows(dataset(row), tokenizer_with(), "prompt_completion", 1)


def test_long_text_becomes_several_rows():
    tokenizer = tokenizer_with()
    rows, cut = format_rows(dataset({"text": "abcdefghi"}, {"text": "k"}, {"text": "lm"}), tokenizer, "text", 4)
    assert [spelled(tokenizer, ids) for ids in rows["input_ids"]] == ["abcd", "efgh", "lm"]
    assert [learnt(tokenizer, row) for row in rows] == ["abcd", "efgh", "lm"]
    assert cut == Cut(truncated=0, dropped=1)


@pytest.mark.parametrize("chat_template", [None, CHAT])
@pytest.mark.parametrize("bos", [False, True])
def test_prompt_ids_are_what_the_loss_leaves_out(chat_template, bos):
    tokenizer = tokenizer_with(chat_template, merges=[("?", "a"), ("n", "Ġ")], bos=bos)
    rows, _ = format_rows(dataset(*PAIRS), tokenizer, "prompt_completion", 100)
    for row, formatted in zip(PAIRS, rows, strict=True):
        prompt = prompt_ids(row, tokenizer, "prompt_completion")
        assert formatted["input_ids"][: len(prompt)] == prompt
        assert formatted["completion_mask"] == [0] * len(prompt) + [1] * (len(formatted["input_ids"]) - len(prompt))


@pytest.mark.parametrize(("text", "prompt"), [("abcde", "abc"), ("a", "a"), ("x" * 100, "x" * 32)])
def test_prompt_ids_of_a_text_are_its_beginning(text, prompt):
    tokenizer = tokenizer_with()
    assert spelled(tokenizer, prompt_ids({"text": text}, tokenizer, "text")) == prompt


def test_the_trainer_takes_the_rows_as_they_are(tmp_path):
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokenizer_with(CHAT)
    rows, _ = format_rows(dataset(*PAIRS[:4]), tokenizer, "prompt_completion", 100)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    options = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, bf16=False, gradient_checkpointing=False
    )
    trainer = SFTTrainer(LlamaForCausalLM(config), options, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    found = {tuple(i for i in labels if i >= 0) for labels in batch["labels"].tolist()}
    assert found == {tuple(i for i in row["labels"] if i >= 0) for row in rows}
    assert {spelled(tokenizer, ids) for ids in found} == {f"{row['completion']}</s>" for row in PAIRS[:4]}
    assert torch.equal(batch["attention_mask"].sum(1).sort().values, torch.tensor(sorted(map(len, rows["input_ids"]))))
