"""The laboratory's plots: a figure that an experiment names, made from its arms, the paper's points beside ours."""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctsft.errors import CTError
from ctsft.lab.compare import ArmRuns, chosen, measured
from ctsft.lab.drawing import INCHES, LAWS, PLACES, SHADES, Line, axis, draw_heat, drawing, laws_of, styles, tinted
from ctsft.lab.experiments import Figure
from ctsft.lab.metrics import MEASURES, SERIES, check_metric
from ctsft.lab.records import Record
from ctsft.lab.spec import Spec
from ctsft.lab.stats import SEEDS, t_test
from ctsft.lab.tables import UNREAD, field_of
from ctsft.pages.words import words

LONGEST = 200  # points of a curve at most


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


def picture(name: str, figure: Figure, found: Sequence[ArmRuns], beside: Sequence[Figure] = ()) -> Picture:
    """One figure of an experiment, drawn from the arms that its `where` leaves.

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
    text = axis(figure.y)
    text = f"{text[0].upper()}{text[1:]}; mean over the seeds at every update."
    return Picture(figure.title, svgs, legend, text)
