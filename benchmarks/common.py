"""What the benchmarks share: the model, arms that share its weights, timing in interleaved rounds, and tables.

An arm is one way to train a model. All arms of a table live in one process on the very same base weights, and every
round runs each of them once, in an order that moves on by one from round to round. Ratios are taken inside a round, so
that what slows the machine for a while slows both sides; quoted are their median and quartiles.
"""

import argparse
import copy
import gc
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import ctsft
from ctsft.files import cpu_name

# width, layers, vocabulary, inner width of the MLP, heads, heads of keys and values, tied head
SHAPES = {
    "tiny": (64, 2, 64, 96, 4, 2, False),
    "smollm2-135m": (576, 30, 49152, 1536, 9, 3, True),
    "slice": (2048, 2, 2000, 5632, 32, 4, False),  # two blocks of TinyLlama, and a head too small to dominate
    "tinyllama-1.1b": (2048, 22, 32000, 5632, 32, 4, False),
    "llama-7b": (4096, 32, 32000, 11008, 32, 32, False),
}
ROW = 256  # tokens of a batch row at most, so that attention does not grow with the batch
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Step = Callable[[], object]


# ------------------------------------------------------------------------------------------------------------ options


def parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options that all benchmarks have, with `defaults` in the place of the general ones."""
    p = argparse.ArgumentParser(
        description=(doc or "").partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--model", default="slice", help=f"a Hugging Face folder, or a shape: {', '.join(SHAPES)}")
    p.add_argument("--width", type=int, help="another width of a shape, in TinyLlama's proportions")
    p.add_argument("--layers", type=int, help="another number of blocks")
    p.add_argument("--vocab", type=int, help="another vocabulary")
    p.add_argument("--tokens", type=int, default=256, help=f"tokens a step, in rows of at most {ROW}")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the base model")
    p.add_argument("--k", type=int, default=64, help="directions a matrix")
    p.add_argument("--repeats", type=int, default=15, help="rounds that are timed")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the process's own time, for a busy machine")
    p.set_defaults(**defaults)
    return p


def parse(p: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options of one run; torch is set to its threads and a fixed seed."""
    warnings.filterwarnings("ignore", message="Specified to not save")  # VeRA's and TinyLoRA's random factors
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft reads it
    warnings.filterwarnings("ignore", message="There is a performance drop")  # vmap over attention
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def say(line: str) -> None:
    """Progress, on stderr: stdout holds the tables alone."""
    print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------- the model, its arms


def load(args: argparse.Namespace, inputs: bool = True) -> nn.Module:
    """The frozen base model that `args` names, in training mode; with `inputs` its embedding's output requires grad.

    That lets backward run through all of every block in every arm alike. A shape gets random weights of a trained
    model's size, entries of 1 / sqrt(width), and uneven norm gains, so that no two activations are equal by chance.
    """
    folder = Path(args.model).expanduser()
    dtype = getattr(torch, args.dtype)
    if folder.is_dir():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(args.device)
    elif args.model in SHAPES:
        config = shaped(args)
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            for name, p in model.named_parameters():
                if p.ndim == 1 and "norm" in name:
                    p.data.uniform_(0.5, 1.5)
    else:
        raise SystemExit(f"--model {args.model} is neither a folder nor one of {', '.join(SHAPES)}.")
    model.config.use_cache = False
    model.requires_grad_(False).train()
    if inputs:
        model.get_input_embeddings().register_forward_hook(lambda module, ids, out: out.requires_grad_(True))
    return model


def shaped(args: argparse.Namespace) -> LlamaConfig:
    width, layers, vocabulary, inner, heads, kv, tied = SHAPES[args.model]
    if args.width:
        heads = max(1, args.width // 64)
        width, inner, kv = args.width, args.width * 11 // 4, max(1, heads // 8)
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=args.layers or layers,
        vocab_size=args.vocab or vocabulary,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=tied,
        initializer_range=width**-0.5,
        bos_token_id=0,
        eos_token_id=1,
    )


