"""Spectra: which directions a matrix has, and how its energy is spread over them.

Decompositions run in float64 on one CPU thread, with a fixed sign, so that the same weights give the same bits on the
same machine whatever the caller's thread count. They cost one symmetric eigenproblem of the smaller side.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

GRAM_LIMIT = 1e-4  # below this share of the largest singular value, the Gram matrix has squared the accuracy away


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: the bits of a decomposition depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def singular_values(w: Tensor) -> Tensor:
    """All singular values of `w` (d_out, d_in), descending, float64, shape (min(d_out, d_in),)."""
    with one_thread():
        return torch.linalg.svdvals(w.detach().to("cpu", torch.float64))


def singular_triples(w: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triples of `w` (d_out, d_in) at the ranks `which` (K,), 0 being the largest.

    Returns u (d_out, K), s (K,), vh (K, d_in), all float64 on the CPU; the largest entry of each row of vh is positive.
    A triple does not depend on which others are asked for.
    """
    with one_thread():
        a = w.detach().to("cpu", torch.float64)
        tall = a.shape[0] >= a.shape[1]
        values, vectors = torch.linalg.eigh(a.T @ a if tall else a @ a.T)
        s = values.flip(0).clamp(min=0).sqrt()
        picked, one = s[which], vectors.flip(1)[:, which]
        u, vh = (a @ one / picked, one.T) if tall else (one, (a.T @ one / picked).T)
        small = picked <= GRAM_LIMIT * s[0]
        if small.any():
            full_u, full_s, full_vh = torch.linalg.svd(a, full_matrices=False)
            u[:, small], picked[small], vh[small] = full_u[:, which[small]], full_s[which[small]], full_vh[which[small]]
        sign = fixed_sign(vh)
        return u * sign, picked, vh * sign[:, None]


def principal_directions(gram: Tensor, k: int) -> Tensor:
    """The `k` leading eigenvectors of a symmetric `gram` (d, d), as rows (k, d), float64, sign fixed."""
    with one_thread():
        _, vectors = torch.linalg.eigh(gram.detach().to("cpu", torch.float64))
        rows = vectors.flip(1)[:, :k].T
        return rows * fixed_sign(rows)[:, None]


def orthonormal_columns(a: Tensor) -> Tensor:
    """Gram-Schmidt on the columns of `a` (d, K) in order: the first do not depend on the later ones. float64."""
    with one_thread():
        q, r = torch.linalg.qr(a.detach().to("cpu", torch.float64))
        diagonal = r.diagonal()
        return q * torch.where(diagonal < 0, -1.0, 1.0)


def fixed_sign(rows: Tensor) -> Tensor:
    """(K,) of +-1 that makes the largest entry of each row of `rows` (K, d) positive."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0]
    return torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of sigma / sum sigma (Roy and Vetterli 2007); from 1 to len(s). `s` (n,) singular values."""
    p = s.double() / s.double().sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def stable_rank(s: Tensor) -> float:
    """|W|_F^2 / |W|_2^2 = sum sigma^2 / max sigma^2. `s` (n,) singular values."""
    return float((s.double() ** 2).sum() / s.double().max() ** 2)


def energy(s: Tensor, k: int) -> float:
    """Share of the squared Frobenius norm in the `k` largest singular values. `s` (n,) descending."""
    squares = s.double() ** 2
    return float(squares[:k].sum() / squares.sum())
