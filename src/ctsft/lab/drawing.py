"""How the laboratory's plots are drawn: colours, axes in words, lines and points with intervals, laws, heat maps."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from ctsft.lab.experiments import Figure
from ctsft.lab.metrics import METRICS, SERIES
from ctsft.pages.plot import LIGHT, LINE_COLOURS, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Settings with an order (K, widths) take these, from the smallest to the largest; light and dark as in COLOURS.
RAMP = {
    "s0": ("#b3962f", "#e0c45a"),
    "s1": ("#7f9535", "#b4cc66"),
    "s2": ("#3c8f5f", "#77c98d"),
    "s3": ("#1f8584", "#4fbfb8"),
    "s4": ("#2a6a9b", "#6aa8dd"),
    "s5": ("#45499a", "#8f92e6"),
    "s6": ("#6b2f92", "#b287e3"),
    "s7": ("#4b1459", "#d08fd8"),
}
SHADES = list(RAMP)
DASHES = ("solid", "dashed", "dotted", "dashdot")
MARKERS = dict(zip(DASHES, "os^D", strict=True))  # a single point has no dash
GLYPHS = dict(
    zip(DASHES, "\N{BLACK CIRCLE}\N{BLACK SQUARE}\N{BLACK UP-POINTING TRIANGLE}\N{BLACK DIAMOND}", strict=True)
)
INCHES = (4.3, 2.8)
AXES = {  # what axes are called that are no metric; a metric is called what METRICS says
    "k": "K",
    "lr": "learning rate",
    "step": "updates",
    "kept": "directions kept",
    "heldout": METRICS["heldout_loss"].words,
}
PARTS = {"first": "at the first update", "last": "at the last update", "min": "lowest", "max": "highest"}

Shapes = list[tuple[int, int]]
# Curves that a figure may name as its `law` (several: "coverage,one"): words, y at x for the adapted shapes
# (d_out, d_in), and whether x has to be K. Without words it tells itself.
LAWS: dict[str, tuple[str, Callable[[float, Shapes], float], bool]] = {
    "coverage": (
        "mean of K / (d_out d_in): any directions that do not know the gradient",
        lambda k, shapes: k * statistics.fmean(1 / (d_out * d_in) for d_out, d_in in shapes),
        True,
    ),
    "coverage_87": ("0.00205 K, paper 87", lambda k, shapes: 0.00205 * k, True),
    "rank_83": ("0.62 K, paper 83", lambda k, shapes: 0.62 * k, True),
    "identity": ("y = x", lambda x, shapes: x, False),
    "one": ("", lambda x, shapes: 1.0, False),
    "zero": ("", lambda x, shapes: 0.0, False),
}
PLACES = {"kmin": {"d/128": 1 / 128, "d/32": 1 / 32}}  # the same for upright lines, by the model's width d (paper 78)


@dataclass(frozen=True)
class Line:
    """What a figure shows of one arm or of several: points (x, mean over seeds, half of its 95% interval or 0)."""

    key: tuple[Any, ...]
    points: list[tuple[float, float, float]]
    curve: bool = False

    @property
    def joined(self) -> bool:
        return len({x for x, _, _ in self.points}) == len(self.points)


def laws_of(figure: Figure) -> list[str]:
    return [part.strip() for part in figure.law.split(",") if part.strip()]


def styles(keys: Sequence[tuple[Any, ...]]) -> list[tuple[str, str]]:
    """A colour and a dash for each key: the ramp for its numbers and a dash for its words, or the series for names."""
    parted = [([p for p in key if is_number(p)], [p for p in key if not is_number(p)]) for key in keys]
    numbers = sorted({tuple(number) for number, _ in parted})
    words = list(dict.fromkeys(tuple(word) for _, word in parted))
    if len(numbers) > 2 and len(words) <= len(DASHES):
        shades = [SHADES[round(i * (len(SHADES) - 1) / (len(numbers) - 1))] for i in range(len(numbers))]
        return [(shades[numbers.index(tuple(n))], DASHES[words.index(tuple(w))]) for n, w in parted]
    many = len(LINE_COLOURS)
    return [(LINE_COLOURS[i % many], DASHES[i // many % len(DASHES)]) for i in range(len(keys))]


def is_number(part: Any) -> bool:
    return isinstance(part, int | float) and not isinstance(part, bool)


def tinted(draw: Callable[["Axes"], None], inches: tuple[float, float], name: str, label: str) -> str:
    """`plot` with the ramp's colours too, and no mathematics read into labels."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        svg = plot(draw, inches, name, str(escape(label)))
    for variable, (light, _) in RAMP.items():
        svg = svg.replace(light, f"var(--{variable})")
    return svg


