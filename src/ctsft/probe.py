"""Probes: what is measured while an adapter trains, each quantity a small function, and none of them felt by training.

The gradients of the trained numbers are read at every step, as training made them. The true gradient dL/dW of the
adapted matrices and the gradients of single samples come from a pass of the probes' own, over fixed batches, now and
then.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from ctsft.adapter.layer import CTEmbedding, CTLayer
from ctsft.adapter.resize import fitted
from ctsft.adapter.store import adapted
from ctsft.choices import PROBES
from ctsft.errors import CTError
from ctsft.spectral.basis import Basis, generator
from ctsft.spectral.collect import own_labels
from ctsft.spectral.decompose import effective_rank, stable_rank
from ctsft.spectral.weights import clean_name, matrix

TOP = 20  # directions that paper 85 holds against the rest
SAMPLES = 4  # with fewer, mean^2 / variance of pure noise has no finite mean (it is Fisher's F with n - 1 degrees)
DENSE = 100  # updates after which diversity is read with the heavy probes: its eigenproblem grows with the updates

Batch = Mapping[str, Tensor]


def double(t: Tensor) -> Tensor:
    """`t` in float64, where it lies if that device knows float64."""
    return t.detach().to("cpu" if t.device.type == "mps" else t.device, torch.float64)


# ------------------------------------------------------------------------------------- gradients of the trained numbers


@dataclass
class Vector:
    """Gradients of all trained numbers as one vector (n,), with the shapes of the parameters in it."""

    flat: Tensor
    shapes: tuple[torch.Size, ...]

    def pieces(self) -> list[Tensor]:
        parts = self.flat.split([s.numel() for s in self.shapes])
        return [part.reshape(s) for part, s in zip(parts, self.shapes, strict=True)]


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that train, in the model's order, tied ones once; CTError if there are none."""
    found: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise CTError("nothing in the model trains, so there is nothing to probe; set requires_grad first.")
    return found


def gradient_vector(model: nn.Module) -> Vector:
    """A copy of the `.grad` of all trained numbers; zero where there is none."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained(model)]
    flat = torch.cat([g.detach().flatten().to(grads[0].device, torch.float32) for g in grads])
    return Vector(flat, tuple(g.shape for g in grads))


def dot(a: Vector, b: Vector) -> float:
    """Inner product. Where K of a parameter has changed in between, only the directions that both have count."""
    if a.shapes == b.shapes:
        return float((a.flat * b.flat).sum())  # unlike a @ b, summed pairwise: exact enough for 10^8 numbers
    return sum(float((x * fitted(y, tuple(x.shape))).sum()) for x, y in zip(a.pieces(), b.pieces(), strict=True))


def norm(a: Vector) -> float:
    return dot(a, a) ** 0.5


def cosine(a: Vector, b: Vector) -> float:
    """Cosine of the angle between two gradients, NaN where one is zero (paper 88)."""
    lengths = norm(a) * norm(b)
    return dot(a, b) / lengths if lengths else float("nan")


@dataclass
class Diversity:
    """Effective rank, over sigma, of the stack of normalised gradients so far (paper 89); from 1 to their number.

    It keeps them all, 8 bytes a trained number and update, and only adds one row to their Gram matrix at each.
    """

    vectors: list[Vector] = field(default_factory=list)
    gram: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))

    def add(self, vector: Vector) -> None:
        new = Vector(double(vector.flat), vector.shapes)  # sigma is the root of an eigenvalue: half the digits are lost
        self.vectors.append(new)
        row = torch.tensor([dot(new, v) for v in self.vectors], dtype=torch.float64)
        self.gram = F.pad(self.gram, (0, 1, 0, 1))
        self.gram[-1], self.gram[:, -1] = row, row

    def value(self) -> float:
        lengths = self.gram.diagonal().sqrt()
        scale = torch.where(lengths > 0, 1 / lengths, 0.0)
        return effective_rank(root_eigenvalues(self.gram * scale * scale[:, None]))


def amplitude_gradients(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The `.grad` of the trained piece of every adapted matrix, by clean name; zero where there is none."""
    pieces = {n: m.ctsft_coefficients[adapter_name] for n, m in layers_of(model, adapter_name).items()}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.detach() for n, p in pieces.items()}


