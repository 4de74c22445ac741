"""Forms: what trains beside or between the frozen factors of a basis, one class each, and all that it decides.

A new form is one class in FORMS, its name in `choices.Form`, and tests. Nobody else asks which form an adapter has.
Index letters: t tokens, i inputs, o outputs, k directions.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ctsft.spectral.basis import Basis


class Form(ABC):
    """dW = left right, (d_out, K) (K, d_in), made of frozen factors and c, the trained numbers; zero where c is.

    The basis is `Basis(u, vh)`; c is float32. Products with c run in float32, those with u and vh in the wider of their
    and the input's dtype.
    """

    both: ClassVar[bool] = True  # whether it needs u and vh, or trains one of them
    linear: ClassVar[bool] = True  # whether dW is linear in c, so that adapters along the same directions add up
    absent: ClassVar[float] = 0.0  # what the numbers of a direction hold where it adds nothing
    rate: ClassVar[float]  # its best learning rate as a share of a typical singular value, at K = 64 (see rate.py)

    @abstractmethod
    def shape(self, w: torch.Size, basis: Basis | None, k: int) -> tuple[int, ...]:
        """Shape of c for a matrix of shape `w` (d_out, d_in) at K = `k`. `basis` None: that of a file still unread."""

    @abstractmethod
    def factors(self, basis: Basis, c: Tensor) -> tuple[Tensor, Tensor]:
        """left (d_out, K) and right (K, d_in), float32."""

    @abstractmethod
    def delta(self, x: Tensor, basis: Basis, c: Tensor) -> Tensor:
        """dW x for `x` (..., d_in): (..., d_out). By plain autograd: the twin of `forward` and `backward`."""

    @abstractmethod
    def rows(self, ids: Tensor, basis: Basis, c: Tensor) -> Tensor:
        """The rows of dW (vocabulary, d_model) that `ids` (...) pick: (..., d_model)."""

    @abstractmethod
    def forward(self, x: Tensor, u: Tensor | None, c: Tensor, vh: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """a (t, K) and b (K, d_out) with dW x = a b for the rows of `x` (t, d_in), and what `backward` needs of them.

        What is kept has K numbers a token, or is `x` itself.
        """

    @abstractmethod
    def backward(
        self, dy: Tensor, kept: Tensor, u: Tensor | None, c: Tensor, vh: Tensor | None, wants_c: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """dL/dc (where wanted), and d (t, K) and b (K, d_in) with dL/dx = d b, for dL/dy = `dy` (t, d_out)."""

    def begin(self, start: Tensor) -> Tensor:
        """The c of the dW that training starts from: `start` is a basis' own (see `Basis`), of amplitudes (K,)."""
        return start

    def weighted(self, c: Tensor, by: Tensor) -> Tensor:
        """c with what every direction adds multiplied by its number in `by` (K,); of `core`, on the input side."""
        return c * by

    def only(self, c: Tensor, keep: Tensor) -> Tensor:
        """c where of the directions only those of `keep` (K,), a mask, add anything."""
        return self.weighted(c, keep.to(c))


