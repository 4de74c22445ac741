"""The report: one self-contained HTML page that tells what a run did, from the content of its run.json alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ctsft.pages.plot import LIGHT, LINE_COLOURS, plot
from ctsft.pages.render import write_page
from ctsft.pages.words import percent, place
from ctsft.tune.record import Accuracy, Point, RunRecord, Scores, Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OPEN_ROWS = 12  # rows of the table of matrices that are not folded away
CURVE_ROWS = 60  # rows of the loss table at most


def write_report(run: RunRecord, path: Path) -> None:
    """Write the page of `run` to `path`, whole or not at all.

    The page needs nothing from outside it and runs no script. Losses are in nats per token. Parts of the run that are
    empty or null (accuracy, samples, curve, spectra) are left out.
    """
    spectra = sorted(run.spectra, key=lambda row: -moved(row))
    values = {
        "run": run,
        "result": result_sentence(run),
        "accuracy": [(label, side.accuracy, score(side.accuracy)) for label, side in sides(run) if side.accuracy],
        "kinds": accuracy_by_kind(run),
        "loss_plot": plot(draw_loss(run), (4.2, 2.5), "loss", "Loss over the training steps, in nats per token"),
        "smoothing": window(len(run.curve)),
        "curve": thinned(run.curve),
        "depth_plots": depth_plots(run.spectra),
        "lines": lines(run.spectra),
        "spectra": spectra,
        "open_rows": OPEN_ROWS,
        "largest_delta": max((row.delta_over_weight or 0 for row in spectra), default=0) or 1,
    }
    write_page("report.html", path, values)


# ---- words and numbers


def moved(row: Spectrum) -> float:
    """|dW| / |W| of a matrix; infinite where W is zero and dW is not."""
    return math.inf if row.delta_over_weight is None else row.delta_over_weight


def sides(run: RunRecord) -> list[tuple[str, Scores]]:
    """What was measured before and after, each with its name."""
    return [("before", run.before), ("after", run.after)]


def result_sentence(run: RunRecord) -> str:
    """The main result in one sentence: held-out loss and execution accuracy, before and after."""
    before, after = run.before, run.after
    share = run.costs.trainable / run.model.parameters
    moved = round(after.heldout_loss, 3) - round(before.heldout_loss, 3)
    verb = "lowered" if moved < 0 else "raised" if moved > 0 else "did not change" if moved == 0 else "broke"
    text = (
        f"Training {run.costs.trainable:,} numbers, {percent(share)} of the model, {verb} the held-out loss "
        f"from {before.heldout_loss:.3f} to {after.heldout_loss:.3f} nats per token"
    )
    if before.accuracy and after.accuracy:
        text += f"; execution accuracy went from {score(before.accuracy)} to {score(after.accuracy)}"
    return text + "."


def score(accuracy: Accuracy) -> str:
    """`3 of 40 (7.5%, 95% interval 2.0% to 20.0%)`."""
    correct, total = accuracy.correct, accuracy.total
    rate = f"{correct / total:.1%}" if total else "no questions"
    return f"{correct} of {total} ({rate}, 95% interval {accuracy.low:.1%} to {accuracy.high:.1%})"


def accuracy_by_kind(run: RunRecord) -> list[tuple[str, list[tuple[str, int, int]]]]:
    """(kind, [(before or after, correct, total), ...]) for every kind of question that was asked."""
    measured = {label: side.accuracy.by_kind for label, side in sides(run) if side.accuracy}
    kinds = sorted({kind for counts in measured.values() for kind in counts})
    return [(kind, [(label, *(counts.get(kind) or (0, 0))) for label, counts in measured.items()]) for kind in kinds]


def thinned(curve: list[Point]) -> list[Point]:
    """At most CURVE_ROWS points of the loss curve, evenly spaced, with the last."""
    stride = -(-len(curve) // CURVE_ROWS) or 1
    return curve[::-1][::stride][::-1]


# ---- plots


def window(steps: int) -> int:
    """How many steps the smoothed loss is a mean over; odd, so that it has a middle."""
    return (steps // 15) | 1


def draw_loss(run: RunRecord) -> Callable[["Axes"], None] | None:
    """The training loss, faint and smoothed, with the held-out loss before and after, and at the end if it rose."""
    points = [(p.step, p.loss) for p in run.curve if p.loss is not None and math.isfinite(p.loss)]
    if not points:
        return None
    steps, losses = (list(column) for column in zip(*points, strict=True))
    half = window(len(run.curve)) // 2
    around = [losses[max(0, i - half) : i + half + 1] for i in range(len(losses))]
    end = max(run.steps, steps[-1])

    def draw(ax: "Axes") -> None:
        ax.plot(steps, losses, color=LIGHT["c0"], linewidth=0.7, alpha=0.4)
        ax.plot(steps, [sum(near) / len(near) for near in around], color=LIGHT["c0"], linewidth=1.5)
        mark(ax, 0, run.before.heldout_loss, "before", "before", end)
        if run.worse and run.worse.end:
            mark(ax, end, run.worse.end.heldout_loss, "at the end", "bad", end)
        elif not run.worse:
            mark(ax, end, run.after.heldout_loss, "after", "after", end)
        ax.set(xlabel="step", xlim=(-0.01 * end, end * 1.01))
        ax.margins(y=0.15)  # room for the held-out labels
        ax.set_title("loss, nats per token", color=LIGHT["muted"], pad=10)

    return draw


def mark(ax: "Axes", step: int, loss: float, when: str, colour: str, end: int) -> None:
    """A diamond at a held-out loss, with its words on the side where there is room."""
    if not math.isfinite(loss):
        return
    ax.plot(step, loss, "D", color=LIGHT[colour], markersize=5, clip_on=False, zorder=3)
    ax.annotate(
        f"held-out {when} {loss:.3f}",
        (step, loss),
        (7, 4) if step < end else (-7, 14),
        textcoords="offset points",
        ha="left" if step < end else "right",
        bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 1.5, "alpha": 0.8},
    )


def lines(spectra: list[Spectrum]) -> dict[str, tuple[str, str]]:
    """The colour and dash of every kind of matrix that is found in several blocks: what the plots over depth show."""
    kinds: dict[str, set[int]] = {}
    for row in spectra:
        block, kind = place(row.name)
        if block is not None:
            kinds.setdefault(kind, set()).add(block)
    several = [kind for kind, blocks in kinds.items() if len(blocks) > 1]
    dashes, many = ("solid", "dashed", "dotted"), len(LINE_COLOURS)
    return {kind: (LINE_COLOURS[i % many], dashes[i // many % len(dashes)]) for i, kind in enumerate(several)}


def depth_plots(spectra: list[Spectrum]) -> list[str]:
    """Energy, effective rank and the size of the change over the model's depth, a line per kind of matrix."""
    quantities: list[tuple[str, str, Callable[[Spectrum], float]]] = [
        ("energy", "energy in the top K", lambda row: row.energy_top_k),
        ("rank", "effective rank / smaller side", lambda row: row.effective_rank / min(row.shape)),
        (
            "change",
            "|\N{GREEK CAPITAL LETTER DELTA}W| / |W|",
            lambda row: math.nan if row.delta_over_weight is None else row.delta_over_weight,
        ),
    ]
    return [
        plot(draw_depth(spectra, value, title), (3.3, 2.3), name, f"{title}, over the blocks")
        for name, title, value in quantities
        if lines(spectra)
    ]


def draw_depth(spectra: list[Spectrum], value: Callable[[Spectrum], float], title: str) -> Callable[["Axes"], None]:
    """The mean of `value` over the matrices of one kind in each block, a line per kind."""

    def draw(ax: "Axes") -> None:
        for kind, (colour, dash) in lines(spectra).items():
            blocks: dict[int, list[float]] = {}
            for row in spectra:
                block, its_kind = place(row.name)
                if its_kind == kind and block is not None:
                    blocks.setdefault(block, []).append(value(row))
            line = [(block, sum(ys) / len(ys)) for block, ys in sorted(blocks.items())]
            ax.plot(*zip(*line, strict=True), color=LIGHT[colour], linestyle=dash, linewidth=1.1)
        ax.set(xlabel="block", ylim=(0, None))
        ax.set_title(title, color=LIGHT["muted"])
        ax.locator_params(axis="x", integer=True)
        ax.yaxis.set_major_formatter("{x:g}")

    return draw