def hue(colour: str) -> str:
    return LIGHT[colour] if colour in LIGHT else RAMP[colour][0]


def drawing(
    figure: Figure,
    lines: Sequence[Line],
    looks: Mapping[tuple[Any, ...], tuple[str, str]],
    ticks: Sequence[str],
    shapes: Mapping[str, Shapes],
) -> Callable[["Axes"], None]:
    """Draws lines or points with their intervals, the paper's points as rings, and the laws.

    With `ticks` (words in place of x) the axes change places: a line a word, values to the right.
    """
    places = sorted({x for line in lines for x, _, _ in line.points})

    def draw(ax: "Axes") -> None:
        if figure.log_x and not ticks:
            logarithmic(ax, sorted({*places, *(x for x, _ in figure.paper)}))
        for line in lines:
            colour, dash = looks[line.key]
            if line.curve:
                draw_curve(ax, line, hue(colour), dash)
            elif ticks:
                shift = 0.12 * (list(looks).index(line.key) - (len(looks) - 1) / 2)
                xs, ys, halves = (list(column) for column in zip(*line.points, strict=True))
                ax.errorbar(ys, [x + shift for x in xs], xerr=halves, linestyle="none", **point_style(colour, dash))
            else:
                xs, ys, halves = (list(column) for column in zip(*line.points, strict=True))
                joined = dash if line.joined else "none"
                ax.errorbar(xs, ys, yerr=halves, linestyle=joined, linewidth=1.2, **point_style(colour, dash))
        if figure.paper:
            ax.plot(*zip(*figure.paper, strict=True), "o", ms=6.5, mfc="none", mec=LIGHT["ink"], mew=0.9, zorder=4)
        if ticks:
            by_words(ax, figure, ticks)
            return
        draw_laws(ax, figure, places, shapes)
        limit(ax, figure, [y for line in lines for _, y, _ in line.points] + [y for _, y in figure.paper])
        ax.set(xlabel=axis(figure.x))
        ax.set_title(axis(figure.y), color=LIGHT["muted"], pad=8)

    return draw


def point_style(colour: str, dash: str) -> dict[str, Any]:
    return {"color": hue(colour), "marker": MARKERS[dash], "ms": 4, "elinewidth": 1.1, "capsize": 2}


def draw_curve(ax: "Axes", line: Line, colour: str, dash: str) -> None:
    """A line over the updates (or the directions kept), its intervals as a band."""
    xs, ys, halves = (list(column) for column in zip(*line.points, strict=True))
    marker = MARKERS[dash] if len(xs) < 9 else ""
    ax.plot(xs, ys, color=colour, linestyle=dash, linewidth=1.4, marker=marker, ms=3)
    low, high = ([y + sign * half for y, half in zip(ys, halves, strict=True)] for sign in (-1, 1))
    ax.fill_between(xs, low, high, color=colour, alpha=0.16, linewidth=0)


def by_words(ax: "Axes", figure: Figure, ticks: Sequence[str]) -> None:
    """Axes with words from top to bottom and the values to the right."""
    ax.set(yticks=range(len(ticks)), yticklabels=ticks, xlabel=axis(figure.y))
    for law in {"zero", "one"} & set(laws_of(figure)):
        ax.axvline(LAWS[law][1](0, []), color=LIGHT["ink"], linestyle=(0, (4, 3)), linewidth=0.9)
    ax.set_ylim(len(ticks) - 0.5, -0.5)
    ax.grid(axis="x")