class Between(Form):
    """C stands between both factors: dW = U C Vh."""

    @abstractmethod
    def mixed(self, z: Tensor, c: Tensor) -> Tensor:
        """C z for every token of `z` (t, K)."""

    def delta(self, x: Tensor, basis: Basis, c: Tensor) -> Tensor:
        u, vh = both_of(basis)
        dtype = torch.promote_types(x.dtype, basis.dtype)
        z = self.mixed(F.linear(x.to(dtype), vh.to(dtype)).float(), c)
        return F.linear(z.to(dtype), u.to(dtype))

    def forward(self, x: Tensor, u: Tensor | None, c: Tensor, vh: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert u is not None and vh is not None
        z = product(x, vh.T, x.dtype)
        return self.mixed(z, c), u.T, z


class Diagonal(Between):
    """C = diag(c): K amplitudes c (K,)."""

    rate = 0.07

    def shape(self, w: torch.Size, basis: Basis | None, k: int) -> tuple[int, ...]:
        return (k,)

    def mixed(self, z: Tensor, c: Tensor) -> Tensor:
        return z * c

    def factors(self, basis: Basis, c: Tensor) -> tuple[Tensor, Tensor]:
        u, vh = both_of(basis)
        return u.float() * c, vh.float()

    def rows(self, ids: Tensor, basis: Basis, c: Tensor) -> Tensor:
        u, vh = both_of(basis)
        return F.embedding(ids, u).float() * c @ vh.float()

    def backward(
        self, dy: Tensor, kept: Tensor, u: Tensor | None, c: Tensor, vh: Tensor | None, wants_c: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        assert u is not None and vh is not None
        d = product(dy, u, dy.dtype)
        return (d.float() * kept).sum(0) if wants_c else None, d * c, vh


class Core(Between):
    """C = c, a K x K matrix."""

    rate = 0.004

    def shape(self, w: torch.Size, basis: Basis | None, k: int) -> tuple[int, ...]:
        return k, k

    def mixed(self, z: Tensor, c: Tensor) -> Tensor:
        return z.float() @ c.T

    def factors(self, basis: Basis, c: Tensor) -> tuple[Tensor, Tensor]:
        u, vh = both_of(basis)
        return u.float() @ c, vh.float()

    def rows(self, ids: Tensor, basis: Basis, c: Tensor) -> Tensor:
        u, vh = both_of(basis)
        return F.embedding(ids, u).float() @ c @ vh.float()

    def backward(
        self, dy: Tensor, kept: Tensor, u: Tensor | None, c: Tensor, vh: Tensor | None, wants_c: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        assert u is not None and vh is not None
        d = product(dy, u, dy.dtype).float()
        return d.T @ kept.float() if wants_c else None, d @ c, vh

    def begin(self, start: Tensor) -> Tensor:
        return torch.diag(start)

    def only(self, c: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep & keep[:, None], c, 0.0)


class Scores(Form):
    """c is one whole factor: dW = c Vh with c (d_out, K), or, where the basis knows the output side, dW = U c^T with
    c (d_in, K)."""

    both = False
    rate = 0.0015

    def shape(self, w: torch.Size, basis: Basis | None, k: int) -> tuple[int, ...]:
        d_out, d_in = w
        return d_in if basis is not None and basis.vh is None else d_out, k

    def factors(self, basis: Basis, c: Tensor) -> tuple[Tensor, Tensor]:
        return (c, basis.vh.float()) if basis.vh is not None else (cast(Tensor, basis.u).float(), c.T)

    def delta(self, x: Tensor, basis: Basis, c: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, basis.dtype)
        if basis.vh is not None:
            return F.linear(F.linear(x.to(dtype), basis.vh.to(dtype)).float(), c)
        return F.linear((x.float() @ c).to(dtype), cast(Tensor, basis.u).to(dtype))

    def rows(self, ids: Tensor, basis: Basis, c: Tensor) -> Tensor:
        if basis.vh is not None:
            return F.embedding(ids, c) @ basis.vh.float()
        return F.embedding(ids, cast(Tensor, basis.u)).float() @ c.T

    def forward(self, x: Tensor, u: Tensor | None, c: Tensor, vh: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if vh is not None:
            z = product(x, vh.T, x.dtype)
            return z.float(), c.T, z
        return x.float() @ c, cast(Tensor, u).T, x

    def backward(
        self, dy: Tensor, kept: Tensor, u: Tensor | None, c: Tensor, vh: Tensor | None, wants_c: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        if vh is not None:
            d = dy.float()
            return d.T @ kept.float() if wants_c else None, d @ c, vh
        d = product(dy, cast(Tensor, u), dy.dtype).float()
        return kept.float().T @ d if wants_c else None, d, c.T


class Gains(Between):
    """dW = diag(b) U diag(a) Vh: c (d_out + K,) is b, a gain for every output, and then a - EVEN, amplitudes.

    The idea is VeRA's (Kopiczko et al. 2024, there EVEN is 0.1). At c = 0 dW is zero, and its gradient in b is not.
    """

    rate = 0.1  # below those of two small models at K = 256, 0.3 and 0.5: larger ones were not tried
    linear = False
    EVEN = 0.1  # the amplitudes at the start; of 0.03 to 1, the best with one rate for b and a (LOG.md)
    absent = -EVEN

    def parts(self, c: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """b (d_out,) and a (K,)."""
        return c[:-k], c[-k:] + self.EVEN

    def shape(self, w: torch.Size, basis: Basis | None, k: int) -> tuple[int, ...]:
        return (w[0] + k,)

    def mixed(self, z: Tensor, c: Tensor) -> Tensor:
        return z * self.parts(c, z.shape[-1])[1]

    def factors(self, basis: Basis, c: Tensor) -> tuple[Tensor, Tensor]:
        u, vh = both_of(basis)
        b, a = self.parts(c, basis.k)
        return b[:, None] * u.float() * a, vh.float()

    def delta(self, x: Tensor, basis: Basis, c: Tensor) -> Tensor:
        return super().delta(x, basis, c) * self.parts(c, basis.k)[0]

    def rows(self, ids: Tensor, basis: Basis, c: Tensor) -> Tensor:
        u, vh = both_of(basis)
        b, a = self.parts(c, basis.k)
        return F.embedding(ids, b[:, None]) * F.embedding(ids, u).float() * a @ vh.float()

    def forward(self, x: Tensor, u: Tensor | None, c: Tensor, vh: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        a, right, z = super().forward(x, u, c, vh)
        return a, (right * self.parts(c, z.shape[-1])[0]).to(z.dtype), z

    def backward(
        self, dy: Tensor, kept: Tensor, u: Tensor | None, c: Tensor, vh: Tensor | None, wants_c: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        assert u is not None and vh is not None
        b, a = self.parts(c, vh.shape[0])
        d = product(dy, (b[:, None] * u).to(kept.dtype), dy.dtype) * a
        if not wants_c:
            return None, d, vh
        g = dy.float().T @ kept.float() * u  # (d_out, K): dL/dW seen from the input side, times u
        return torch.cat([g @ a, b @ g]), d, vh

    def weighted(self, c: Tensor, by: Tensor) -> Tensor:
        b, own = c[: -len(by)], c[-len(by) :]
        return torch.cat([b, own * by + self.absent * (1 - by)])


FORMS: dict[str, Form] = {"diagonal": Diagonal(), "core": Core(), "scores": Scores(), "gains": Gains()}


def both_of(basis: Basis) -> tuple[Tensor, Tensor]:
    """u and vh of a basis that has both."""
    assert basis.u is not None and basis.vh is not None
    return basis.u, basis.vh


def product(a: Tensor, b: Tensor, at_least: torch.dtype) -> Tensor:
    """a b in the wider of b's dtype and `at_least`."""
    dtype = torch.promote_types(at_least, b.dtype)
    return a.to(dtype) @ b.to(dtype)
