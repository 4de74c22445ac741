"""The laboratory's plots: a figure that an experiment names, drawn from its rows, the paper's points beside ours."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from ctsft.errors import CTError
from ctsft.lab.compare import ArmRuns, chosen, measured
from ctsft.lab.experiments import Figure
from ctsft.lab.metrics import MEASURES, METRICS, SERIES, check_metric
from ctsft.lab.records import Record
from ctsft.lab.spec import Spec
from ctsft.lab.stats import SEEDS, t_test
from ctsft.lab.tables import UNREAD, field_of
from ctsft.pages.plot import LIGHT, LINE_COLOURS, plot
from ctsft.pages.words import words

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
LONGEST = 200  # points of a curve at most
AXES = {  # what axes are called that are no metric, or a part of one; a metric is called what METRICS says
    "k": "K",
    "lr": "learning rate",
    "step": "updates",
    "kept": "directions kept",
    "heldout": METRICS["heldout_loss"].words,
    "coverage_diagonal.first": "share of the gradient's energy on the diagonal, before training",
}

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


def varying(found: Sequence[ArmRuns]) -> list[str]:
    """The fields of Spec, but the rate and the seed, in which the arms differ."""
    fields = [name for name in Spec.model_fields if name not in ("lr", "seed")]
    return [name for name in fields if len({getattr(arm.spec, name) for arm in found}) > 1]


def told(field: str, value: Any) -> str:
    """A setting in few words: `K = 32`, `tied: no`, `sql`."""
    if field == "k":
        return f"K = {value}"
    if field == "schedule":
        return value or "fixed K"
    if field == "model":
        return Path(value).name
    if isinstance(value, str) and value:
        return value
    return f"{field.replace('_', ' ')}: {words(value)}" if isinstance(value, bool | tuple) else f"{field} = {value}"


@dataclass(frozen=True)
class Line:
    """What a figure shows of one arm or of several: points (x, mean over seeds, half of its 95% interval or 0)."""

    key: tuple[Any, ...]
    points: list[tuple[float, float, float]]
    curve: bool = False

    @property
    def joined(self) -> bool:
        return len({x for x, _, _ in self.points}) == len(self.points)


@dataclass(frozen=True)
class Picture:
    title: str
    svgs: list[tuple[str, str]]  # (what it is of, the SVG)
    legend: list[tuple[str, str, str]]  # (words, colour, border style)
    note: str


def check(name: str, figure: Figure) -> None:
    """CTError if a figure's names are not names."""
    where, root = f"Experiment {name}, figure {figure.title!r}", figure.y.partition(".")[0]
    fields = {*Spec.model_fields, "name"}
    if wrong := [field for field in (*fields_of(figure), *figure.where) if field not in fields]:
        raise CTError(f"{where}: {wrong[0]!r} is no field of a run; take one of {', '.join(sorted(fields))}.")
    if figure.x == "step" and root not in (*SERIES, "train_loss", "heldout"):
        raise CTError(f"{where}: no curve {figure.y!r} over the steps; take train_loss, heldout, {', '.join(SERIES)}.")
    if figure.x == "kept" and root not in MEASURES:
        raise CTError(f"{where}: {figure.y!r} is not measured by directions kept; take {', '.join(MEASURES)}.")
    for metric in () if figure.x in ("step", "kept") else (figure.x, figure.y):
        try:
            if metric != "name":
                check_metric(metric)
        except CTError as error:
            raise CTError(f"{where}: {error}") from None
    for law in laws_of(figure):
        if law not in (*LAWS, *PLACES):
            raise CTError(f"{where}: there is no law {law!r}; take one of {', '.join((*LAWS, *PLACES))}.")
        if figure.x != "k" and (law in PLACES or LAWS[law][2]):
            raise CTError(f"{where}: the law {law!r} is one of K, so the figure needs x = 'k'.")


def fields_of(figure: Figure) -> list[str]:
    return [part.strip() for part in figure.by.split(",") if part.strip()]


def laws_of(figure: Figure) -> list[str]:
    return [part.strip() for part in figure.law.split(",") if part.strip()]


