"""A sweep: every run that the arms still miss, computed in this process, in several, or on Ray.

The records are the state. Workers compute, only the driver writes, and each record as soon as it is there: a sweep
that was stopped or killed goes on where it was when it is started again. An arm proceeds by rounds, see
`rates.due`: its learning rates, more rates where the best lay at an edge, then its seeds. Its next round begins
when its own last one is done, whatever other arms do, and a run that several arms need is computed once. Of all that is
due, tuning runs go first, then arms in the order given.

A run whose worker died is tried again, by the driver.
"""

import time
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from ctsft.lab.engines import Compute, Engine, Failure, failure, in_process
from ctsft.lab.rates import due
from ctsft.lab.records import Record, Records
from ctsft.lab.spec import TUNE_SEEDS, Arm, Spec

RETRIES = 2  # of a run whose worker died


@dataclass
class Report:
    """What a sweep did, by the keys of its runs."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # key: sentence
    tracebacks: dict[str, str] = field(default_factory=dict)  # of the failed runs that raised
    retried: Counter[str] = field(default_factory=Counter)  # how often a run lost its worker and was started again
    seconds: float = 0.0


# ------------------------------------------------------------------------------------------------------------- rounds


class Rounds:
    """The runs that each arm waits for: what is left of its round, without those that have failed.

    An arm whose round ended with a failed run goes no further.
    """

    def __init__(self, arms: Sequence[Arm], records: Records, failed: Container[str]) -> None:
        self.arms, self.records, self.failed = arms, records, failed
        self.waiting = [self.next_round(arm) for arm in arms]

    def next_round(self, arm: Arm) -> dict[str, Spec]:
        return {spec.key: spec for spec in due(arm, self.records) if spec.key not in self.failed}

    def settle(self, key: str) -> None:
        """A run is recorded or has failed: the arms for which it was the last of their round begin the next."""
        for i, waiting in enumerate(self.waiting):
            if waiting.pop(key, None) and not waiting:
                self.waiting[i] = self.next_round(self.arms[i])

    def due(self) -> dict[str, Spec]:
        """Every run that an arm waits for, once: tuning runs first, then in the order of the arms."""
        every = {key: spec for waiting in self.waiting for key, spec in waiting.items()}
        return dict(sorted(every.items(), key=lambda item: item[1].seed not in TUNE_SEEDS))

    def later(self) -> list[Spec]:
        """Stand-ins for the final runs of the arms that are still tuning, whose rate is not known yet."""
        tuning = [
            arm
            for arm, waiting in zip(self.arms, self.waiting, strict=True)
            if any(spec.seed in TUNE_SEEDS for spec in waiting.values())
        ]
        return [spec for spec, _ in {(arm.spec, seed): None for arm in tuning for seed in arm.seeds}]


# ----------------------------------------------------------------------------------------------------------- progress


class Clock:
    """How long runs will take, from the seconds per trained token that runs of the same model took in this sweep."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()

    def add(self, spec: Spec, seconds: float) -> None:
        self.seconds[spec.model] += seconds  # type: ignore[assignment]
        self.tokens[spec.model] += tokens(spec)

    def estimate(self, specs: Iterable[Spec]) -> float | None:
        """Seconds for `specs`, one after the other; None before the first run is done."""
        if not self.tokens:
            return None
        mean = self.seconds.total() / self.tokens.total()
        rates = {model: self.seconds[model] / seen for model, seen in self.tokens.items()}
        return sum(tokens(spec) * rates.get(spec.model, mean) for spec in specs)


def tokens(spec: Spec) -> int:
    """Trained tokens; a run of no steps counts as one step."""
    return max(spec.steps, 1) * spec.batch * spec.length


class Left(ProgressColumn):
    """The time to the estimated end."""

    def render(self, task: Task) -> Text:
        return Text(left(task.fields["ends"]))


def left(ends: float | None) -> str:
    return "-:--:-- left" if ends is None else f"{timedelta(seconds=max(0, round(ends - time.monotonic())))} left"


