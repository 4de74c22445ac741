"""The report: one self-contained HTML page that tells what a run did, from the content of its run.json alone."""

import io
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from ctsft.errors import CTError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = 1
OPEN_ROWS = 12  # rows of the table of matrices that are not folded away
CURVE_ROWS = 60  # rows of the loss table at most
PLACE = re.compile(r"(?:.*?\.(\d+)\.)?(.+)")  # "model.layers.3.mlp.up_proj": the block's index and the kind of matrix

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
SERIES = [name for name in COLOURS if re.fullmatch(r"c\d", name)]


def write_report(run: dict[str, Any], path: Path) -> None:
    """Write the page of `run` (the content of run.json) to `path`, whole or not at all.

    The page needs nothing from outside it and runs no script. Losses are in nats per token. Parts of the run that are
    empty or null (accuracy, samples, curve, spectra) are left out. Raises CTError when `run` has another format.
    """
    if run.get("format") != FORMAT:
        raise CTError(
            f"this run has format {run.get('format')!r} and this ctsft reads {FORMAT}; use the ctsft that wrote it."
        )
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, size=size, duration=duration, words=words)
    spectra = sorted(run["spectra"], key=lambda row: -(row.get("delta_over_weight") or 0))
    page = environment.from_string(PAGE).render(
        run=run,
        style=environment.from_string(STYLE).render(colours=COLOURS),
        result=result_sentence(run),
        accuracy=[
            (label, run[label]["accuracy"], score(run[label]["accuracy"]))
            for label in ("before", "after")
            if run[label]["accuracy"]
        ],
        kinds=accuracy_by_kind(run),
        loss_plot=plot(draw_loss(run), (4.2, 2.5), "loss", "Loss over the training steps, in nats per token"),
        smoothing=window(len(run["curve"])),
        curve=thinned(run["curve"]),
        depth_plots=depth_plots(run["spectra"]),
        series=series(run["spectra"]),
        spectra=spectra,
        open_rows=OPEN_ROWS,
        largest_delta=max((row.get("delta_over_weight") or 0 for row in spectra), default=0) or 1,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(page, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


# ---- words and numbers


def result_sentence(run: dict[str, Any]) -> str:
    """The main result in one sentence: held-out loss and execution accuracy, before and after."""
    before, after = run["before"], run["after"]
    share = run["costs"]["trainable"] / run["model"]["parameters"]
    moved = round(after["heldout_loss"], 3) - round(before["heldout_loss"], 3)
    verb = "lowered" if moved < 0 else "raised" if moved > 0 else "did not change" if moved == 0 else "broke"
    text = (
        f"Training {run['costs']['trainable']:,} numbers, {percent(share)} of the model, {verb} the held-out loss "
        f"from {before['heldout_loss']:.3f} to {after['heldout_loss']:.3f} nats per token"
    )
    if before["accuracy"] and after["accuracy"]:
        text += f"; execution accuracy went from {score(before['accuracy'])} to {score(after['accuracy'])}"
    return text + "."


def score(accuracy: dict[str, Any]) -> str:
    """`3 of 40 (7.5%, 95% interval 2.0% to 20.0%)`."""
    correct, total = accuracy["correct"], accuracy["total"]
    rate = f"{correct / total:.1%}" if total else "no questions"
    return f"{correct} of {total} ({rate}, 95% interval {accuracy['low']:.1%} to {accuracy['high']:.1%})"


def accuracy_by_kind(run: dict[str, Any]) -> list[tuple[str, list[tuple[str, int, int]]]]:
    """(kind, [(before or after, correct, total), ...]) for every kind of question that was asked."""
    measured = {
        label: run[label]["accuracy"].get("by_kind", {}) for label in ("before", "after") if run[label]["accuracy"]
    }
    kinds = sorted({kind for counts in measured.values() for kind in counts})
    return [(kind, [(label, *counts.get(kind, (0, 0))) for label, counts in measured.items()]) for kind in kinds]


def number(value: object, form: str = ",") -> str:
    """A number in `form`; a dash where there is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "\N{EN DASH}"
    return format(value, form)


def percent(share: float) -> str:
    """A share with three digits, however small."""
    return f"{share * 100:.3g}%"


def size(value: float) -> str:
    """Bytes for people: 54.0 kB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people: 4 min 0 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def words(value: object) -> str:
    """A setting of the recipe in words."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {words(item)}" for key, item in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def thinned(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most CURVE_ROWS points of the loss curve, evenly spaced, with the last."""
    stride = -(-len(curve) // CURVE_ROWS) or 1
    return curve[::-1][::stride][::-1]


# ---- plots


def plot(draw: Callable[["Axes"], None] | None, inches: tuple[float, float], name: str, label: str) -> str:
    """What `draw` draws, as an inline SVG in the page's own colours and font; empty when there is nothing to draw."""
    if draw is None:
        return ""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
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
        "svg.hashsalt": name,
    }
    with matplotlib.rc_context(style):
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


def window(steps: int) -> int:
    """How many steps the smoothed loss is a mean over; odd, so that it has a middle."""
    return (steps // 15) | 1


def draw_loss(run: dict[str, Any]) -> Callable[["Axes"], None] | None:
    """The training loss, faint and smoothed, with the held-out loss before and after."""
    points = [(p["step"], p["loss"]) for p in run["curve"] if p["loss"] is not None and math.isfinite(p["loss"])]
    if not points:
        return None
    steps, losses = (list(column) for column in zip(*points, strict=True))
    half = window(len(run["curve"])) // 2
    around = [losses[max(0, i - half) : i + half + 1] for i in range(len(losses))]

    def draw(ax: "Axes") -> None:
        ax.plot(steps, losses, color=LIGHT["c0"], linewidth=0.7, alpha=0.4)
        ax.plot(steps, [sum(near) / len(near) for near in around], color=LIGHT["c0"], linewidth=1.5)
        end = max(run["steps"], steps[-1])
        for x, label, side in ((0, "before", "left"), (end, "after", "right")):
            loss = run[label]["heldout_loss"]
            if math.isfinite(loss):
                ax.plot(x, loss, "D", color=LIGHT[label], markersize=5, clip_on=False, zorder=3)
                shift = 7 if side == "left" else -7
                ax.annotate(
                    f"held-out {label} {loss:.3f}",
                    (x, loss),
                    (shift, 4 if side == "left" else 14),
                    textcoords="offset points",
                    ha=side,
                    bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 1.5, "alpha": 0.8},
                )
        ax.set(xlabel="step", xlim=(-0.01 * end, end * 1.01))
        ax.margins(y=0.15)  # room for the held-out labels
        ax.set_title("loss, nats per token", color=LIGHT["muted"], pad=10)

    return draw


def series(spectra: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """The colour and dash of every kind of matrix that is found in several blocks: what the plots over depth show."""
    kinds: dict[str, set[str]] = {}
    for row in spectra:
        block, kind = place(row)
        if block is not None:
            kinds.setdefault(kind, set()).add(block)
    several = [kind for kind, blocks in kinds.items() if len(blocks) > 1]
    dashes = ("solid", "dashed", "dotted")
    return {kind: (SERIES[i % len(SERIES)], dashes[i // len(SERIES) % len(dashes)]) for i, kind in enumerate(several)}


def place(row: dict[str, Any]) -> tuple[str | None, str]:
    """The block's index in a matrix' name (None outside the blocks) and the kind, the same for all experts."""
    block, kind = PLACE.fullmatch(row["name"]).groups()  # type: ignore[union-attr]
    return block, re.sub(r"\.\d+\.", ".*.", kind)


def depth_plots(spectra: list[dict[str, Any]]) -> list[str]:
    """Energy, effective rank and the size of the change over the model's depth, a line per kind of matrix."""
    quantities: list[tuple[str, str, Callable[[dict[str, Any]], float | None]]] = [
        ("energy", "energy in the top K", lambda row: row.get("energy_top_k")),
        ("rank", "effective rank / smaller side", lambda row: row["effective_rank"] / min(row["shape"])),
        ("change", "|\N{GREEK CAPITAL LETTER DELTA}W| / |W|", lambda row: row.get("delta_over_weight")),
    ]
    return [
        plot(draw_depth(spectra, value, title), (3.3, 2.3), name, f"{title}, over the blocks")
        for name, title, value in quantities
        if series(spectra)
    ]


def draw_depth(
    spectra: list[dict[str, Any]], value: Callable[[dict[str, Any]], float | None], title: str
) -> Callable[["Axes"], None]:
    """The mean of `value` over the matrices of one kind in each block, a line per kind."""

    def draw(ax: "Axes") -> None:
        for kind, (colour, dash) in series(spectra).items():
            blocks: dict[int, list[float]] = {}
            for row in spectra:
                block, its_kind = place(row)
                if its_kind == kind and block is not None and (y := value(row)) is not None:
                    blocks.setdefault(int(block), []).append(y)
            line = [(block, sum(ys) / len(ys)) for block, ys in sorted(blocks.items())]
            ax.plot(*zip(*line, strict=True), color=LIGHT[colour], linestyle=dash, linewidth=1.1)
        ax.set(xlabel="block", ylim=(0, None))
        ax.set_title(title, color=LIGHT["muted"])
        ax.locator_params(axis="x", integer=True)
        ax.yaxis.set_major_formatter("{x:g}")

    return draw


# ---- the page

STYLE = """\
:root { {% for name, shades in colours.items() %}--{{ name }}: {{ shades[0] }}; {% endfor %}}
@media (prefers-color-scheme: dark) { :root { {% for name, shades in colours.items() %}--{{ name }}: {{ shades[1] }}; {% endfor %}} }
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1088px; padding: 3.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 17px/1.6 Charter, "Bitstream Charter", "Iowan Old Style", "Palatino Linotype", Georgia, serif; }
h1 { font-size: clamp(1.7rem, 4.6vw, 2.5rem); line-height: 1.15; font-weight: 600; letter-spacing: -.012em; margin: .4rem 0 1rem;
  max-width: 26em; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.3; font-weight: 600; margin: 3.5rem 0 .6rem; padding-top: 1.1rem; border-top: 1px solid var(--rule); }
p { margin: 0 0 1rem; max-width: 42rem; }
.lead { font-size: 1.18rem; line-height: 1.5; max-width: 46rem; }
.note, figcaption, .eyebrow, .tile, table, dl, summary, .legend, .score, .sample h3, .sample b, svg text {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important; }
.note, figcaption { color: var(--muted); font-size: .83rem; line-height: 1.5; max-width: 46rem; }
.eyebrow { color: var(--after); font-size: .76rem; font-weight: 600; letter-spacing: .09em; text-transform: uppercase; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1px; margin: 1.8rem 0 .8rem; background: var(--rule);
  border: 1px solid var(--rule); border-radius: 6px; overflow: hidden; }
.tiles.two { grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); margin-bottom: 0; border-bottom: 0; border-radius: 6px 6px 0 0; }
.tiles.two + .tiles { margin-top: 0; border-radius: 0 0 6px 6px; }
.tile { background: var(--panel); padding: 1rem 1.1rem; min-width: 0; font-variant-numeric: tabular-nums; }
.tile span, .tile small { display: block; color: var(--muted); font-size: .8rem; line-height: 1.45; }
.tile strong { display: block; font-size: 1.5rem; line-height: 1.35; font-weight: 600; letter-spacing: -.01em; }
.two strong { font-size: 2rem; }
.tile em { font-style: normal; font-weight: 400; color: var(--before); }
.tile em.to { font-weight: 600; color: var(--after); }
.score + small { margin-top: .6rem; }
.score { display: grid; grid-template-columns: 3.6em 1fr; gap: .2rem .7rem; align-items: center; margin-top: .5rem; font-size: .8rem; color: var(--muted); }
.track { position: relative; height: 1px; border-bottom: 1px solid var(--rule); }
.track i, .track b { position: absolute; bottom: -3px; height: 5px; border-radius: 3px; background: var(--after); opacity: .45; }
.track b { width: 9px; height: 9px; bottom: -5px; margin-left: -4.5px; border-radius: 50%; opacity: 1; }
.track.before i, .track.before b { background: var(--before); }
.scroll + .note { margin-top: .8rem; }
figure { margin: 1.2rem 0; }
figure.beside { display: grid; grid-template-columns: minmax(0, 600px) minmax(0, 1fr); gap: 2.2rem; align-items: end; }
.three { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1.4rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.2rem; margin: .8rem 0 .3rem; font-size: .8rem; color: var(--muted); }
.legend i { display: inline-block; width: 1.6em; margin-right: .45em; vertical-align: .28em; border-top: 2px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 500; text-align: right; vertical-align: bottom; padding: .35rem .7rem; border-bottom: 1px solid var(--rule); }
td { text-align: right; padding: .32rem .7rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.name { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .76rem; overflow-wrap: anywhere; white-space: normal; }
.spectra { width: 100%; min-width: 780px; table-layout: fixed; }
.spectra .wide { width: 31%; }
.bar { position: relative; }
.bar i { position: absolute; right: 0; top: 15%; bottom: 15%; background: var(--after); opacity: .2; border-radius: 2px; max-width: 100%; }
.bar span { position: relative; }
.kinds { width: 100%; max-width: 46rem; }
.kinds td { width: 38%; text-align: left; }
.kinds td:first-child { width: 24%; white-space: normal; overflow-wrap: anywhere; }
.kinds th { text-align: left; }
.meter { display: flex; align-items: center; gap: .7rem; }
.meter > span { min-width: 3.4em; color: var(--muted); }
.meter div { flex: 1; height: 8px; border-radius: 4px; background: var(--rule); overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--after); }
.meter.before i { background: var(--before); }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--after); font-size: .86rem; padding: .35rem 0; }
.sample { margin: 1.4rem 0; border: 1px solid var(--rule); border-radius: 6px; overflow: hidden; background: var(--rule); }
.sample > div, .sample .three > div { background: var(--paper); padding: .8rem 1rem; min-width: 0; }
.sample > div:first-child { background: var(--panel); }
.sample .three { gap: 1px; padding: 0; background: var(--rule); margin-top: 1px; }
.sample h3 { display: flex; justify-content: space-between; margin: 0 0 .4rem; font-size: .76rem; font-weight: 600; color: var(--muted); }
.good { color: var(--good); } .bad { color: var(--bad); }
pre { margin: 0; max-height: 15rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .79rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
dl { display: grid; grid-template-columns: minmax(9em, auto) 1fr; gap: .25rem 1.4rem; margin: .6rem 0 1.4rem; font-size: .83rem; line-height: 1.45;
  font-variant-numeric: tabular-nums; }
.none { color: var(--muted); }
dt { color: var(--muted); } dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
@media (max-width: 760px) {
  body { padding: 2rem 1.1rem 3rem; font-size: 16px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tiles.two { grid-template-columns: 1fr; }
  .tile { padding: .8rem .9rem; } .tile strong { font-size: 1.25rem; } .two strong { font-size: 1.65rem; }
  figure.beside, .three { grid-template-columns: 1fr; gap: 1rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  td, th { padding-left: .4rem; padding-right: .4rem; }
}
"""  # noqa: E501  (of this page, and of the laboratory's)

PAGE = """\
{% macro table_of(rows, first) %}
<table class="spectra">
<colgroup><col class="wide"><col span="7"></colgroup>
{% if first %}
<thead><tr><th>matrix</th><th>|ΔW| / |W|</th><th>|C|</th><th>K</th><th>energy in top K</th><th>effective rank</th><th>stable rank</th>
<th>d_out &times; d_in</th></tr></thead>
{% endif %}
<tbody>
{% for row in rows %}
<tr><td class="name">{{ row.name }}</td>
<td class="bar"><i style="width:{{ 100 * (row.delta_over_weight or 0) / largest_delta }}%"></i><span>{{ row.delta_over_weight|number(".2e") }}</span></td>
<td>{{ row.coefficient_norm|number(".3g") }}</td><td>{{ row.k|number }}</td><td>{{ row.energy_top_k|number(".1%") }}</td>
<td>{{ row.effective_rank|number(".1f") }}</td><td>{{ row.stable_rank|number(".1f") }}</td><td>{{ row.shape[0] }} &times; {{ row.shape[1] }}</td></tr>
{% endfor %}
</tbody></table>
{% endmacro %}
{% macro mark(ok) %}
{% if ok is true %}<b class="good">✓ right</b>{% elif ok is false %}<b class="bad">✗ wrong</b>{% endif %}
{% endmacro %}
{% macro answer(text) %}
<pre>{% if text %}{{ text }}{% else %}<i class="none">nothing</i>{% endif %}</pre>
{% endmacro %}
{% macro facts(pairs) %}
<dl>{% for key, value in pairs %}<dt>{{ key }}</dt><dd>{{ value|words }}</dd>{% endfor %}</dl>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ run.name }}</title>
<style>
{{ style|safe }}
</style>
</head>
<body>
<header>
<div class="eyebrow">CT-SFT fine-tuning run</div>
<h1>{{ run.name }}</h1>
<p class="lead">{{ result }}</p>
<p class="note">{{ run.created|replace("T", " ") }} · {{ run.steps|number }} steps{% if run.resumed %} · resumed {{ run.resumed }}
{{ "time" if run.resumed == 1 else "times" }}{% endif %} · one seed. A single run has no spread: how much another seed would move these
numbers is not known from it.</p>
</header>

<div class="tiles two">
<div class="tile"><span>held-out loss, nats per token</span>
<strong><em>{{ run.before.heldout_loss|number(".3f") }} →</em> <em class="to">{{ run.after.heldout_loss|number(".3f") }}</em></strong>
<small>change {{ (run.after.heldout_loss - run.before.heldout_loss)|number("+.3f") }}, over {{ run.after.heldout_tokens|number }} tokens never trained on</small></div>
{% if accuracy %}
<div class="tile"><span>execution accuracy</span>
<strong>{% for label, value, text in accuracy %}{% if label == "before" %}<em>{{ (value.correct / (value.total or 1))|number(".1%") }} →</em>
{% else %}<em class="to">{{ (value.correct / (value.total or 1))|number(".1%") }}</em>{% endif %}{% endfor %}</strong>
<div class="score">
{% for label, value, text in accuracy %}
<span>{{ label }}</span><div class="track {{ label }}" title="{{ text }}"><i style="left:{{ 100 * value.low }}%;width:{{ 100 * (value.high - value.low) }}%"></i>
<b style="left:{{ 100 * value.correct / (value.total or 1) }}%"></b></div>
{% endfor %}
</div>
<small>{% for label, value, text in accuracy %}{{ label }} {{ text }}{{ "; " if not loop.last }}{% endfor %}</small></div>
{% endif %}
</div>
<div class="tiles">
<div class="tile"><span>trained numbers</span><strong>{{ run.costs.trainable|number }}</strong>
<small>{{ (100 * run.costs.trainable / run.model.parameters)|number(".3g") }}% of {{ run.model.parameters|number }}</small></div>
<div class="tile"><span>adapter on disk</span><strong>{{ run.costs.adapter_bytes|size }}</strong>
<small>{{ run.costs.adapter_bytes|number }} bytes</small></div>
<div class="tile"><span>extra memory</span><strong>{{ run.costs.extra_memory_bytes|size }}</strong>
<small>{{ run.costs.extra_memory_bytes|number }} bytes</small></div>
<div class="tile"><span>time</span><strong>{{ run.costs.seconds|duration }}</strong><small>{{ run.costs.seconds|number(",.1f") }} seconds</small></div>
</div>
{% if accuracy %}
<p class="note">The intervals say how far the share could lie from this sample of questions; they say nothing about other seeds.</p>
{% endif %}

{% if loss_plot or curve %}
<h2>Training</h2>
{% if loss_plot %}
<figure class="beside">{{ loss_plot|safe }}
<figcaption>Training loss of each step (faint){% if smoothing > 1 %} and its mean over {{ smoothing }} steps (line){% endif %}; diamonds are the
loss on the held-out split before and after training. Each training point is over one batch, so its scatter is that of the text.</figcaption></figure>
{% endif %}
<details><summary>The curve as numbers{% if curve|length < run.curve|length %}, {{ curve|length }} of {{ run.curve|length }} steps{% endif %}</summary>
<div class="scroll"><table><thead><tr><th>step</th><th>loss, nats per token</th><th>tokens</th><th>seconds</th><th>learning rate</th></tr></thead><tbody>
{% for point in curve %}
<tr><td>{{ point.step|number }}</td><td>{{ point.loss|number(".4f") }}</td><td>{{ point.tokens|number }}</td><td>{{ point.seconds|number(",.1f") }}</td>
<td>{{ point.learning_rate|number(".3g") }}</td></tr>
{% endfor %}
</tbody></table></div></details>
{% endif %}

{% if kinds %}
<h2>Accuracy by kind of question</h2>
<div class="scroll"><table class="kinds"><thead><tr><th>kind</th>{% for label, _, _ in accuracy %}<th>{{ label }}</th>{% endfor %}</tr></thead><tbody>
{% for kind, counts in kinds %}
<tr><td>{{ kind }}</td>{% for label, correct, total in counts %}
<td><div class="meter {{ label }}"><div><i style="width:{{ 100 * correct / (total or 1) }}%"></i></div><span>{{ correct }} of {{ total }}</span></div></td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p class="note">Shares of a kind with few questions move by chance; compare the counts.</p>
{% endif %}

{% if run.samples %}
<h2>What it writes</h2>
<p>The same held-out prompts, answered by the model before and after training.{% if run.after.accuracy %} Shown in turn are the
first that tuning answers as wanted and the first that it does not; how many there are of each is told above.{% endif %}</p>
{% for sample in run.samples %}
{% if loop.index == 5 %}<details><summary>{{ run.samples|length - 4 }} more</summary>{% endif %}
<div class="sample"><div><h3>prompt</h3><pre>{{ sample.prompt }}</pre></div>
<div class="three">
<div><h3>reference</h3><pre>{{ sample.reference }}</pre></div>
<div><h3>before {{ mark(sample.before_ok) }}</h3>{{ answer(sample.before) }}</div>
<div><h3>after {{ mark(sample.after_ok) }}</h3>{{ answer(sample.after) }}</div>
</div></div>
{% if loop.last and loop.index > 4 %}</details>{% endif %}
{% endfor %}
{% endif %}

{% if spectra %}
<h2>The adapted matrices</h2>
<p>How each matrix W that was adapted spreads its own energy over its directions, and how large the change ΔW is that training gave it.</p>
{% if depth_plots %}
<figure><div class="three">{% for svg in depth_plots %}<div>{{ svg|safe }}</div>{% endfor %}</div>
<div class="legend">{% for kind, look in series.items() %}<span><i style="border-top-style:{{ look[1] }};border-top-color:var(--{{ look[0] }})"></i>{{ kind }}</span>{% endfor %}</div>
<figcaption>Over the depth of the model, by kind of matrix. Energy: share of the squared norm of W in its K largest singular values.
Effective rank: exp of the entropy of the normalised singular values. |·|: Frobenius norm.</figcaption></figure>
{% endif %}
<div class="scroll">
{{ table_of(spectra[:open_rows], true) }}
{% if spectra|length > open_rows %}
<details><summary>{{ spectra|length - open_rows }} more matrices, in order of |ΔW| / |W|</summary>
{{ table_of(spectra[open_rows:], false) }}
</details>
{% endif %}
</div>
{% endif %}

<h2>How it was made</h2>
{{ facts([
  ("model", run.model.name), ("parameters", run.model.parameters), ("dtype", run.model.dtype), ("about the model", run.model.note or none),
  ("data", run.data.name), ("kind", run.data.kind), ("rows trained on", run.data.train_rows), ("rows held out", run.data.heldout_rows),
  ("rows truncated", run.data.truncated), ("rows dropped", run.data.dropped), ("notes", run.data.notes),
  ("held-out tokens", run.after.heldout_tokens)]) }}
<details><summary>Recipe</summary>{{ facts(run.recipe.items()) }}</details>
<details><summary>Versions and machine</summary>{{ facts(run.versions.items()) }}{{ facts(run.machine.items()) }}</details>
<p class="note">Base weights {{ run.fingerprint }}. All numbers on this page are in run.json beside it.</p>
</body>
</html>
"""  # noqa: E501
