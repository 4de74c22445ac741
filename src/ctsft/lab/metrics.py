"""Numbers out of records: a metric by its name, and the one list of metrics."""

import itertools
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ctsft.errors import CTError
from ctsft.lab.records import Record
from ctsft.lab.schedule import counted_parameters, k_at
from ctsft.lab.spec import Spec

UPDATES = re.compile(r"\d+(/k)?")
AHEAD = re.compile(r"ahead_of_k(\d+)")
DROP_LOST = "drop_lost"  # see `lost` in compare
TIMED = ("train_loss", "heldout_loss")  # numbers that have an @N too
REDUCE: dict[str, Callable[[list[float]], float]] = {
    "first": lambda values: values[0],
    "last": lambda values: values[-1],
    "min": min,
    "max": max,
}

# ---------------------------------------------------------------------------------------------------- one record


def value(record: Record, metric: str) -> float | None:
    """The number that `metric` names in a run's record; None where this run has none (diverged, not measured).

    Metrics: a number among Spec's fields; the names in METRICS (losses in nats per token); train_loss@N and
    heldout_loss@N after N updates; a probe's series, as NAME (mean over the run), NAME@N, NAME.first, .last, .min, .max
    or NAME.KEY where its values are objects; a measure by its path, such as ablation.order.32. N is a number, or one
    over the run's K, such as train_loss@1280/k: the loss at a budget of 1280 K-steps.
    CTError for a name that no record has, and for one that names no single number.
    """
    check_metric(metric)
    name, _, at = metric.partition("@")
    root, _, rest = name.partition(".")
    update = updates(at, record.spec.k) if at else None
    if metric in Spec.model_fields:
        return _number(metric, getattr(record.spec, metric))
    if update is not None and name in TIMED:
        return _number(metric, _after(record, name, update))
    found = METRICS.get(root)
    if found and found.kind == "series":
        return _series(metric, record.probes.get(root, []), rest, update)
    if found and found.kind == "measure":
        return _number(metric, _reach(record.measures.get(root), rest))
    if found and found.of:
        return _number(metric, found.of(record))
    raise CTError(f"{metric!r} is relative to another arm; a record alone does not have it.")


def check_metric(metric: str) -> None:
    """CTError if `metric` is no name that `value` or `measured` can read; it lists the names there are."""
    name, sign, at = metric.partition("@")
    root = name.partition(".")[0]
    kind = METRICS[root].kind if root in METRICS else ""
    if sign and (kind == "series" or name in TIMED):
        if not UPDATES.fullmatch(at):
            raise CTError(f"{metric!r} needs a number of updates after the @, such as @40, or @1280/k for a budget.")
        return
    whole = metric in METRICS or metric in Spec.model_fields or AHEAD.fullmatch(metric)
    if not whole and (sign or kind not in ("series", "measure")):
        names = ", ".join((*METRICS, "ahead_of_kN"))
        raise CTError(f"there is no metric {metric!r}; take a field of Spec or one of {names}.")


def _number(metric: str, found: Any) -> float | None:
    if found is None:
        return None
    if isinstance(found, bool | int | float):
        return float(found)
    raise CTError(f"{metric!r} names no single number but {str(found)[:60]}; name one part of it, or another metric.")


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
    return record.train_loss[-1] if record.train_loss and not record.diverged else None


def _last_heldout(record: Record) -> float | None:
    return None if record.diverged else record.heldout[-1][1]


def drop(first: float | None, last: float | None) -> float | None:
    return None if first is None or last is None else first - last


def _loss_drop(record: Record) -> float | None:
    return drop(record.train_loss[0], _last(record)) if record.train_loss else None


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
    found = _loss_drop(record)
    return None if found is None or not count else found / (count / 10_000)


def _monotonic_share(record: Record) -> float | None:
    losses = [loss for loss in record.train_loss if loss is not None]
    if record.spec.batches != "fixed" or len(losses) < 2 or len(losses) < len(record.train_loss):
        return None
    return statistics.fmean(after < before for before, after in itertools.pairwise(losses))


# -------------------------------------------------------------------------------------------------- the one list


class Reference(NamedTuple):
    """What a relative metric is taken against: the loss that both drops start at, the one they end at, and an arm."""

    first: str
    last: str
    where: dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """What a name stands for; `words` is what an axis calls it, with the unit."""

    kind: Literal["number", "series", "measure", "relative"]
    words: str
    of: Callable[[Record], Any] | None = None  # of a record, where it is a number
    against: Reference | None = None  # where it is relative


def number(of: Callable[[Record], Any], words: str) -> Metric:
    return Metric("number", words, of)


def kept(name: str, words: str) -> Metric:
    """A number that the record holds under its own name."""
    return Metric("number", words, lambda record: getattr(record, name))


def series(words: str) -> Metric:
    """What a probe writes: one number (or object) an update."""
    return Metric("series", words)


def measure(words: str) -> Metric:
    """What a run measures once."""
    return Metric("measure", words)


def relative_to(first: str, last: str, words: str, **where: Any) -> Metric:
    return Metric("relative", words, against=Reference(first, last, where))


