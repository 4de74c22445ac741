"""The universal basis in one pass over a model's files (limits for 1.1B numbers: 60 s on 2 cores, 1.5 GB of memory),
and the two passes over all weights that every start makes.

    python benchmarks/universal.py --model ~/models/TinyLlama --threads 2 --accuracy

Prints Markdown. The pass runs in a fresh process, whose peak of resident memory is its own. The old ways are written
down here: float64 products one after the other on one thread; fingerprint and finiteness by whole copies. Old and new
take turns; every cell of a pair is the median, with the smallest and largest, of `--repeats`. On a machine that does
other work too, seconds of the processor tell more than those of the clock; both are given.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import common as c
import torch
import xxhash
from torch import Tensor

from ctsft.models.load import load_skeleton
from ctsft.spectral import universal
from ctsft.spectral.decompose import one_thread, principal_directions
from ctsft.spectral.universal import Checkpoint, universal_basis
from ctsft.spectral.weights import check_finite, fingerprint, gram_of, universal_members, width

DTYPES = (torch.float32, torch.bfloat16)


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="built-in name or Hugging Face folder")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5, help="of every pair of old and new")
    parser.add_argument("--pieces", type=int, default=8, help="pieces of up to 8192 rows that the old Gram is timed on")
    parser.add_argument("--accuracy", action="store_true", help="also the angles of float32 and bfloat16 products")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(one_pass(options.model)))
        return ""
    parts = [streaming(options), gram_pair(options), accuracy(options) if options.accuracy else "", passes(options)]
    head = f"### Universal basis and passes over all weights: {options.model.rstrip('/').rpartition('/')[2]}"
    return c.show(head, c.machine(options), *parts)


def clocked(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the clock, and of the processor in all threads."""
    spent: dict[str, list[float]] = {}
    with c.clocks(spent, ""):
        work()
    return spent[""][0], spent[""][1]


def in_turn(old: Callable[[], Any], new: Callable[[], Any], repeats: int) -> list[list[tuple[float, float]]]:
    """`clocked` of `old` and `new`, `repeats` times, by turns."""
    pairs = [(clocked(old), clocked(new)) for _ in range(repeats)]
    return [list(times) for times in zip(*pairs, strict=True)]


