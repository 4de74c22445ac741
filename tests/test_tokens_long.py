"""Long rows: what is cut off before it is tokenised leaves the tokens as they were."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ctsft.data import tokens
from ctsft.data.tokens import Cut, format_rows, prompt_ids
from test_tokens import dataset, tokenizer_with

WORDS = ["the", "a", "of", "to", "model", "tables", "12", "3456", "7", "don't", "naïve", "Straße", "数据", "库"]
WORDS += ["e\u0301", "\U0001f600", "x_y", "(a+b)*c,", "end.", "<s>", "</s>"]
BLANKS = (" ", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "")
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
LLAMA_3 += r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def drawn(seed, words):
    """A text of so many random words and blanks."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(BLANKS) for _ in range(words))


def trained(model, trainer, pre_tokenizer=None, normalizer=None):
    """A tokenizer of some hundred tokens, learnt from random texts."""
    tokenizer = Tokenizer(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([drawn(i, 60) for i in range(40)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def byte_pairs(pre_tokenizer, normalizer=None, **options):
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    return trained(models.BPE(unk_token="<unk>", **options), trainer, pre_tokenizer, normalizer)


def every_tokenizer():
    special = ["<s>", "</s>", "<unk>"]
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    llama2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    unigram = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    word_piece = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    yield "bytes", tokenizer_with()
    yield "bytes after a begin token", tokenizer_with(merges=[("a", "b"), ("Ġ", "t")], bos=True)
    yield "GPT-2", byte_pairs(gpt2)
    yield "GPT-2, a blank put before", byte_pairs(pre_tokenizers.ByteLevel(add_prefix_space=True))
    yield "Llama 3", byte_pairs(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), bare]))
    yield "Llama 2", byte_pairs(None, llama2, fuse_unk=True)
    yield "no words", byte_pairs(bare, normalizers.NFC())
    yield "T5", trained(models.Unigram(), unigram, pre_tokenizers.Metaspace(), normalizers.NFKC())
    yield "BERT", trained(models.WordPiece(unk_token="<unk>"), word_piece, pre_tokenizers.BertPreTokenizer())


TOKENIZERS = dict(every_tokenizer())


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces so small that short texts are long."""
    monkeypatch.setattr(tokens, "PIECE", 150)
    monkeypatch.setattr(tokens, "SEAM", 40)
    monkeypatch.setattr(tokens, "BATCH", 400)


def whole(tokenizer, texts, bos, most=None):
    """What `_tokenise` gives where nothing is cut."""
    start = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id][:1] if bos else []
    return [start + ids for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def both_ways(make):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_tokenise", whole)
        wanted = make()
    return make(), wanted


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), sizes=st.lists(st.integers(0, 400), min_size=2, max_size=6), most=st.integers(2, 9))
def test_rows_are_those_of_the_whole_texts(name, seed, sizes, most):
    tokenizer = TOKENIZERS[name]
    texts = [drawn(seed + i, size) for i, size in enumerate([*sizes, 3])]
    pairs = dataset(*({"prompt": a, "completion": f"{b}x"} for a, b in zip(texts, texts[::-1], strict=True)))
    short = dataset(*({"prompt": a[: most // 2], "completion": f"{a}x"} for a in texts))
    for rows, kind in ((pairs, "prompt_completion"), (short, "prompt_completion"), (dataset({"text": "a b"}), "text")):
        try:
            (found, cut), (wanted, expected) = both_ways(lambda r=rows, k=kind: format_rows(r, tokenizer, k, most))
        except tokens.CTError:
            continue
        assert cut == expected
        assert found.to_list() == wanted.to_list()
    long = dataset(*({"text": f"{text} a b"} for text in texts))
    (found, cut), (wanted, expected) = both_ways(lambda: format_rows(long, tokenizer, "text", most))
    assert cut == expected and found.to_list() == wanted.to_list()
    got, wanted = both_ways(lambda: [prompt_ids({"text": text}, tokenizer, "text") for text in texts])
    assert got == wanted


def test_a_token_may_be_as_long_as_it_likes():
    tokenizer = TOKENIZERS["Llama 2"]  # all unknown characters in a row are one token
    row = dataset({"prompt": "\u0416" * 5_000, "completion": "ab" * 500})
    (found, cut), (wanted, expected) = both_ways(lambda: format_rows(row, tokenizer, "prompt_completion", 8))
    assert cut == expected == Cut(truncated=1, dropped=0) and found.to_list() == wanted.to_list()


def test_a_token_that_the_cut_goes_through_is_not_kept():
    tokenizer = tokenizer_with(merges=[("a" * 2**i, "a" * 2**i) for i in range(6)])
    row = dataset({"prompt": "b", "completion": "a" * 6_400})
    for most in range(2, 30):
        (found, _), (wanted, _) = both_ways(lambda n=most: format_rows(row, tokenizer, "prompt_completion", n))
        assert found.to_list() == wanted.to_list()


@pytest.mark.parametrize("row", [{"prompt": "a", "completion": "b c " * 5_000_000}, {"prompt": "bc" * 10_000_000}])
def test_of_twenty_megabytes_only_the_beginning_is_tokenised(row, monkeypatch):
    tokenizer, read = tokenizer_with(), []
    encode = tokens._ids
    monkeypatch.setattr(tokens, "_ids", lambda t, texts: read.append(sum(map(len, texts))) or encode(t, texts))
    started = time.process_time()
    rows, cut = format_rows(
        dataset({"completion": "d"} | row, {"prompt": "a", "completion": "b"}), tokenizer, "prompt_completion", 100
    )
    assert sorted(cut) == [0, 1]
    assert max(map(len, rows["input_ids"])) <= 100
    assert sum(read) < 20_000
    assert time.process_time() - started < 5


def test_a_long_text_is_tokenised_in_pieces(monkeypatch):
    read = []
    encode = tokens._ids
    monkeypatch.setattr(tokens, "_ids", lambda t, texts: read.append(sum(map(len, texts))) or encode(t, texts))
    format_rows(dataset({"text": "word " * 2_000}), TOKENIZERS["GPT-2"], "text", 100)
    assert max(read) < 1_000


def text_of(words, seed, size=3_000):
    draw, text = random.Random(seed), ""
    while len(text) < size:
        text += draw.choice(words)
    return text


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "words",
    [WORDS, "abcdefghij数据库é", ["the", "a", ",", "model", ";", "数据", "。"], ["Ж"], ["a b c d", "e" * 1_000]],
    ids=("words", "letters", "signs", "unknown", "long words"),
)
def test_a_text_without_blanks_is_tokenised_in_pieces_to_the_same_tokens(name, words, monkeypatch):
    tokenizer, texts, read = TOKENIZERS[name], [text_of(words, seed) for seed in range(2)], []
    encode = tokens._ids
    monkeypatch.setattr(tokens, "_ids", lambda t, texts: read.extend(map(len, texts)) or encode(t, texts))
    found = tokens._tokenise(tokenizer, texts, True)
    assert max(read) <= 2 * tokens.PIECE + tokens.SEAM
    assert found == whole(tokenizer, texts, True)
