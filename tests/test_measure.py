"""The loss against one token at a time, generations against greedy decoding of one prompt alone."""

import io
import math

import pytest
import torch

import tiny
from ctsft.data.rows import load_corpus
from ctsft.errors import CTError
from ctsft.progress import watched
from ctsft.tune import measure as measuring
from ctsft.tune.measure import collate, generate, heldout_loss, measure
from ctsft.tune.recipe import make_recipe
from helpers import SHAPES, adapt, ids, randomise, slow_loss
from helpers import tiny as tiny_model


def test_collate_pads_on_the_left():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = collate([*rows, {"input_ids": [1, 2], "labels": [1, 2]}], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8], [9, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 1]]
    # nothing predicts the first token of a row, least of all the padding before it
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100], [-100, -100, 2]]


def rows_of(lengths, completion=None):
    """Random rows; labels on the last `completion` tokens, or on all."""
    made = []
    for i, n in enumerate(lengths):
        tokens = ids(1, n, seed=i)[0].tolist()
        skip = 0 if completion is None else n - completion
        made.append({"input_ids": tokens, "labels": [-100] * skip + tokens[skip:]})
    return made


@pytest.mark.parametrize("completion", [None, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_that_of_every_token_alone(shape, completion):
    rows = rows_of([9, 4, 12, 5, 7], completion)
    for model in (tiny_model(shape), randomise(adapt(tiny_model(shape)))):
        total, count = slow_loss(model, rows)
        assert count == (32 if completion is None else 15)
        assert heldout_loss(model, rows, 0, batch_size=2) == (pytest.approx(total / count, rel=1e-5), count)


def test_right_padding_and_all_logits_give_the_same_loss():
    model, rows = tiny_model("llama"), rows_of([9, 4, 12], completion=2)
    ids_, labels = torch.zeros(3, 12, dtype=torch.long), torch.full((3, 12), -100)
    mask = torch.zeros(3, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids_[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), 1
    with torch.no_grad():
        mean = model(input_ids=ids_, attention_mask=mask, labels=labels).loss
    assert heldout_loss(model, rows, 0)[0] == pytest.approx(float(mean), rel=1e-5)


def test_loss_that_is_not_finite_is_an_error():
    model = tiny_model("llama")
    model.model.norm.weight.data[:] = math.nan
    with pytest.raises(CTError, match="held-out loss is nan"):
        heldout_loss(model, rows_of([5]), 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_generate_equals_one_prompt_alone_token_by_token(shape):
    model, tokenizer = tiny_model(shape, vocab_size=258, eos_token_id=1), tiny.byte_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("abc", "a", "hello you")]
    wanted = []
    for prompt in prompts:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 6 and (len(tokens) == len(prompt) or tokens[-1] != 1):
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        wanted.append(tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True).strip())
    assert generate(model, tokenizer, prompts, 6, batch_size=2) == wanted
    assert len(set(wanted)) > 1


def test_generate_where_the_context_has_no_room():
    model, tokenizer = tiny_model("gpt2", vocab_size=258), tiny.byte_tokenizer()  # 20 positions
    prompts = [tokenizer(letters)["input_ids"] for letters in ("a" * 18, "a" * 30, "a", "a" * 20)]
    texts = generate(model, tokenizer, prompts, 5, batch_size=1)
    assert texts[1] == texts[3] == ""
    assert texts[0] == generate(model, tokenizer, prompts[:1], 2)[0]
    assert texts[2] == generate(model, tokenizer, prompts[2:3], 5)[0]


def test_a_long_prompt_costs_its_batch_nothing():
    model, tokenizer = tiny_model("gpt2", vocab_size=258), tiny.byte_tokenizer()  # 20 positions
    prompts = [tokenizer(text)["input_ids"] for text in ("a", "b" * 17, "cc", "d" * 30, "e" * 15)]
    told = []
    texts = generate(model, tokenizer, prompts, 5, progress=told.append)
    assert texts == [generate(model, tokenizer, [prompt], 5)[0] for prompt in prompts]
    assert texts[3] == "" and all(texts[:3]) and sum(told) == 5


def test_progress_counts_every_row():
    model, tokenizer, seen = tiny_model("llama", vocab_size=258), tiny.byte_tokenizer(), []
    heldout_loss(model, rows_of([5, 4, 6, 7, 5]), 0, batch_size=2, progress=seen.append)
    generate(model, tokenizer, [[5], [6], [7]], 2, batch_size=2, progress=seen.append)
    assert seen == [2, 2, 1, 2, 1]


def test_right_sql_counts(monkeypatch):
    corpus = load_corpus("sql", seed=0, heldout=6, limit=2)
    answers = [e.completion for e in corpus.examples]
    monkeypatch.setattr(
        measuring, "generate", lambda *_, **__: [answers[0], f"```sql\n{answers[1]}\n```", "SELECT 1, 2, 3, 4", ""]
    )
    monkeypatch.setattr(measuring, "heldout_loss", lambda *_, **__: (1.0, 2))
    found = measure(
        tiny_model(),
        tiny.byte_tokenizer(),
        corpus,
        [],
        make_recipe({"eval_rows": 4}),
        lambda total: watched(total=total, file=io.StringIO()),
    )
    assert found.ok == [True, True, False, False]
    assert (found.accuracy.correct, found.accuracy.total) == (2, 4)
    assert found.texts[1] == answers[1]