def limit(ax: "Axes", figure: Figure, centres: Sequence[float]) -> None:
    """Room for all means. Two seeds have huge intervals: they may leave the plot, the means may not."""
    span = max(centres) - min(centres)
    if figure.log_y and min(centres) > 0:
        ax.set_yscale("log")
        ax.set_ylim(min(centres) / 2, max(centres) * 2)
    elif span:
        bottom, top = ax.get_ylim()
        ax.set_ylim(max(bottom, min(centres) - 0.8 * span), min(top, max(centres) + 0.8 * span))


def draw_laws(ax: "Axes", figure: Figure, xs: Sequence[float], shapes: Mapping[str, Shapes]) -> None:
    """The curves that the figure names, one for each set of shapes, and the upright lines, for each width."""
    grid = [xs[0] + (xs[-1] - xs[0]) * i / 60 for i in range(61)]
    widths = sorted({statistics.mode(side for shape in its for side in shape) for its in shapes.values()})
    for law in laws_of(figure):
        for its in {tuple(its): its for its in shapes.values()}.values() if law in LAWS else ():
            ys = [LAWS[law][1](x, its) for x in grid]
            ax.plot(grid, ys, color=LIGHT["ink"], linestyle=(0, (4, 3)), linewidth=0.9, zorder=3)
        for (label, share), (i, width) in itertools.product(PLACES.get(law, {}).items(), enumerate(widths)):
            ax.axvline(width * share, color=LIGHT["muted"], linestyle=":", linewidth=0.9)
            text = label if len(widths) == 1 else label.replace("d", str(width))
            x, y, base = width * share, 0.99 - 0.06 * i, ax.get_xaxis_transform()
            ax.text(x, y, f" {text}", transform=base, va="top", fontsize=6.5, color=LIGHT["muted"])


def axis(metric: str) -> str:
    """What an axis is called: by METRICS, with the part (`snr_top.last`) or the time (`train_loss@40`) in words."""
    name, _, at = metric.partition("@")
    root, _, part = name.partition(".")
    text = AXES.get(root) or (METRICS[root].words if root in METRICS else name.replace("_", " "))
    if part and root in SERIES:
        text += ", " + " ".join(PARTS.get(word, word) for word in part.split("."))
    budget = f"{at.removesuffix('/k')} {'K-steps' if at.endswith('/k') else 'updates'}"
    return f"{text}, after {budget}" if at else text


def logarithmic(ax: "Axes", xs: Sequence[float]) -> None:
    """A logarithmic x axis (linear below the smallest above 0) with the values themselves as ticks if they fit."""
    from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

    above = [x for x in xs if x > 0]
    if not above:
        return
    if above == list(xs):
        ax.set_xscale("log")
    else:
        ax.set_xscale("symlog", linthresh=above[0], linscale=0.4)
    room = (above[-1] / above[0]) ** 0.07  # the factor between neighbours that leaves room for their ticks
    ticks = list(xs)
    if xs[-1] >= 10_000 or any(b / a < room for a, b in itertools.pairwise(above)):
        subs = (1, 2, 5) if above[-1] < 300 * above[0] else (1,)
        decades = range(math.floor(math.log10(above[0])), math.ceil(math.log10(above[-1])) + 1)
        round_ = [s * 10.0**i for i in decades for s in subs]
        ticks = [x for x in xs[:1] if x == 0] + [x for x in round_ if 0.99 * above[0] <= x <= 1.01 * above[-1]]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(EngFormatter(sep="") if xs[-1] >= 10_000 else "{x:g}")


def draw_heat(
    matrices: Sequence[str], updates: Sequence[int], cells: Mapping[tuple[str, int], float], low: float, high: float
) -> Callable[["Axes"], None]:
    def draw(ax: "Axes") -> None:
        from matplotlib.colors import ListedColormap

        values = [[cells.get((matrix, update), float("nan")) for update in updates] for matrix in matrices]
        shades = ListedColormap([light for light, _ in RAMP.values()])
        ax.pcolormesh(values, cmap=shades, vmin=low, vmax=high, edgecolors="face", linewidth=0.4)
        stride = -(-len(updates) // 8)
        ax.set_xticks([i + 0.5 for i in range(0, len(updates), stride)], [str(n) for n in updates[::stride]])
        ax.set(xlabel=AXES["step"])
        ax.set_yticks([i + 0.5 for i in range(len(matrices))], matrices, fontsize=6)
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.invert_yaxis()

    return draw
