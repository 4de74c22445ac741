"""What a run leaves: its record, and the folder that keeps the records of all runs. Nothing here imports torch."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

from filelock import FileLock
from pydantic import Field, ValidationError

from ctsft.errors import CTError, wrong_fields
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
    weights: str = Field(default="", description="fingerprint of the bare model; absent in the oldest records")
    versions: dict[str, str]
    machine: dict[str, Any]


class Records(dict[str, Record]):
    """Finished runs by key, kept in a folder of JSON lines: a file for every model and method, a line for every run.

    Other tools read the files as they are:

        jq -r 'select(.spec.k == 32) | [.spec.lr, .train_loss[-1]] | @tsv' records/photonic-diagonal.jsonl
        pandas.json_normalize(pandas.read_json("records/photonic-lora.jsonl", lines=True).to_dict("records"))
        duckdb -c "SELECT spec.model, spec.method, avg(trained) FROM 'records/*.jsonl' GROUP BY ALL"

    Lines are added at the end, under a lock, and never changed. A last line without its end is what a killed process
    left: it is no record, and the next one takes its place.
    """

    def __init__(self, folder: Path) -> None:
        """Read all that is in `folder`, which need not exist. CTError names the line that is no record."""
        super().__init__()
        self.folder = folder
        if any(folder.glob("*.json")):
            raise CTError(
                f"{folder} has a file for every run, as ctsft once wrote them; join them and move them away: "
                f"cat {folder}/*.json > {folder}/joined.jsonl"
            )
        for path in sorted(folder.glob("*.jsonl")):
            *lines, _torn = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines, 1):
                try:
                    record = Record.model_validate_json(line)
                except ValidationError as error:
                    raise CTError(
                        f"line {number} of {path} is no record of this ctsft ({wrong_fields(error)}); delete the line "
                        "and run the experiment again."
                    ) from None
                self[record.spec.key] = record

    def add(self, record: Record) -> None:
        """Keep `record`, in memory and whole on disk; where that fails, nothing has changed."""
        line = record.model_dump_json().encode() + b"\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{record.spec.short}-{record.spec.method}.jsonl"
        with FileLock(self.folder / ".lock"), path.open("ab+", buffering=0) as file:
            end = end_of_lines(file)
            file.truncate(end)
            try:
                file.write(line)
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(end)
                raise
        self[record.spec.key] = record


def end_of_lines(file: IO[bytes]) -> int:
    """Where the last line that has an end, ends."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if size == 0 or file.read(1) == b"\n":
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def finite(value: Any) -> Any:
    """`value` with None for every number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
