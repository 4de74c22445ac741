"""Plots as inline SVG in the colours of the page around them, light and dark."""

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Each colour in light and in dark. Plots are drawn in the light one; it then becomes a reference to the CSS variable.
COLOURS = {
    "paper": ("#fcfbf8", "#15171a"),
    "panel": ("#f4f2ec", "#1d2024"),
    "rule": ("#dedad0", "#33373d"),
    "ink": ("#22211f", "#e7e4de"),
    "muted": ("#69665f", "#a29e96"),
    "before": ("#98948a", "#85827b"),
    "after": ("#0e6377", "#64bfd6"),
    "good": ("#2e7147", "#79c594"),
    "bad": ("#a8432f", "#e58d79"),
    "c0": ("#3b6ea5", "#7fb0e0"),
    "c1": ("#c1622d", "#e39a68"),
    "c2": ("#4f8a4c", "#8cc488"),
    "c3": ("#8a5a9e", "#c39ad6"),
    "c4": ("#b08d1e", "#dcc05a"),
    "c5": ("#2f8f8b", "#6fcac5"),
    "c6": ("#b0486b", "#e58aa8"),
    "c7": ("#7a6a4a", "#b9ab8c"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
LINE_COLOURS = [name for name in COLOURS if re.fullmatch(r"c\d", name)]

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.6,
    "axes.edgecolor": LIGHT["rule"],
    "xtick.color": LIGHT["rule"],
    "ytick.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "text.color": LIGHT["ink"],
    "svg.fonttype": "none",
}


def plot(draw: Callable[["Axes"], None] | None, inches: tuple[float, float], name: str, label: str) -> str:
    """What `draw` draws, as an inline SVG in the page's own colours and font; empty when there is nothing to draw.

    `name` makes the ids inside unique on the page; `label` (HTML) is read out instead of the picture.
    """
    if draw is None:
        return ""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = file.getvalue()
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view
    svg = f'<svg {view[0]} role="img" aria-label="{label}">' + svg[svg.index(">", view.end()) + 1 :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for variable, light in LIGHT.items():
        svg = svg.replace(light, f"var(--{variable})")
    return svg