# Every metric but Spec's own fields and ahead_of_kN: specs, claims, tables and figures take their names from here.
METRICS: dict[str, Metric] = {
    "rate": number(lambda record: record.measures.get("rate", record.spec.lr), "peak learning rate"),
    "diverged": number(lambda record: record.diverged, "share of runs that diverged"),
    "trained": kept("trained", "trained numbers"),
    "counted": kept("counted", "numbers by the paper's count, K \N{N-ARY SUMMATION}(d_out + d_in)"),
    "adapter_bytes": kept("adapter_bytes", "adapter, bytes"),
    "memory_bytes": kept("memory_bytes", "memory beside the bare model, bytes"),
    "tokens": kept("tokens", "tokens of training"),
    "flops": kept("flops", "floating-point operations of training"),
    "seconds": kept("seconds", "seconds of training"),
    "matrices": number(lambda record: record.adapted.matrices, "adapted matrices"),
    "first_loss": number(
        lambda record: record.train_loss[0] if record.train_loss else None, "loss before training, nats per token"
    ),
    "train_loss": number(_last, "loss on the step's batch, nats per token"),
    "best_loss": number(
        lambda record: min((x for x in record.train_loss if x is not None), default=None),
        "lowest loss on the step's batch, nats per token",
    ),
    "first_heldout": number(lambda record: record.heldout[0][1], "held-out loss before training, nats per token"),
    "heldout_loss": number(_last_heldout, "held-out loss, nats per token"),
    "loss_drop": number(_loss_drop, "loss drop on the step's batch, nats per token"),
    "heldout_drop": number(
        lambda record: drop(record.heldout[0][1], _last_heldout(record)), "held-out loss drop, nats per token"
    ),
    "k_steps": number(_k_steps, "K \N{MULTIPLICATION SIGN} updates"),
    "param_steps": number(_param_steps, "counted numbers \N{MULTIPLICATION SIGN} updates"),
    "drop_per_10k_counted": number(
        lambda record: _per_10k(record, record.counted), "loss drop per 10,000 counted numbers"
    ),
    "drop_per_10k_trained": number(
        lambda record: _per_10k(record, record.trained), "loss drop per 10,000 trained numbers"
    ),
    "seconds_per_step": number(
        lambda record: record.seconds / record.spec.steps if record.spec.steps else None, "seconds per update"
    ),
    "monotonic_share": number(_monotonic_share, "share of updates that lower the loss"),
    # "Efficiency" in paper 78 is the first.
    "fraction_of_full_sft": relative_to(
        "first_heldout", "heldout_loss", "held-out loss drop / full SFT's", method="full", targets="last2+head"
    ),
    "fraction_of_full_sft_train": relative_to(
        "first_loss", "train_loss", "loss drop on the step's batch / full SFT's", method="full", targets="last2+head"
    ),
    "fraction_of_headless_sft": relative_to(
        "first_heldout",
        "heldout_loss",
        "held-out loss drop / full SFT's without the output head",
        method="full",
        targets="last2",
    ),
    "fraction_of_lora_r8": relative_to(
        "first_heldout", "heldout_loss", "held-out loss drop / LoRA r8's", method="lora", k=8, start="zero"
    ),
    DROP_LOST: Metric("relative", "share of the tuned held-out loss drop that is lost"),
    "gradient_norm": series("norm of the gradient"),
    "cosine": series("cosine of consecutive gradients"),
    "amplitude_rms": series("root mean square of the trained numbers"),
    "amplitude_max": series("largest of the trained numbers"),
    "coverage_diagonal": series("share of the gradient's energy on the diagonal of the K directions"),
    "coverage_two_sided": series(
        "share of the gradient's energy in the K \N{MULTIPLICATION SIGN} K block of the directions"
    ),
    "coverage_input": series("share of the gradient's energy on the input side of the K directions"),
    "coverage_output": series("share of the gradient's energy on the output side of the K directions"),
    "coverage_diagonal_null": series("share of the gradient's energy on K directions that do not know it"),
    "true_effective_rank": series("effective rank of \N{PARTIAL DIFFERENTIAL}L/\N{PARTIAL DIFFERENTIAL}W"),
    "true_stable_rank": series("stable rank of \N{PARTIAL DIFFERENTIAL}L/\N{PARTIAL DIFFERENTIAL}W"),
    "true_effective_rank_by_matrix": series(
        "effective rank of \N{PARTIAL DIFFERENTIAL}L/\N{PARTIAL DIFFERENTIAL}W, by matrix"
    ),
    "constrained_effective_rank": series("effective rank of the gradient through K directions"),
    "abs_mean_over_std_by_number_top": series("|mean| / standard deviation of each number's gradient, top 20"),
    "abs_mean_over_std_by_number_rest": series("|mean| / standard deviation of each number's gradient, rest"),
    "snr_top": series("mean\N{SUPERSCRIPT TWO} / variance of the gradient over samples, top 20"),
    "snr_rest": series("mean\N{SUPERSCRIPT TWO} / variance of the gradient over samples, rest"),
    "abs_mean_over_std_top": series("|mean| / standard deviation of the gradient, top 20"),
    "abs_mean_over_std_rest": series("|mean| / standard deviation of the gradient, rest"),
    "gradient_snr": series("mean\N{SUPERSCRIPT TWO} / variance of the gradient over samples"),
    "diversity": series("effective number of gradient directions so far"),
    "ablation": measure("loss on the fixed batch, nats per token"),
    "heldout_parts": measure("held-out loss by windows, nats per token"),
    "learned": measure("what learning the directions cost: tokens, seconds, bytes"),
    "variance_explained": measure("share of |W|\N{SUPERSCRIPT TWO} in the span of the basis"),
}
SERIES = [name for name, metric in METRICS.items() if metric.kind == "series"]
MEASURES = [name for name, metric in METRICS.items() if metric.kind == "measure"]
