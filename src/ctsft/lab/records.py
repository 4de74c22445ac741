"""What a run leaves: its record, and the folder that keeps the records of all runs. Nothing here imports torch."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ctsft.errors import CTError
from ctsft.files import write_text
from ctsft.lab.spec import Spec, Strict


class Adapted(Strict):
    """The matrices that a run adapted."""

    matrices: int
    names: list[str] = Field(default=[], description="in the model's order; absent in the oldest records")
    shapes: list[tuple[int, int]] = Field(description="(d_out, d_in) of each")


class Record(Strict, allow_inf_nan=False):
    """All that one run measured. Losses are mean nats per predicted token; None stands for a number that is not finite.

    Two runs of equal specs on one machine give records that are equal but for `seconds` and `probe_seconds`.
    """

    format: Literal[1] = 1
    spec: Spec
    adapted: Adapted
    trained: int = Field(description="how many numbers trained")
    counted: int | None = Field(description="K (d_out + d_in) over the matrices; None for methods without a K")
    adapter_bytes: int = Field(description="of the file that holds what trained")
    memory_bytes: int = Field(description="beside the bare model: frozen bases and trained numbers")
    tokens: int = Field(description="trained on, padding none")
    flops: float = Field(description="of all forward and backward passes of the training")
    seconds: float = Field(description="of the training, without probes and evaluations")
    train_loss: list[float | None] = Field(
        description="before every update; for a fixed batch also after the last, without dropout"
    )
    heldout: list[tuple[int, float | None]] = Field(description="(updates done, held-out loss)")
    probes: dict[str, list[tuple[int, Any]]] = Field(description="by series: (update, number or object)")
    probe_seconds: dict[str, float] = Field(default={}, description="by probe; absent in the oldest records")
    measures: dict[str, Any] = Field(description="what is measured once: ablation, variance_explained")
    diverged: bool = Field(description="a loss was not finite, and the run ended there")
    versions: dict[str, str]
    machine: dict[str, Any]


class Records(dict[str, Record]):
    """Finished runs by key, read from and written to a folder of JSON files, one a run."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        for path in sorted(folder.glob("*.json")):
            try:
                record = Record.model_validate_json(path.read_bytes())
            except (OSError, ValidationError) as error:
                raise CTError(
                    f"{path} is no record of this ctsft ({error}); move it away and run the experiment again."
                ) from None
            self[record.spec.key] = record

    def add(self, record: Record) -> None:
        """Keep `record`, in memory and whole on disk."""
        write_text(self.folder / f"{record.spec.key}.json", record.model_dump_json() + "\n")
        self[record.spec.key] = record


def finite(value: Any) -> Any:
    """`value` with None for every number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
