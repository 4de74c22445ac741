"""The laboratory's hands: one spec in, one record out.

A run trains one arm on a stream of text cut into windows of `length` tokens. The loop is written out, and is not a
Trainer's, because K changes in mid-run, one batch may serve every step, and the loss of every step is wanted.
"""

import time
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ctsft.adapter.layer import CTLayer
from ctsft.adapter.rate import BATCHES
from ctsft.adapter.resize import resize
from ctsft.choices import FORMS
from ctsft.errors import CTError
from ctsft.files import cpu_name, versions
from ctsft.lab.methods import Equipped, equip, refresh
from ctsft.lab.prefix import Replay, prefix, replay_prefix
from ctsft.lab.records import Record, finite
from ctsft.lab.rules import RULES
from ctsft.lab.schedule import k_at
from ctsft.lab.siblings import directions, merge_mean
from ctsft.lab.sources import (
    autocast,
    batches,
    blocks,
    fresh_model,
    heldout_windows,
    inputs,
    streams,
    tokens_of,
    weights_of,
    windows,
)
from ctsft.lab.spec import PAPER_LR, TUNE_SEEDS, Spec, replaced
from ctsft.probe import Probes
from ctsft.quantities.ablation import ablation
from ctsft.spectral.weights import matrix

CALIBRATION_BATCHES = 4
SAMPLES = {"batch": 16, "length": 31}  # single samples for gradient_snr: many and short
FLOPS: dict[str, float] = {}  # of a step, by the spec without rate and seed
FIRST_HELDOUT: dict[str, tuple[float, list[float]]] = {}  # of the untouched models: the loss, and by windows
ABLATIONS = ("order", "reverse", "random")
KEPT = (0, 2, 4, 8, 16, 20, 24, 32, 48, 64)