def picture(name: str, figure: Figure, found: Sequence[ArmRuns], beside: Sequence[Figure] = ()) -> Picture:
    """One figure of an experiment, drawn from the rows that its `where` leaves.

    Lines that figures `beside` it draw `by` the same fields look alike in all of them.
    """
    here = [arm for arm in chosen(found, figure.where) if arm.records]
    if figure.x == "step" and figure.y.endswith("_by_matrix"):
        return heat(name, figure, here)
    fields = fields_of(figure) or (varying(here) if figure.x in ("step", "kept") else [])
    ticks: list[str] = []
    if figure.x in ("step", "kept"):
        lines = [line for arm in here for line in curves(figure, arm, fields)]
    else:
        lines = points(figure, here, found, fields, ticks)
    lines = [line for line in lines if line.points]
    if not lines:
        return Picture(figure.title, [], [], "No run of this figure is there yet, or none has this number.")
    keys = in_order(line.key for line in lines)
    alike = [arm for f in (*beside, figure) if fields_of(f) == fields for arm in chosen(found, f.where) if arm.records]
    every = in_order(key_of(arm, fields) for arm in alike)
    every = every if set(keys) <= set(every) else keys
    looks = {key: look for key, look in zip(every, styles(every), strict=True) if key in keys}
    shapes = {Path(arm.spec.model).name: arm.records[0].adapted.shapes for arm in here}
    draw = drawing(figure, lines, looks, ticks, {k: v for k, v in shapes.items() if v})
    legend = [(describe(fields, key), *look) for key, look in looks.items() if key]
    if figure.paper:
        legend.append(("the paper's figures", "ink", "ring"))
    legend += [(LAWS[law][0], "ink", "dashed") for law in laws_of(figure) if law in LAWS and LAWS[law][0]]
    missing = sum(y is None for arm in here for y in measured(arm, found, figure.y)) if not lines[0].curve else 0
    inches = (INCHES[0], 0.6 + 0.22 * len(ticks)) if ticks else INCHES
    return Picture(figure.title, [("", tinted(draw, inches, name, figure.title))], legend, note(here, lines, missing))


