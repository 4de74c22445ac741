"""Trials: candidates trained one after the other on one model, one set of rows and the same batches.

A trial does what `ctsft tune` does with its recipe's defaults: Adam, 5% warm-up, linear decay, gradients clipped at
norm 1, batches by `arranged`. Afterwards the model is the bare one again.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import get_linear_schedule_with_warmup

from ctsft.adapter.calibrate import calibrate
from ctsft.adapter.config import CTConfig
from ctsft.adapter.loss import summed_loss
from ctsft.adapter.peers import Base, Trained, peer_config, train_only, vectors, wrap
from ctsft.adapter.rate import BATCHES, valley
from ctsft.adapter.targets import find_targets
from ctsft.plan.arms import Candidate
from ctsft.plan.record import Trial
from ctsft.spectral.kinds import needs_data
from ctsft.spectral.weights import matrix
from ctsft.tune.measure import NotFinite, Tokens, collate, heldout_loss
from ctsft.tune.record import Accuracy
from ctsft.tune.trainer import arranged

Batch = dict[str, Tensor]


def narrowest(model: Any, config: CTConfig | None = None) -> int:
    """The directions of the narrowest of the matrices that `config` adapts; without it, that ours does by default."""
    return min(min(matrix(m).shape) for m in find_targets(model, config or CTConfig())[0].values())


class Bench:
    """A bare `model`, the `rows` to train on and the `heldout` ones, in tokens; candidates are tried on it in turn.

    rows: anything with a length whose items are rows. score: what is measured of a trained model beside the loss.
    The model is taken over: nothing of it trains but within a trial.
    """

    def __init__(
        self,
        model: Any,
        pad_id: int,
        rows: Sequence[Tokens],
        heldout: Sequence[Tokens],
        batch_size: int = 8,
        score: Callable[[Any], Accuracy | None] | None = None,
    ) -> None:
        self.model, self.pad_id, self.rows, self.heldout = model.requires_grad_(False), pad_id, rows, heldout
        self.batch_size, self.score = batch_size, score
        self.lengths = [len(row["input_ids"]) for row in rows]
        self.base = Base.of(model)
        self.bytes: dict[str, int] = {}

    @cached_property
    def start(self) -> float:
        """The held-out loss of the bare model, where every trial starts; measured once."""
        return self.loss(self.model)

    def loss(self, model: nn.Module, rows: Sequence[Tokens] | None = None) -> float:
        """The loss of `model` on the held-out rows, or on `rows`; infinite where it is not finite."""
        try:
            return heldout_loss(model, self.heldout if rows is None else rows, self.pad_id)[0]
        except NotFinite:
            return math.inf

    def batch(self, picked: Sequence[int]) -> Batch:
        rows = [self.rows[i] for i in picked]
        return {k: v.to(self.model.device) for k, v in collate(rows, self.pad_id).items()}

    def first(self) -> list[Batch]:
        """Batches of the first rows, that rates are measured on and directions made from."""
        count = min(BATCHES * self.batch_size, len(self.lengths))
        groups = [range(i, count, BATCHES) for i in range(min(BATCHES, count))]
        return [self.batch(group) for group in (groups if len(groups) > 1 else groups * 2)]

    @contextmanager
    def equipped(self, candidate: Candidate, seed: int = 0) -> Iterator[Trained]:
        """The model with what `candidate` trains, at its start; bare again, bit for bit, when the block ends."""
        training, model = self.model.training, self.model
        if candidate.arm.kind == "vectors":
            kept = {p: p.detach().clone() for p in vectors(model)}
            train_only(model, kept)
            wrapped = model
        else:
            wrapped = wrap(model, self.config(candidate, seed), seed)
        try:
            yield Trained(wrapped, self.base)
        finally:
            if wrapped is model:
                for p, start in kept.items():
                    p.data.copy_(start)
                    p.grad = None
            else:
                wrapped.unload()
            model.requires_grad_(False)
            model.train(training)

    def config(self, candidate: Candidate, seed: int) -> Any:
        """peft's config of `candidate`, ours or its own, on the matrices that ours adapts by default."""
        if candidate.arm.kind == "peer":
            return peer_config(
                self.model, candidate.method, candidate.k, seed, list(find_targets(self.model, CTConfig())[0])
            )
        config = CTConfig(
            k=candidate.k,
            form=candidate.method,  # type: ignore[arg-type]
            basis=candidate.basis,  # type: ignore[arg-type]
            basis_file=candidate.basis_file,
            basis_dtype="bfloat16" if self.model.dtype == torch.bfloat16 else "float32",
            seed=seed,
            task_type="CAUSAL_LM",
        )
        return calibrate(self.model, config, self.first()) if needs_data(candidate.basis) else config

    def rate(self, candidate: Candidate, seed: int = 0) -> float:
        """The rate by the rule of `ctsft.learning_rate`, on the numbers that `candidate` trains, whatever they are."""
        with self.equipped(candidate, seed) as equipped:
            return self.measured_rate(equipped)

    def measured_rate(self, equipped: Trained) -> float:
        return valley(equipped.model, equipped.trainable, self.first()).rate

    def trial(
        self,
        candidate: Candidate,
        seed: int,
        steps: int,
        lr: float | None = None,
        looks: Iterable[int] | None = None,
        horizon: int | None = None,
        batch_size: int | None = None,
        scored: bool = False,
        tick: Callable[[int], object] = lambda step: None,
    ) -> Trial:
        """Train `candidate` for `steps` steps of a schedule over `horizon` (as many, if None), from rate `lr` (if None,
        by the rule). All candidates of one seed and horizon see the same batches.

        looks: after how many steps the held-out loss is measured, 0 and `steps` if None; none at all if empty.
        `tick(n)` is called after every n steps.
        """
        horizon, size = horizon or steps, batch_size or self.batch_size
        wanted = {0, steps} if looks is None else set(looks)
        order = arranged(self.lengths, size, horizon, seed)
        batches = (self.batch([order[i % len(order)] for i in range(s * size, s * size + size)]) for s in range(steps))
        start = self.start if 0 in wanted else None  # of the bare model
        with torch.random.fork_rng(), self.equipped(candidate, seed) as equipped:
            torch.manual_seed(seed)
            lr = self.measured_rate(equipped) if lr is None else lr
            course = Course(equipped, lr, horizon)
            looked = [] if start is None else [(0, start)]
            for step, batch in enumerate(batches, 1):
                if not course.step(batch):
                    break
                if step in wanted:
                    looked.append((step, self.loss(equipped.model)))
                tick(1)
            if candidate.name not in self.bytes:
                self.bytes[candidate.name] = equipped.adapter_bytes()
            finite = course.finite and all(math.isfinite(loss) for _, loss in looked)
            return Trial(
                candidate=candidate.name,
                seed=seed,
                rate=lr,
                steps=steps,
                horizon=horizon,
                batch_size=size,
                train=[number(loss) for loss in course.losses],
                heldout=[(step, number(loss)) for step, loss in looked],
                clock=[round(seconds, 3) for seconds in course.clock],
                trained=equipped.trained,
                adapter_bytes=self.bytes[candidate.name],
                memory_bytes=equipped.memory_bytes + course.memory_bytes,
                diverged=not finite,
                accuracy=self.score(equipped.model) if self.score and scored and finite else None,
            )


