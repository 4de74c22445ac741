"""The basis read from files against the one of the loaded model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import ctsft
from ctsft.errors import CTError
from ctsft.models.load import load_skeleton, resolve
from ctsft.spectral import universal, weights
from ctsft.spectral.decompose import principal_directions
from ctsft.spectral.universal import Checkpoint, universal_basis
from ctsft.spectral.weights import matrix, rows, universal_gram, universal_members, width
from helpers import HEAD, SHAPES, assert_same_bits, tiny


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Pieces of 10 rows, so that every matrix is read in several."""
    monkeypatch.setattr(weights, "ROWS", 10)
    monkeypatch.setattr(universal, "ROWS", 10)


def save(base, folder, **options):
    base.save_pretrained(folder, **options)
    return folder


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_as_loaded(folder, model=None):
    """The pass over `folder` gives the bits of the model that is loaded from it; returns the basis."""
    model = model or AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    d_model = width(model)
    members = universal_members(model, d_model)
    gram = universal_gram(members, d_model)
    basis = universal_basis(folder)
    assert_same_bits(basis.directions, principal_directions(gram, d_model))
    assert basis.members == len(members)
    assert torch.allclose(basis.values, (basis.directions @ gram @ basis.directions.T).diagonal(), atol=1e-10)
    return basis


