import datasets
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ctsft.data.tokens import Cut, fits, format_rows, prompt_ids
from ctsft.errors import CTError
from test_rows import ASSISTANT, PAIRS, SYSTEM, USER

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


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
    start = row["labels"].count(-100)
    assert row["labels"] == [-100] * start + row["input_ids"][start:]
    return spelled(tokenizer, row["labels"][start:])


def test_chat_template_is_applied_to_strings():
    tokenizer = tokenizer_with(CHAT)
    rows, cut = format_rows(dataset({"prompt": "hi \n", "completion": " yo"}), tokenizer, "prompt_completion", 100)
    assert cut == Cut(0, 0)
    assert set(rows.column_names) == {"input_ids", "labels"}
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


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 1 / 0 }}", r"fails for turns of user \(ZeroDivisionError: division by zero\)"),
        ("{% for i in range(10**10) %}x{% endfor %}", r"fails for turns of user \(OverflowError: Range too big"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", r"fails for turns of user \(RecursionError: maximum"),
        ("{{ messages[0].content + 1 }}", r"fails for turns of user \(TypeError: can only concatenate"),
        ("{% for", r"refuses turns of user \(unexpected"),
        ("{{ 'x' * 10**10 }}", "takes too much time or memory: use another"),
    ],
)
def test_a_template_that_fails_is_one_sentence(template, why):
    with pytest.raises(CTError, match=f"^The model's chat template {why}") as error:
        prompt_ids({"prompt": "hi", "completion": "yo"}, tokenizer_with(template), "prompt_completion")
    assert "\n" not in str(error.value)


def test_an_empty_prompt_needs_a_begin_token():
    row = {"prompt": "", "completion": "yo"}
    assert prompt_ids(row, tokenizer_with(bos=True), "prompt_completion") == [0]
    with pytest.raises(CTError, match="an empty prompt leaves nothing to start from"):
        prompt_ids(row, tokenizer_with(), "prompt_completion")


def test_a_tokenizer_with_more_tokens_than_the_model():
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    fits(tokenizer_with(), LlamaForCausalLM(LlamaConfig(vocab_size=258, **size)))
    with pytest.raises(
        CTError, match=r"^The tokenizer has 258 tokens and the model embeddings for 257: take the model's own"
    ):
        fits(tokenizer_with(), LlamaForCausalLM(LlamaConfig(vocab_size=257, **size)))


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
    for context, told in ((10, ", the model's context: give shorter ones"), (11, ": give a larger max_length")):
        with pytest.raises(CTError, match=rf"^No held-out row has anything to learn within 10 tokens{told}\.$"):
            named = {"context": context, "which": "held-out row"}
            format_rows(dataset(row), tokenizer_with(), "prompt_completion", 10, **named)
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
        assert formatted["labels"] == [-100] * len(prompt) + formatted["input_ids"][len(prompt) :]


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