def number(loss: float) -> float | None:
    """A loss as it is written down: to six digits after the point, None where it is not finite."""
    return round(loss, 6) if math.isfinite(loss) else None


class Course:
    """The training of one equipped model, a step at a time, on the schedule and with the optimizer of `ctsft tune`.

    Numbers of less than 32 bits are stepped on as float32 copies: a step is often smaller than they can tell apart.
    """

    def __init__(self, equipped: Trained, lr: float, horizon: int) -> None:
        self.model, self.numbers = equipped.model, equipped.trainable
        self.masters = [nn.Parameter(p.detach().float()) for p in self.numbers]  # the number itself where it is float32
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0, fused=True)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, horizon // 20, horizon)
        self.losses: list[float] = []
        self.clock: list[float] = []
        self.finite = True

    def step(self, batch: Batch) -> bool:
        """One update on `batch`; False, and none, where its loss is not finite."""
        began = time.perf_counter()
        self.model.train()
        loss, count = summed_loss(self.model, batch)
        mean = loss / count
        self.losses.append(mean.item())
        self.finite = math.isfinite(self.losses[-1])
        if self.finite:
            found = torch.autograd.grad(mean, self.numbers, allow_unused=True)
            for master, grad in zip(self.masters, found, strict=True):
                master.grad = None if grad is None else grad.float()
            clip_grad_norm_(self.masters, 1.0)
            self.optimizer.step()
            self.schedule.step()
            for p, master in zip(self.numbers, self.masters, strict=True):
                p.data.copy_(master.data)
        self.clock.append((self.clock[-1] if self.clock else 0.0) + time.perf_counter() - began)
        return self.finite

    @property
    def memory_bytes(self) -> int:
        """Bytes of gradients, optimizer state, and copies that are stepped on."""
        kept = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        kept += [m for p, m in zip(self.numbers, self.masters, strict=True) if m.data_ptr() != p.data_ptr()]
        return sum(t.nbytes for t in kept) + sum(p.nbytes for p in self.numbers)
