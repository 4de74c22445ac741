"""Numbers out of records: a metric by its name, the rows of an experiment, and a paper's table beside our figures."""

import itertools
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctsft.choices import FORMS
from ctsft.errors import CTError
from ctsft.lab.experiments import Experiment, Laboratory, Table, arms
from ctsft.lab.rates import finals
from ctsft.lab.records import Record
from ctsft.lab.schedule import counted_parameters, k_at
from ctsft.lab.spec import Spec

UPDATES = re.compile(r"\d+(/k)?")
AHEAD = re.compile(r"ahead_of_k(\d+)")

SERIES = (  # what probes write, one number (or object) an update
    *("gradient_norm", "cosine", "amplitude_rms", "amplitude_max"),
    *("coverage_diagonal", "coverage_two_sided", "coverage_input", "coverage_output", "coverage_diagonal_null"),
    *("true_effective_rank", "true_stable_rank", "true_effective_rank_by_matrix", "constrained_effective_rank"),
    *("abs_mean_over_std_by_number_top", "abs_mean_over_std_by_number_rest"),
    *("snr_top", "snr_rest", "abs_mean_over_std_top", "abs_mean_over_std_rest", "gradient_snr", "diversity"),
)
UNREAD: dict[str, Callable[[Spec], bool]] = {  # fields that some methods do not read, and which
    "basis": lambda spec: spec.method not in (*FORMS, "lora-xs"),
    "weight_from": lambda spec: spec.method not in FORMS or spec.basis != "weight",
    "universal_mode": lambda spec: spec.method not in FORMS or spec.basis != "universal",
}
MEASURES = ("ablation", "variance_explained")  # what a run measures once
REDUCE: dict[str, Callable[[list[float]], float]] = {
    "first": lambda values: values[0],
    "last": lambda values: values[-1],
    "min": min,
    "max": max,
}
# Relative metric: (first loss, last loss, the reference arm by its fields). "Efficiency" in paper 78 is the first.
RELATIVE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fraction_of_full_sft": ("first_heldout", "heldout_loss", {"method": "full", "targets": "last2+head"}),
    "fraction_of_full_sft_train": ("first_loss", "train_loss", {"method": "full", "targets": "last2+head"}),
    "fraction_of_headless_sft": ("first_heldout", "heldout_loss", {"method": "full", "targets": "last2"}),
    "fraction_of_lora_r8": ("first_heldout", "heldout_loss", {"method": "lora", "k": 8}),
}
SETTING = (
    "model",
    "tied",
    "text",
    "batches",
    "batch",
    "length",
    "steps",
    "decay",
    "dtype",
)  # shared with the reference


# ---------------------------------------------------------------------------------------------------- one record


def value(record: Record, metric: str) -> float | None:
    """The number that `metric` names in a run's record; None where this run has none (diverged, not measured).

    Metrics: a number among Spec's fields; the names in METRICS (losses in nats per token); train_loss@N and
    heldout_loss@N after N updates; a probe's series, as NAME (mean over the run), NAME@N, NAME.first, .last, .min, .max
    or NAME.KEY where its values are objects; a measure by its path, such as ablation.order.32. N is a number, or one
    over the run's K, such as train_loss@1280/k: the loss at a budget of 1280 K-steps.
    CTError for a name that no record has, and for one that names no single number.
    """
    name, sign, at = metric.partition("@")
    root, _, rest = name.partition(".")
    if metric in METRICS:
        return _number(metric, METRICS[metric](record))
    if metric in Spec.model_fields:
        return _number(metric, getattr(record.spec, metric))
    if sign and name in ("train_loss", "heldout_loss"):
        return _number(metric, _after(record, name, _update(record, metric, at)))
    if root in SERIES or root in record.probes:
        return _series(metric, record.probes.get(root, []), rest, _update(record, metric, at) if sign else None)
    if root in MEASURES or root in record.measures:
        return _number(metric, _reach(record.measures.get(root), rest))
    raise CTError(f"there is no metric {metric!r}; {known(metric)}.")


