import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ctsft.models.load
from ctsft.errors import CTError
from ctsft.files import read_json
from ctsft.models.load import check_index, load_model, resolve

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def small_llama():
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
def llama():
    return small_llama()


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
    tokenizer = load_model(str(folder)).tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


def test_an_own_pad_token_is_kept(folder):
    tokenizer = load_model(str(folder)).tokenizer
    tokenizer.pad_token = "<s>"
    tokenizer.save_pretrained(folder)
    assert load_model(str(folder)).tokenizer.pad_token_id == 0


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


def index(folder, name):
    """The weights behind an index that sends to `name`, which torch.load would read."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "other.bin")
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    content = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def index_of(text):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
BROKEN = {
    "truncated": (truncate, "truncated or corrupt safetensors .*: fetch the folder again"),
    "pickled": (only_pickled, r"only pickled weights \(pytorch_model.bin\).*save it as safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json: it is not a Hugging Face model folder"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "cannot be loaded .*not a valid JSON"),
    "adapter": (adapter, "is an adapter, not a model: give the model that it was trained on"),
    "index to pickles": (lambda f: index(f, "other.bin"), "sends to other.bin: only safetensors beside it are read"),
    "index to elsewhere": (lambda f: index(f, "../a.safetensors"), "sends to ../a.safetensors: only"),
    "index that is none": (index_of("[]"), "is no index of weights; it is damaged"),
    "index without files": (index_of('{"weight_map": {"a": 3}}'), "is no index of weights; it is damaged"),
    "index of brackets": (index_of("[" * 100_000), "cannot be read as JSON"),
    "adapter within": (lambda f: (f / "adapter_config.json").write_text("{}"), "is a model with an adapter in it"),
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


def test_what_is_missing_in_a_folder_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CTError, match="There is no mine in the folder runs, and it is not asked of the hub"):
        load_model("runs/mine")


def test_an_index_on_the_hub_is_checked_too(folder, monkeypatch):
    index(folder, "other.bin")
    monkeypatch.setattr(ctsft.models.load, "hf_hub_download", lambda source, name: folder / name)
    with pytest.raises(CTError, match=r"sends to other\.bin: only safetensors"):
        check_index("some/model")


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
    tokenizer = load_model("photonic").tokenizer
    assert len(tokenizer) == 15_007 and tokenizer.model_max_length == 128
    text = "Zürich, 東京\n\t SELECT count(*)  FROM t;"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == load_model("photonic").model.config.eos_token_id == 0