def constrained_effective_rank(gradients: Mapping[str, Tensor]) -> float:
    """Mean over matrices of the effective rank of U diag(g) Vh (paper 83): its sigma are |g_i|, so it is at most K.

    gradients: of the trained pieces; for `core` (K, K) and `scores` (d, K) they have the same sigma as U C Vh too.
    """
    sigma = [g.abs() if g.ndim == 1 else gram_singular_values(g) for g in gradients.values()]
    padded = double(pad_sequence(sigma, batch_first=True))  # zeros add no rank: all matrices at once
    p = padded / padded.sum(1, keepdim=True)
    return float(torch.exp(-torch.special.xlogy(p, p).sum(1)).mean())


def top_and_rest(values: Iterable[Tensor]) -> dict[str, Tensor]:
    """Tensors (..., K) joined along K in two groups, of the ranks below `TOP` and of the others, if there are any."""
    values = list(values)
    groups = {"top": [v[..., :TOP] for v in values], "rest": [v[..., TOP:] for v in values]}
    joined = {name: torch.cat(parts, -1) for name, parts in groups.items()}
    return {name: t for name, t in joined.items() if t.shape[-1]}


@dataclass
class AbsMeanOverStd:
    """What paper 85 calls SNR: mean|g| / std(g) over matrices and all updates so far. No sampling noise enters.

    Pooled as the paper words it, it cannot be far above 1 for gradients of both signs; the paper prints 3 to 6. So it
    is also read `by number`: std over the updates for each trained number, then the mean of the ratios. On a fixed
    batch that tells how slowly the gradient turns.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)  # (4, K) float64: count, sum |g|, sum g, sum g^2

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            g = double(gradient)
            new = torch.stack([torch.ones_like(g), g.abs(), g, g**2])
            old = self.sums.get(name, new.new_zeros(4, 0))
            k = max(old.shape[1], new.shape[1])
            self.sums[name] = F.pad(old, (0, k - old.shape[1])) + F.pad(new, (0, k - new.shape[1]))

    def values(self) -> dict[str, float]:
        """abs_mean_over_std_top and _rest; from two updates on also abs_mean_over_std_by_number_top and _rest."""
        found = {}
        for group, sums in top_and_rest(self.sums.values()).items():
            found[f"abs_mean_over_std_{group}"] = float(self.ratio(sums.sum(1)))
            repeated = sums[:, sums[0] > 1]
            if repeated.shape[1]:
                found[f"abs_mean_over_std_by_number_{group}"] = float(self.ratio(repeated).mean())
        return found

    @staticmethod
    def ratio(sums: Tensor) -> Tensor:
        absolute, mean, square = sums[1:] / sums[0]
        return absolute / (square - mean**2).clamp(min=0).sqrt()


# -------------------------------------------------------------------------------------------------- the true gradient


def coverage(gradient: Tensor, basis: Basis) -> dict[str, Tensor]:
    """Shares of |G|_F^2 that the first k directions of a basis reach, for every k from 1 to K: each (K,), float32.

    gradient: (d_out, d_in). With V = Vh^T and both sides orthonormal:
    `diagonal` |diag(U^T G V)|^2 (what K amplitudes can follow, paper 87), `two_sided` |U^T G V|^2 (`core`),
    `input` |G V|^2 (`scores`), `output` |U^T G|^2, each over |G|^2, and `diagonal_null` = k / (d_out d_in), the
    expectation of `diagonal` for directions that do not know G. What needs a side that the basis lacks is left out.
    """
    g = gradient.detach().float()
    total, found = g.square().sum(), {}
    if basis.vh is not None:
        gv = g @ basis.vh.float().T
        found["input"] = gv.square().sum(0).cumsum(0) / total
    if basis.u is not None:
        ug = basis.u.float().T @ g
        found["output"] = ug.square().sum(1).cumsum(0) / total
    if basis.u is not None and basis.vh is not None:
        squares = (basis.u.float().T @ gv).square()
        found["diagonal"] = squares.diagonal().cumsum(0) / total
        found["two_sided"] = squares.cumsum(0).cumsum(1).diagonal() / total
        found["diagonal_null"] = torch.arange(1, basis.k + 1, device=g.device) / g.numel()
    return found


def root_eigenvalues(gram: Tensor) -> Tensor:
    """sigma (n,) of a matrix A, from its Gram matrix A A^T (n, n) in float64; NaN where that is not finite."""
    if not torch.isfinite(gram).all():
        return gram.new_full(gram.shape[:1], float("nan"))
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()


def gram_singular_values(g: Tensor) -> Tensor:
    """The singular values of `g` (d_out, d_in), float64, unordered, by the Gram matrix of its smaller side."""
    a = double(g)
    return root_eigenvalues(a.T @ a if a.shape[0] >= a.shape[1] else a @ a.T)


# ------------------------------------------------------------------------------------------------- the probes' own pass


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, CTLayer]:
    """The layers that own the adapter, by clean name; CTError if there are none."""
    found = {clean_name(n): m for n, m in adapted(model, adapter_name)}
    if not found:
        raise CTError(f"the model has no CT-SFT adapter {adapter_name!r}; only the norms and cosines fit any run.")
    return found


@contextmanager
def undisturbed(model: nn.Module, *wanted: Tensor) -> Iterator[None]:
    """Evaluation mode and gradients for `wanted` only; then every mode, flag and random state is as it was."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    devices = {p.device for p, _ in flags if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            model.requires_grad_(False).eval()
            for parameter in wanted:
                parameter.requires_grad_(True)
            yield
        finally:
            for module, training in modes:
                module.training = training
            for p, trains in flags:
                p.requires_grad_(trains)