def known(metric: str) -> str:
    """Which names there are, for a message about `metric`; empty if it is one of them."""
    name, sign, at = metric.partition("@")
    root = name.partition(".")[0]
    whole = metric in METRICS or metric in Spec.model_fields or metric in RELATIVE or root in MEASURES
    timed = root in SERIES or name in ("train_loss", "heldout_loss")
    if whole or AHEAD.fullmatch(metric) or (timed and (UPDATES.fullmatch(at) if sign else root in SERIES)):
        return ""
    return f"take a field of Spec or one of {', '.join((*METRICS, *RELATIVE, 'ahead_of_kN', *SERIES, *MEASURES))}"


def _number(metric: str, found: Any) -> float | None:
    if found is None:
        return None
    if isinstance(found, bool | int | float):
        return float(found)
    raise CTError(f"{metric!r} names no single number but {str(found)[:60]}; name one part of it, or another metric.")


def _update(record: Record, metric: str, at: str) -> int:
    if not UPDATES.fullmatch(at):
        raise CTError(f"{metric!r} needs a number of updates after the @, such as @40, or @1280/k for a budget.")
    return updates(at, record.spec.k)


def updates(text: str, k: int) -> int:
    """The number of updates that "40" names, or "1280/k": those that a budget of 1280 K-steps pays for at this K."""
    budget, _, over = text.partition("/")
    return max(1, round(int(budget) / k)) if over else int(budget)


def _after(record: Record, name: str, updates: int) -> Any:
    if name == "train_loss":
        losses = record.train_loss
        return losses[updates] if updates < len(losses) else None
    return next((loss for done, loss in record.heldout if done == updates), None)


def _reach(found: Any, path: str) -> Any:
    """The part of nested objects and lists at a dotted path; a key may hold dots itself. None if it is not there."""
    if not path or found is None:
        return found
    if isinstance(found, Mapping) and path in found:
        return found[path]
    key, _, rest = path.partition(".")
    if isinstance(found, Mapping):
        return _reach(found.get(key), rest)
    if isinstance(found, list) and key.isdigit():
        return _reach(found[int(key)] if int(key) < len(found) else None, rest)
    return None


def _series(metric: str, series: Sequence[tuple[int, Any]], path: str, at: int | None) -> float | None:
    key, _, last = path.rpartition(".")
    reduce = REDUCE.get(last)
    path = path if reduce is None else key
    points = [(update, _number(metric, _reach(found, path))) for update, found in series]
    if at is not None:
        return next((number for update, number in points if update == at), None)
    numbers = [number for _, number in points if number is not None]
    return (reduce or statistics.fmean)(numbers) if numbers else None


def _last(record: Record) -> float | None:
    return None if record.diverged else record.train_loss[-1]


def _last_heldout(record: Record) -> float | None:
    return None if record.diverged else record.heldout[-1][1]


def _drop(first: float | None, last: float | None) -> float | None:
    return None if first is None or last is None else first - last


def _loss_drop(record: Record) -> float | None:
    return _drop(record.train_loss[0], _last(record)) if record.train_loss else None


def _k_steps(record: Record) -> float:
    spec = record.spec
    if not spec.schedule:
        return float(spec.k * spec.steps)
    return float(sum(k_at(spec.schedule, step, spec.steps) for step in range(spec.steps)))


def _param_steps(record: Record) -> float | None:
    if record.counted is None:
        return None
    if not record.spec.schedule:
        return float(record.counted * record.spec.steps)
    return _k_steps(record) * counted_parameters(1, record.adapted.shapes)


def _per_10k(record: Record, count: float | None) -> float | None:
    drop = _loss_drop(record)
    return None if drop is None or not count else drop / (count / 10_000)


