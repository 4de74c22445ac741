"""The laboratory's hands: one spec in, one record out.

A run trains one arm on a stream of text cut into windows of `length` tokens. The loop is written out, and is not a
Trainer's, because K changes in mid-run, one batch may serve every step, and the loss of every step is wanted.
"""

import copy
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import ctsft.models.photonic  # noqa: F401  (registers the model)
from ctsft import probe
from ctsft.adapter.layer import CTLayer
from ctsft.adapter.resize import resize
from ctsft.data.read import READABLE
from ctsft.data.rows import BUILTIN as BUILTIN_TEXTS
from ctsft.data.rows import load_corpus
from ctsft.errors import CTError
from ctsft.files import cpu_name, versions
from ctsft.lab.methods import Equipped, equip
from ctsft.lab.records import Record, finite
from ctsft.lab.schedule import k_at
from ctsft.lab.spec import PAPER_LR, TUNE_SEEDS, Spec, replaced
from ctsft.models.load import BUILTIN as BUILTIN_MODELS
from ctsft.models.load import Loaded, load_model
from ctsft.spectral.basis import generator
from ctsft.spectral.weights import matrix

HELDOUT_WINDOWS = 16  # the same for every run on a text
CALIBRATION_BATCHES = 4
SAMPLES = {"batch": 16, "length": 31}  # single samples for gradient_snr: many and short
FLOPS: dict[str, float] = {}  # of a step, by the spec without rate and seed
FIRST_HELDOUT: dict[str, float] = {}  # of the untouched models
ABLATIONS = ("order", "reverse", "random")
KEPT = (0, 2, 4, 8, 16, 20, 24, 32, 48, 64)


def models_folder() -> Path:
    """Where models that are not built in lie, by name: `$CTSFT_MODELS`, else `~/.cache/ctsft-models`."""
    return Path(os.environ.get("CTSFT_MODELS") or Path.home() / ".cache" / "ctsft-models").expanduser()


def texts_folder() -> Path:
    """Where texts that are not built in lie, by name: `$CTSFT_TEXTS`, else the folder `texts` beside the models."""
    return Path(os.environ.get("CTSFT_TEXTS") or models_folder() / "texts").expanduser()


def model_source(name: str) -> str:
    """What `load_model` takes for a spec's model; CTError if it is not on this machine."""
    if name in BUILTIN_MODELS:
        return name
    if not (models_folder() / name / "config.json").exists():
        raise CTError(f"the model {name} is not in {models_folder()}; fetch it there, or set CTSFT_MODELS.")
    return str(models_folder() / name)


def text_source(name: str) -> str:
    """What `load_corpus` takes for a spec's text; CTError if it is not on this machine."""
    if name in BUILTIN_TEXTS:
        return name
    for suffix in READABLE:
        if (path := texts_folder() / f"{name}{suffix}").exists():
            return str(path)
    raise CTError(
        f"the text {name} is not in {texts_folder()} ({name}.txt or .jsonl); put it there, or set CTSFT_TEXTS."
    )


def absent(spec: Spec) -> str:
    """Why this machine cannot run `spec` for want of a model or text; empty if it can."""
    try:
        model_source(spec.model)
        text_source(spec.text)
    except CTError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------------ model and text


@lru_cache(maxsize=1)
def base(name: str) -> Loaded:
    """The bare model in float32. Never trained: every run takes a copy."""
    return load_model(model_source(name), "float32")


def fresh_model(spec: Spec) -> PreTrainedModel:
    """A copy of the base; with a random head of its own, drawn by the seed, where the spec unties it.

    Blocks that the spec never trains are shared with the base, not copied.
    """
    model = base(spec.model).model
    if spec.tied:
        frozen = blocks(model)[:-2].parameters() if spec.targets.startswith("last2") else ()
        return copy.deepcopy(model, {id(p): p for p in frozen})
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        untied = type(model)(config)
    shared = set(model.all_tied_weights_keys)  # the head's weight, under its own name
    missing, unexpected = untied.load_state_dict(
        {name: weight for name, weight in model.state_dict().items() if name not in shared}, strict=False
    )
    assert set(missing) == shared and not unexpected, (missing, unexpected)
    return untied.eval()


