"""Lone adapters: what else few numbers can do. For comparison only; all but one have neither data nor siblings.

One function of LONE is one method. It freezes what it draws or decomposes, and says how the change of every matrix is
made of the n trained numbers of the whole model, which are zero at the start, as is the change. `k` is the mean of
trained numbers a matrix, or their count in the whole model. See `equip` for the published methods that peft has.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctsft.adapter.learned import Learned
from ctsft.errors import CTError
from ctsft.spectral.basis import Basis, generator, random_basis, weight_basis
from ctsft.spectral.decompose import leading_triples, orthonormal_columns
from ctsft.spectral.weights import clean_name, matrix

Make = Callable[[Tensor], tuple[Tensor, Tensor]]  # numbers (n,) -> left (d_out, r) and right (r, d_in), dW = left right
Changes = dict[str, Make]  # by the name of the matrix
WIDE = 32  # rank of the core that `tinylora` moves through few numbers
RANK = 4  # of the LoRA whose entries `unilora` shares
START = 0.5  # amplitudes of `grouped` at the start: few directions have short rows, so gains of them are larger
INTO_STREAM = ("o_proj", "down_proj", "c_proj", "attn.proj", "mlp.down")  # what writes into the residual stream


def tinylora(weights: Mapping[str, Tensor], k: int, basis: str, seed: int) -> Changes:
    """LoRA-XS of rank WIDE through k numbers: dW = U_r S_r (sum_i c_i P_i) Vh_r of W, with k random P_i (r, r)."""

    def one(i: int, name: str, w: Tensor) -> Make:
        r = min(WIDE, *w.shape)
        u, s, vh = (t.float() for t in leading_triples(w, r))
        p = torch.randn(r * r, k, generator=generator(seed, "tinylora", name), dtype=torch.float64)
        p = orthonormal_columns(p).float()
        return lambda c: (u * s @ (p @ c[i * k : i * k + k]).view(r, r), vh)

    return {name: one(i, name, w) for i, (name, w) in enumerate(weights.items())}


def unilora(weights: Mapping[str, Tensor], k: int, basis: str, seed: int) -> Changes:
    """LoRA of rank RANK, each entry of which moves by one of the model's n numbers, drawn once (Li et al. 2025).

    The projection is isometric: a number that m entries share moves them by 1 / sqrt(m). Unlike there, A starts as a
    LoRA's and B at zero, so that the change does.
    """
    total, sizes = k * len(weights), [RANK * sum(w.shape) for w in weights.values()]
    index = torch.randint(total, (sum(sizes),), generator=generator(seed, "unilora"))
    scale = index.bincount(minlength=total)[index].float().rsqrt()

    def one(name: str, w: Tensor, own: Tensor, share: Tensor) -> Make:
        d_out, d_in = w.shape
        a = (torch.rand(RANK, d_in, generator=generator(seed, "unilora", name)) * 2 - 1) / d_in**0.5

        def make(c: Tensor) -> tuple[Tensor, Tensor]:
            entries = c[own] * share
            return entries[: RANK * d_out].view(d_out, RANK), a + entries[RANK * d_out :].view(RANK, d_in)

        return make

    pieces = zip(weights.items(), index.split(sizes), scale.split(sizes), strict=True)
    return {name: one(name, w, own, share) for (name, w), own, share in pieces}


def grouped(weights: Mapping[str, Tensor], k: int, basis: str, seed: int) -> Changes:
    """Gains cut to k numbers: dW = diag(b) U diag(START + a) Vh, k / 4 amplitudes a, neighbouring outputs share b."""
    few = k // 4

    def one(i: int, name: str, w: Tensor) -> Make:
        found = directions(name, w, few, basis, seed)
        group = torch.arange(len(w)) * (k - few) // len(w)

        def make(c: Tensor) -> tuple[Tensor, Tensor]:
            b, a = c[i * k : i * k + k].split([k - few, few])
            return b[group, None] * found.u * (START + a), found.vh  # type: ignore[return-value]

        return make

    return {name: one(i, name, w) for i, (name, w) in enumerate(weights.items())}


def diagonal(weights: Mapping[str, Tensor], k: int, basis: str, seed: int) -> Changes:
    """k amplitudes of every matrix, as the form of that name."""

    def one(i: int, name: str, w: Tensor) -> Make:
        found = directions(name, w, k, basis, seed)
        return lambda c: (found.u * c[i * k : i * k + k], found.vh)  # type: ignore[return-value, operator]

    return {name: one(i, name, w) for i, (name, w) in enumerate(weights.items())}


def moved(weights: Mapping[str, Tensor], k: int, basis: str, seed: int) -> Changes:
    """All amplitudes, k a matrix in the mean, on the matrices that write into the residual stream."""
    few = {name: w for name, w in weights.items() if name.endswith(INTO_STREAM)}
    if not few:
        raise CTError(f"no matrix ends in one of {', '.join(INTO_STREAM)}, so there is nothing to move numbers to.")
    return diagonal(few, k * len(weights) // len(few), basis, seed)


def components(weights: Mapping[str, Tensor], k: int, basis: str, seed: int) -> Changes:
    """k numbers for the whole model: weights of the leading principal components of what siblings' amplitudes are, in
    the folder `basis` of learned directions.

    A component changes all matrices together. It is as long as the siblings vary along it (one standard deviation).
    """
    learned = Learned.read(basis)
    a = [learned.siblings[clean_name(name)] for name in weights]
    every = torch.cat(a, 1)  # (siblings, all directions of all matrices)
    if k >= len(every):
        raise CTError(f"{len(every)} siblings have {len(every) - 1} components beside their mean and not {k}; lower k.")
    _, s, vh = torch.linalg.svd((every - every.mean(0)).double(), full_matrices=False)
    rows = (s[:k, None] * vh[:k] / len(every) ** 0.5).float().split([one.shape[1] for one in a], 1)

    def one(name: str, p: Tensor) -> Make:
        return lambda c: (learned.u[name] * (c @ p), learned.vh[name])

    return {name: one(clean_name(name), p) for name, p in zip(weights, rows, strict=True)}


class Lone(NamedTuple):
    """A method: how it changes matrices, from their weights, k, basis and seed."""

    changes: Callable[[Mapping[str, Tensor], int, str, int], Changes]
    with_norms: bool = False  # whether norm gains train beside the numbers
    whole: bool = False  # whether k counts the numbers of the whole model


LONE = {
    "tinylora": Lone(tinylora),
    "unilora": Lone(unilora),
    "grouped": Lone(grouped),
    "moved": Lone(moved),
    "with-norms": Lone(diagonal, with_norms=True),
    "components": Lone(components, whole=True),
}


def directions(name: str, w: Tensor, k: int, basis: str, seed: int) -> Basis:
    """`k` random or W's own directions of the matrix `w` (d_out, d_in)."""
    if k > min(w.shape):
        raise CTError(f"{k} directions are more than {name} has ({w.shape[0]} x {w.shape[1]}); lower k.")
    if basis not in ("random", "weight"):
        raise CTError(f"basis={basis!r} is unknown to lone adapters; choose random or weight.")
    return random_basis((w.shape[0], w.shape[1]), k, seed, name) if basis == "random" else weight_basis(w, k)


def attach(model: nn.Module, modules: Mapping[str, nn.Module], method: str, k: int, basis: str, seed: int) -> None:
    """Put `method` of LONE into `model`, on `modules` (Linear or Conv1D); its n numbers alone train, as `model.lone`.

    basis: random or weight, or the folder of learned directions, by what the method has. Raises CTError for a k or
    basis that it cannot have.
    """
    changes_of, with_norms, whole = LONE[method]
    weights = {name: matrix(module).detach() for name, module in modules.items()}
    changes = changes_of(weights, k, basis, seed)
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_(with_norms and p.ndim == 1 and name.endswith("weight"))
    numbers = nn.Parameter(torch.zeros(k if whole else k * len(weights)))
    model.register_parameter("lone", numbers)

    def hook(make: Make) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            left, right = make(numbers)
            return y + F.linear(F.linear(args[0].to(left.dtype), right), left).to(y.dtype)

        return add

    for name, make in changes.items():
        modules[name].register_forward_hook(hook(make))