@dataclass
class Look:
    """What one pass saw, by the clean name of the matrix."""

    gradients: dict[str, Tensor]  # dL/dW (d_out, d_in) float32, mean over the batches; of a tied weight both uses
    samples: dict[str, Tensor]  # dL/da of every sample (S, K) float32; their mean over a batch is the batch's


def look(
    model: nn.Module,
    batches: Sequence[Batch],
    gradients: bool = True,
    samples: bool = True,
    adapter_name: str = "default",
) -> Look:
    """One forward and backward pass over `batches` of an adapted model as it stands, without dropout.

    batches: model inputs, input_ids (b, t) with labels (where absent, all tokens but padding); L is the batch's mean
    loss in nats per token. `samples` needs form='diagonal' and a first dimension of b in every adapted layer's input:
    the gradient of a sample is the sum over its tokens of (Vh x)_i (U^T dL/dy)_i, times b, which are K numbers a token
    and no (d_out, d_in) product. The model, its `.grad` and the random state are left as they were. Raises CTError
    where there are no batches or the samples cannot be told apart.
    """
    owners = layers_of(model, adapter_name)
    if not batches:
        raise CTError("a probe of the true gradient needs batches of its own; give at least one.")
    if gradients and any(m.replaces(adapter_name) for m in owners.values()):
        raise CTError("universal_mode='replace' takes W out of the model, so there is no dL/dW to measure.")
    bases = {n: m.get_base_layer() for n, m in owners.items()}
    amplitudes: dict[str, Tensor] = {n: m.ctsft_coefficients[adapter_name] for n, m in owners.items()}
    wanted = [cast(Tensor, b.weight) for b in bases.values()] if gradients else list(amplitudes.values())
    total: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {n: [] for n in owners}
    handles = hooks(model, owners, parts, adapter_name) if samples else []
    device = next(model.parameters()).device
    try:
        with undisturbed(model, *wanted), torch.enable_grad():
            for batch in batches:
                on_device = {k: v.to(device) for k, v in batch.items()}
                for name, a in amplitudes.items() if samples else ():
                    parts[name].append(a.new_zeros(len(on_device["input_ids"]), len(a)))
                loss = model(**{"labels": own_labels(on_device), **on_device}).loss / len(batches)
                found = torch.autograd.grad(loss, wanted, allow_unused=True)
                for (name, base), g in zip(bases.items(), found if gradients else (), strict=gradients):
                    dense = matrix(base, torch.zeros_like(base.weight) if g is None else g).float()  # type: ignore[arg-type]
                    total[name] = total[name] + dense if name in total else dense
    finally:
        for handle in handles:
            handle.remove()
    scaled = {n: torch.cat([g * len(g) * len(batches) for g in p]) for n, p in parts.items() if p}
    return Look(total, scaled)