@lru_cache(maxsize=4)
def streams(model: str, text: str) -> tuple[Tensor, Tensor]:
    """Token ids of the text to train on and of the held-out text, each one stream, rows ended by the end token."""
    tokenizer = base(model).tokenizer
    corpus = load_corpus(text_source(text), seed=0, heldout=0.1)

    def stream(rows: Any) -> Tensor:
        texts = [r["text"] if corpus.kind == "text" else joined(r["prompt"]) + joined(r["completion"]) for r in rows]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor([i for row in ids for i in [*row, tokenizer.eos_token_id]])

    return stream(corpus.train), stream(corpus.heldout)


def joined(turns: Any) -> str:
    return turns if isinstance(turns, str) else "\n".join(turn["content"] for turn in turns)


def windows(ids: Tensor, spec: Spec, *words: object) -> Tensor:
    """A batch (batch, length) of windows of the stream `ids`, drawn by the seed and `words`."""
    if len(ids) <= spec.length:
        raise CTError(f"the text {spec.text} has {len(ids)} tokens, too few for windows of {spec.length}.")
    starts = torch.randint(len(ids) - spec.length, (spec.batch, 1), generator=generator(spec.seed, *words))
    return ids[starts + torch.arange(spec.length)]


def batches(spec: Spec) -> Iterator[Tensor]:
    """What every step trains on: always the same windows, or new ones."""
    train, _ = streams(spec.model, spec.text)
    step = 0
    while True:
        yield windows(train, spec, "batch", step if spec.batches == "fresh" else 0)
        step += 1


def heldout_windows(spec: Spec) -> Tensor:
    """(HELDOUT_WINDOWS, length): evenly spread over the held-out stream, the same for every arm and seed."""
    _, ids = streams(spec.model, spec.text)
    starts = torch.linspace(0, len(ids) - spec.length, HELDOUT_WINDOWS).long()[:, None]
    return ids[starts + torch.arange(spec.length)]


def named_batch(spec: Spec, *name: object) -> Tensor:
    """The fixed batch, ("batch",), or part i of the held-out windows, ("heldout", i)."""
    if name[0] == "heldout":
        return heldout_windows(spec).split(spec.batch)[int(str(name[1]))]
    return windows(streams(spec.model, spec.text)[0], spec, "batch", 0)


def tokens_of(spec: Spec, *name: object) -> Spec:
    """`spec` without all that does not decide the tokens of the batch `name`: runs that share tokens share this."""
    seed = 0 if name else spec.seed
    return Spec(model=spec.model, text=spec.text, batch=spec.batch, length=spec.length, seed=seed)


def inputs(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids}


# ------------------------------------------------------------------------------------------------------ frozen prefix


class Replay(nn.Module):
    """Stands for frozen blocks: returns what they gave for the batch at hand, whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.now = torch.empty(0)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.now


class Reached(Exception):
    """Ends a forward pass at the block whose input was wanted."""


@lru_cache(maxsize=64)
def prefix(spec: Spec, kept: int, *name: object) -> Tensor:
    """What the base feeds to its last `kept` blocks for the batch `name` of `spec`, (batch, length, d_model)."""
    model = base(spec.model).model
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise Reached

    handle = blocks(model)[-kept].register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            model(input_ids=named_batch(spec, *name), use_cache=False)
    except Reached:
        return found[0]
    finally:
        handle.remove()
    raise AssertionError("the block was never reached")


def blocks(model: nn.Module) -> nn.ModuleList:
    """The list of blocks of a causal language model: the longest ModuleList in it."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def replay_prefix(model: nn.Module, kept: int) -> Replay:
    """Put a Replay in the place of all blocks but the last `kept`. Exact where nothing before those trains."""
    replay, layers = Replay(), blocks(model)
    del layers[1 : len(layers) - kept]
    layers[0] = replay
    return replay


