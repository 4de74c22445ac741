"""What can be read off gradients: norms, angles, diversity, ranks, signal and noise, coverage by a basis."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ctsft.adapter.resize import fitted
from ctsft.adapter.store import layers_of
from ctsft.errors import CTError
from ctsft.spectral.basis import Basis
from ctsft.spectral.decompose import effective_rank

NORMS = "; only the norms and cosines fit any run"  # told where a quantity needs an adapter
AMPLITUDES = "gradient_snr reads the gradients of amplitudes, so it needs form='diagonal'."
TOP = 20  # directions that paper 85 holds against the rest


def double(t: Tensor) -> Tensor:
    """`t` in float64, where it lies if that device knows float64."""
    return t.detach().to("cpu" if t.device.type == "mps" else t.device, torch.float64)


# ---- gradients of the trained numbers


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
    """The `.grad` of the trained piece of every adapted matrix, by clean name; zero where there is none.

    Raises CTError for a form in whose numbers dW is not linear: its gradient is not one of directions.
    """
    layers = layers_of(model, adapter_name, NORMS)
    if unfit := [m for m in layers.values() if not m.form(adapter_name).linear]:
        raise CTError(
            f"form={unfit[0].ctsft_config[adapter_name].form!r} has gradients that are not of directions alone"
            f"{NORMS}, and coverage any adapter."
        )
    pieces = {n: m.ctsft_coefficients[adapter_name] for n, m in layers.items()}
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
            if gradient.ndim != 1:
                raise CTError(AMPLITUDES)
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


# ---- gradients of single samples


def gradient_snr(samples: Mapping[str, Tensor]) -> dict[str, float]:
    """The field's signal-to-noise ratio, mean^2 / variance over samples, averaged over directions: {top, rest}.

    samples: gradients of single samples (S, K) by matrix. The variance is the unbiased one of a single sample. Pure
    noise reads (S - 1) / (S (S - 3)), not 0. A direction whose mean is zero counts as 0.
    """

    def ratio(g: Tensor) -> Tensor:
        mean = double(g).mean(0)
        return torch.where(mean == 0, 0.0, mean**2 / double(g).var(0))

    return {group: float(r.mean()) for group, r in top_and_rest(ratio(g) for g in samples.values()).items()}


# ---- the true gradient


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