def run(spec: Spec) -> Record:
    """Train and measure what `spec` says. Raises CTError where the model, text or adapter cannot be had."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the first loss")  # an untied head is what was asked for
        warnings.filterwarnings("ignore", category=FutureWarning, module="peft|transformers")
        torch.manual_seed(spec.seed)
        if spec.weights and spec.weights != weights_of(spec.model):
            raise CTError(f"{spec.model} has other weights than when its runs began; start them again.")
        return Run(spec).record()


class Run:
    """The state of one run."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        train, _ = streams(spec.model, spec.text)
        self.feed = batches(spec)
        self.heldout_ids = heldout_windows(spec)
        calibration = [inputs(windows(train, spec, "calibration", i)) for i in range(CALIBRATION_BATCHES)]
        model, learned = fresh_model(spec), None
        self.cost: dict[str, float] = {}  # of directions that were learned
        if spec.learns:
            learned, self.cost = directions(spec)
            if spec.start == "mean" and spec.method not in FORMS:
                merge_mean(model, learned)
        self.equipped: Equipped = equip(model, spec, calibration, learned)
        self.model: Any = self.equipped.model
        self.first = next(self.feed)
        self.lr = spec.lr
        if spec.rule:
            with autocast(spec):
                measured_on = [inputs(windows(train, spec, "rate", i)) for i in range(BATCHES)]
                self.lr = RULES[spec.rule](self.model.eval(), measured_on)
        self.adapter_bytes = self.equipped.adapter_bytes() * (1 + spec.refreshes)
        self.replay: Replay | None = None
        if spec.targets.startswith("last2") and spec.batches == "fixed" and len(blocks(self.model)) > 2:
            self.replay = replay_prefix(self.model, 2)
            prefix(tokens_of(spec), 2, "batch")  # before the clock and the FLOP counter run
        own = self.first if spec.batches == "fixed" else windows(train, spec, "probe")
        single = [inputs(windows(train, replaced(spec, **SAMPLES), "samples"))]
        self.probes = Probes(spec.probes, spec.probe_every, [inputs(own)], single)
        # A tuning run on one batch is judged by that batch, so nothing else is measured.
        self.tuning = spec.seed in TUNE_SEEDS and spec.batches == "fixed"
        self.train_loss: list[float] = []
        self.heldout: list[tuple[int, float]] = []
        self.heldout_parts: list[list[float]] = []  # of every evaluation, by `batch` windows
        self.k, self.diverged, self.flops, self.seconds = spec.k, False, 0.0, 0.0

    def loss(self, ids: Tensor, *name: object) -> Tensor:
        """The model's loss on `ids`, which a run with a replayed prefix must be able to call by name."""
        if self.replay:
            self.replay.now = prefix(tokens_of(self.spec, *name), 2, *(name or ("batch",)))
        with autocast(self.spec):
            value: Tensor = self.model(**inputs(ids), use_cache=False).loss
        return value

    def heldout_loss(self) -> tuple[float, list[float]]:
        """Over all windows, and by `batch` of them."""
        self.model.eval()
        parts = self.heldout_ids.split(self.spec.batch)
        with torch.no_grad():
            losses = [self.loss(part, "heldout", i).item() for i, part in enumerate(parts)]
        return sum(loss * len(part) for loss, part in zip(losses, parts, strict=True)) / len(self.heldout_ids), losses

    def evaluate(self, step: int) -> None:
        """Measure the held-out loss; that of the untouched model, which most arms start as, once for all of them."""
        if step == 0 and self.spec.universal_mode != "replace" and self.spec.start == "zero":
            alike = replaced(tokens_of(self.spec), dtype=self.spec.dtype, tied=self.spec.tied).key
            if alike not in FIRST_HELDOUT:
                FIRST_HELDOUT[alike] = self.heldout_loss()
            loss, parts = FIRST_HELDOUT[alike]
        else:
            loss, parts = self.heldout_loss()
        self.heldout.append((step, loss))
        self.heldout_parts.append(parts)

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
        """Train, measure before and after, and tell all of it."""
        if not self.tuning:
            self.evaluate(0)
        measures = measured_at_start(self.equipped) | ({"learned": self.cost} if self.cost else {})
        measures |= {"rate": self.lr} if self.spec.rule else {}
        if self.spec.steps == 0:
            self.train_loss.append(self.fixed_loss())
            self.probes.measure(self.model, 0)
        self.train()
        if self.diverged:
            self.heldout.append((self.spec.steps, float("nan")))
        else:
            if self.spec.steps and self.spec.batches == "fixed":
                self.train_loss.append(self.fixed_loss())
            if self.spec.ablate:
                measures["ablation"] = self.ablations()
            if self.spec.heldout_windows != Spec.model_fields["heldout_windows"].default:
                measures["heldout_parts"] = brief({"first": self.heldout_parts[0], "last": self.heldout_parts[-1]})
        return Record(spec=self.spec, **finite(self.told() | {"measures": measures}))

    def train(self) -> None:
        """All updates, or those up to a loss that is not finite; the clock stands still for probes and evaluations."""
        spec, evaluated, periods = self.spec, {*self.spec.evaluate, self.spec.steps}, self.spec.refreshes + 1
        optimizer = torch.optim.Adam(self.equipped.trainable, lr=self.lr)
        for step in range(spec.steps):
            if spec.schedule and (new := k_at(spec.schedule, step, spec.steps)) != self.k:
                self.k = new
                resize(self.model, new, optimizer=optimizer, carry=spec.carry)
            if step and step * periods // spec.steps > (step - 1) * periods // spec.steps:
                refresh(self.model, optimizer)
            if spec.decay == "linear":
                optimizer.param_groups[0]["lr"] = self.lr * (1 - step / spec.steps)
            ids = self.first if step == 0 or spec.batches == "fixed" else next(self.feed)
            self.model.train()
            if step == 0:
                self.flops = self.flops_of_a_step()
            started = time.perf_counter()
            loss = self.loss(ids)
            loss.backward()
            loss = loss.detach()  # a graph that lives on would remember the shapes from before a resize
            self.seconds += time.perf_counter() - started
            self.train_loss.append(loss.item())
            if not torch.isfinite(loss):
                self.diverged = True
                return
            self.probes.before_step(self.model, step + 1)
            started = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            self.seconds += time.perf_counter() - started
            self.probes.after_step(self.model, step + 1)
            if step + 1 in evaluated and not self.tuning:
                self.evaluate(step + 1)

    def ablations(self) -> dict[str, Any]:
        """The loss with so many trained directions kept, by the order in which the others are zeroed."""
        kept = [n for n in KEPT if n <= self.spec.k]
        return {order: ablation(self.model, self.fixed_loss, kept, order, self.spec.seed) for order in ABLATIONS}

    def told(self) -> dict[str, Any]:
        """The record's fields, as the run stands, but for what is measured once."""
        spec, equipped = self.spec, self.equipped
        done = len(self.train_loss) if spec.batches == "fresh" else len(self.train_loss) - 1
        return {
            "adapted": {"matrices": len(equipped.shapes), "names": equipped.names, "shapes": equipped.shapes},
            "trained": equipped.trained,
            "counted": equipped.counted(self.k if spec.allocation == "uniform" else None),
            "adapter_bytes": equipped.adapter_bytes() if spec.schedule else self.adapter_bytes,
            "memory_bytes": equipped.memory_bytes,
            "tokens": done * spec.batch * spec.length,
            "flops": self.flops * done,
            "seconds": round(self.seconds, 3),
            "train_loss": [round(loss, 6) for loss in self.train_loss],
            "heldout": [(step, round(loss, 6)) for step, loss in self.heldout],
            "probes": {name: [(update, brief(found)) for update, found in s] for name, s in self.probes.series.items()},
            "probe_seconds": self.probes.seconds,
            "diverged": self.diverged,
            "weights": weights_of(spec.model),
            "versions": versions(),
            "machine": {"processor": cpu_name(), "threads": torch.get_num_threads()},
        }


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
