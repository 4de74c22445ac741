"""Engines: where runs are computed, in this process, in several, or on Ray.

An engine is a function that opens workers for a computation. All engines compute the same: what a run raises becomes a
sentence, and a worker that dies takes no other's run with it.
"""

import logging
import os
import pkgutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from ctsft.errors import CTError, needs
from ctsft.files import cores
from ctsft.lab.records import Record
from ctsft.lab.spec import Spec

Compute = Callable[[Spec], Record] | str  # a function that a worker can import, or its name: "ctsft.lab.run:run"


class Failure(NamedTuple):
    """Why a run has no record."""

    sentence: str
    traceback: str = ""


class Workers(NamedTuple):
    """So many runs at once. A future that ends in an exception has lost its worker; a run's own is in its Failure."""

    slots: int
    submit: Callable[[Spec], Future[Record | Failure]]


Engine = Callable[[Compute], AbstractContextManager[Workers]]  # leaving it ends the workers, whatever they are at


def attempt(run: Compute, spec: Spec) -> Record | Failure:
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
def in_process(run: Compute) -> Iterator[Workers]:
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
    def engine(run: Compute) -> Iterator[Workers]:
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
    def engine(run: Compute) -> Iterator[Workers]:
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
