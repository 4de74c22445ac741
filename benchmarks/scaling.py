"""Forward and backward of adapted square matrices over those of the bare ones, `diagonal` beside PEFT's LoRA at rank
K, against K, width, tokens and the number of matrices; the other three stay at K=64, width 1,024, 256 tokens, 1 matrix.

    python benchmarks/scaling.py --dtype bfloat16
"""

import argparse
from pathlib import Path
from typing import Any

import common as c
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

FIGURES = Path(__file__).parent / "figures"
AXES = {
    "K": (8, 16, 32, 64, 128, 256, 512),
    "width": (256, 512, 1024, 2048, 4096),
    "tokens": (64, 128, 256, 512, 1024, 2048, 4096),
    "matrices": (1, 2, 4, 8, 16),
}
CENTRE = {"K": 64, "width": 1024, "tokens": 256, "matrices": 1}
ARMS = ("diagonal", "LoRA")
AT_LEAST = 0.01  # seconds of one measurement


def steps(point: dict[str, int], args: argparse.Namespace) -> dict[str, c.Step]:
    """Forward and backward of a chain of linear layers: frozen, and with the two adapters."""
    d, dtype = point["width"], getattr(torch, args.dtype)
    layers = [nn.Linear(d, d, bias=False, device=args.device, dtype=dtype) for _ in range(point["matrices"])]
    base = nn.Sequential(*layers).requires_grad_(False)
    names: Any = {"target_modules": [str(i) for i in range(len(layers))], "task_type": None}
    our = c.ours(argparse.Namespace(k=point["K"], dtype=args.dtype), **names)
    theirs = c.lora(point["K"])
    theirs.target_modules, theirs.task_type = set(names["target_modules"]), None
    models = {"frozen": base, "diagonal": c.adapt(base, our)}
    models["LoRA"] = c.adapt(base, theirs, autocast_adapter_dtype=False)
    x = torch.randn(point["tokens"], d, device=args.device, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)

    def step(model: nn.Module) -> None:
        torch.autograd.grad(model(x), [x, *c.trained(model)], dy)

    return {n: lambda m=m: step(m) for n, m in models.items()}


def measure(
    args: argparse.Namespace, axes: dict[str, tuple[int, ...]], centre: dict[str, int]
) -> dict[str, list[dict[str, np.ndarray]]]:
    """By axis and point: milliseconds of `frozen`, and of every arm the ratios to it, (repeats,)."""
    found: dict[str, list[dict[str, np.ndarray]]] = {}
    for axis, values in axes.items():
        for value in values:
            point = centre | {axis: value}
            c.say(", ".join(f"{n} {v}" for n, v in point.items()))
            times = c.interleaved(steps(point, args), args, AT_LEAST)
            ratios = {arm: times[arm] / times["frozen"] for arm in ARMS}
            found.setdefault(axis, []).append({"frozen": 1000 * times["frozen"]} | ratios)
    return found


def draw(found: dict[str, list[dict[str, np.ndarray]]], axes: dict[str, tuple[int, ...]], path: Path) -> None:
    """One panel an axis: the median ratio to frozen, with quartiles."""
    with matplotlib.rc_context({"svg.hashsalt": "ctsft", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(3 * len(axes), 2.8), layout="constrained")
        panels = figure.subplots(1, len(axes), sharey=True)
        for panel, (axis, values) in zip(panels, axes.items(), strict=True):
            for arm, label, colour in (("diagonal", "diagonal", "tab:blue"), ("LoRA", "LoRA r=K", "tab:orange")):
                low, middle, high = np.percentile([point[arm] for point in found[axis]], [25, 50, 75], axis=1)
                panel.plot(values, middle, "o-", color=colour, markersize=3, label=label)
                panel.fill_between(values, low, high, color=colour, alpha=0.2, linewidth=0)
            panel.axhline(1, color="grey", linewidth=0.8)
            panel.set(xscale="log", xlabel=axis, xticks=values, xticklabels=[str(v) for v in values])
            panel.minorticks_off()
            panel.tick_params("x", rotation=45)
        panels[0].set_ylabel("time over frozen")
        panels[0].legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def main(argv: list[str] | None = None) -> str:
    p = c.parser(__doc__)
    p.add_argument("--largest", type=int, default=4096, help="leave out what is larger on any axis")
    p.add_argument("--figures", type=Path, default=FIGURES, help="folder of the figure")
    args = c.parse(p, argv)
    centre = {axis: min(v, args.largest) for axis, v in CENTRE.items()}
    axes = {axis: tuple(v for v in values if v <= max(args.largest, values[0])) for axis, values in AXES.items()}
    found = measure(args, axes, centre)
    path = args.figures / f"scaling-{args.device}-{args.dtype}.svg"
    draw(found, axes, path)
    rows = [
        [f"{axis} {value}", c.spread(point["frozen"], 1), *(c.spread(point[arm]) for arm in ARMS)]
        for axis, values in axes.items()
        for value, point in zip(values, found[axis], strict=True)
    ]
    setting = f"**{args.dtype}**, {c.rounds(args)}. {c.machine(args)}."
    image = f"![time over frozen against {', '.join(axes)}](figures/{path.name})"
    return c.show(setting, image, c.table(["", "frozen, ms", "diagonal over frozen", "LoRA r=K over frozen"], rows))


if __name__ == "__main__":
    main()
