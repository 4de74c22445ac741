"""Spectra: which directions a matrix has, and how its energy is spread over them.

Decompositions run on one CPU thread, with a fixed sign, so that the same weights give the same bits on the same machine
whatever the caller's thread count. They are exact, in float64, and cost one symmetric eigenproblem of the smaller side;
the leading triples of a large matrix are iterated instead, to a stated residual (`leading_triples`).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

VERSION = 1  # of what decides the bits of a decomposition: a change of them raises it, and kept bases are made anew
GRAM_LIMIT = 1e-4  # below this share of the largest singular value, the Gram matrix has squared the accuracy away

# The iteration of `leading_triples`: chosen by measurement, and part of what decides the bits of a basis.
ITERATED_FROM = 1024  # smaller sides up to this are decomposed exactly
GROUP = (
    64  # directions are iterated in whole groups, so that those of a smaller K are the first of a larger, bit for bit
)
BLOCK, ROOM, KEPT, STEPS = 32, 448, 128, 150  # rows a step, most rows held, those kept at a restart, most steps
# dtype of the iteration, residual (of s_1) that it runs to, and residual that is accepted when checked in float64
STAGES = ((torch.float32, 3e-7, 2e-6), (torch.float64, 1e-9, 1e-8))


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
    A triple does not depend on which others are asked for. Orthonormal to 2e-8 where a matrix has values both above and
    below GRAM_LIMIT, else to rounding.
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


def iterated(shape: torch.Size, k: int) -> bool:
    """Whether `leading_triples` iterates for `k` triples of a matrix of `shape`; else it decomposes exactly."""
    n = min(shape)
    return n > ITERATED_FROM and k <= most_iterated(n)


def most_iterated(n: int) -> int:
    """The most directions that are iterated where the smaller side is `n`: an eighth of it, in whole groups."""
    return n // (8 * GROUP) * GROUP


def leading_triples(w: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` largest singular triples of `w` (d_out, d_in): u (d_out, k), s (k,), vh (k, d_in), float64 on the CPU.

    Where `iterated` says so, by a seeded block Lanczos iteration with thick restarts (Wu and Simon 2000) on the Gram
    matrix of the smaller side in float32, then Rayleigh-Ritz in float64. Every triple has |w^T u - s v| <= 2e-6 s_1 and
    w v = s u; energies are then exact to 1e-11, directions to about 1e-6 (at worst to 2e-6 s_1 over the gap between the
    64th value of a group and the next). Groups of 64 are iterated one after the other, each on what the earlier ones
    leave, so that the triples of a smaller k are the first of a larger k to the bit. Where float32 does not get there
    float64 does the same, and where that does not (rank below k, values under 1e-4 s_1) the rest is exact. Else it is
    `singular_triples`.
    """
    if not iterated(w.shape, k):
        return singular_triples(w, torch.arange(k))
    with one_thread():
        a = w.detach().to("cpu", torch.float64)
        scale = 2.0 ** math.frexp(float(torch.linalg.vector_norm(w.detach(), torch.inf)))[1]
        if not 2**-20 < scale < 2**20:  # float32 would not hold the squares
            a = a / scale
        else:
            scale = 1.0
        wide = a.shape[0] < a.shape[1]
        if wide:
            a = a.T
        u, s, vh = a.new_empty(len(a), 0), a.new_empty(0), a.new_empty(0, a.shape[1])
        while len(s) < k:
            more = next_group(a, u, s, vh) or remaining(a, u, vh, most_iterated(a.shape[1]) - len(s))
            u, s, vh = torch.cat([u, more[0]], 1), torch.cat([s, more[1]]), torch.cat([vh, more[2]])
        u, s, vh = u[:, :k], s[:k], vh[:k]
        if wide:
            u, vh = vh.T, u.T
        sign = fixed_sign(vh)
        return u * sign, s * scale, vh * sign[:, None]


