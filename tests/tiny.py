"""A tiny Llama on disk, with a tokenizer of one token a byte, and texts that it learns at once."""

import json
import random

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("red", "green", "blue", "black", "white", "brown", "pink", "grey")


def byte_tokenizer():
    """ "<s>" = 0, "</s>" = 1, then one token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(["<s>", "</s>", *letters])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def save_model(folder, context=128, **changes):
    """A Llama of width 32 in the Hugging Face `folder`; returns it as a string, the way a user writes it."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2} | changes
    config = LlamaConfig(
        max_position_embeddings=context,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        **{"vocab_size": 258} | size,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def save_rows(path, count=40):
    """JSONL with prompts of random words and always the same completion; returns the path as a string."""
    draw = random.Random(0)
    rows = [{"prompt": " ".join(draw.choices(WORDS, k=3)) + "?", "completion": " aaaa"} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