MODELS = {
    "llama, tied": {},
    "llama, untied": {"tie_word_embeddings": False},
    "llama, square MLP": {"intermediate_size": 16},
    "gpt2": {"shape": "gpt2"},
    "photonic": {"shape": "photonic"},
    "photonic, untied": {"shape": "photonic", "tie_word_embeddings": False},
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_pass_gives_the_bits_of_the_loaded_model(tmp_path, changes, dtype):
    base = tiny(dtype=dtype, **changes)
    basis = assert_as_loaded(save(base, tmp_path / "one"), base)
    files = save(base, tmp_path / "many", max_shard_size="4KB")
    assert len(list(files.glob("*.safetensors"))) > 1 and not (files / "model.safetensors").exists()
    assert_same_bits(assert_as_loaded(files).directions, basis.directions)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_values_are_the_squared_singular_values_of_all_rows_stacked(tmp_path, shape):
    base = tiny(shape)
    basis = universal_basis(save(base, tmp_path))
    stacked = []
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding) and name != HEAD[shape]:
            w = (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().double()
            stacked.append(rows(name, w, 16))
    _, s, vh = torch.linalg.svd(torch.cat(stacked), full_matrices=False)
    assert torch.allclose(basis.values, s**2)
    assert torch.allclose((basis.directions @ vh.T).abs(), torch.eye(16, dtype=torch.float64), atol=1e-8)
    assert basis.explained(3) == pytest.approx(float((s[:3] ** 2).sum() / (s**2).sum()))
    assert basis.explained(16) == 1


def test_the_built_in_model(monkeypatch):
    monkeypatch.setattr(weights, "ROWS", 8192)
    monkeypatch.setattr(universal, "ROWS", 8192)
    loaded = AutoModelForCausalLM.from_pretrained(resolve("photonic"), dtype="auto")
    members = universal_members(loaded, 256)
    basis = ctsft.universal_basis("photonic")
    assert_same_bits(basis.directions, principal_directions(universal_gram(members, 256), 256))


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_without_the_prefix_of_the_base_model(tmp_path, shape):
    base = tiny(shape)
    wanted = universal_basis(save(base, tmp_path)).directions
    prefix = base.base_model_prefix + "."
    bare = {k.removeprefix(prefix): v for k, v in tensors_of(tmp_path).items()}
    assert not any(k.startswith(prefix) for k in bare)
    rewrite(tmp_path, bare)
    assert_same_bits(universal_basis(tmp_path).directions, wanted)


def test_a_model_saved_without_its_head_has_keys_without_prefix(tmp_path):
    base = tiny("gpt2")
    base.transformer.save_pretrained(tmp_path)
    assert "wte.weight" in tensors_of(tmp_path)
    assert_as_loaded(tmp_path, base)


def test_a_tied_weight_that_is_stored_as_the_head(tmp_path):
    wanted = universal_basis(save(tiny(), tmp_path)).directions
    tensors = tensors_of(tmp_path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    rewrite(tmp_path, tensors)
    assert_same_bits(universal_basis(tmp_path).directions, wanted)


def test_a_tied_weight_that_is_stored_twice_counts_once_and_must_be_the_same(tmp_path):
    wanted = universal_basis(save(tiny(), tmp_path)).directions
    tensors = tensors_of(tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    rewrite(tmp_path, tensors)
    assert_same_bits(universal_basis(tmp_path).directions, wanted)
    tensors["lm_head.weight"][36, 15] += 1
    rewrite(tmp_path, tensors)
    with pytest.raises(CTError, match=r"ties model\.embed_tokens\.weight to lm_head\.weight .* numbers differ"):
        universal_basis(tmp_path)


def test_the_model_is_read_in_pieces(tmp_path):
    save(tiny("gpt2"), tmp_path)
    skeleton, folder = load_skeleton(str(tmp_path))
    assert all(tensor.is_meta for tensor in skeleton.parameters())
    checkpoint = Checkpoint(folder, skeleton)
    for name, module in universal_members(skeleton, 16).items():
        pieces = list(checkpoint.rows(name, module, 16))
        assert len(pieces) > 1 and all(p.shape[1] == 16 and len(p) <= 10 for p in pieces)
        assert torch.equal(torch.cat(pieces), rows(name, matrix(tiny("gpt2").get_submodule(name)), 16))


def without_a_key(folder):
    tensors = tensors_of(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    rewrite(folder, tensors)


def changed_weight(change):
    def damage(folder):
        tensors = tensors_of(folder)
        key = "model.layers.1.mlp.up_proj.weight"
        tensors[key] = change(tensors[key])
        rewrite(folder, tensors)

    return damage


def only_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def other_names(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def cut(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])


def without_a_shard(folder):
    save(tiny(), folder / "new", max_shard_size="4KB")
    (folder / "model.safetensors").unlink()
    for file in (folder / "new").glob("model*"):
        file.rename(folder / file.name)
    next(folder.glob("model-00002*")).unlink()


def config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


MISTAKES = {
    "a key is missing": (without_a_key, r"holds no weights for model\.layers\.1\.mlp\.up_proj; its files are incompl"),
    "a shard is missing": (without_a_shard, r"cannot be loaded \(No such file or directory"),
    "pickled only": (only_pickled, r"has only pickled weights \(pytorch_model\.bin\)"),
    "other file names": (other_names, r"has neither model\.safetensors nor model\.safetensors\.index\.json"),
    "cut off": (cut, "truncated or corrupt safetensors file"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "not a language model": (config(model_type="vit", architectures=["ViTModel"]), "is not a causal language model"),
    "unknown architecture": (config(model_type="nothing"), "cannot be loaded"),
    "another width": (config(intermediate_size=32), r"\(24, 16\) in .* and \(32, 16\) by its config\.json"),
    "integers": (changed_weight(lambda w: w.to(torch.int8)), r"up_proj is quantised \(I8\)"),
    "infinite": (changed_weight(lambda w: w.index_fill(0, torch.tensor([23]), torch.inf)), "NaN or infinite weights"),
}


@pytest.mark.parametrize(("damage", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_users_mistake_is_one_sentence(tmp_path, damage, message):
    save(tiny(), tmp_path)
    damage(tmp_path)
    with pytest.raises(CTError, match=message) as caught:
        universal_basis(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_hub_id_is_no_folder():
    with pytest.raises(CTError, match=r"org/name is a hub id and here a folder is read: fetch it"):
        universal_basis("org/name")


def test_a_model_without_an_input_embedding_has_no_width(tmp_path, monkeypatch):
    save(tiny(), tmp_path)

    def none(self):
        raise NotImplementedError

    monkeypatch.setattr("transformers.LlamaForCausalLM.get_input_embeddings", none)
    with pytest.raises(CTError, match="whose input embedding tells the width d_model"):
        universal_basis(tmp_path)