def _monotonic_share(record: Record) -> float | None:
    losses = [loss for loss in record.train_loss if loss is not None]
    if record.spec.batches != "fixed" or len(losses) < 2 or len(losses) < len(record.train_loss):
        return None
    return statistics.fmean(after < before for before, after in itertools.pairwise(losses))


# The metrics that are computed, by name; `trained` and others are numbers of the record itself.
METRICS: dict[str, Callable[[Record], Any]] = {
    **{
        name: lambda record, name=name: getattr(record, name)  # type: ignore[misc]
        for name in ("trained", "counted", "adapter_bytes", "memory_bytes", "tokens", "flops", "seconds")
    },
    "matrices": lambda record: record.adapted.matrices,
    "first_loss": lambda record: record.train_loss[0] if record.train_loss else None,
    "train_loss": lambda record: _last(record) if record.train_loss else None,
    "best_loss": lambda record: min((x for x in record.train_loss if x is not None), default=None),
    "first_heldout": lambda record: record.heldout[0][1],
    "heldout_loss": _last_heldout,
    "loss_drop": _loss_drop,
    "heldout_drop": lambda record: _drop(record.heldout[0][1], _last_heldout(record)),
    "k_steps": _k_steps,
    "param_steps": _param_steps,
    "drop_per_10k_counted": lambda record: _per_10k(record, record.counted),
    "drop_per_10k_trained": lambda record: _per_10k(record, record.trained),
    "seconds_per_step": lambda record: record.seconds / record.spec.steps if record.spec.steps else None,
    "monotonic_share": _monotonic_share,
}


# ------------------------------------------------------------------------------------------------- an experiment


