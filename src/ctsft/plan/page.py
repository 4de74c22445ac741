"""Pages of room plan: one self-contained HTML page of a comparison, from its record alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ctsft.pages.plot import LIGHT, LINE_COLOURS, plot
from ctsft.pages.render import write_page
from ctsft.plan.record import Comparison
from ctsft.plan.standing import GOAL, Standing, curve, sentences, standings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES = ("solid", "dashed", "dotted")
INCHES = (3.5, 2.7)


def write_comparison(found: Comparison, path: str | Path) -> None:
    """Write the page of `found` to `path`, whole or not at all. It needs nothing from outside and runs no script."""
    rows = standings(found)
    looks = {row.arm.name: look(i) for i, row in enumerate(rows)}
    by_step = draw_curves(found, rows, 0, "step")
    by_second = draw_curves(found, rows, 1, "seconds of training")
    values = {
        "found": found,
        "rows": rows,
        "told": sentences(found),
        "goal": GOAL if any(row.arm.name == GOAL for row in rows) else None,
        "seeds": len(rows[0].arm.trials),
        "looks": looks,
        "plots": [
            plot(by_step, INCHES, "steps", "Held-out loss over the training steps, a line an arm"),
            plot(by_second, INCHES, "seconds", "Held-out loss over the seconds of training, a line an arm"),
            plot(draw_numbers(found, rows), INCHES, "numbers", "Held-out loss at the end against trained numbers"),
        ],
        "raced": any(row.arm.tried for row in rows),
    }
    write_page("compare.html", Path(path), values)


def look(i: int) -> tuple[str, str]:
    """Colour and dash of the arm with rank `i`."""
    return LINE_COLOURS[i % len(LINE_COLOURS)], DASHES[i // len(LINE_COLOURS) % len(DASHES)]


def draw_curves(found: Comparison, rows: list[Standing], axis: int, label: str) -> Callable[["Axes"], None]:
    """The mean held-out loss of every arm over its steps (`axis` 0) or its seconds (1)."""

    def draw(ax: "Axes") -> None:
        ends = [point[2] for row in rows for point in curve(row.arm)]
        for i, row in enumerate(rows):
            colour, dash = look(i)
            points = curve(row.arm)
            ax.plot([p[axis] for p in points], [p[2] for p in points], color=LIGHT[colour], linestyle=dash, lw=1.3)
        reach = max(found.before, *ends) if ends else found.before
        ax.set(xlabel=label, xlim=(0, None), ylim=(None, min(reach, found.before + 0.3 * abs(found.before))))
        ax.set_title("held-out loss, nats per token", color=LIGHT["muted"], pad=8)

    return draw


def draw_numbers(found: Comparison, rows: list[Standing]) -> Callable[["Axes"], None]:
    """Every arm's loss at the end against the numbers it trains; a bar for the lowest and the highest seed."""

    def draw(ax: "Axes") -> None:
        for i, row in enumerate(rows):
            if not math.isfinite(row.loss):
                continue
            ends, colour = [t.end for t in row.arm.trials], LIGHT[look(i)[0]]
            ax.plot([row.trained] * 2, [min(ends), max(ends)], color=colour, linewidth=1.2)
            ax.plot(row.trained, row.loss, "o", color=colour, markersize=5)
        ax.axhline(found.before, color=LIGHT["before"], linewidth=0.8, linestyle="dashed")
        ax.annotate(
            "before", (0, found.before), (2, -9), xycoords=("axes fraction", "data"), textcoords="offset points"
        )
        ax.set(xscale="log", xlabel="trained numbers")
        ax.margins(x=0.12)
        ax.set_title("held-out loss at the end", color=LIGHT["muted"], pad=8)

    return draw