def in_order(keys: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Each key once, words as they come, numbers by size."""
    once = list(dict.fromkeys(keys))
    order = {part: i for i, part in enumerate(dict.fromkeys(p for key in once for p in key if isinstance(p, str)))}
    return sorted(once, key=lambda key: [order.get(part, part) for part in key])


def note(here: Sequence[ArmRuns], lines: Sequence[Line], missing: int) -> str:
    """What the bars are, and what is not drawn."""
    counts = sorted({len(arm.records) for arm in here})
    text = f"Mean over {counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''} seeds"
    if any(half for line in lines for _, _, half in line.points):
        text += f"; {'bands' if lines[0].curve else 'bars'} are its 95% t interval"
    text = "One seed" if counts == [1] else text
    if counts[0] < SEEDS:
        text += f"; fewer than {SEEDS} have no interval"
    return text + "." + (f" Not drawn, as missing or without this number: {missing}." if missing else "")


def centre(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95% t interval; 0 for fewer than SEEDS values, whose interval says nothing."""
    test = t_test(values)
    return test.mean, test.high - test.mean if test.n >= SEEDS else 0.0


def key_of(arm: ArmRuns, fields: Iterable[str]) -> tuple[Any, ...]:
    return tuple(field_of(arm, field) for field in fields)


def describe(fields: Sequence[str], key: tuple[Any, ...]) -> str:
    """A line in words; what follows the fields is the order of an ablation."""
    parts = [told(field, value) for field, value in zip(fields, key, strict=False) if field not in UNREAD or value]
    return ", ".join([*parts, *map(str, key[len(fields) :])])


def points(
    figure: Figure, here: Sequence[ArmRuns], found: Sequence[ArmRuns], fields: Sequence[str], ticks: list[str]
) -> list[Line]:
    """A line for every value of `by`, a point for every arm; where x is words they are added to `ticks`."""
    groups: dict[tuple[Any, ...], list[tuple[float, float, float]]] = {}
    for arm in here:
        ys = [y for y in measured(arm, found, figure.y) if y is not None]
        at = key_of(arm, [figure.x])[0] if figure.x == "name" or figure.x in Spec.model_fields else None
        if isinstance(at, str):
            at = told(figure.x, at)
            ticks += [at] if at not in ticks else []
            xs: list[float] = [ticks.index(at)]
        else:
            xs = [x for x in measured(arm, found, figure.x) if x is not None]
        if xs and ys:
            groups.setdefault(key_of(arm, fields), []).append((statistics.fmean(xs), *centre(ys)))
    return [Line(key, sorted(line)) for key, line in groups.items()]


def curves(figure: Figure, arm: ArmRuns, fields: Sequence[str]) -> list[Line]:
    """The curves of one arm: means at every x that all its seeds have."""
    merged: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    for record in arm.records:
        for key, curve in curves_of(figure, record):
            for x, y in curve:
                if isinstance(y, int | float):
                    merged.setdefault(key_of(arm, fields) + key, {}).setdefault(x, []).append(y)
    out = []
    for key, values in merged.items():
        whole = [(x, ys) for x, ys in sorted(values.items()) if len(ys) == len(arm.records)]
        even = (round(i * (len(whole) - 1) / LONGEST) for i in range(LONGEST + 1))
        kept = sorted({*even, *range(20)} & set(range(len(whole))))  # the start whole, for logarithmic axes
        out.append(Line(key, [(x, *centre(ys)) for x, ys in (whole[i] for i in kept)], curve=True))
    return out


def curves_of(figure: Figure, record: Record) -> list[tuple[tuple[str, ...], Iterable[tuple[float, Any]]]]:
    """One run's curves, each with what sets it apart from the others of the run (the order of an ablation)."""
    root, *path = figure.y.split(".")
    if figure.x == "kept":
        found: Any = record.measures.get(root)
        for part in path:
            found = (found or {}).get(part)
        many = found if isinstance(next(iter((found or {}).values()), None), dict) else {"": found or {}}
        return [((order,) if order else (), [(float(k), y) for k, y in ys.items()]) for order, ys in many.items()]
    if root == "train_loss":
        return [((), enumerate(record.train_loss))]
    series: Sequence[tuple[int, Any]] = record.heldout if root == "heldout" else record.probes.get(root, [])
    return [((), [(x, y[path[0]] if path else y) for x, y in series])]


def styles(keys: Sequence[tuple[Any, ...]]) -> list[tuple[str, str]]:
    """A colour and a dash for each key: the ramp for numbers, the series for names."""
    if len(keys) > 2 and all(isinstance(part, int | float) for key in keys for part in key):
        last = len(SHADES) - 1
        return [(SHADES[round(i * last / (len(keys) - 1))], "solid") for i in range(len(keys))]
    many = len(LINE_COLOURS)
    return [(LINE_COLOURS[i % many], DASHES[i // many % len(DASHES)]) for i in range(len(keys))]


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
    """Draws lines or points with their intervals, the paper's points as rings, and the laws."""
    places = sorted({x for line in lines for x, _, _ in line.points})

    def draw(ax: "Axes") -> None:
        if figure.log_x and not ticks:
            logarithmic(ax, sorted({*places, *(x for x, _ in figure.paper)}))
        for line in lines:
            colour, dash = looks[line.key]
            xs, ys, halves = (list(column) for column in zip(*line.points, strict=True))
            if line.curve:
                ax.plot(
                    xs,
                    ys,
                    color=hue(colour),
                    linestyle=dash,
                    linewidth=1.4,
                    marker=MARKERS[dash] if len(xs) < 9 else "",
                    ms=3,
                )
                low, high = ([y + sign * half for y, half in zip(ys, halves, strict=True)] for sign in (-1, 1))
                ax.fill_between(xs, low, high, color=hue(colour), alpha=0.16, linewidth=0)
                continue
            style: dict[str, Any] = {
                "color": hue(colour),
                "marker": MARKERS[dash],
                "ms": 4,
                "elinewidth": 1.1,
                "capsize": 2,
            }
            joined = dash if line.joined and not ticks else "none"
            if ticks:
                shift = 0.12 * (list(looks).index(line.key) - (len(looks) - 1) / 2)
                ax.errorbar(ys, [x + shift for x in xs], xerr=halves, linestyle="none", **style)
            else:
                ax.errorbar(xs, ys, yerr=halves, linestyle=joined, linewidth=1.2, **style)
        centres: list[float] = [y for line in lines for _, y, _ in line.points] + [y for _, y in figure.paper]
        if figure.paper:
            ax.plot(*zip(*figure.paper, strict=True), "o", ms=6.5, mfc="none", mec=LIGHT["ink"], mew=0.9, zorder=4)
        if ticks:
            ax.set(yticks=range(len(ticks)), yticklabels=ticks, xlabel=axis(figure.y))
            for law in {"zero", "one"} & set(laws_of(figure)):
                ax.axvline(LAWS[law][1](0, []), color=LIGHT["ink"], linestyle=(0, (4, 3)), linewidth=0.9)
            ax.set_ylim(len(ticks) - 0.5, -0.5)
            ax.grid(axis="x")
            return
        draw_laws(ax, figure, places, shapes)
        span = max(centres) - min(centres)  # two seeds have huge intervals: they may leave the plot, the means may not
        if figure.log_y and min(centres) > 0:
            ax.set_yscale("log")
            ax.set_ylim(min(centres) / 2, max(centres) * 2)
        elif span:
            bottom, top = ax.get_ylim()
            ax.set_ylim(max(bottom, min(centres) - 0.8 * span), min(top, max(centres) + 0.8 * span))
        ax.set(xlabel=axis(figure.x))
        ax.set_title(axis(figure.y), color=LIGHT["muted"], pad=8)

    return draw


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
    """What an axis is called: `train_loss@40` by `train_loss`, `ablation.order` by `ablation`."""
    name, _, at = metric.partition("@")
    known = METRICS.get(name) or METRICS.get(name.partition(".")[0])
    text = AXES.get(name) or (known and known.words) or name.replace("_", " ").replace(".", ", ")
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


def heat(name: str, figure: Figure, here: Sequence[ArmRuns]) -> Picture:
    """A value by matrix over the training, a map for every arm: mean over the seeds, in the steps of the ramp."""
    maps = []
    for arm in here:
        found: dict[tuple[str, int], list[float]] = {}
        for record in arm.records:
            for update, values in record.probes.get(figure.y, []):
                for matrix, value in values.items():
                    if value is not None:
                        found.setdefault((matrix, update), []).append(value)
        if found:
            maps.append((arm, {place: statistics.fmean(values) for place, values in found.items()}))
    if not maps:
        return Picture(figure.title, [], [], "No run of this figure is there yet, or none has this number.")
    low = min(value for _, cells in maps for value in cells.values())
    high = max(value for _, cells in maps for value in cells.values())
    fields = fields_of(figure) or varying([arm for arm, _ in maps])
    svgs = []
    for i, (arm, cells) in enumerate(maps):
        matrices = list(dict.fromkeys(matrix for matrix, _ in cells))
        label = describe(fields, key_of(arm, fields))
        draw = draw_heat(matrices, sorted({update for _, update in cells}), cells, low, high)
        height = 0.6 + 0.125 * len(matrices)
        svgs.append((label, tinted(draw, (INCHES[0], height), f"{name}-{i}", f"{figure.title} {label}")))
    edges = [low + (high - low) * i / len(SHADES) for i in range(len(SHADES) + 1)]
    legend = [
        (f"{a:.3g} \N{EN DASH} {b:.3g}", shade, "block")
        for shade, (a, b) in zip(SHADES, itertools.pairwise(edges), strict=True)
    ]
    return Picture(figure.title, svgs, legend, f"{axis(figure.y)}, mean over the seeds, by update.".capitalize())


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