def spread(values: list[float], form: str = ".2f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(*rows: tuple[str, ...]) -> str:
    return c.table(rows[0], rows[1:])


def pair_row(name: str, old: list[tuple[float, float]], new: list[tuple[float, float]]) -> tuple[str, ...]:
    cells = [spread([t[i] for t in times]) for i in (0, 1) for times in (old, new)]
    ratios = [spread([a[i] / b[i] for a, b in zip(old, new, strict=True)], ".1f") for i in (0, 1)]
    return (name, *cells[:2], ratios[0], *cells[2:], ratios[1])


PAIR_HEAD = ("", "old, s", "new, s", "ratio", "old, processor s", "new, processor s", "ratio")


def one_pass(model: str) -> dict[str, Any]:
    """In a fresh process: seconds of the pass and of the whole, and the peak of resident memory."""
    import resource

    seconds: list[tuple[float, float]] = []
    grams: list[Tensor] = []

    def timed(pieces: Iterator[Tensor], d_model: int) -> Tensor:
        seconds.append(clocked(lambda: grams.append(gram_of(pieces, d_model))))
        return grams[0]

    at_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    universal.gram_of = timed  # type: ignore[assignment]
    whole = clocked(lambda: universal_basis(model))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    return {"gram": seconds[0], "whole": whole, "libraries": at_start / 1024, "peak": peak / 1024}


def streaming(options: argparse.Namespace) -> str:
    command = [sys.executable, __file__, "--child", "--model", options.model, "--threads", str(options.threads)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(said.splitlines()[-1])
    (clock, cpu), (whole_clock, whole_cpu) = found["gram"], found["whole"]
    return table(
        ("one pass over the files, a fresh process", "clock, s", "processor, s"),
        ("Gram matrix", f"{clock:.1f}", f"{cpu:.1f}"),
        ("all else: eigendecomposition, config, headers", f"{whole_clock - clock:.1f}", f"{whole_cpu - cpu:.1f}"),
        (
            f"peak of resident memory {found['peak']:.0f} MiB, of which the libraries {found['libraries']:.0f} MiB",
            "",
            "",
        ),
    )


def pieces_of(model: str) -> tuple[Callable[[], Iterator[Tensor]], int, int]:
    """The rows of all matrices as pieces, anew at every call; d_model; the number of rows."""
    skeleton, folder = load_skeleton(model)
    d_model = width(skeleton)
    members: dict[str, Any] = universal_members(skeleton, d_model)
    files = Checkpoint(folder, skeleton)
    total = sum(m.weight.numel() for m in members.values()) // d_model
    return (lambda: (p for n, m in members.items() for p in files.rows(n, m, d_model))), d_model, total


def old_gram(pieces: Iterator[Tensor], d_model: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """One product after the other, on one thread, in `dtype`; added up in float64."""
    gram = torch.zeros(d_model, d_model, dtype=torch.float64)
    with one_thread():
        for piece in pieces:
            p = piece.to(dtype)
            gram += (p.T @ p).double()
    return gram


def gram_pair(options: argparse.Namespace) -> str:
    pieces, d_model, total = pieces_of(options.model)
    some = [p.clone() for p in islice(pieces(), options.pieces)]
    grams: dict[str, Tensor] = {}
    old, new = in_turn(
        lambda: grams.update(old=old_gram(iter(some), d_model)),
        lambda: grams.update(new=gram_of(iter(some), d_model)),
        options.repeats,
    )
    rows = sum(map(len, some))
    scaled = statistics.median(t[1] for t in old) * total / rows
    same = "the same bits" if torch.equal(grams["old"].tril(), grams["new"].tril()) else "NOT the same bits"
    note = f"{rows:,} of {total:,} rows; scaled to all of them the old way takes {scaled:.0f} s of the processor, on "
    note += f"one core. Old and new give {same}."
    return table(PAIR_HEAD, pair_row("Gram matrix, float64", old, new)) + "\n\n" + note


def accuracy(options: argparse.Namespace) -> str:
    pieces, d_model, _ = pieces_of(options.model)
    exact = gram_of(pieces(), d_model)
    directions = principal_directions(exact, d_model)
    values = torch.linalg.eigvalsh(exact).flip(0)
    rows = [
        ("products in", "processor, s", "largest angle of the top 64, rad", "largest relative error of their values")
    ]
    for dtype in DTYPES:
        grams: list[Tensor] = []
        _, cpu = clocked(lambda dtype=dtype, grams=grams: grams.append(old_gram(pieces(), d_model, dtype)))
        found = principal_directions(grams[0], 64)
        off = torch.linalg.matrix_norm(found - found @ directions[:64].T @ directions[:64], 2).clamp(max=1).asin()
        error = ((torch.linalg.eigvalsh(grams[0]).flip(0) - values) / values)[:64].abs().max()
        rows.append((str(dtype).removeprefix("torch."), f"{cpu:.1f}", f"{float(off):.1e}", f"{float(error):.1e}"))
    return table(*rows) + "\n\nAgainst float64 products, which are what ctsft makes; all are added up in float64."


def old_fingerprint(weights: list[tuple[str, Tensor]]) -> str:
    total = xxhash.xxh3_128()
    for name, weight in sorted(weights, key=lambda pair: pair[0]):
        exact = weight.detach().cpu() if weight.dtype == torch.float64 else weight.detach().to("cpu", torch.float32)
        total.update(f"{name} {tuple(weight.shape)} ".encode())
        total.update(exact.contiguous().numpy())
    return f"xxh3-{total.hexdigest()}"


def passes(options: argparse.Namespace) -> str:
    skeleton, folder = load_skeleton(options.model)
    files = Checkpoint(folder, skeleton)
    weights: list[tuple[str, Tensor]] = []
    for name, module in universal_members(skeleton, width(skeleton)).items():
        shape: Any = module.weight.shape
        weights.append((name, torch.cat([p.clone() for p in files.pieces(files.stored(module)[0], shape)])))
    marks: dict[str, str] = {}
    hashes = in_turn(
        lambda: marks.update(old=old_fingerprint(weights)),
        lambda: marks.update(new=fingerprint(weights)),
        options.repeats,
    )
    finite = in_turn(
        lambda: [torch.isfinite(w).all() for _, w in weights],
        lambda: [check_finite(n, w) for n, w in weights],
        options.repeats,
    )
    count, dtype = sum(w.numel() for _, w in weights), str(weights[0][1].dtype).removeprefix("torch.")
    same = "the same digest" if marks["old"] == marks["new"] else "NOT the same digest"
    rows = [pair_row("fingerprint", *hashes), pair_row("all finite?", *finite)]
    return table(PAIR_HEAD, *rows) + f"\n\n{count:,} numbers in {dtype}; old and new give {same}."


if __name__ == "__main__":
    main()
