import io
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from command import assert_one_sentence
from ctsft.adapter import export


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_export_measures_the_difference(ctsft, finished, tmp_path, to):
    code, out, err = ctsft("export", finished, "--to", to, "--out", tmp_path / to)
    assert code == 0 and "Traceback" not in err
    difference = float(out.split("random tokens: ")[1].split()[0])
    reach = float(out.split("logits reach ")[1].rstrip(")\n"))
    assert difference < 1e-4 < 0.1 < reach
    assert str(tmp_path / to) in out
    names = {p.name for p in (tmp_path / to).iterdir()}
    wanted = (
        {"adapter_model.safetensors", "adapter_config.json"} if to == "lora" else {"model.safetensors", "config.json"}
    )
    assert names >= wanted | {"tokenizer.json"}


def test_export_beside_the_adapter_by_default_and_never_over_it(ctsft, finished):
    assert ctsft("export", finished / "adapter")[0] == 0
    assert (finished / "adapter-lora" / "adapter_model.safetensors").exists()
    assert_one_sentence(ctsft("export", finished / "adapter"), "adapter-lora exists; choose another place")


def test_the_difference_would_show(ctsft, finished, tmp_path, monkeypatch):
    """The number that is printed is that of the files: spoil them and it grows."""
    original = export.export_adapter

    def spoilt(model, out, *args, **kwargs):
        notes = original(model, out, *args, **kwargs)
        path = Path(out) / "adapter_model.safetensors"
        save_file({n: t * 1.5 for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
        return notes

    monkeypatch.setattr(export, "export_adapter", spoilt)
    _, out, _ = ctsft("export", finished, "--out", tmp_path / "lora")
    assert float(out.split("random tokens: ")[1].split()[0]) > 1e-2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], "nowhere holds no adapter"),
        (["RUN", "--to", "onnx"], "--to 'onnx' is unknown; choose lora or merged"),
        (["RUN", "--model", "smollm"], "no model 'smollm'"),
        (["MODEL"], "holds no adapter"),
    ],
)
def test_a_mistake_in_export_is_one_sentence(ctsft, finished, files, args, words):
    args = [{"RUN": finished, "MODEL": files[0]}.get(a, a) for a in args]
    assert_one_sentence(ctsft("export", *args), words)


def test_sample(ctsft, finished, files, monkeypatch):
    say = ["--prompt", "red green?", "--max-new-tokens", "8"]
    code, of_run, _ = ctsft("sample", finished, *say)
    assert code == 0 and of_run.strip()
    assert ctsft("sample", finished / "adapter", *say)[1] == of_run
    of_model = ctsft("sample", files[0], *say)[1]
    assert of_model != of_run
    assert ctsft("sample", finished, "--base", *say)[1] == f"base:  {of_model}tuned: {of_run}"
    monkeypatch.setattr(sys, "stdin", io.StringIO("red green?"))
    assert ctsft("sample", finished, "--max-new-tokens", "8")[1] == of_run


def test_a_mistake_in_sample_is_one_sentence(ctsft, finished, files, tmp_path):
    assert_one_sentence(ctsft("sample", finished, "--prompt", " \n"), "the prompt is empty")
    assert_one_sentence(ctsft("sample", "smollm", "--prompt", "x"), "did you mean 'smollm2-135m'?")
    assert_one_sentence(ctsft("sample", files[0], "--base", "--prompt", "x"), "--base compares an adapter")
    told = ctsft("sample", files[0], "--model", "/nowhere", "--prompt", "x")
    assert_one_sentence(told, "--model is the base of an adapter", "leave --model out")
    assert_one_sentence(ctsft("sample", files[0], "--prompt", "x" * 200), "200 tokens", "128")
    (tmp_path / "recipe.json").write_text("{}")
    assert_one_sentence(ctsft("sample", tmp_path, "--prompt", "x"), "holds no adapter")


def damaged(run, folder, damage):
    """A copy of the finished `run` in `folder`, its adapter's files as `damage` leaves their bytes."""
    shutil.copytree(run, folder)
    file, change = damage
    path = folder / "adapter" / file
    content = change(path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    return folder


FILE, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
DAMAGES = {
    "truncated": (FILE, lambda b: b[:-10]),
    "empty": (FILE, lambda b: b""),
    "header": (FILE, lambda b: b[:3] + b"\xff" + b[4:]),
    "no file": (FILE, lambda b: None),
    "number": (FILE, lambda b: b[:-1] + bytes([b[-1] ^ 1])),
    "list": (SETTINGS, lambda b: b"[]"),
    "no json": (SETTINGS, lambda b: b[:-5]),
    "no utf-8": (SETTINGS, lambda b: b"\xff" + b),
    "brackets": (SETTINGS, lambda b: b"[" * 100_000),
    "setting": (SETTINGS, lambda b: b.replace(b'"k": 4', b'"k": 5')),
    "type": (SETTINGS, lambda b: b.replace(b'"k": 4', b'"k": [4]')),
    "lora": (SETTINGS, lambda b: b.replace(b"CTSFT", b"LORA")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_adapter_is_one_sentence(ctsft, finished, tmp_path, damage):
    run = damaged(finished, tmp_path / "run", damage)
    assert_one_sentence(ctsft("sample", run, "--prompt", "x"))
    assert_one_sentence(ctsft("export", run, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_export_of_an_adapter_is_no_adapter_of_ctsft(ctsft, finished, tmp_path):
    assert ctsft("export", finished, "--out", tmp_path / "lora")[0] == 0
    for args in (("sample", tmp_path / "lora", "--prompt", "x"), ("export", tmp_path / "lora")):
        assert_one_sentence(ctsft(*args), "is of an adapter of the method 'LORA', not CTSFT; load it with peft alone")


@pytest.mark.parametrize("recipe", ("[]", "{}", '{"model": 3}', "{"))
def test_a_damaged_recipe_is_one_sentence(ctsft, finished, tmp_path, recipe):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "recipe.json").write_text(recipe)
    assert_one_sentence(ctsft("sample", run, "--prompt", "x"))
