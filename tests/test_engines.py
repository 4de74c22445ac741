import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctsft.errors import CTError
from ctsft.lab import engines
from ctsft.lab.engines import check_answers, in_process, make_engine, on_ray, processes
from ctsft.lab.records import Records
from ctsft.lab.sweep import sweep
from test_sweep import fake, on_disk, plain, record_of, started, started_pids, wait_until


@pytest.fixture
def log(tmp_path):
    """Where runs sign in."""
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


def threads_of(spec):
    import torch

    return record_of(spec, machine={"threads": torch.get_num_threads(), "variable": os.environ["OMP_NUM_THREADS"]})


def test_a_worker_that_dies_between_two_runs_costs_no_retry(log, tmp_path):
    specs = plain(log).final(5e-3)
    with processes(1)(fake) as workers:
        assert workers.submit(specs[0]).result() == record_of(specs[0])
        (first,) = started_pids(log)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{first}").exists())
        time.sleep(0.2)
        assert workers.submit(specs[1]).result() == record_of(specs[1])


def test_every_worker_has_its_threads(log, tmp_path):
    records = Records(tmp_path / "r")
    sweep([plain(log, seeds=(0,))], records, threads_of, processes(1, threads=2))
    assert [one.machine for one in records.values()] == [{"threads": 2, "variable": "2"}]


def test_a_worker_that_has_torch_already_has_its_threads_too():
    code = (
        "import torch\nfrom multiprocessing import Pipe\nfrom ctsft.lab.engines import start_worker\n"
        "ends = Pipe(duplex=False)\nstart_worker(ends[0], 3)\nprint(torch.get_num_threads())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "3\n"


def test_make_engine(monkeypatch):
    assert make_engine("process", 1) is in_process
    monkeypatch.setattr(engines, "cores", lambda: 4)
    with make_engine("process")(fake) as workers:
        assert workers.slots == 4
    with make_engine("process", threads=2)(fake) as workers:
        assert workers.slots == 2
    assert make_engine("process", threads=4) is in_process
    with pytest.raises(CTError, match="no engine 'dask'; choose process or ray"):
        make_engine("dask")
    with pytest.raises(CTError, match="an address is for the engine ray"):
        make_engine("process", address="here:1")


def test_without_ray_the_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CTError, match=r"pip install 'ctsft\[ray\]'"), on_ray()(fake):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_an_address_where_nothing_answers(address):
    with pytest.raises(CTError, match=f"no Ray cluster answers at '{address}'"):
        check_answers(address)


@pytest.mark.filterwarnings("ignore:::ray")
def test_ray_retries_a_killed_worker_s_run(log, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("CTSFT_MODELS", "travels")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    arms = [plain(log, text="dies once", seeds=range(4)), plain(log, text="bug", seeds=(0,))]
    report = sweep(arms, Records(tmp_path / "r"), "test_sweep:fake", on_ray(workers=2))
    victim, bug = arms[0].final(5e-3)[1].key, arms[1].final(5e-3)[0].key
    assert report.retried == {victim: 1} and report.failed == {bug: "ZeroDivisionError: the second"}
    assert started(log) == dict.fromkeys([*report.finished, bug], 1) | {victim: 2}
    sweep(arms[:1], Records(tmp_path / "calm"), record_of)
    assert on_disk(tmp_path / "r") == on_disk(tmp_path / "calm")
