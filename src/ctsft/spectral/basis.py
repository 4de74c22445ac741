"""Bases: the frozen directions that an adapter trains along.

A `Basis` is one or two frozen factors of dW = U C Vh. With both, C is (K,) or (K, K). With one only, the other factor
is what trains: dW = D Vh with D (d_out, K), or dW = U D^T with D (d_in, K) where a matrix takes part in a shared basis
transposed.
Every maker gives nested directions: those of a smaller K are the first ones of a larger K.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ctsft.spectral.decompose import leading_triples, orthonormal_columns, principal_directions, singular_triples

BLOCK = 64  # random directions are drawn in whole blocks, so that a larger K keeps the smaller one's


@dataclass
class Basis:
    """Frozen directions of one matrix (d_out, d_in), float32 or rounded once to bfloat16.

    u: (d_out, K), or None when the left factor trains. vh: (K, d_in), or None when the right factor trains.
    start: what training starts from where that is not zero: the scores (d_out or d_in, K) where W is *replaced* by its
    K-term form, or the mean amplitudes (K,) of the siblings that the directions were learned from.
    """

    u: Tensor | None
    vh: Tensor | None
    start: Tensor | None = None

    @property
    def k(self) -> int:
        return self.vh.shape[0] if self.vh is not None else self.u.shape[1]  # type: ignore[union-attr]

    def tensors(self) -> dict[str, Tensor]:
        """The factors there are, by name."""
        return {n: t for n, t in (("u", self.u), ("vh", self.vh), ("start", self.start)) if t is not None}

    @property
    def both(self) -> bool:
        """Whether both factors are there."""
        return self.u is not None and self.vh is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.vh.dtype if self.vh is not None else self.u.dtype  # type: ignore[union-attr]

    def rounded(self, dtype: torch.dtype) -> "Basis":
        """The directions in `dtype` (the same factors where they have it already); `start` stays as it is."""
        u, vh = (None if f is None else f.to(dtype) for f in (self.u, self.vh))
        return Basis(u, vh, self.start)

    def move(self, device: torch.device) -> None:
        """Move the factors to `device` in place: one that many bases share moves once, stays shared. Never a cast."""
        for factor in self.tensors().values():
            if factor.device != device:
                factor.data = factor.data.to(device)

    def on_meta(self) -> "Basis":
        """The shapes of the factors, without their numbers: for a model on the meta device, where only shapes count."""
        u, vh, start = (None if f is None else f.to("meta") for f in (self.u, self.vh, self.start))
        return Basis(u, vh, start)

    def view(self, k: int) -> "Basis":
        """The first `k` directions as views of these factors: no memory of their own."""
        u, vh, start = self.u, self.vh, self.start
        if k < self.k:
            u, start = (None if t is None else t[..., :k] for t in (u, start))
            vh = None if vh is None else vh[:k]
        return Basis(u, vh, start)

    def own(self, k: int) -> "Basis":
        """The first `k` directions in memory of their own (all: the same factors)."""
        if k == self.k:
            return self
        parts = {n: t.clone(memory_format=torch.contiguous_format) for n, t in self.view(k).tensors().items()}
        return Basis(parts.get("u"), parts.get("vh"), parts.get("start"))

    def refer_to(self, larger: "Basis") -> None:
        """Give up these factors for views of `larger`, which holds the same numbers, where both lie on one device."""
        same = larger.view(self.k)
        for name, mine in self.tensors().items():
            theirs = getattr(same, name)
            if theirs is not None and theirs.device == mine.device:
                setattr(self, name, theirs)

    def one_side(self) -> "Basis":
        """One factor, for a form that trains the other: vh where both are there."""
        return Basis(None, self.vh, self.start) if self.both else self


def generator(seed: int, *words: object) -> torch.Generator:
    """A CPU generator of its own for `seed` and `words`; the global state is not touched."""
    return torch.Generator().manual_seed(zlib.crc32(repr((seed, *words)).encode()))


def weight_basis(w: Tensor, k: int, which: str = "top", seed: int = 0, name: str = "") -> Basis:
    """`k` singular directions of `w` (d_out, d_in): `top`, `bottom`, or a seeded `random` choice (papers 81-88)."""
    n = min(w.shape)
    if which == "top":
        u, _, vh = leading_triples(w, k)
        return Basis(u.float().contiguous(), vh.float().contiguous())
    if which == "bottom":
        ranks = n - 1 - torch.arange(k)
    else:
        ranks = torch.randperm(n, generator=generator(seed, "choice", name))[:k]
    u, _, vh = singular_triples(w, ranks)
    return Basis(u.float().contiguous(), vh.float().contiguous())


def random_basis(shape: tuple[int, int], k: int, seed: int, name: str) -> Basis:
    """A seeded orthonormal draw for a matrix of `shape` (d_out, d_in): the null that every claim is held against."""

    def columns(d: int, side: str) -> Tensor:
        blocks = [
            torch.randn(d, BLOCK, generator=generator(seed, name, side, b), dtype=torch.float64)
            for b in range(-(-k // BLOCK))
        ]
        return orthonormal_columns(torch.cat(blocks, 1)[:, :k]).float()

    d_out, d_in = shape
    return Basis(columns(d_out, "u").contiguous(), columns(d_in, "vh").T.contiguous())


def gradient_basis(gradient: Tensor, k: int) -> Basis:
    """Top singular directions of the mean loss gradient (d_out, d_in) over calibration batches."""
    return weight_basis(gradient, k)


def input_basis(gram: Tensor, k: int) -> Basis:
    """Input-side basis: the `k` leading directions of `gram` (d_in, d_in) = sum x x^T.

    x runs over the layer's inputs (EVA), or over the rows of all matrices (the universal basis, paper 78).
    """
    return Basis(None, principal_directions(gram, k).float().contiguous())


def two_sides(vh: Tensor, ks: Iterable[int]) -> dict[int, tuple[Basis, Basis]]:
    """For every K in `ks` the first K rows of `vh` as an input side and, transposed, as an output side.

    All matrices that use a shared basis refer to these few tensors, which are views of one.
    """
    return {k: (Basis(None, vh[:k]), Basis(vh[:k].T, None)) for k in ks}


def paired(w: Tensor, basis: Basis) -> Basis:
    """Give a one-sided basis its other side: the images of its directions under `w`, orthonormalised in order.

    Used where C is diagonal or square but the basis knows one side only (`universal`, `activation`).
    """
    a = w.detach().to("cpu", torch.float64)
    if basis.vh is not None:
        return Basis(orthonormal_columns(a @ basis.vh.double().T).float().contiguous(), basis.vh)
    assert basis.u is not None
    return Basis(basis.u, orthonormal_columns(a.T @ basis.u.double()).T.float().contiguous())


def replacing(w: Tensor, basis: Basis) -> Basis:
    """The paper's form (78): W becomes its K-term reconstruction; training starts from its scores W Vh^T (or W^T U)."""
    a = w.detach().to("cpu", torch.float32)
    start = a @ basis.vh.float().T if basis.vh is not None else a.T @ basis.u.float()  # type: ignore[union-attr]
    return Basis(basis.u, basis.vh, start.contiguous())


def checksum(basis: Basis, name: str) -> float:
    """One number, of order sqrt(K), that moves when directions of `basis` rotate, even among themselves.

    A random combination, seeded by `name`, of the projections of all directions on a random vector.
    """
    g = generator(0, "checksum", name)
    total = 0.0
    for side in (basis.u, None if basis.vh is None else basis.vh.T):
        if side is not None:
            projections = torch.randn(side.shape[0], generator=g, dtype=torch.float64) @ side.cpu().double()
            total += float(projections @ torch.randn(basis.k, generator=g, dtype=torch.float64))
    return total