@dataclass(frozen=True)
class Row:
    """One arm of an experiment and the records of its seeds, as far as they exist."""

    name: str
    spec: Spec
    lr: float | None  # None: the learning rate is still being tuned
    bracketed: bool  # worse rates were seen on both sides of lr
    seeds: tuple[int, ...]
    records: list[Record]
    tuned: bool = field(default=True)  # False: the arm has one given rate, so there is nothing to bracket

    @property
    def complete(self) -> bool:
        return len(self.records) == len(self.seeds)

    def values(self, metric: str) -> list[float | None]:
        """One number for every seed in `seeds`, in order; None for a run that is missing, or lacks the metric."""
        found = {r.spec.seed: value(r, metric) for r in self.records}
        return [found.get(seed) for seed in self.seeds]

    def mean(self, metric: str) -> float | None:
        return mean(self.values(metric))

    def sd(self, metric: str) -> float | None:
        return sd(self.values(metric))


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the numbers that are there; None if there are none."""
    there = [v for v in values if v is not None]
    return statistics.fmean(there) if there else None


def sd(values: Sequence[float | None]) -> float | None:
    """The sample standard deviation of the numbers that are there; None for fewer than two."""
    there = [v for v in values if v is not None]
    return statistics.stdev(there) if len(there) > 1 else None


def rows(
    laboratory: Laboratory,
    name: str,
    records: Mapping[str, Record],
    profile: str = "full",
    protocol: str = "honest",
) -> list[Row]:
    """One row for every arm of the experiment `name`, complete or not."""
    out = []
    for arm in arms(laboratory, name, profile, protocol):
        choice, found = finals(arm, records)
        out.append(Row(arm.name, arm.spec, choice.lr, choice.bracketed, arm.seeds, found, arm.tunes))
    return out


def chosen(rows: Sequence[Row], where: Mapping[str, Any]) -> list[Row]:
    """The rows whose spec has all the values of `where` (a list: any of them); `name` is the arm's name.

    A model that is a folder is known by the folder's name.
    """
    return [row for row in rows if all(_fits(row, name, wanted) for name, wanted in where.items())]


def _fits(row: Row, name: str, wanted: Any) -> bool:
    found = {row.name} if name == "name" else {getattr(row.spec, name)}
    if name == "model":
        found.add(Path(row.spec.model).name)
    return any(value in found for value in (wanted if isinstance(wanted, list) else [wanted]))


def measured(row: Row, rows: Sequence[Row], metric: str) -> list[float | None]:
    """Any metric of `row`, one number a seed; relative ones are taken against their reference among `rows`."""
    if rival := AHEAD.fullmatch(metric):
        return ahead(row, rows, int(rival[1]))
    return relative(row, rows, metric) if metric in RELATIVE else row.values(metric)


def relative(row: Row, rows: Sequence[Row], metric: str) -> list[float | None]:
    """A loss drop divided by the same seed's drop of the reference arm: same experiment, model, text and training.

    Both drops start at the reference's first loss, the bare model's: an arm that begins by damaging the model (78's
    `replace`) gets no credit for repairing it. `fraction_of_full_sft` (paper 78) is held out, `_train` on the step's
    batch; `fraction_of_headless_sft` is against full SFT without the output head; `fraction_of_lora_r8` is the arena's.
    None where either drop is missing or the reference's is not above 0.
    """
    if metric not in RELATIVE:
        raise CTError(f"{metric!r} is no relative metric; there are {', '.join(RELATIVE)}.")
    first, last, where = RELATIVE[metric]
    found = [r for r in chosen(rows, where) if all(getattr(r.spec, f) == getattr(row.spec, f) for f in SETTING)]
    same = [r for r in found if r.spec.targets == row.spec.targets]
    found = same if len(same) == 1 else found
    if not found:
        return [None] * len(row.seeds)
    if len(found) > 1:
        raise CTError(f"{metric} has {len(found)} reference arms for {row.name!r} ({where}); leave only one of them.")
    starts = dict(zip(found[0].seeds, found[0].values(first), strict=True))
    ends = dict(zip(found[0].seeds, found[0].values(last), strict=True))

    def fraction(seed: int, reached: float | None) -> float | None:
        whole, part = _drop(starts.get(seed), ends.get(seed)), _drop(starts.get(seed), reached)
        return None if part is None or whole is None or whole <= 0 else part / whole

    return [fraction(seed, reached) for seed, reached in zip(row.seeds, row.values(last), strict=True)]


def ahead(row: Row, rows: Sequence[Row], rival: int) -> list[float | None]:
    """`ahead_of_kN`, paper 82's crossover: the budget in K-steps from which on `row` ends below the arm with K = N.

    Its loss on the step's batch, at every budget that pays whole updates of both; it must stay below up to the largest
    that both have reached, and the budgets before that do not count. None where it is not below at
    the end, where the arm of K = N has no run, and for N itself. That arm has the same name and setting.
    """
    same = [field for field in SETTING if field != "steps"]
    others = [r for r in rows if r.name == row.name and r.spec.k == rival and not r.spec.schedule]
    others = [r for r in others if all(getattr(r.spec, f) == getattr(row.spec, f) for f in same)]
    if rival == row.spec.k or len(others) != 1:
        return [None] * len(row.seeds)
    runs = [{r.spec.seed: r.train_loss for r in one.records} for one in (row, others[0])]
    return [_from(runs[0].get(seed, []), runs[1].get(seed, []), row.spec.k, rival) for seed in row.seeds]


def _from(losses: Sequence[float | None], rival: Sequence[float | None], k: int, its_k: int) -> float | None:
    unit, start = math.lcm(k, its_k), None
    for budget in range(unit, min((len(losses) - 1) * k, (len(rival) - 1) * its_k) + 1, unit):
        own, other = losses[budget // k], rival[budget // its_k]
        if own is None or other is None or own >= other:
            start = None
        elif start is None:
            start = float(budget)
    return start


# ------------------------------------------------------------------------------------------------------- tables


def table(experiment: Experiment, table: Table, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Column heads and cells: the paper's columns from our rows, and its own figures in columns "HEAD (paper)".

    A row of the paper stands beside the row of ours that agrees in every column that is a field of Spec (or the arm's
    name); one without a partner has a line of its own, in its place if numbers tell which. A cell is mean ± sample sd
    (number of seeds).
    """
    for head, metric in table.columns.items():
        if metric != "name" and known(metric):
            raise CTError(f"experiment {experiment.name}, table {table.title!r}: no metric {metric!r} ({head}).")
    keys = [head for head, metric in table.columns.items() if metric == "name" or metric in Spec.model_fields]
    printed = [head for head in table.columns if head not in keys and any(head in figures for figures in table.paper)]
    heads = [name for head in table.columns for name in ([head, f"{head} (paper)"] if head in printed else [head])]
    left = list(table.paper)
    body: list[tuple[list[Any], list[str]]] = []  # the fields that a line is placed by, and the line
    for row in in_order(chosen(rows, table.where), [table.columns[head] for head in keys]):
        own = {head: field_of(row, table.columns[head]) for head in keys}
        figures = next((f for f in left if all(own[h] == f[h] for h in keys if h in f)), {})
        left = [f for f in left if f is not figures]
        cells = {head: cell(own[head]) if head in keys else spread(measured(row, rows, m)) for head, m in _items(table)}
        body.append(([own[head] for head in keys], _line(table, printed, cells, figures)))
    for figures in left:
        own = {head: figures.get(head) for head in keys}
        body.append((list(own.values()), _line(table, printed, {head: cell(own[head]) for head in keys}, figures)))
    if all(isinstance(found, int | float) for place, _ in body for found in place):
        body.sort(key=lambda one: one[0])  # else the paper's lines come last
    return heads, [line for _, line in body]