def hooks(
    model: nn.Module, owners: Mapping[str, CTLayer], parts: Mapping[str, list[Tensor]], adapter_name: str
) -> list[Any]:
    """Hooks that add every use of an adapter to the last (b, K) tensor in its list of `parts`."""
    names = {m: n for n, m in owners.items()}
    made = []
    for layer in model.modules():
        if isinstance(layer, CTLayer) and adapter_name in layer.ctsft_coefficients:
            owner = layer.ctsft_owner[0] if layer.ctsft_owner else layer
            if owner.ctsft_config[adapter_name].form != "diagonal":
                raise CTError("gradient_snr reads the gradients of amplitudes, so it needs form='diagonal'.")
            made.append(layer.register_forward_hook(watched(names[owner], parts[names[owner]], adapter_name)))
    return made


def watched(
    name: str, parts: list[Tensor], adapter_name: str
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A forward hook that takes the K inner numbers of every token, and meets them with dL/dy on the way back."""

    def forward(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        assert isinstance(layer, CTLayer)
        basis, x, total = layer.ready(adapter_name), args[0].detach(), parts[-1]
        u, vh = cast(Tensor, basis.u).float(), cast(Tensor, basis.vh).float()
        if len(x) != len(total):
            raise CTError(
                f"{name} sees {len(x)} rows of a batch of {len(total)}, so its samples cannot be told apart; leave it "
                "out of target_modules, or gradient_snr out of the probes."
            )
        if isinstance(layer, CTEmbedding):  # y = scale Vh^T (a * U[ids])
            inner, outer = F.embedding(x, u), vh.T * layer.scale()
        else:  # y = U (a * (Vh x))
            inner, outer = F.linear(x.float(), vh), u

        def backward(dy: Tensor) -> None:
            total.add_((inner * (dy.float() @ outer)).reshape(len(x), -1, total.shape[1]).sum(1))

        y.register_hook(backward)

    return forward


def gradient_snr(samples: Mapping[str, Tensor]) -> dict[str, float]:
    """The field's signal-to-noise ratio, mean^2 / variance over samples, averaged over directions: {top, rest}.

    samples: gradients of single samples (S, K) by matrix. The variance is the unbiased one of a single sample. Pure
    noise reads (S - 1) / (S (S - 3)), not 0. A direction whose mean is zero counts as 0.
    """

    def ratio(g: Tensor) -> Tensor:
        mean = double(g).mean(0)
        return torch.where(mean == 0, 0.0, mean**2 / double(g).var(0))

    return {group: float(r.mean()) for group, r in top_and_rest(ratio(g) for g in samples.values()).items()}


# ----------------------------------------------------------------------------------------------------- all of them


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


# ------------------------------------------------------------------------------------------------------------- ablation


def ablation(
    model: nn.Module,
    loss: Callable[[], float],
    kept: Sequence[int],
    order: str = "order",
    seed: int = 0,
    adapter_name: str = "default",
) -> dict[str, float]:
    """loss() by the number of trained directions kept in every matrix, all others set to zero (paper 85).

    order: `order` keeps the first, `reverse` the last, `random` a seeded choice per matrix, nested over the counts. A
    matrix with fewer directions keeps all. In evaluation mode; the model is left bit for bit as it was. Keys are the
    counts as text. Raises CTError for another order, a negative count, or no adapter.
    """
    if order not in ("order", "reverse", "random"):
        raise CTError(f"order={order!r} is unknown; choose one of order, reverse, random.")
    if wrong := [n for n in kept if n < 0]:
        raise CTError(f"kept={wrong[0]} must be a number of directions, at least 0.")
    layers = layers_of(model, adapter_name)
    pieces = {n: m.ctsft_coefficients[adapter_name] for n, m in layers.items()}
    whole = {n: p.data for n, p in pieces.items()}

    def ranked(name: str, k: int) -> Tensor:
        if order == "random":
            return torch.randperm(k, generator=generator(seed, "ablation", name))
        return torch.arange(k) if order == "order" else torch.arange(k).flip(0)

    losses = {}
    with undisturbed(model), torch.no_grad():
        try:
            for count in kept:
                for name, c in whole.items():
                    mask = torch.zeros(c.shape[-1], dtype=torch.bool)
                    mask[ranked(name, c.shape[-1])[:count]] = True
                    left = layers[name].form(adapter_name).mask(mask).to(c.device)
                    pieces[name].data = torch.where(left, c, 0.0)
                losses[str(count)] = float(loss())
        finally:
            for name, c in whole.items():
                pieces[name].data = c
    return losses
