"""A folder that is not what was saved is refused in one sentence, before a model is touched."""

import json
import warnings

import huggingface_hub
import peft.config
import peft.utils.save_and_load
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ctsft import CTConfig, CTError, save_adapter
from helpers import adapt, assert_same_bits, logits, randomise, tiny

# pytest.warns hands on what it did not expect, without the module by which pyproject.toml knows it
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FILE, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def saved(tmp_path):
    """The folder of an adapter with a head that is trained whole and a stored basis, and its logits."""
    model = randomise(adapt(tiny(tie_word_embeddings=False), modules_to_save=["lm_head"], store_basis=True))
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    save_adapter(model, tmp_path / "a")
    return tmp_path / "a", logits(model)


def base():
    return tiny(tie_word_embeddings=False)


def load(folder):
    return PeftModel.from_pretrained(base(), folder).eval()


def settings(folder):
    return json.loads((folder / SETTINGS).read_text())


def edit(folder, **changes):
    (folder / SETTINGS).write_text(json.dumps(settings(folder) | changes))


def change(folder, how):
    tensors = load_file(folder / FILE)
    how(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def refused(folder, match):
    with pytest.raises(CTError, match=match) as caught:
        load(folder)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text


def unseal(folder):
    """The folder as an older ctsft, which wrote no hashes, saved it."""
    old = {n: v for n, v in settings(folder).items() if not n.endswith("_hash")}
    (folder / SETTINGS).write_text(json.dumps(old))


def test_what_was_saved_loads_without_a_word(saved):
    folder, wanted = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same_bits(logits(load(folder)), wanted)


def test_where_the_base_lies_may_be_edited(saved):
    folder, wanted = saved
    edit(folder, base_model_name_or_path="moved/elsewhere", inference_mode=False, peft_version="9", revision="main")
    assert_same_bits(logits(load(folder)), wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {"form": "core"},
        {"basis": "random"},
        {"k": 3},
        {"seed": 1},
        {"weight_from": "bottom"},
        {"save_dtype": "float16"},
        {"basis_dtype": "bfloat16"},
        {"stored_basis": False},
        {"fingerprint": "xxh3-0"},
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["q_proj"]},
        {"layers_to_transform": [0]},
        {"modules_to_save": None},
        {"target_modules_to_tie": ["lm_head"]},
        {"task_type": None},
        {"amplitude_dropout": 0.5},
        {"tensors_hash": "xxh3-0"},
        {"settings_hash": "xxh3-0"},
        {"settings_hash": None},
        {"tensors_hash": None},
    ],
    ids=str,
)
def test_every_setting_that_has_a_meaning_is_sealed(saved, changes):
    edit(saved[0], **changes)
    refused(saved[0], "adapter_config.json is not as it was saved; it is damaged or was edited")