class Board(Progress):
    """The bar: runs done of all that are due or surely will be, and the runs at work."""

    def __init__(self, console: Console | None, rounds: Rounds, report: Report) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Left(),
        )
        super().__init__(*columns, console=console, disable=console is None)
        self.rounds, self.report, self.clock = rounds, report, Clock()
        self.bar = self.add_task("starting", ends=None)

    def show(self, at_work: list[str], slots: int, told: str = "") -> None:
        """`at_work`: keys of the runs that are computed now. Off a terminal, a line for what is `told`."""
        to_do = [*self.rounds.due().values(), *self.rounds.later()]
        done = len(self.report.finished) + len(self.report.failed)
        seconds = self.clock.estimate(to_do)
        ends = None if seconds is None else time.monotonic() + seconds / max(1, min(slots, len(to_do)))
        text = " and ".join(at_work[:1] + [f"{len(at_work) - 1} more"] * (len(at_work) > 1))
        self.update(self.bar, description=text or "done", completed=done, total=done + len(to_do), ends=ends)
        if told and not self.disable and not self.console.is_terminal:
            self.console.print(f"{done}/{done + len(to_do)} {told}, {left(ends)}", markup=False, highlight=False)


# -------------------------------------------------------------------------------------------------------------- sweep


def sweep(
    arms: Iterable[Arm], records: Records, run: Compute, engine: Engine = in_process, console: Console | None = None
) -> Report:
    """Compute every run that `arms` miss, by `run` (Spec -> record) on workers of `engine`, and add it to `records`.

    A run that raises is reported and does not stop the others; its arm goes no further. A run whose worker died is
    started again, `RETRIES` times at most. `console` shows a bar, or off a terminal a line for every run; its total
    counts the seeds of arms still tuning, and grows where a grid of rates does. On KeyboardInterrupt finished runs are
    kept, the workers end at once and it is raised again.
    """
    began, report = time.monotonic(), Report()
    rounds = Rounds(list(arms), records, report.failed)
    running: dict[Future[Record | Failure], tuple[Spec, float]] = {}

    def at_work() -> list[str]:
        return [spec.key for spec, _ in running.values()]

    def settle(future: Future[Record | Failure]) -> str:
        spec, started = running[future]
        lost = future.exception()
        if lost and report.retried[spec.key] < RETRIES:
            report.retried[spec.key] += 1  # it is still due
            told = f"{spec.key} lost its worker and is due again"
        else:
            outcome = worker_died(lost) if lost else kept(future.result(), records)
            if isinstance(outcome, Failure):
                report.failed[spec.key], report.tracebacks[spec.key] = outcome
                told = f"{spec.key} failed"
            else:
                report.finished.append(spec.key)
                told = spec.key
                board.clock.add(spec, time.monotonic() - started)
            rounds.settle(spec.key)
        del running[future]
        return told

    with Board(console, rounds, report) as board, engine(run) as workers:
        try:
            while True:
                busy = at_work()
                free = [item for item in rounds.due().items() if item[0] not in busy]
                for key, spec in free[: workers.slots - len(running)]:
                    board.show([*at_work(), key], workers.slots)
                    started = time.monotonic()
                    running[workers.submit(spec)] = spec, started
                if not running:
                    break
                wait(running, return_when=FIRST_COMPLETED)
                for future in [future for future in running if future.done()]:
                    told = settle(future)
                    board.show(at_work(), workers.slots, told)
        except KeyboardInterrupt:
            for future in [future for future in running if future.done()]:
                settle(future)
            raise
    report.seconds = time.monotonic() - began
    return report


def kept(outcome: Record | Failure, records: Records) -> Record | Failure:
    """`outcome`, added to the records if it is one; a Failure if it cannot be written as JSON."""
    if not isinstance(outcome, Failure):
        try:
            records.add(outcome)
        except (TypeError, ValueError) as error:
            return failure(error)
    return outcome


def worker_died(error: BaseException) -> Failure:
    told = f"its worker died {RETRIES + 1} times ({failure(error).sentence}); is there memory enough for it?"
    return Failure(told)