# ----------------------------------------------------------------------------------------------------------- one run


def run(spec: Spec) -> Record:
    """Train and measure what `spec` says. Raises CTError where the model, text or adapter cannot be had."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the first loss")  # an untied head is what was asked for
        warnings.filterwarnings("ignore", category=FutureWarning, module="peft|transformers")
        torch.manual_seed(spec.seed)
        return Run(spec).record()


class Run:
    """The state of one run."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        train, _ = streams(spec.model, spec.text)
        self.feed = batches(spec)
        self.heldout_ids = heldout_windows(spec)
        calibration = [inputs(windows(train, spec, "calibration", i)) for i in range(CALIBRATION_BATCHES)]
        self.equipped: Equipped = equip(fresh_model(spec), spec, calibration)
        self.model: Any = self.equipped.model
        self.first = next(self.feed)
        self.adapter_bytes = self.equipped.adapter_bytes()
        self.replay: Replay | None = None
        if spec.targets.startswith("last2") and spec.batches == "fixed" and len(blocks(self.model)) > 2:
            self.replay = replay_prefix(self.model, 2)
            prefix(tokens_of(spec), 2, "batch")  # before the clock and the FLOP counter run
        own = self.first if spec.batches == "fixed" else windows(train, spec, "probe")
        single = [inputs(windows(train, replaced(spec, **SAMPLES), "samples"))]
        self.probes = probe.Probes(spec.probes, spec.probe_every, [inputs(own)], single)
        self.train_loss: list[float] = []
        self.heldout: list[list[float]] = []

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.spec.dtype == "bfloat16" else nullcontext()

    def loss(self, ids: Tensor, *name: object) -> Tensor:
        """The model's loss on `ids`, which a run with a replayed prefix must be able to call by name."""
        if self.replay:
            self.replay.now = prefix(tokens_of(self.spec, *name), 2, *(name or ("batch",)))
        with self.autocast():
            value: Tensor = self.model(**inputs(ids), use_cache=False).loss
        return value

    def heldout_loss(self) -> float:
        self.model.eval()
        parts = self.heldout_ids.split(self.spec.batch)
        with torch.no_grad():
            losses = [self.loss(part, "heldout", i).item() for i, part in enumerate(parts)]
        return sum(loss * len(part) for loss, part in zip(losses, parts, strict=True)) / len(self.heldout_ids)

    def evaluate(self, step: int) -> None:
        """Measure the held-out loss; that of the untouched model, which most arms start as, once for all of them."""
        if step == 0 and self.spec.universal_mode != "replace":
            alike = replaced(tokens_of(self.spec), dtype=self.spec.dtype, tied=self.spec.tied).key
            if alike not in FIRST_HELDOUT:
                FIRST_HELDOUT[alike] = self.heldout_loss()
            self.heldout.append([step, FIRST_HELDOUT[alike]])
        else:
            self.heldout.append([step, self.heldout_loss()])

    def flops_of_a_step(self) -> float:
        """Of forward and backward on one batch, counted (not timed) once for all runs that differ in rate and seed."""
        alike = replaced(self.spec, seed=0, lr=PAPER_LR, steps=1, probes=(), evaluate=(), ablate=False).key
        if alike not in FLOPS:
            with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
                self.loss(self.first).backward()
            self.model.zero_grad()
            FLOPS[alike] = float(counter.get_total_flops())
        return FLOPS[alike]

    def fixed_loss(self) -> float:
        """The loss on the first batch as the model stands, without dropout."""
        self.model.eval()
        with torch.no_grad():
            return self.loss(self.first).item()

    def record(self) -> Record:
        spec, equipped = self.spec, self.equipped
        # A tuning run on one batch is judged by that batch, so nothing else is measured.
        tuning = spec.seed in TUNE_SEEDS and spec.batches == "fixed"
        if not tuning:
            self.evaluate(0)
        measures = measured_at_start(equipped)
        flops, seconds, evaluated = 0.0, 0.0, set(spec.evaluate) | {spec.steps}
        if spec.steps == 0:
            self.train_loss.append(self.fixed_loss())
            self.probes.measure(self.model, 0)
        optimizer = torch.optim.Adam(equipped.trainable, lr=spec.lr)
        k, diverged = spec.k, False
        for step in range(spec.steps):
            if spec.schedule and (new := k_at(spec.schedule, step, spec.steps)) != k:
                k = new
                resize(self.model, k, optimizer=optimizer, carry=spec.carry)
            if spec.decay == "linear":
                optimizer.param_groups[0]["lr"] = spec.lr * (1 - step / spec.steps)
            ids = self.first if step == 0 or spec.batches == "fixed" else next(self.feed)
            self.model.train()
            if step == 0:
                flops = self.flops_of_a_step()
            started = time.perf_counter()
            loss = self.loss(ids)
            loss.backward()
            loss = loss.detach()  # a graph that lives on would remember the shapes from before a resize
            seconds += time.perf_counter() - started
            self.train_loss.append(loss.item())
            if diverged := not torch.isfinite(loss):
                break
            self.probes.before_step(self.model, step + 1)
            started = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            seconds += time.perf_counter() - started
            self.probes.after_step(self.model, step + 1)
            if step + 1 in evaluated and not tuning:
                self.evaluate(step + 1)
        if spec.steps and spec.batches == "fixed" and not diverged:
            self.train_loss.append(self.fixed_loss())
        if diverged:
            self.heldout.append([spec.steps, float("nan")])
        elif spec.ablate:
            kept = [n for n in KEPT if n <= spec.k]
            measures["ablation"] = {
                order: probe.ablation(self.model, self.fixed_loss, kept, order, spec.seed) for order in ABLATIONS
            }
        done = len(self.train_loss) if spec.batches == "fresh" else len(self.train_loss) - 1
        measured = {
            "adapted": {"matrices": len(equipped.shapes), "names": equipped.names, "shapes": equipped.shapes},
            "trained": equipped.trained,
            "counted": equipped.counted(k),
            "adapter_bytes": equipped.adapter_bytes() if spec.schedule else self.adapter_bytes,
            "memory_bytes": equipped.memory_bytes,
            "tokens": done * spec.batch * spec.length,
            "flops": flops * done,
            "seconds": round(seconds, 3),
            "train_loss": [round(loss, 6) for loss in self.train_loss],
            "heldout": [(step, round(loss, 6)) for step, loss in self.heldout],
            "probes": {name: [(update, brief(found)) for update, found in s] for name, s in self.probes.series.items()},
            "probe_seconds": self.probes.seconds,
            "measures": measures,
            "diverged": diverged,
            "versions": versions(),
            "machine": {"processor": cpu_name(), "threads": torch.get_num_threads()},
        }
        return Record(spec=spec, **finite(measured))


def brief(found: Any) -> Any:
    """Six digits of every number: a record is read by people too."""
    if isinstance(found, dict):
        return {name: brief(value) for name, value in found.items()}
    return [brief(value) for value in found] if isinstance(found, list) else float(f"{found:.6g}")


@torch.no_grad()
def measured_at_start(equipped: Equipped) -> dict[str, Any]:
    """`variance_explained`: share of |W|^2, over the adapted matrices, in the span of a one-sided basis (paper 78)."""
    inside = total = 0.0
    for layer in equipped.model.modules():
        if isinstance(layer, CTLayer) and not layer.ctsft_owner and layer.ctsft_basis:
            basis = next(iter(layer.ctsft_basis.values()))
            w = matrix(layer.get_base_layer())
            if basis is not None and (basis.u is None) != (basis.vh is None):
                inside += float((w @ basis.vh.T if basis.vh is not None else basis.u.T @ w).square().sum())  # type: ignore[union-attr]
                total += float(w.square().sum())
    return {"variance_explained": inside / total} if total else {}
