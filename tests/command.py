"""The command as a user runs it, and what he sees."""

import sys

import pytest


def options(files, steps=4):
    small = f"--k 4 --steps {steps} --batch-size 4 --heldout 8 --eval-rows 4 --max-length 64"
    return ["--model", files[0], "--data", files[1], *small.split()]


def assert_one_sentence(result, *words):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def ctsft(wide, monkeypatch, capfd):
    """Run the command as a user does; returns its exit code, standard output and standard error."""

    from ctsft.cli import main as cli

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["ctsft", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code or 0, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    import tiny

    folder = tmp_path_factory.mktemp("files")
    return tiny.save_model(folder / "llama"), tiny.save_rows(folder / "rows.jsonl")


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """A finished run, made by the command, with what it printed."""
    from ctsft.cli import main as cli

    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(sys, "argv", ["ctsft", "tune", *options(files), "--lr", "0.05", "--out", str(out)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    return out