def batch_for(model: nn.Module, tokens: int, rows: int | None = None) -> dict[str, Tensor]:
    """Random ids and labels, (rows, tokens / rows), the same ones every time."""
    rows = rows or math.ceil(tokens / ROW)
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randint(0, size, (rows, tokens // rows), generator=torch.Generator().manual_seed(1))
    ids = ids.to(next(model.parameters()).device)
    return {"input_ids": ids, "labels": ids}


def twin(model: nn.Module) -> Any:
    """A copy of the module tree on the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def adapt(base: nn.Module, config: Any, **options: Any) -> nn.Module:
    """A twin of `base` with the adapter of a PEFT `config`."""
    return get_peft_model(twin(base), config, **options)


def ours(args: argparse.Namespace, **options: Any) -> ctsft.CTConfig:
    """A CTConfig at `args.k` whose directions are stored in the base's dtype, as `ctsft tune` has it.

    Random directions unless told otherwise: what they are decides no time, and they are made at once.
    """
    return ctsft.CTConfig(
        **{"k": args.k, "basis": "random", "basis_dtype": args.dtype, "task_type": "CAUSAL_LM"} | options
    )


def lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def standard_arms(base: nn.Module, args: argparse.Namespace, only: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The frozen model, our forms, and PEFT's LoRA at rank K and 8, by name; frozen and what begins as in `only`.

    LoRA trains in the base's dtype, its faster way on bfloat16; peft's own choice there, float32, has its own row.
    """
    k, own = args.k, {"autocast_adapter_dtype": False}
    configs: dict[str, tuple[Any, dict[str, Any]]] = {
        **{f"{form} K={k}": (ours(args, form=form), {}) for form in ("diagonal", "core", "scores")},
        **{f"universal {f} K={k}": (ours(args, form=f, basis="universal"), {}) for f in ("diagonal", "scores")},
    }
    if args.dtype == "bfloat16":
        configs[f"diagonal K={k}, float32 basis"] = ours(args, basis_dtype="float32"), {}
        configs[f"LoRA r={k}, float32 adapter"] = lora(k), {}
    configs |= {f"LoRA r={rank}": (lora(rank), own) for rank in (k, 8)}
    made: dict[str, nn.Module] = {"frozen": twin(base)}
    for name, (config, options) in configs.items():
        if only is None or name.startswith(tuple(only)):
            say(f"making {name}")
            made[name] = adapt(base, config, **options)
    return made


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def training_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Step:
    """A whole step: forward, loss, backward, AdamW, zero_grad; without the last two where nothing trains."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-4) if trained(model) else None

    def step() -> None:
        model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


# -------------------------------------------------------------------------------------------------- tensors and bytes


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in a value, through dicts, sequences and dataclasses; modules are not entered."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from tensors_in(v)
    elif isinstance(value, list | tuple | set):
        for v in value:
            yield from tensors_in(v)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(vars(value))


def held(model: nn.Module) -> dict[int, int]:
    """Bytes of every storage that the model holds, in parameters, buffers or plain attributes, by its address."""
    found = (t for m in model.modules() for t in tensors_in(vars(m)))
    return {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in found)}


def extra_bytes(model: nn.Module, base: nn.Module) -> int:
    """Bytes that the adapted `model` holds more than the bare `base`."""
    return sum(held(model).values()) - sum(held(base).values())


# ------------------------------------------------------------------------------------------------------------- timing


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(step: Step, number: int = 1, clock: str = "wall") -> float:
    """Mean seconds of one of `number` steps."""
    synchronise()
    start = CLOCKS[clock]()
    for _ in range(number):
        step()
    synchronise()
    return (CLOCKS[clock]() - start) / number


def interleaved(
    steps: Mapping[str, Step], args: argparse.Namespace, at_least: float = 0.0, warm_up: int = 2
) -> dict[str, np.ndarray]:
    """Seconds of every step in every round, (args.repeats,) by name; see the head of this file.

    A measurement repeats its step until the fastest takes `at_least` seconds, the same number for all.
    """
    names = list(steps)
    for _ in range(warm_up):
        for name in names:
            steps[name]()
    fastest = min(seconds(steps[name]) for name in names)
    number = max(1, math.ceil(at_least / fastest))
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for round_ in range(args.repeats):
            shift = round_ % len(names)
            for name in names[shift:] + names[:shift]:
                times[name].append(seconds(steps[name], number, args.clock))
            if at_least == 0:
                say(f"round {round_ + 1} of {args.repeats}")
    finally:
        gc.enable()
    return {name: np.array(t) for name, t in times.items()}


@contextmanager
def clocks(spent: dict[str, list[float]], name: str) -> Iterator[None]:
    """Add seconds on the clock and of the processor (all threads) to `spent[name]`."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    before = spent.get(name, [0.0, 0.0])
    spent[name] = [before[0] + time.perf_counter() - wall, before[1] + time.process_time() - cpu]


def spread(values: np.ndarray, digits: int = 2) -> str:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


# ------------------------------------------------------------------------------------------------------------- tables


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table: the first column to the left, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(args: argparse.Namespace) -> str:
    """Device, threads, versions."""
    name = f"cuda: {torch.cuda.get_device_name()}" if args.device == "cuda" else f"cpu: {cpu_name()}"
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "peft"))
    return f"{name}, {args.threads} of {os.cpu_count()} threads, {packages}"


def setting(args: argparse.Namespace, base: nn.Module, timed: bool = True) -> str:
    """What was run: model, dtype, tokens, rounds where time was taken, machine."""
    c: Any = base.config
    name = Path(args.model).expanduser().name
    return (
        f"**{name}** (width {c.hidden_size}, {c.num_hidden_layers} blocks, vocabulary {c.vocab_size}), {args.dtype}, "
        f"{args.tokens} tokens{', ' + rounds(args) if timed else ''}. {machine(args)}."
    )


def rounds(args: argparse.Namespace) -> str:
    return f"{args.repeats} rounds" + (", time of the process instead of the clock's" if args.clock == "cpu" else "")


def show(*parts: str) -> str:
    """Print the parts of a section and return it."""
    section = "\n\n".join(part for part in parts if part) + "\n"
    print(section)
    return section
