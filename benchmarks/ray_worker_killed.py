"""A sweep on two local Ray workers, one of them killed in mid-run: nothing is lost, and the records are the same.

    pip install -e '.[ray]' && python benchmarks/ray_worker_killed.py

Trains a small PhotonicGPT of random weights: two arms, their learning rates tuned, first in this process and then on
Ray. On Ray, the worker of the fourth run gets SIGKILL half way. Exits with 1 unless that run, and no other, was started
twice and every record equals its twin. Took 160 s on two busy cores.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # as Ray's workers have it: the last bits of a sum depend on the threads

import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ctsft.lab import run as lab
from ctsft.lab.engines import on_ray
from ctsft.lab.records import Records
from ctsft.lab.spec import Arm, Spec
from ctsft.lab.sweep import sweep
from ctsft.models.load import load_model
from ctsft.models.photonic import PhotonicGPTConfig, PhotonicGPTForCausalLM

VICTIM = 3  # in the order of their starts
CLOCKS = {"seconds": 0.0, "probe_seconds": {}}  # made equal before two records are compared


def logged(spec: Spec) -> dict:
    """`lab.run`, which signs in with its process before it starts."""
    journal = Path(os.environ["CTSFT_JOURNAL"])
    (journal / f"{time.time_ns()}-{spec.key}").write_text(str(os.getpid()))
    return lab.run(spec)


def starts(journal: Path) -> list[tuple[str, int]]:
    """(key, process) of every start, in their order."""
    signed = [path for path in sorted(journal.iterdir()) if path.stat().st_size]
    return [(path.name.partition("-")[2], int(path.read_text())) for path in signed]


def kill_one(journal: Path, delay: float, killed: list[tuple[str, int]]) -> None:
    while len(starts(journal)) <= VICTIM:
        time.sleep(0.01)
    time.sleep(delay)
    killed.append(starts(journal)[VICTIM])
    os.kill(killed[0][1], signal.SIGKILL)


def prepare(folder: Path) -> list[Arm]:
    """A model and a text under `folder`, and the arms to run on them."""
    torch.manual_seed(0)
    size = {"n_embd": 64, "n_layer": 4, "n_head": 2, "eos_token_id": 0, "pad_token_id": 0}
    PhotonicGPTForCausalLM(PhotonicGPTConfig(**size)).save_pretrained(folder / "small")
    load_model("photonic").tokenizer.save_pretrained(folder / "small")
    (folder / "texts").mkdir()
    lines = "\n\n".join(f"line {i} has the number {i * i}" for i in range(4000))
    (folder / "texts" / "numbers.txt").write_text(lines)
    for name, value in {"CTSFT_MODELS": folder, "CTSFT_JOURNAL": folder / "journal"}.items():
        os.environ[name] = str(value)
    (folder / "journal").mkdir()
    spec = Spec(model="small", text="numbers", length=32, steps=60)
    return [
        Arm(name=f"K={k}", spec=spec.model_copy(update={"k": k}), seeds=(0, 1, 2), rates=(0.016, 0.05, 0.16))
        for k in (4, 16)
    ]


def main(folder: Path, console: Console) -> bool:
    arms = prepare(folder)
    calm, disturbed = Records(folder / "calm"), Records(folder / "disturbed")
    alone = sweep(arms, calm, logged, console=console)
    delay = alone.seconds / len(alone.finished) / 2
    for path in (folder / "journal").iterdir():
        path.unlink()

    killed: list[tuple[str, int]] = []
    threading.Thread(target=kill_one, args=(folder / "journal", delay, killed), daemon=True).start()
    report = sweep(arms, disturbed, logged, on_ray(workers=2), console)

    table = Table("run", "lr", "seed", "processes", "last loss in process", "on Ray", "records equal", title="records")
    equal = set(calm) == set(disturbed)
    for key in alone.finished:
        one, two = (records[key].model_copy(update=CLOCKS) for records in (calm, disturbed))
        equal = equal and one == two
        pids = [f"{pid} (killed)" if (name, pid) in killed else f"{pid}" for name, pid in starts_of(folder, key)]
        spec, losses = one.spec, (f"{record.train_loss[-1]:.6f}" for record in (one, two))
        table.add_row(key, f"{spec.lr:g}", f"{spec.seed}", ", ".join(pids), *losses, "yes" if one == two else "NO")
    console.print(table)
    victim, pid = killed[0]
    console.print(f"killed process {pid} in {victim}, {delay:.2f} s after its start; retried: {dict(report.retried)}")
    console.print(
        f"{len(alone.finished)} runs in process {alone.seconds:.0f} s, on two Ray workers {report.seconds:.0f} s; "
        f"failed: {len(report.failed)}; records equal but for their clocks: {'yes' if equal else 'NO'}"
    )
    return equal and report.retried == {victim: 1} and len(starts(folder / "journal")) == len(alone.finished) + 1


def starts_of(folder: Path, key: str) -> list[tuple[str, int]]:
    return [(name, pid) for name, pid in starts(folder / "journal") if name == key]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        sys.exit(0 if main(Path(name), Console(width=150)) else 1)
