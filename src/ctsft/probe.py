"""Probes: what is measured while an adapter trains, and none of it felt by training.

The gradients of the trained numbers are read at every step, as training made them. The true gradient dL/dW of the
adapted matrices and the gradients of single samples come from a pass of the probes' own, over fixed batches, now and
then.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ctsft.adapter.store import layers_of
from ctsft.choices import PROBES
from ctsft.errors import CTError
from ctsft.quantities.gradients import (
    AbsMeanOverStd,
    Diversity,
    Vector,
    amplitude_gradients,
    constrained_effective_rank,
    cosine,
    coverage,
    gradient_snr,
    gradient_vector,
    gram_singular_values,
    norm,
    trained,
)
from ctsft.quantities.look import Batch, look
from ctsft.spectral.decompose import effective_rank, stable_rank

SAMPLES = 4  # with fewer, mean^2 / variance of pure noise has no finite mean (it is Fisher's F with n - 1 degrees)
DENSE = 100  # updates after which diversity is read with the heavy probes: its eigenproblem grows with the updates


class Probes:
    """The measured series of one run: `before_step` after backward, `after_step` after the optimizer's step.

    Always, at every update and on any model: gradient_norm (as the optimizer gets it), cosine (to the last update's
    gradient), amplitude_rms and amplitude_max (of the absolute value), over all trained numbers. By `names`:
    `coverage`, `gradient_rank`, `gradient_snr`, `diversity`; what they need of the true gradient or of single samples
    is measured before the updates 1, `every`, 2 `every` ... on `batches` (see `look`), and the single samples on
    `samples` where that is given.

    series: name -> [[update, value], ...]; seconds: what each group has cost, to hold against the run's own.
    Raises CTError for an unknown name, and for batches that do not suffice.
    """

    def __init__(
        self,
        names: Collection[str] = (),
        every: int = 30,
        batches: Sequence[Batch] = (),
        samples: Sequence[Batch] | None = None,
        adapter_name: str = "default",
    ) -> None:
        if unknown := sorted(set(names) - set(PROBES)):
            raise CTError(f"there are no probes {', '.join(unknown)}; there are {', '.join(PROBES)}.")
        if every < 1:
            raise CTError(f"every={every} must be at least 1 update.")
        self.names, self.every, self.adapter_name = set(names), every, adapter_name
        self.batches, self.samples = list(batches), None if samples is None else list(samples)
        if {"coverage", "gradient_rank"} & self.names and not self.batches:
            raise CTError("coverage and gradient_rank need batches of their own; give at least one.")
        rows = sum(len(b["input_ids"]) for b in (self.batches if self.samples is None else self.samples))
        if "gradient_snr" in self.names and rows < SAMPLES:
            raise CTError(
                f"gradient_snr has {rows} samples; with fewer than {SAMPLES} the ratio of pure noise has no finite "
                "mean, so give more rows, which may be shorter."
            )
        self.series: dict[str, list[list[Any]]] = {}
        self.seconds: dict[str, float] = {}
        self.last: Vector | None = None
        self.diversity, self.ratios = Diversity(), AbsMeanOverStd()

    def note(self, update: int, **values: Any) -> None:
        for name, value in values.items():
            self.series.setdefault(name, []).append([update, value])

    @contextmanager
    def timed(self, group: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[group] = self.seconds.get(group, 0.0) + time.perf_counter() - started

    def due(self, update: int) -> bool:
        return update == 1 or update % self.every == 0

    def before_step(self, model: nn.Module, update: int) -> None:
        """Read the gradients of update `update` (1 is the first), and the heavy probes where they are due."""
        with self.timed("every step"):
            now = gradient_vector(model)
            self.note(update, gradient_norm=norm(now))
            if self.last is not None:
                self.note(update, cosine=cosine(self.last, now))
            self.last = now
        if "diversity" in self.names:
            with self.timed("diversity"):
                self.diversity.add(now)
                if update <= DENSE or self.due(update):
                    self.note(update, diversity=self.diversity.value())
        if "gradient_rank" in self.names:
            with self.timed("gradient_rank"):
                rank = constrained_effective_rank(amplitude_gradients(model, self.adapter_name))
                self.note(update, constrained_effective_rank=rank)
        if "gradient_snr" in self.names:
            with self.timed("gradient_snr"):
                self.ratios.add(amplitude_gradients(model, self.adapter_name))
                self.note(update, **self.ratios.values())
        if self.due(update):
            self.measure(model, update)

    def after_step(self, model: nn.Module, update: int) -> None:
        """Read the trained numbers as update `update` left them."""
        with self.timed("every step"):
            flat = torch.cat([p.detach().flatten().to(torch.float32) for p in trained(model)])
            rms = float(flat.norm()) / len(flat) ** 0.5
            self.note(update, amplitude_rms=rms, amplitude_max=float(flat.abs().max()))

    def measure(self, model: nn.Module, update: int) -> None:
        """The heavy probes at once, on the model as it stands."""
        dense, sampled = bool({"coverage", "gradient_rank"} & self.names), "gradient_snr" in self.names
        together = sampled and self.samples is None
        if dense or together:
            with self.timed("pass"):
                seen = look(model, self.batches, dense, together, self.adapter_name)
        if sampled and self.samples is not None:
            with self.timed("pass of samples"):
                samples = look(model, self.samples, False, True, self.adapter_name).samples
        elif sampled:
            samples = seen.samples
        if sampled:
            with self.timed("gradient_snr"):
                snr = gradient_snr(samples)
                self.note(update, gradient_snr=snr, **{f"snr_{group}": value for group, value in snr.items()})
        if "coverage" in self.names:
            with self.timed("coverage"):
                found: dict[str, list[float]] = {}
                for name, layer in layers_of(model, self.adapter_name).items():
                    for kind, shares in coverage(seen.gradients[name], layer.ready(self.adapter_name)).items():
                        found.setdefault(f"coverage_{kind}", []).append(float(shares[-1]))
                self.note(update, **{kind: sum(values) / len(values) for kind, values in found.items()})
        if "gradient_rank" in self.names:
            with self.timed("gradient_rank"):
                sigma = {n: gram_singular_values(g) for n, g in seen.gradients.items()}
                by_matrix = {n: effective_rank(s) for n, s in sigma.items()}
                self.note(
                    update,
                    true_effective_rank=sum(by_matrix.values()) / len(by_matrix),
                    true_stable_rank=sum(map(stable_rank, sigma.values())) / len(sigma),
                    true_effective_rank_by_matrix=by_matrix,
                )


class ProbeCallback(TrainerCallback):
    """Probes on any transformers Trainer: `Trainer(..., callbacks=[ProbeCallback(probes)])`, then `probes.series`.

    The Trainer clips first: with its `max_grad_norm`, gradient_norm is that of the clipped gradient.
    """

    def __init__(self, probes: Probes) -> None:
        self.probes = probes

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.probes.before_step(model, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.probes.after_step(model, state.global_step)
