"""Inspection: how the energy of every matrix of a model is spread over its directions, as numbers, table and plot."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from ctsft.errors import CTError
from ctsft.pages.words import place
from ctsft.spectral.decompose import effective_rank, energy, one_thread, singular_values, stable_rank
from ctsft.spectral.universal import universal_basis
from ctsft.spectral.weights import ROWS, checked, matrices, universal_gram, universal_members, width

SAMPLES = 40  # points that stand for a whole spectrum
KINDS = 60  # rows of the printed table

Progress = Callable[[int, int, str], None]
Groups = dict[tuple[str, tuple[int, int]], list[tuple[int | None, dict[str, Any]]]]


def inspect_model(model: nn.Module, k: int = 64, progress: Progress | None = None) -> dict[str, Any]:
    """The spectra of all Linear, Conv1D and Embedding weights of `model`, and of its universal basis. JSON values.

    `matrices` is `spectra_of` for all of them. `universal` (paper 78) tells which share of the squared norm of the rows
    of all `members` together lies in the top `k` directions of width d_model (`explained`) and in the top
    1, 2, 4, ... d_model (`curve`, pairs). `progress` is as in `spectra_of`.
    Raises CTError for a k below 1, for weights that have no spectrum, and for a model without an input embedding.
    """
    d_model = width(model)
    members = universal_members(model, d_model)
    spectra = spectra_of(model, k=k, progress=progress)
    with one_thread():
        values = torch.linalg.eigvalsh(universal_gram(members, d_model)).flip(0).clamp(min=0)
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "d_model": d_model,
        "k": k,
        "matrices": spectra,
        "universal": universal_curve(values, k, len(members)),
    }


def universal_curve(values: Tensor, k: int, members: int) -> dict[str, Any]:
    """What `inspect_model` tells of a universal basis, from its eigenvalues `values` (d_model,), descending."""
    total, d_model = values.sum(), len(values)
    share = (values.cumsum(0) / (total if total > 0 else 1)).tolist()  # of a model of zeros: 0
    counts = sorted({2**i for i in range(d_model.bit_length())} | {d_model})
    return {
        "k": min(k, d_model),
        "explained": share[min(k, d_model) - 1],
        "curve": [[count, share[count - 1]] for count in counts],
        "members": members,
    }


def inspect_universal(model: str, k: int = 64, bar: str | None = None) -> dict[str, Any]:
    """What `inspect_model` tells of the universal basis of `model`, without loading it (see `universal_basis`).

    JSON values: `model` as given, `d_model`, `k`, `universal`. Raises CTError for a k below 1 and as `universal_basis`.
    """
    if k < 1:
        raise CTError(f"k={k} must be a whole number of directions, at least 1.")
    basis = universal_basis(model, bar)
    told = universal_curve(basis.values, k, basis.members)
    return {"model": model, "d_model": len(basis.values), "k": k, "universal": told}


def spectra_of(
    model: nn.Module, names: Iterable[str] | None = None, k: int | dict[str, int] = 64, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """One dict per matrix of `model`, in the model's order: those in `names` (clean names), or all.

    `name`; `shape` [d_out, d_in]; `k`, one for all or per name, at most the smaller side; `effective_rank` (exp of the
    entropy of sigma / sum sigma); `stable_rank`; `energy_top_k` (share of the squared Frobenius norm in the k largest);
    `largest` (sigma_1); `spectrum` (sigma / sigma_1 at up to 40 ranks, evenly spaced from the first to the last).
    All but `k` are 0 for a matrix of zeros. `progress(done, total, name)` is called before each matrix.
    Raises CTError for a name that is not there and for a k below 1.
    """
    found = dict(matrices(model))
    wanted = set(found) if names is None else set(names)
    if unknown := sorted(wanted - set(found)):
        raise CTError(f"{type(model).__name__} has no matrix {unknown[0]}; it has {', '.join(list(found)[:8])}, ...")
    result: list[dict[str, Any]] = []
    for name, module in found.items():
        if name in wanted:
            if progress:
                progress(len(result), len(wanted), name)
            result.append(spectrum_of(name, checked(name, module), k if isinstance(k, int) else k[name]))
    return result


def spectrum_of(name: str, w: Tensor, k: int) -> dict[str, Any]:
    """The numbers of one matrix `w` (d_out, d_in); see `spectra_of`."""
    if k < 1:
        raise CTError(f"k={k} must be a whole number of directions, at least 1.")
    s = all_singular_values(w)
    n, k, zero = len(s), min(k, len(s)), not s[0]
    ranks = torch.linspace(0, n - 1, min(n, SAMPLES)).round().long()
    return {
        "name": name,
        "shape": list(w.shape),
        "effective_rank": 0.0 if zero else effective_rank(s),
        "stable_rank": 0.0 if zero else stable_rank(s),
        "energy_top_k": 0.0 if zero else energy(s, k),
        "k": k,
        "largest": float(s[0]),
        "spectrum": (s if zero else s / s[0])[ranks].tolist(),
    }


def all_singular_values(w: Tensor) -> Tensor:
    """As `spectrum.singular_values`; of a tall matrix, those of its R factor, without a float64 copy of it all."""
    tall = (w if w.shape[0] >= w.shape[1] else w.T).detach()
    if len(tall) <= ROWS:
        return singular_values(tall)
    r = torch.empty(0, tall.shape[1], dtype=torch.float64)
    with one_thread():
        for rows in tall.split(ROWS):
            r = torch.linalg.qr(torch.cat((r, rows.to("cpu", torch.float64))), mode="r").R
    return singular_values(r)


def by_kind(result: dict[str, Any]) -> Groups:
    """The matrices of an `inspect_model` result by kind and shape, each with its block (None outside the blocks)."""
    groups: Groups = {}
    for entry in result["matrices"]:
        block, kind = place(entry["name"])
        groups.setdefault((kind, tuple(entry["shape"])), []).append((block, entry))
    return groups


def inspection_table(result: dict[str, Any]) -> Table:
    """An `inspect_model` result as a rich table: a row per kind of matrix, the mean and the range over the blocks."""
    universal, groups = result["universal"], by_kind(result)
    table = Table(
        title=Text(
            f"{result['model']}: {result['parameters']:,} parameters, {len(result['matrices'])} matrices", "table.title"
        ),
        caption=f"mean over the blocks, and the range below it; energy: share of the squared norm in the top "
        f"{result['k']} directions\nuniversal basis: the top {universal['k']} of {result['d_model']} directions hold "
        f"{universal['explained']:.1%} of the squared norm of {universal['members']} matrices",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("matrix", overflow="fold")
    for head in (
        "effective\nrank",
        "stable\nrank",
        f"energy in\ntop {result['k']}",
        "largest\n\N{GREEK SMALL LETTER SIGMA}",
    ):
        table.add_column(head, justify="right", no_wrap=True)

    def cell(entries: list[dict[str, Any]], key: str, form: str) -> Text:
        values = [entry[key] for entry in entries]
        mean = format(sum(values) / len(values), form)
        return Text.assemble(
            mean, ("" if len(values) == 1 else f"\n{min(values):{form}} - {max(values):{form}}", "dim")
        )

    for (kind, (d_out, d_in)), placed in list(groups.items())[:KINDS]:
        entries = [entry for _, entry in placed]
        formats = (("effective_rank", ".0f"), ("stable_rank", ".1f"), ("energy_top_k", ".0%"), ("largest", ".3g"))
        table.add_row(
            Text.assemble(kind, (f"\n{f'{len(entries)} of ' if len(entries) > 1 else ''}{d_out} x {d_in}", "dim")),
            *(cell(entries, key, form) for key, form in formats),
        )
    if len(groups) > KINDS:
        table.add_row(f"... and {len(groups) - KINDS} more kinds")
    return table


def universal_table(result: dict[str, Any]) -> Table:
    """An `inspect_universal` result as a rich table: K, and the share of the squared norm in the top K directions."""
    universal = result["universal"]
    shares = dict(universal["curve"]) | {universal["k"]: universal["explained"]}
    table = Table(
        "directions K",
        "share of the squared norm of all rows",
        title=Text(f"{result['model']}: {universal['members']} matrices of width {result['d_model']}", "table.title"),
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    for count in sorted(shares):
        table.add_row(f"{count}", f"{shares[count]:.1%}")
    return table


STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.6",
    "xtick.color": "0.35",
    "ytick.color": "0.35",
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "grid.color": "0.92",
    "axes.grid": True,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "ctsft",
}


def plot_spectra(result: dict[str, Any], path: Path) -> None:
    """Draw an `inspect_model` result: a panel per kind of matrix, a spectrum per block, and the universal basis' curve.

    `path` ends in .svg or .png. Raises CTError for another ending.
    """
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    path = Path(path)
    if path.suffix.lower() not in (".svg", ".png"):
        raise CTError(f"{path} must end in .svg or .png.")
    groups = by_kind(result)
    blocks = [block for placed in groups.values() for block, _ in placed if block is not None]
    last, shade = max(blocks, default=0) or 1, matplotlib.colormaps["viridis"]
    columns = 3 if len(groups) < 9 else 4
    lines = -(-(len(groups) + 1) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.7 * columns + 0.8, 2.1 * lines + 0.6), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flat
        for i, ((kind, (d_out, d_in)), placed) in enumerate(groups.items()):
            draw_kind(axes[i], placed, lambda block: "0.25" if block is None else shade(block / last))
            axes[i].tick_params(labelleft=i % columns == 0)
            axes[i].set_title(f"{kind}  {d_out} x {d_in}")
        draw_universal(axes[len(groups)], result)
        for ax in axes[len(groups) + 1 :]:
            ax.set_axis_off()
        figure.supxlabel("rank, as a share of the smaller side", fontsize=8, color="0.35")
        figure.supylabel("singular value / largest", fontsize=8, color="0.35")
        if blocks:
            depth = ScalarMappable(Normalize(0, last), shade)
            ticks = MaxNLocator(integer=True)
            figure.colorbar(depth, ax=figure.axes, label="block", ticks=ticks, shrink=0.6, aspect=30, pad=0.01)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def draw_kind(ax: Any, placed: list[tuple[int | None, dict[str, Any]]], colour: Callable[[int | None], Any]) -> None:
    """The spectra of one kind of matrix, a line a block in `colour(block)`."""
    for block, entry in placed:
        values = [value if value > 0 else float("nan") for value in entry["spectrum"]]
        x = torch.linspace(0, 1, len(values)).tolist()
        ax.plot(x, values, color=colour(block), linewidth=0.9, alpha=0.85)
    ax.set(yscale="log", ylim=(1e-3, 1.4), xlim=(0, 1), xticks=[0, 0.5, 1])


def draw_universal(ax: Any, result: dict[str, Any]) -> None:
    """The share of energy in the top directions of the universal basis, with a mark at K."""
    universal, accent = result["universal"], "#b5482f"
    counts, shares = zip(*universal["curve"], strict=True)
    ax.plot(counts, shares, color="0.25", linewidth=1.2)
    point = (universal["k"], universal["explained"])
    ax.plot(*point, "o", color=accent, markersize=4)
    note = f"K = {universal['k']}: {universal['explained']:.0%}"
    ax.annotate(note, point, (-5, 5), ha="right", textcoords="offset points", color=accent)
    ax.set_xscale("log", base=2)
    ax.set(ylim=(0, 1.02), xlim=(1, result["d_model"]), xticks=counts[::2], xticklabels=counts[::2])
    ax.minorticks_off()
    ax.set_title("universal basis: share of energy in top K")
