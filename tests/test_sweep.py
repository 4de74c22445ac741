import io
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from ctsft.errors import CTError
from ctsft.lab.engines import Workers, in_process, processes
from ctsft.lab.rates import choose_rate, due
from ctsft.lab.records import Record, Records
from ctsft.lab.spec import TUNE_SEEDS, Arm, Spec
from ctsft.lab.sweep import Clock, sweep
from synthetic import record

# ------------------------------------------------------------------------------------------ runs that need no model

# A spec's `model` is the folder where its runs sign in, its `text` how they behave, and its `k` tells the best rate.


def record_of(spec, **changes):
    distance = math.log10(spec.lr / best_rate(spec.k))
    losses = [8.0, 4.0 + distance**2 + spec.seed / 1e5]
    return record(spec, losses, [(0, 8.0), (spec.steps, losses[1])], **changes)


def best_rate(k):
    return 0.005 * k


def fake(spec):
    started = len(starts(spec))
    (Path(spec.model) / f"{spec.key}.{started}").write_text(str(os.getpid()))
    if spec.text == "mistake":
        raise CTError("there is no such text; name another.")
    if spec.text == "bug":
        raise ZeroDivisionError("told in two lines\nthe second")
    if spec.text == "other":
        return record_of(spec.model_copy(update={"seed": 77}))
    if spec.text == "no json":
        return record_of(spec, measures={"ablation": object()})
    if spec.text == "dies" or (spec.text == "dies once" and spec.seed == 1 and started == 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if spec.text == "hangs" and spec.seed == 1:
        time.sleep(60)
    return record_of(spec)


def interrupted(spec):
    if len(list(Path(spec.model).iterdir())) == 4:
        raise KeyboardInterrupt
    return fake(spec)


def starts(spec):
    return sorted(Path(spec.model).glob(f"{spec.key}.*"))


def started(folder):
    """How often each run was started, by key."""
    return Counter(path.stem for path in Path(folder).iterdir())


def started_pids(folder):
    return {int(path.read_text() or 0) for path in Path(folder).iterdir()}


def plain(folder, text="", seeds=(0, 1, 2), **fields):
    """An arm that is not tuned."""
    return Arm(name="plain", spec=Spec(model=str(folder), text=text, **fields), seeds=seeds, rates=(5e-3,))


def tuned(folder, k=1, rates=(0.0016, 0.005, 0.016), seeds=(0, 1), tune_seeds=1, **fields):
    spec = Spec(model=str(folder), k=k, **fields)
    return Arm(name="tuned", spec=spec, seeds=seeds, rates=rates, tune_seeds=tune_seeds)


def on_disk(folder):
    """The lines of all whole records, by key."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines(keepends=True)]
    return {Record.model_validate_json(line).spec.key: line for line in lines if line.endswith("\n")}


def alive(pid):
    """Whether the process computes or may yet: it is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(met, seconds=45.0):
    end = time.monotonic() + seconds
    while not met() and time.monotonic() < end:
        time.sleep(0.02)
    assert met()


def start_driver(folder, call):
    """Another process that makes the `call`, with its records in `folder`/r."""
    (folder / "r").mkdir()
    (folder / "driver.py").write_text(
        f"import sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from ctsft.lab.records import Records\nfrom ctsft.lab.engines import processes\n"
        "from ctsft.lab.sweep import sweep\n"
        "from test_sweep import fake, plain\n"
        f"if __name__ == '__main__':\n    records = Records(Path({str(folder / 'r')!r}))\n    {call}\n"
    )
    return subprocess.Popen([sys.executable, folder / "driver.py"])


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@pytest.fixture
def log(tmp_path):
    """Where runs sign in."""
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


# ---------------------------------------------------------------------------------------------------- what is computed


def test_only_what_is_missing_is_computed_and_written(log, tmp_path):
    arm = plain(log)
    specs = arm.final(5e-3)
    report = sweep([arm], Records(tmp_path / "r"), fake)
    assert report.finished == [s.key for s in specs] and not report.failed and not report.retried
    whole = on_disk(tmp_path / "r")
    assert sorted(whole) == sorted(s.key for s in specs)

    assert sweep([arm], Records(tmp_path / "r"), fake).finished == []
    (file,) = (tmp_path / "r").glob("*.jsonl")
    file.write_text("".join(line for key, line in whole.items() if key != specs[1].key))
    assert sweep([arm], Records(tmp_path / "r"), fake).finished == [specs[1].key]
    assert started(log) == {specs[0].key: 1, specs[1].key: 2, specs[2].key: 1}
    assert on_disk(tmp_path / "r") == whole


def test_every_record_is_on_disk_before_the_next_run_starts(log, tmp_path):
    seen = []

    def watching(spec):
        seen.append(len(on_disk(tmp_path / "r")))
        return record_of(spec)

    sweep([plain(log)], Records(tmp_path / "r"), watching)
    assert seen == [0, 1, 2]


def test_runs_that_arms_share_are_computed_once(log, tmp_path):
    arms = [plain(log, seeds=(0, 1)), plain(log, seeds=(0, 1, 2)), plain(log, seeds=(2, 1))]
    report = sweep(arms, Records(tmp_path / "r"), fake)
    assert len(report.finished) == 3
    assert set(started(log).values()) == {1}


def test_shared_runs_that_are_in_flight_are_not_started_again(log, tmp_path):
    """On four slots: one of three runs ends, and a free slot must not take one of the others again."""
    submitted = {}

    def end(specs):
        for spec in specs:
            submitted[spec].set_result(record_of(spec))

    @contextmanager
    def engine(run):
        def submit(spec):
            assert spec not in submitted
            submitted[spec] = Future()
            if len(submitted) == 3:
                first, *rest = submitted
                end([first])
                threading.Timer(0.2, end, [rest]).start()
            return submitted[spec]

        yield Workers(4, submit)

    sweep([plain(log, seeds=(0, 1)), plain(log, seeds=(0, 1, 2))], Records(tmp_path / "r"), fake, engine)
    assert [spec.seed for spec in submitted] == [0, 1, 2]


def test_the_grid_of_rates_grows_until_its_best_is_inside_then_the_seeds_run(log, tmp_path):
    arm = tuned(log, k=10, tune_seeds=2)  # the best rate, 0.05, lies above the grid
    records = Records(tmp_path / "r")
    report = sweep([arm], records, fake)
    choice = choose_rate(arm, records)
    assert choice.bracketed and choice.lr == 0.051
    assert [rate for rate, _ in choice.tried] == [0.0016, 0.005, 0.016, 0.051, 0.16]
    assert not due(arm, records) and len(report.finished) == 5 * 2 + 2
    assert report.finished[-2:] == [s.key for s in arm.final(0.051)]


def test_tuning_goes_first_then_the_order_of_the_arms(log, tmp_path):
    order = []

    def noting(spec):
        order.append(("tunes" if spec.seed in TUNE_SEEDS else "final", spec.steps))
        return record_of(spec)

    sweep([plain(log, steps=3, seeds=(0,)), tuned(log, steps=2), tuned(log, steps=1)], Records(tmp_path / "r"), noting)
    assert order == [("tunes", 2)] * 3 + [("tunes", 1)] * 3 + [("final", 3)] + [("final", 2)] * 2 + [("final", 1)] * 2


def test_an_arm_does_not_wait_for_a_slower_one(log, tmp_path):
    """One slot is held by the first arm's first run until the second arm has come to its seeds."""
    slow, quick = tuned(log, k=1, steps=1000), tuned(log, k=1, steps=10)
    held, order = Future(), []

    @contextmanager
    def engine(run):
        def submit(spec):
            order.append(spec)
            if len(order) == 1:
                return held
            if spec in quick.final(0.005) and not held.done():
                held.set_result(record_of(order[0]))
            future = Future()
            future.set_result(record_of(spec))
            return future

        timer = threading.Timer(5, lambda: held.set_exception(AssertionError("the quick arm waits for the slow one")))
        timer.start()
        yield Workers(2, submit)
        timer.cancel()

    report = sweep([slow, quick], Records(tmp_path / "r"), fake, engine)
    assert not report.retried and not report.failed and order[0] == slow.tuning(0.0016)[0]
    assert not due(slow, Records(tmp_path / "r")) and not due(quick, Records(tmp_path / "r"))


# ------------------------------------------------------------------------------------------------------ runs that fail


@pytest.mark.parametrize("engine", [in_process, processes(1)], ids=["in process", "a process"])
def test_a_failed_run_stops_neither_the_others_nor_the_sweep(log, tmp_path, engine):
    texts = ("", "mistake", "bug", "other", "no json")
    arms = [plain(log, text=text, seeds=(0,), k=k) for k, text in enumerate(texts, 1)]
    good, mistake, bug, other, no_json = (arm.final(5e-3)[0].key for arm in arms)
    report = sweep(arms[1:] + arms[:1], Records(tmp_path / "r"), fake, engine)
    assert report.finished == [good] and list(on_disk(tmp_path / "r")) == [good]
    assert report.failed == {
        mistake: "there is no such text; name another.",
        bug: "ZeroDivisionError: the second",
        other: "ValueError: the record is that of another spec",
        no_json: "PydanticSerializationError: Unable to serialize unknown type: <class 'object'>",
    }
    assert "in fake" in report.tracebacks[bug] and "told in two lines" in report.tracebacks[bug]
    assert set(started(log).values()) == {1} and not report.retried


def test_an_arm_whose_tuning_fails_goes_no_further_and_is_tried_again_by_the_next_sweep(log, tmp_path):
    bad, good = tuned(log, text="mistake"), tuned(log)
    report = sweep([bad, good], Records(tmp_path / "r"), fake)
    assert sorted(report.failed) == sorted(s.key for lr in bad.rates for s in bad.tuning(lr))
    assert len(due(bad, Records(tmp_path / "r"))) == 3 and not due(good, Records(tmp_path / "r"))
    assert len(sweep([bad, good], Records(tmp_path / "r"), fake).failed) == 3


def test_a_function_is_also_found_by_its_name(log, tmp_path):
    assert len(sweep([plain(log)], Records(tmp_path / "r"), "test_sweep:fake").finished) == 3
    report = sweep([plain(log, seeds=(5,))], Records(tmp_path / "r"), "ctsft.nowhere:run")
    assert list(report.failed.values()) == ["ModuleNotFoundError: No module named 'ctsft.nowhere'"]


# ----------------------------------------------------------------------------------------------- workers that are lost


def test_a_killed_worker_s_run_is_retried_and_the_records_are_those_of_an_undisturbed_sweep(log, tmp_path):
    arms = [plain(log, text="dies once", seeds=range(6)), tuned(log, k=10)]
    for spec in arms[0].final(5e-3)[1:2]:
        (log / f"{spec.key}.0").touch()  # it has died already
    sweep(arms, Records(tmp_path / "calm"), fake)
    for path in log.iterdir():
        path.unlink()

    report = sweep(arms, Records(tmp_path / "r"), fake, processes(2))
    victim = arms[0].final(5e-3)[1]
    assert report.retried == {victim.key: 1} and not report.failed
    assert started(log) == dict.fromkeys(report.finished, 1) | {victim.key: 2}, "a bystander was started again"
    assert on_disk(tmp_path / "r") == on_disk(tmp_path / "calm")


def test_a_run_that_always_loses_its_worker_is_given_up(log, tmp_path):
    arms = [plain(log, text="dies", seeds=(0,)), plain(log)]
    report = sweep(arms, Records(tmp_path / "r"), fake, processes(2))
    (key,) = report.failed
    assert key == arms[0].final(5e-3)[0].key and report.failed[key].startswith("its worker died 3 times (BrokenProcess")
    assert started(log)[key] == 3 and report.retried == {key: 2} and len(report.finished) == 3


# ------------------------------------------------------------------------------------------------------ stop and resume


def test_an_interrupted_sweep_keeps_what_is_finished_and_goes_on_from_there(log, tmp_path):
    arms = [tuned(log, k=10)]
    with pytest.raises(KeyboardInterrupt):
        sweep(arms, Records(tmp_path / "r"), interrupted)
    assert len(on_disk(tmp_path / "r")) == 4
    report = sweep(arms, Records(tmp_path / "r"), fake)
    assert len(report.finished) == 5 + 2 - 4 and set(started(log).values()) == {1}


@pytest.fixture
def heard():
    """Ctrl-C is heard, also where the tests run in the background of a shell, which starts them with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@linux
def test_ctrl_c_ends_the_workers_and_keeps_what_is_finished(log, tmp_path, heard):
    arm = plain(log, text="hangs")
    hangs = arm.final(5e-3)[1]

    pressed = []

    def press():
        wait_until(lambda: any(path.read_text() for path in starts(hangs)) and len(on_disk(tmp_path / "r")) == 2)
        pressed.append(time.monotonic())
        os.kill(int(starts(hangs)[0].read_text()), signal.SIGINT)  # a terminal sends it to the workers too
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        sweep([arm], Records(tmp_path / "r"), fake, processes(2))
    thread.join()
    assert len(starts(hangs)) == 1 and time.monotonic() - pressed[0] < 30
    assert not any(alive(pid) for pid in started_pids(log))
    assert sorted(on_disk(tmp_path / "r")) == sorted(s.key for s in arm.final(5e-3) if s != hangs)


@linux
def test_a_killed_driver_leaves_no_workers_and_the_next_one_resumes(log, tmp_path):
    arm = plain(log, text="hangs", seeds=range(4))
    driver = start_driver(
        tmp_path, f"sweep([plain({str(log)!r}, text='hangs', seeds=range(4))], records, fake, processes(2))"
    )
    wait_until(lambda: len(on_disk(tmp_path / "r")) == 3 and len(list(log.iterdir())) == 4, 30)
    driver.kill()
    driver.wait()
    wait_until(lambda: not any(alive(pid) for pid in started_pids(log)))

    kept = on_disk(tmp_path / "r")
    report = sweep([arm], Records(tmp_path / "r"), record_of)
    assert report.finished == [arm.final(5e-3)[1].key]
    now = on_disk(tmp_path / "r")
    assert len(now) == 4 and kept.items() < now.items()


# ------------------------------------------------------------------------------------------------------------- progress


def test_off_a_terminal_every_run_has_its_line(log, tmp_path):
    out = io.StringIO()
    arm = tuned(log)
    sweep([arm], Records(tmp_path / "r"), fake, console=Console(file=out, width=120))
    lines = [line for line in out.getvalue().splitlines() if " left" in line and "━" not in line]
    assert [line.split()[0] for line in lines] == [f"{i}/5" for i in range(1, 6)], "seeds count while the arm tunes"
    assert lines[-1].endswith(f"{arm.final(0.005)[1].key}, 0:00:00 left")


def test_the_bar_shows_the_run_at_work(log, tmp_path):
    out = io.StringIO()
    sweep([plain(log)], Records(tmp_path / "r"), fake, console=Console(file=out, width=120, force_terminal=True))
    assert "3/3" in out.getvalue() and "done" in out.getvalue()


def test_the_estimate_goes_by_tokens_and_model():
    clock, one = Clock(), Spec(model="a", steps=10, batch=2, length=50)
    assert clock.estimate([one]) is None
    clock.add(one, 10.0)
    other = one.model_copy(update={"model": "b"})
    assert clock.estimate([one.model_copy(update={"steps": 40}), other]) == pytest.approx(40 + 10)
    clock.add(other, 30.0)
    assert clock.estimate([one, other, one.model_copy(update={"model": "c"})]) == pytest.approx(10 + 30 + 20)
    assert clock.estimate([one.model_copy(update={"steps": 0})]) == pytest.approx(1.0)