def seconds(shape: torch.Size, k: int, leading: bool) -> float:
    """Roughly how long one core of 2024 takes for `k` triples of a matrix of `shape`, `leading` ones or chosen ones."""
    short, long = sorted(shape)
    if leading and iterated(shape, k):
        return -(-k // GROUP) * (long * short**2 / 4e10 + 1.5e-4 * short)
    return (2 * long * short**2 + 10 * short**3) / 2.5e10


def next_group(a: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The GROUP triples of the tall `a` (m, n) that follow the known `u`, `s`, `vh`; None where iterating fails."""
    for dtype, aim, accepted in STAGES:
        gram = whole_gram(a.to(dtype))
        gram -= (vh.T * s.square() @ vh).to(dtype)  # the known directions sink to 0: the next ones lead what is left
        v = ritz_rows(gram, len(s), float(s[0]) if len(s) else None, aim).double()
        v = torch.linalg.qr((v - v @ vh.T @ vh).T)[0].T  # what rounding has brought back of them leaves here
        y = F.linear(v, a)  # Rayleigh-Ritz on `a` itself: its Gram matrix has squared the accuracy away
        values, mix = torch.linalg.eigh(y @ y.T)
        found, mix = values.flip(0)[:GROUP].clamp(min=0).sqrt(), mix.flip(1)[:, :GROUP].T
        largest = s[0] if len(s) else found[0]
        if found[-1] <= GRAM_LIMIT * largest:
            return None
        left, right = mix @ y / found[:, None], mix @ v
        if (left @ a - found[:, None] * right).norm(dim=1).max() <= accepted * largest:
            return left.T, found, right
    return None


def ritz_rows(gram: Tensor, seed: int, s1: float | None, aim: float) -> Tensor:
    """KEPT orthonormal rows (KEPT, n) that hold the GROUP leading eigenvectors of `gram` (n, n).

    `aim`: residual as a share of `s1`, the largest singular value (None: of `gram` itself), at which the GROUP leading
    ones count as found; the caller checks, for STEPS may run out before.
    """
    n, dtype = len(gram), gram.dtype
    start = torch.randn(n, BLOCK, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    space = gram.new_empty(ROOM + BLOCK, n)
    space[:BLOCK] = torch.linalg.qr(start)[0].T
    projected = torch.zeros(ROOM, ROOM, dtype=torch.float64)  # of gram, on the rows of the space
    held = BLOCK
    for step in range(STEPS):
        rows = space[:held]
        image = rows[-BLOCK:] @ gram  # only the newest rows are multiplied: the older ones' images lie in the space
        inside = image @ rows.T
        projected[held - BLOCK : held, :held], projected[:held, held - BLOCK : held] = inside, inside.T
        outside = image - inside @ rows  # what the space does not hold yet: the next block, and the residual
        block = torch.linalg.qr(outside.T)[0].T
        block = torch.linalg.qr((block - block @ rows.T @ rows).T)[0].T  # "twice is enough"; also where outside is 0
        full, last = held == ROOM, step == STEPS - 1
        # not at every step: the small eigenproblem costs too
        if full or last or (held >= 4 * GROUP and held % (4 * BLOCK) == 0):
            values, mix = torch.linalg.eigh(projected[:held, :held])
            values, mix = values.flip(0), mix.flip(1)
            s = values[:GROUP].clamp(min=torch.finfo(dtype).tiny).sqrt()
            residuals = (mix[-BLOCK:, :GROUP].T @ (outside @ block.T).double()).norm(dim=1) / s
            found = bool((residuals <= aim * (s1 or s[0])).all())
            if full or last or found:
                rows = mix[:, :KEPT].T.to(dtype) @ rows
                if last or found:
                    return rows
                # restart with twice the rows that are wanted: the gap to what is let go decides how fast it goes on
                space[:KEPT], held = rows, KEPT
                projected.zero_().diagonal()[:KEPT] = values[:KEPT]
        space[held : held + BLOCK] = block
        held += BLOCK
    raise AssertionError("the last step returns")


def lower_gram(a: Tensor, edges: Sequence[int], out: Tensor) -> Tensor:
    """a^T a of `a` (m, n) into `out` (n, n), in blocks of rows between `edges`, each up to its own diagonal block.

    The lower triangle is all that is meant to be read: what it is the mirror of is not computed. The edges and the
    layout of `out` (its rows or, as `gram.T`, its columns together in memory) are part of what decides the bits.
    """
    for low, high in pairwise(edges):
        torch.mm(a[:, low:high].T, a[:, :high], out=out[low:high, :high])
    return out


def whole_gram(a: Tensor) -> Tensor:
    """a^T a of `a` (m, n), (n, n), in eight strips: one triangle is a copy of the other, which saves 7 parts in 16."""
    n = a.shape[1]
    edges = [n * i // 8 for i in range(9)]
    gram = lower_gram(a, edges, a.new_empty(n, n).T).T
    for low, high in pairwise(edges):
        gram[low:high, :low] = gram[:low, low:high].T
        block = gram[low:high, low:high]
        block.copy_(block.triu() + block.triu(1).T)  # not every BLAS gives both triangles the same bits
    return gram


def remaining(a: Tensor, u: Tensor, vh: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` triples of the tall `a` (m, n) that follow the known `u`, `vh`, exactly: those of what is left of it.

    `count` does not depend on K, nor do the bits.
    """
    if not len(vh):
        return singular_triples(a, torch.arange(count))
    left, right = (torch.linalg.qr(known, mode="complete")[0][:, len(vh) :] for known in (u, vh.T))
    more_u, s, more_vh = singular_triples(left.T @ a @ right, torch.arange(count))
    return left @ more_u, s, more_vh @ right.T


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
