"""The file of directions that siblings share: what lies in it, and how they were learned."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctsft.choices import LEARNED
from ctsft.errors import CTError
from ctsft.files import replacing
from ctsft.spectral.basis import generator
from ctsft.spectral.kinds import FACTS, SEAL, check_seal, seal
from ctsft.spectral.weights import fingerprint


@dataclass
class Sibling:
    """A task that directions were learned from: its rows and tokens that were trained on (with repeats) and its mean
    losses in nats per token over its held-out batches, None where it has none."""

    name: str
    rows: int = 0
    tokens: int = 0
    before: float | None = None
    after: float | None = None


@dataclass
class Facts:
    """How directions were learned. base: fingerprint of the target matrices; model: where the base came from."""

    siblings: list[Sibling]
    base: str
    model: str
    k: int | dict[str, int]
    steps: int
    batches: int
    rates: list[float]
    nested: bool
    seed: int
    seconds: float = 0.0


@dataclass
class Learned:
    """Directions that siblings share, by clean module name: u (d_out, K) of unit columns and vh (K, d_in) of unit rows,
    not orthogonal, and siblings (S, K), the amplitude of every sibling along each; all float32."""

    u: dict[str, Tensor]
    vh: dict[str, Tensor]
    siblings: dict[str, Tensor]
    facts: Facts

    @property
    def k(self) -> int:
        """The most directions that a matrix has."""
        return max(map(len, self.vh.values()))

    def agreement(self, draws: int = 200) -> dict[str, tuple[float, float]]:
        """How far siblings use the directions alike, by kind of module: the mean cosine between the amplitudes of two
        siblings in a matrix, and what it is under random signs, one standard deviation over `draws`. Empty for one
        sibling: there is nobody to agree with."""
        found: dict[str, tuple[float, float]] = {}
        by_kind: dict[str, list[Tensor]] = {}
        for name, a in self.siblings.items():
            by_kind.setdefault(name.rpartition(".")[2], []).append(F.normalize(a.double(), dim=1))
        for kind, matrices in by_kind.items() if len(self.facts.siblings) > 1 else ():
            g = generator(0, "agreement", kind)
            null = [sum(mean_cosine(a * random_signs(a.shape, g)) for a in matrices) for _ in range(draws)]
            spread = float(torch.tensor(null).square().mean().sqrt()) / len(matrices)
            found[kind] = sum(map(mean_cosine, matrices)) / len(matrices), spread
        return found

    def save(self, folder: str | Path) -> Path:
        """Write `folder`/basis.safetensors, sealed, whole or not at all; returns its path."""
        path = Path(folder) / LEARNED
        parts = {"u": self.u, "vh": self.vh, "siblings": self.siblings}
        tensors = {f"{name}.{part}": t.contiguous() for part, found in parts.items() for name, t in found.items()}
        facts = json.dumps(asdict(self.facts), allow_nan=False)
        with replacing(path) as scratch:
            save_file(tensors, scratch, {FACTS: facts, SEAL: seal(facts, fingerprint(tensors.items()))})
        return path

    @classmethod
    def read(cls, path: str | Path) -> "Learned":
        """What `save` wrote to the folder (or file) `path`; CTError where there is no such thing, or it is damaged."""
        path = Path(path).expanduser()
        path = path / LEARNED if path.is_dir() else path
        found: dict[str, dict[str, Tensor]] = {"u": {}, "vh": {}, "siblings": {}}
        try:
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                facts = TypeAdapter(Facts).validate_json(notes[FACTS])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
            check_seal(path, notes, fingerprint(tensors.items()))
            for key, tensor in tensors.items():
                name, _, part = key.rpartition(".")
                found[part][name] = tensor
        except (OSError, SafetensorError, ValidationError, KeyError) as error:
            raise CTError(
                f"{path} holds no learned directions ({type(error).__name__}); ctsft basis learn makes them."
            ) from None
        return cls(**found, facts=facts)


def mean_cosine(rows: Tensor) -> float:
    """The mean over pairs of `rows` (S, K), each of length 1, of their product."""
    s = len(rows)
    return float((rows.sum(0).square().sum() - rows.square().sum()) / (s * (s - 1)))


def random_signs(shape: torch.Size, g: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=g) * 2 - 1
