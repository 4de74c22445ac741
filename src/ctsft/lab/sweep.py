"""A sweep: every run that the arms still miss, computed in this process, in several, or on Ray.

The records are the state. Workers compute, only the driver writes, and each record as soon as it is there: a sweep
that was stopped or killed goes on where it was when it is started again. An arm proceeds by rounds, see
`experiment.due`: its learning rates, more rates where the best lay at an edge, then its seeds. Its next round begins
when its own last one is done, whatever other arms do, and a run that several arms need is computed once. Of all that is
due, tuning runs go first, then arms in the order given.

An engine is a function that opens workers for `run`. All engines compute the same: what a run raises becomes a sentence
in the report, and a run whose worker died is tried again, by the driver.
"""

import logging
import os
import pkgutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ctsft.errors import CTError, needs
from ctsft.files import cores
from ctsft.lab.rates import due
from ctsft.lab.records import Record, Records
from ctsft.lab.spec import TUNE_SEEDS, Arm, Spec

RETRIES = 2  # of a run whose worker died

Run = Callable[[Spec], Record] | str  # a function that a worker can import, or its name: "ctsft.lab.run:run"


class Failure(NamedTuple):
    """Why a run has no record."""

    sentence: str
    traceback: str = ""


class Workers(NamedTuple):
    """So many runs at once. A future that ends in an exception has lost its worker; a run's own is in its Failure."""

    slots: int
    submit: Callable[[Spec], Future[Record | Failure]]


Engine = Callable[[Run], AbstractContextManager[Workers]]  # leaving it ends the workers, whatever they are at


@dataclass
class Report:
    """What a sweep did, by the keys of its runs."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # key: sentence
    tracebacks: dict[str, str] = field(default_factory=dict)  # of the failed runs that raised
    retried: Counter[str] = field(default_factory=Counter)  # how often a run lost its worker and was started again
    seconds: float = 0.0

    def table(self) -> Table:
        """The failed runs, for a terminal."""
        table = Table("run", "why it failed")
        for key, sentence in self.failed.items():
            table.add_row(Text(key), Text(sentence))
        return table


# ------------------------------------------------------------------------------------------------------------ engines


def attempt(run: Run, spec: Spec) -> Record | Failure:
    """What a worker does. Exceptions end here, since not every one survives the way to another process."""
    try:
        function: Callable[[Spec], Record] = pkgutil.resolve_name(run) if isinstance(run, str) else run
        record = function(spec)
        if record.spec != spec:
            raise ValueError("the record is that of another spec")
        return record
    except Exception as error:
        return failure(error)


def failure(error: BaseException) -> Failure:
    last = str(error).strip().rpartition("\n")[2]
    sentence = str(error) if isinstance(error, CTError) else f"{type(error).__name__}: {last}"
    return Failure(sentence, "".join(traceback.format_exception(error)))


def make_engine(name: str, workers: int | None = None, address: str | None = None, threads: int = 1) -> Engine:
    """The engine of `--engine process` or `ray`; `workers` None: one for every `threads` cores that can be had."""
    if name == "ray":
        return on_ray(address, workers, threads)
    if name != "process":
        raise CTError(f"there is no engine {name!r}; choose process or ray.")
    if address is not None:
        raise CTError("an address is for the engine ray; leave it out, or choose that engine.")
    workers = workers or max(1, cores() // threads)
    return in_process if workers == 1 else processes(workers, threads)


@contextmanager
def in_process(run: Run) -> Iterator[Workers]:
    """One run after the other in this process, on its threads. A run that kills its process kills the sweep."""

    def submit(spec: Spec) -> Future[Record | Failure]:
        future: Future[Record | Failure] = Future()
        future.set_result(attempt(run, spec))
        return future

    yield Workers(1, submit)


def processes(workers: int, threads: int = 1) -> Engine:
    """`workers` processes on this machine, each on so many torch threads.

    Each is a pool of its own, so that one that dies takes no other's run with it.
    """

    @contextmanager
    def engine(run: Run) -> Iterator[Workers]:
        spawn = get_context("spawn")
        lifeline, held = spawn.Pipe(duplex=False)

        def pool() -> ProcessPoolExecutor:
            return ProcessPoolExecutor(1, spawn, start_worker, (lifeline, threads))

        pools = [pool() for _ in range(workers)]
        last: list[Future[Record | Failure] | None] = [None] * workers

        def submit(spec: Spec) -> Future[Record | Failure]:
            i = next(i for i, future in enumerate(last) if future is None or future.done())
            try:
                future = pools[i].submit(attempt, run, spec)
            except BrokenProcessPool:
                pools[i] = pool()
                future = pools[i].submit(attempt, run, spec)
            last[i] = future
            return future

        try:
            yield Workers(workers, submit)
        finally:
            held.close()
            for one in pools:
                one.shutdown(wait=True, cancel_futures=True)
            lifeline.close()

    return engine


def start_worker(lifeline: Connection, threads: int) -> None:
    """Set up a worker: its threads, no Ctrl-C of its own, and an end as soon as the driver closes the line or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for a torch that is imported later
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)

    def outlive_nobody() -> None:
        with suppress(EOFError, OSError):
            lifeline.recv_bytes()
        os._exit(1)

    threading.Thread(target=outlive_nobody, daemon=True).start()


def on_ray(address: str | None = None, workers: int | None = None, threads: int = 1) -> Engine:
    """Ray tasks of `threads` CPUs each, on the cluster at `address` (host:port, or auto), else on a local one.

    On a cluster, start the driver on one of its machines; all need ctsft, the models and texts; CTSFT_* variables
    travel along. Raises CTError where Ray is not installed or no cluster answers.
    """

    @contextmanager
    def engine(run: Run) -> Iterator[Workers]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use to its makers
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # and warn of a coming default
        with needs("ray"):
            import ray
        if address not in (None, "auto"):
            check_answers(str(address))
        variables = {n: v for n, v in os.environ.items() if n.startswith("CTSFT_")} | {"OMP_NUM_THREADS": str(threads)}
        local: dict[str, Any] = {"include_dashboard": False, "num_cpus": (workers or cores() // threads) * threads}
        try:
            ray.init(
                address=address or "local",
                runtime_env={"env_vars": variables},
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(local if address is None else {}),
            )
        except ConnectionError as error:
            raise CTError(
                f"no Ray cluster lets this driver in ({error}): start one with `ray start --head`; if it asks for a "
                "token, set RAY_AUTH_MODE=token."
            ) from error
        try:
            cpus = int(ray.cluster_resources().get("CPU", 0))
            if cpus < threads:
                raise CTError(f"the Ray cluster has {cpus} CPUs, fewer than the {threads} of one run; give it more.")
            task = ray.remote(num_cpus=threads, max_retries=0)(attempt)
            yield Workers(min(workers or cpus, cpus // threads), lambda spec: task.remote(run, spec).future())
        finally:
            ray.shutdown()

    return engine


def check_answers(address: str) -> None:
    """CTError unless something listens at `address`, host:port; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise CTError(f"no Ray cluster answers at {address!r} ({error}); give host:port or auto.") from None


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
    arms: Iterable[Arm], records: Records, run: Run, engine: Engine = in_process, console: Console | None = None
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