def flip(name, index=0):
    def how(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(torch.uint8).view(-1)[index] ^= 1

    return how


HEAD, U = "base_model.model.lm_head.weight", "ctsft.basis.model.layers.0.self_attn.q_proj.u"
NUMBERS = "ctsft.coefficients"


@pytest.mark.parametrize(
    "how",
    [
        flip(NUMBERS),
        flip(HEAD, 5),
        flip(U, 7),
        flip("ctsft.checksum"),
        lambda t: t.update({NUMBERS: t[NUMBERS].flip(0)}),
        lambda t: t.update({HEAD: t[HEAD].flip(0)}),
        lambda t: t.update({NUMBERS: t[NUMBERS].to(torch.int16)}),
        lambda t: t.update({NUMBERS: t[NUMBERS].bool()}),
        lambda t: t.update({NUMBERS: t[NUMBERS].double()}),
        lambda t: t.update({HEAD: t[HEAD].half()}),
        lambda t: t.update({NUMBERS: t[NUMBERS][None]}),
        lambda t: t[NUMBERS][3].fill_(1e38),
        lambda t: t.pop(HEAD),
        lambda t: t.pop(U),
        lambda t: t.update({U.replace("layers.0", "layers.9"): t[U].clone()}),
    ],
)
def test_every_bit_of_every_tensor_is_sealed(saved, how):
    change(saved[0], how)
    refused(saved[0], "the numbers are not those that were saved with this adapter_config.json")


@pytest.mark.parametrize("sealed", (True, False))
@pytest.mark.parametrize(
    "key",
    [
        *("model.norm.weight", "base_model.model.model.norm.weight", "base_model.model.model.embed_tokens.weight"),
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.ctsft_coefficients.weight",
    ],
)
def test_no_file_replaces_a_weight_of_the_base(saved, key, sealed):
    folder, _ = saved
    change(folder, lambda t: t.update({key: torch.ones(16)}))
    if not sealed:
        unseal(folder)
    refused(folder, f"the file has '{key}', which is no part of this adapter and would replace a weight of the base")


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("name", (NUMBERS, HEAD, U))
def test_numbers_that_are_not_finite_are_refused(saved, name, value):
    change(saved[0], lambda t: t[name].view(-1)[0].fill_(value))
    refused(saved[0], f"NaN or infinite numbers in '{name}'; it is damaged")


def test_tensors_of_another_adapter_are_refused(saved, tmp_path):
    other = randomise(adapt(base(), modules_to_save=["lm_head"], store_basis=True), seed=9)
    save_adapter(other, tmp_path / "b")
    (saved[0] / FILE).write_bytes((tmp_path / "b" / FILE).read_bytes())
    refused(saved[0], "the file is damaged or another")


@pytest.mark.parametrize("basis", ("weight", "universal"))
def test_replace_and_residual_are_no_longer_exchanged(basis, tmp_path):
    modes = {"weight": ("residual",), "universal": ("residual", "replace")}[basis]
    for mode in modes:
        model = randomise(adapt(tiny(), form="scores", basis=basis, universal_mode=mode))
        save_adapter(model, tmp_path / mode)
        other = next(iter({"residual", "replace"} - {mode}))
        edit(tmp_path / mode, universal_mode=other)
        with pytest.raises(CTError, match=r"not as it was saved|needs basis='universal'"):
            PeftModel.from_pretrained(tiny(), tmp_path / mode)


# ---- files of an older ctsft, without hashes


def test_an_old_file_loads_with_one_warning(saved):
    folder, wanted = saved
    unseal(folder)
    with pytest.warns(UserWarning, match="saved by an older ctsft without a hash") as caught:
        model = load(folder)
    assert len([w for w in caught if w.category is UserWarning]) == 1
    assert_same_bits(logits(model), wanted)
    save_adapter(model, folder)  # and is sealed anew
    assert_same_bits(logits(load(folder)), wanted)


@pytest.mark.filterwarnings("ignore:the adapter was saved by an older ctsft:UserWarning")
@pytest.mark.parametrize(
    ("how", "match"),
    [
        (lambda t: t.update({NUMBERS: t[NUMBERS].to(torch.int16)}), "coefficients as torch.int16"),
        (lambda t: t.update({NUMBERS: t[NUMBERS].bool()}), "coefficients as torch.bool"),
        (lambda t: t.update({NUMBERS: t[NUMBERS].half()}), "coefficients as torch.float16"),
        (lambda t: t.update({"ctsft.checksum": t["ctsft.checksum"].double()}), "checksum as torch.float64"),
        (lambda t: t.update({NUMBERS: t[NUMBERS][:-1].clone()}), "another model"),
        (lambda t: t.update({HEAD: t[HEAD][:-1].clone()}), "lm_head.weight as torch.float32"),
        (lambda t: t.update({HEAD: t[HEAD].long()}), "lm_head.weight as torch.int64"),
        (
            lambda t: t.update({HEAD.replace("weight", "bias"): t[HEAD].clone()}),
            r"lm_head\.bias., which is no part of this",
        ),
        (lambda t: t.pop(U), "holds no basis for model.layers.0.self_attn.q_proj"),
        (lambda t: [t.pop(n) for n in list(t) if ".basis." in n], "says a stored basis and the file holds none"),
        (lambda t: t.update({U.replace(".u", ".start"): t[U].clone()}), "q_proj.start as torch.float32"),
        (lambda t: t.update({U.replace("layers.0", "layers.9"): t[U].clone()}), "layers.9.self_attn.q_proj.u as"),
    ],
)
def test_an_old_file_too_must_have_just_what_the_adapter_has(saved, how, match):
    change(saved[0], how)
    unseal(saved[0])
    refused(saved[0], match)


@pytest.mark.filterwarnings("ignore:the adapter was saved by an older ctsft:UserWarning")
def test_the_start_of_replaced_weights_may_not_be_missing(tmp_path):
    model = adapt(tiny(), form="scores", basis="universal", universal_mode="replace", store_basis=True)
    save_adapter(randomise(model), tmp_path / "a")
    change(tmp_path / "a", lambda t: [t.pop(n) for n in list(t) if n.endswith(".start")])
    unseal(tmp_path / "a")
    with pytest.raises(CTError, match=r"holds no basis for model\.layers\.0\.self_attn\.q_proj"):
        PeftModel.from_pretrained(tiny(), tmp_path / "a")


def test_k_is_held_against_the_shapes_before_anything_is_made(saved):
    edit(saved[0], k=100_000_000)
    unseal(saved[0])
    refused(saved[0], "k=100000000 is more than the 16 directions of model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("field", ("target_modules", "exclude_modules", "k"))
@pytest.mark.parametrize("pattern", (r"(?:(?:.|\w)+)+(?<=!)", "(x{1000}){1000}", "(", "(?:" * 5000 + ")" * 5000))
def test_a_pattern_of_a_file_cannot_hang(saved, field, pattern):
    edit(saved[0], **{field: [[pattern, 3]] if field == "k" else pattern})
    unseal(saved[0])
    refused(saved[0], "takes too long on|too long or repeats too often|no regular expression")


@pytest.mark.parametrize("field", ("layers_pattern", "modules_to_save"))
def test_names_are_no_patterns(saved, field):
    edit(saved[0], **{field: ["(.+)+!"], "layers_to_transform": [0]})
    unseal(saved[0])
    refused(saved[0], rf"{field}='\(\.\+\)\+!' is no name of a module")


# ---- what is no adapter


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "is no JSON object"),
        ("3", "is no JSON object"),
        ("{", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"seed": ' + "9" * 10_000 + "}", "cannot be read as JSON"),
        ('{"amplitude_dropout": NaN}', "NaN is no JSON"),
        ('{"peft_type": "LORA"}', "of the method 'LORA', not CTSFT"),
        ('{"peft_type": ["CTSFT"]}', r"of the method \['CTSFT'\], not CTSFT"),
        ('{"peft_type": "CTSFT", "colour": 1}', "the unknown field 'colour'"),
        ('{"peft_type": "CTSFT", "runtime_config": 1}', "the unknown field 'runtime_config'"),
        ('{"peft_type": "CTSFT"}', "does not name the base weights"),
    ],
)
def test_settings_that_are_none(saved, text, match):
    (saved[0] / SETTINGS).write_text(text)
    with pytest.raises(CTError, match=match):
        CTConfig.from_pretrained(saved[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("k", v) for v in ("4", None, [4], [[1, 2]], [["a"]], {"a": "b"}, 1.0)),
        *(("form", v) for v in (None, [], {}, 3)),
        *(("target_modules", v) for v in (3, [1], {"a": 1}, True)),
        *(("exclude_modules", v) for v in (3, [1])),
        *(("layers_to_transform", v) for v in ("0", [0.5], True)),
        *(("modules_to_save", v) for v in ("lm_head", [3])),
        *(("seed", v) for v in ("0", None, 0.5, True)),
        *(("amplitude_dropout", v) for v in ("0", None)),
        *(("store_basis", v) for v in ("yes", None, 1)),
        *(("format_version", v) for v in ("1", None)),
        *(("task_type", v) for v in ("SING", 3, [])),
        *(("fingerprint", v) for v in (3, [])),
        ("base_model_name_or_path", 3),
        ("inference_mode", "yes"),
    ],
)
def test_fields_of_a_wrong_type_are_one_sentence(saved, field, value):
    edit(saved[0], **{field: value})
    unseal(saved[0])
    with pytest.raises(CTError) as caught:
        CTConfig.from_pretrained(saved[0])
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_not_asked_of_the_hub(saved, monkeypatch, tmp_path):
    def asked(*args, **kwargs):
        raise AssertionError(f"the hub was asked for {args} {kwargs}")

    for module in (huggingface_hub, peft.config, peft.utils.save_and_load):
        monkeypatch.setattr(module, "hf_hub_download", asked)
    monkeypatch.setattr(peft.utils.save_and_load, "file_exists", asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (saved[0] / FILE).unlink()
    refused(saved[0], "holds no adapter_model.safetensors; only safetensors are read")
    monkeypatch.chdir(tmp_path)
    for missing in ("a/b", tmp_path / "none", "./none", "none"):
        with pytest.raises(CTError, match=r"there is no .*adapter_config\.json; give the folder of"):
            CTConfig.from_pretrained(missing)
    (saved[0] / SETTINGS).unlink()
    with pytest.raises(CTError, match=r"there is no .*adapter_config\.json; give the folder of"):
        CTConfig.from_pretrained(saved[0])


@pytest.mark.parametrize("subfolder", (None, "of/it"))
def test_what_can_be_a_name_on_the_hub_is_asked_of_it(subfolder, saved, monkeypatch):
    """And is checked as a folder is."""
    edit(saved[0], colour=1)
    monkeypatch.setattr(peft.config, "hf_hub_download", lambda *args, **kwargs: str(saved[0] / SETTINGS))
    with pytest.raises(CTError, match="unknown field 'colour'"):
        CTConfig.from_pretrained("organisation/adapter", subfolder)


def test_the_base_is_as_it_was_after_a_refusal(saved):
    folder, _ = saved
    model = base()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    wanted = logits(model)
    change(folder, lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(16)}))
    unseal(folder)
    with pytest.raises(CTError):
        PeftModel.from_pretrained(model, folder)
    assert set(model.state_dict()) == set(before)  # not even a layer is put in
    for name, value in before.items():
        assert_same_bits(model.state_dict()[name], value)
    assert_same_bits(logits(model), wanted)


def test_a_resized_vocabulary_is_not_saved_into_a_file_that_cannot_be_read(tmp_path):
    model = randomise(adapt(tiny()))
    with pytest.raises(CTError, match="a vocabulary was resized; name the embedding in modules_to_save"):
        model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    model.save_pretrained(tmp_path / "b", save_embedding_layers=False)


def test_sets_of_names_are_written_in_order():
    assert CTConfig(target_modules={"v_proj", "q_proj"}).to_dict()["target_modules"] == ["q_proj", "v_proj"]


def test_tensors_of_another_base_that_are_put_onto_an_adapter_are_told_as_such():
    model = adapt(tiny())
    with pytest.raises(CTError, match=r"in 14 of 14 matrices .*: they are of another base, seed or kind of basis\."):
        set_peft_model_state_dict(model, get_peft_model_state_dict(randomise(adapt(tiny(seed=7)))))
