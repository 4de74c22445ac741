"""How long an adapter takes to start (limits for 154 matrices of 1.1B numbers at K=64 on 2 cores: 60 s, and 3 s from
the cache), beside peft's full decompositions; how good the bases are (limit: energy within 0.1% of the exact top K).

    python benchmarks/startup.py --shape tinyllama-1.1b --threads 2
    python benchmarks/startup.py --model path/to/a/folder --k 64 --peft-layers 1

Prints Markdown. Seconds are given twice: on the clock, and of processor time of all threads, which other work on the
machine hardly moves; divided by the threads it is what a free machine takes. `main` returns the same text.
"""

import argparse
import copy
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import common as c
import torch
from peft import LoraConfig, PsoftConfig, TinyLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import ctsft
from ctsft.adapter import bases
from ctsft.adapter.store import adapted
from ctsft.spectral import kinds
from ctsft.spectral.basis import weight_basis
from ctsft.spectral.decompose import one_thread

CLOSE = 1e-3  # singular values nearer than this share of the largest are one cluster


def random_model(shape: str, k: int = 256) -> nn.Module:
    """A Llama of `shape` in bfloat16; every matrix is noise with `k` directions of decaying strength above it."""
    with torch.device("meta"):
        model = LlamaForCausalLM(c.shaped(argparse.Namespace(model=shape, width=None, layers=None, vocab=None)))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.requires_grad_(False)
        if weight.ndim == 1:
            weight.fill_(1.0)
            continue
        d_out, d_in = weight.shape
        left, right = torch.randn(d_out, k, generator=generator), torch.randn(k, d_in, generator=generator)
        strengths = torch.arange(1, k + 1) ** -0.7
        weight.copy_(0.02 * (torch.randn(d_out, d_in, generator=generator) + 0.7 * (left * strengths) @ right))
    return model