def in_order(rows: Sequence[Row], fields: Sequence[str]) -> list[Row]:
    """The rows by `fields`: numbers ascending, words in the order in which they first come."""
    words = {name: list(dict.fromkeys(field_of(row, name) for row in rows)) for name in fields}

    def place(row: Row, name: str) -> float:
        found = field_of(row, name)
        return float(found) if isinstance(found, int | float) else words[name].index(found)

    return sorted(rows, key=lambda row: [place(row, name) for name in fields if name != "lr"])


def _items(table: Table) -> list[tuple[str, str]]:
    return list(table.columns.items())


def field_of(row: Row, name: str) -> Any:
    """A field of the row's spec, its name, or the rate that was chosen; "" for one that its method does not read."""
    if name in UNREAD and UNREAD[name](row.spec):
        return ""
    return row.name if name == "name" else row.lr if name == "lr" else getattr(row.spec, name)


def _line(table: Table, printed: list[str], cells: dict[str, str], figures: Mapping[str, Any]) -> list[str]:
    line = []
    for head in table.columns:
        line.append(cells.get(head, cell(None)))
        if head in printed:
            line.append(cell(figures.get(head)))
    return line


def cell(found: Any) -> str:
    """A value for people; a dash for None. Numbers as they are, with commas."""
    if found is None or found == "":
        return "\N{EN DASH}"
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, float) and found.is_integer() and abs(found) >= 1000:
        found = int(found)
    return f"{found:,}" if isinstance(found, int | float) else str(found)


def short(number: float) -> str:
    """Four digits that count; whole from a thousand up, 1.23e+12 for the largest."""
    if abs(number) >= 1e9:
        return f"{number:.3g}"
    return f"{number:,.0f}" if abs(number) >= 1000 or number == int(number) else f"{number:.4g}"


def spread(values: Sequence[float | None]) -> str:
    """`6.123 ± 0.02 (5)`: mean, sample sd, seeds; the number alone if all runs agree; a dash if there are none."""
    there = [v for v in values if v is not None]
    if not there:
        return cell(None)
    centre, width = statistics.fmean(there), sd(there)
    missing = f" of {len(values)}" if len(there) < len(values) else ""
    if len(set(there)) == 1 and len(there) > 1:
        return short(centre)
    return short(centre) + (f" ± {width:.2g}" if width is not None else "") + f" ({len(there)}{missing})"
