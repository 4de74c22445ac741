"""The file of directions that siblings share: what lies in it, and how they were learned."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctsft.errors import CTError
from ctsft.files import replacing
from ctsft.spectral.kinds import LEARNED

FACTS = "ctsft"  # in a file's metadata: how it was learned, as JSON


@dataclass
class Sibling:
    """A task that directions were learned from, the tokens of it that were trained on, and its mean losses in nats per
    token over its held-out batches, None where it has none."""

    name: str
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

    def save(self, folder: str | Path) -> Path:
        """Write `folder`/basis.safetensors, whole or not at all; returns its path."""
        path = Path(folder) / LEARNED
        parts = {"u": self.u, "vh": self.vh, "siblings": self.siblings}
        tensors = {f"{name}.{part}": t.contiguous() for part, found in parts.items() for name, t in found.items()}
        with replacing(path) as scratch:
            save_file(tensors, scratch, {FACTS: json.dumps(asdict(self.facts), allow_nan=False)})
        return path

    @classmethod
    def read(cls, path: str | Path) -> "Learned":
        """What `save` wrote to the folder (or file) `path`; CTError where there is no such thing."""
        path = Path(path).expanduser()
        path = path / LEARNED if path.is_dir() else path
        found: dict[str, dict[str, Tensor]] = {"u": {}, "vh": {}, "siblings": {}}
        try:
            with safe_open(path, "pt") as file:
                facts = TypeAdapter(Facts).validate_json((file.metadata() or {})[FACTS])
                for key in file.keys():  # noqa: SIM118  (it is no mapping)
                    name, _, part = key.rpartition(".")
                    found[part][name] = file.get_tensor(key)
        except (OSError, SafetensorError, ValidationError, KeyError) as error:
            raise CTError(
                f"{path} holds no learned directions ({type(error).__name__}); ctsft basis learn makes them."
            ) from None
        return cls(**found, facts=facts)
