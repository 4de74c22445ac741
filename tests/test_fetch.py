import importlib.util
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

PATH = Path(__file__).parents[1] / "scripts" / "fetch.py"


@pytest.fixture(scope="module")
def fetch():
    spec = importlib.util.spec_from_file_location("fetch", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nothing_answers(*_, **__):
    raise LocalEntryNotFoundError("no connection")


@pytest.mark.parametrize("name", ["tinyllama-1.1b", "smollm2-135m"])
def test_true_weights_lie_in_a_folder_that_says_so(fetch, name, tmp_path, monkeypatch, capsys):
    asked = []

    def snapshot(repository, local_dir, allow_patterns):
        asked.append(repository)
        assert "*.safetensors" in allow_patterns and not any("bin" in pattern for pattern in allow_patterns)
        (local_dir / ".cache").mkdir(parents=True)
        (local_dir / "config.json").write_text("{}")

    monkeypatch.setattr(fetch, "snapshot_download", snapshot)
    for _ in range(2):
        fetch.main([name, "--out", str(tmp_path)])
        assert capsys.readouterr().out == f"{tmp_path / name}-bf16\n"
    assert asked == [fetch.TRUE[name]], "what is there is not fetched again"
    assert [path.name for path in tmp_path.rglob("*")] == [f"{name}-bf16", "config.json"]


def test_where_the_hub_does_not_answer_the_quantised_ones_are_taken_and_that_is_said(
    fetch, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(fetch, "snapshot_download", nothing_answers)
    monkeypatch.setitem(fetch.WAYS, "tinyllama-1.1b", lambda out, scratch: out.mkdir(parents=True))
    fetch.main(["tinyllama-1.1b", "smollm2-135m", "--out", str(tmp_path)])
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'tinyllama-1.1b'}\n"
    told = [line for line in said.err.splitlines() if "hub" in line]
    assert told == [
        "the hub does not answer (LocalEntryNotFoundError), so tinyllama-1.1b is that of 2-bit weights, out of npm "
        "packages.",
        "the hub does not answer (LocalEntryNotFoundError), so smollm2-135m is that of 4-bit weights, built in.",
    ]


def test_without_the_hub_stories260k_is_not_to_be_had(fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "hf_hub_download", nothing_answers)
    with pytest.raises(SystemExit, match="stories260k is not to be had: the hub does not answer"):
        fetch.main(["stories260k", "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
