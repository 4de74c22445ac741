"""The page of a plan: predicted loss against numbers and bytes, and the reasons; from plan.json alone."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ctsft.pages.plot import LIGHT, plot
from ctsft.pages.render import write_page
from ctsft.plan.choose import Option
from ctsft.plan.told import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_plan(plan: Plan, path: Path) -> None:
    """Write the page of `plan` to `path`, whole or not at all. It needs nothing from outside it and runs no script."""
    values = {
        "plan": plan,
        "chosen": plan.chosen,
        "by_numbers": plot(
            draw(plan, lambda o: o.trained, "numbers that train"), (4.4, 3.0), "numbers", "Predicted loss by numbers"
        ),
        "by_bytes": plot(
            draw(plan, lambda o: o.adapter_bytes, "bytes of the file"), (4.4, 3.0), "bytes", "Predicted loss by bytes"
        ),
    }
    write_page("plan.html", path, values)


def draw(plan: Plan, cost: Callable[[Option], int], label: str) -> Callable[["Axes"], None]:
    """Predicted loss and interval of every arm against `cost`, on a log scale: ours joined, peers beside them."""

    def on(ax: "Axes") -> None:
        ours = sorted((o for o in plan.options if o.ours), key=cost)
        for option in plan.options:
            colour = LIGHT["c0" if option.ours else "c1"]
            best = option.candidate == plan.decision.candidate
            ax.plot([cost(option)] * 2, [option.low, option.high], color=colour, linewidth=1, alpha=0.5)
            ax.plot(
                cost(option), option.loss, "o" if option.ours else "s", color=colour, markersize=7 if best else 4,
                markerfacecolor=colour if option.raced else LIGHT["paper"], alpha=1 if option.fits else 0.4,
            )  # fmt: skip
            ax.annotate(
                option.candidate.partition("@")[0],
                (cost(option), option.loss),
                (4, 4 if option.ours else -9),
                textcoords="offset points",
                fontsize=6.5,
                color=LIGHT["ink" if best else "muted"],
                weight="bold" if best else "normal",
            )
        frontier = [o for i, o in enumerate(ours) if all(o.loss < other.loss for other in ours[:i])]
        ax.plot([cost(o) for o in frontier], [o.loss for o in frontier], color=LIGHT["c0"], linewidth=1)
        ax.axhline(plan.start, color=LIGHT["before"], linewidth=0.8, linestyle="dashed")
        ax.set(xscale="log", xlabel=label)
        ax.margins(x=0.12)
        ax.set_title("predicted held-out loss, nats per token", color=LIGHT["muted"])

    return on