def first_layers(model: Any, count: int) -> nn.Module:
    """A copy of `model` with its first `count` blocks alone and a small vocabulary."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.vocab_size = count, 64
    small = LlamaForCausalLM(config).to(next(model.parameters()).dtype)
    small.model.layers.load_state_dict(model.model.layers[:count].state_dict())
    return small


@contextmanager
def watched(module: Any, name: str, watch: Callable[..., Any]) -> Iterator[None]:
    """`module.<name>` goes through `watch(original, *args)` meanwhile."""
    original = getattr(module, name)
    setattr(module, name, lambda *args, **more: watch(original, *args, **more))
    try:
        yield
    finally:
        setattr(module, name, original)


def refuse(*_: object) -> None:
    raise AssertionError("a second start made a basis")


def seconds(pair: list[float]) -> tuple[str, str]:
    return f"{pair[0]:.2f}", f"{pair[1]:.2f}"


def starts(model: Any, k: int) -> list[str]:
    """Tables of a first and a second start of `model`, and of what two adapters share."""
    spent: dict[str, list[float]] = {}
    by_shape: dict[tuple[int, ...], list[float]] = defaultdict(list)

    def timed_basis(make: Callable[..., Any], w: Tensor, *rest: Any) -> Any:
        began = time.thread_time()  # one matrix, one thread
        made = make(w, *rest)
        by_shape[tuple(w.shape)].append(time.thread_time() - began)
        return made

    config = ctsft.CTConfig(k=k, task_type="CAUSAL_LM")
    with watched(kinds, "weight_basis", timed_basis), c.clocks(spent, "first start"):
        wrapped = get_peft_model(model, copy.deepcopy(config))
    model = wrapped.unload()

    def timed(name: str) -> Callable[..., Any]:
        def call(original: Callable[..., Any], *args: Any, **more: Any) -> Any:
            with c.clocks(spent, name):
                return original(*args, **more)

        return call

    with (
        watched(kinds, "weight_basis", refuse),
        watched(bases, "find_targets", timed("finding and checking the weights")),
        watched(bases, "base_fingerprint", timed("fingerprint of the weights")),
        watched(bases, "make_bases", timed("reading the bases")),
        c.clocks(spent, "second start"),
    ):
        wrapped = get_peft_model(model, copy.deepcopy(config))
    matrices = sum(map(len, by_shape.values()))
    note = f"{matrices} matrices, K = {k}, {torch.get_num_threads()} threads."
    rows = [[name, *seconds(spent[name])] for name in ("first start", "second start")]
    parts = ("finding and checking the weights", "fingerprint of the weights", "reading the bases")
    rows += [[f"of the second: {name}", *seconds(spent[name])] for name in parts]
    tables = [note, c.table(("", "seconds", "processor seconds"), rows)]
    rows = [
        [" x ".join(map(str, shape)), len(times), f"{sum(times) / len(times):.3f}", f"{max(times):.3f}"]
        for shape, times in by_shape.items()
    ]
    tables.append(c.table(("matrix", "how many", "processor seconds each", "slowest"), rows))

    wrapped.add_adapter("same", copy.deepcopy(config))
    half = max(1, k // 2)
    wrapped.add_adapter("fewer", ctsft.CTConfig(k=half, task_type="CAUSAL_LM"))
    rows = []
    for names in (["default"], ["default", "same"], ["default", "same", "fewer"]):
        tensors = [[t for _, m in adapted(wrapped, n) for t in m.ready(n).tensors().values()] for n in names]
        alone = sum(t.numel() * t.element_size() for own in tensors for t in own)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for own in tensors for t in own}
        label = " and ".join(f"K = {half if n == 'fewer' else k}" for n in names)
        rows.append([label, f"{alone:,}", f"{sum(storages.values()):,}"])
    wrapped.unload()
    return [*tables, c.table(("adapters of one model", "bytes of bases, each alone", "together"), rows)]


def quality(model: nn.Module, k: int) -> str:
    """One matrix of each shape against torch.linalg.svd in float64."""
    rows: list[list[object]] = []
    head = (
        "matrix", "energy short of the exact top K, %", "largest sine of an angle to the exact span of a cluster",
        "largest cluster", "smallest gap, share of s_1", "svd in float64, processor seconds", "ours",
    )  # fmt: skip
    seen = set()
    for name, w in ((n, m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n):
        if w.shape in seen:
            continue
        seen.add(w.shape)
        spent: dict[str, list[float]] = {}
        a = w.detach().double()
        with one_thread(), c.clocks(spent, "exact"):
            u, s, vh = torch.linalg.svd(a, full_matrices=False)
        with c.clocks(spent, "ours"):
            basis = weight_basis(w, k)
        mine_u, mine_vh = basis.u.double(), basis.vh.double()  # type: ignore[union-attr]
        short = 1 - float((mine_u.T @ a @ mine_vh.T).square().sum() / s[:k].square().sum())
        gaps = -(s / s[0]).diff()
        edges = [0, *(i + 1 for i in range(len(gaps)) if gaps[i] > CLOSE), len(s)]
        runs = [slice(i, j) for i, j in pairwise(edges) if j <= k]
        sines = [
            float(torch.linalg.matrix_norm(m - e @ (e.T @ m), 2))
            for r in runs
            for m, e in ((mine_u[:, r], u[:, r]), (mine_vh[r].T, vh[r].T))
        ]
        largest = max((r.stop - r.start for r in runs), default=0)
        shape = " x ".join(map(str, w.shape))
        accuracy = f"{100 * max(0.0, short):.1e}", f"{max(sines, default=0):.1e}", largest
        times = f"{spent['exact'][1]:.1f}", f"{spent['ours'][1]:.2f}"
        rows.append([f"{shape} ({name})", *accuracy, f"{float(gaps[:k].min()):.1e}", *times])
    return c.table(head, rows)


def against_peft(model: Any, k: int, layers: int) -> str:
    """Starts of peft's methods that decompose W in full, on the first `layers` blocks, beside ours with no cache.

    All on one thread: on a busy machine threads that wait for each other would count as work.
    """
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    common: dict[str, Any] = {"target_modules": names, "task_type": "CAUSAL_LM"}
    methods: dict[str, Callable[[], Any]] = {
        "ctsft, nothing kept": lambda: ctsft.CTConfig(k=k, **common),
        "LoRA, init_lora_weights='pissa'": lambda: LoraConfig(r=k, init_lora_weights="pissa", **common),
        "PSOFT": lambda: PsoftConfig(r=k, **common),
        "TinyLoRA": lambda: TinyLoraConfig(r=k, **common),
    }
    total = model.config.num_hidden_layers
    rows = []
    head = (
        f"{layers} of {total} blocks, float32, one thread", "seconds", "processor seconds", "ratio of the latter",
        f"times {total / layers:.0f}: all blocks, estimated",
    )  # fmt: skip
    ours = None
    for name, make in methods.items():
        small = first_layers(model, layers).float()
        spent: dict[str, list[float]] = {}
        with one_thread(), c.clocks(spent, "start"):
            get_peft_model(small, make())
        ours = ours or spent["start"][1]
        estimate = f"{spent['start'][1] * total / layers:.0f}"
        rows.append([name, *seconds(spent["start"]), f"{spent['start'][1] / ours:.1f}", estimate])
    return c.table(head, rows)


def main(argv: list[str] | None = None) -> str:
    """Run what `argv` asks for; prints and returns Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="a Hugging Face folder of the Llama kind")
    which.add_argument("--shape", choices=c.SHAPES, default="tinyllama-1.1b", help="random weights of this shape")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--peft-layers", type=int, default=2, help="blocks that peft's methods start on; 0: leave out")
    parser.add_argument("--no-exact", action="store_true", help="leave out the comparison with exact decompositions")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    bases.WORTH_KEEPING = 0.0  # keep bases that a small model makes at once, too
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
        what = os.path.basename(os.path.normpath(options.model))
    else:
        model, what = random_model(options.shape), f"random weights of {options.shape}'s shape"
    for weight in model.parameters():
        weight.data = weight.data.clone()  # read from the disk now, not in the first start
    before = os.environ.get("CTSFT_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CTSFT_CACHE"] = folder
        try:
            parts = [f"### Start-up: {what}", c.machine(options), *starts(model, options.k)]
            os.environ["CTSFT_CACHE"] = os.path.join(folder, "empty")
            if not options.no_exact:
                parts.append(quality(model, options.k))
            if options.peft_layers:
                parts.append(against_peft(model, options.k, options.peft_layers))
        finally:
            os.environ.pop("CTSFT_CACHE")
            if before is not None:
                os.environ["CTSFT_CACHE"] = before
    return c.show(*parts)


if __name__ == "__main__":
    main()
