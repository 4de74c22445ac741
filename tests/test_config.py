import json

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from ctsft import CTConfig, CTError
from ctsft.adapter.config import CTSFT
from ctsft.adapter.model import CTModel


def test_ctsft_is_a_peft_type():
    assert CTSFT is PeftType.CTSFT is PeftType("CTSFT") is PeftType["CTSFT"]
    assert CTSFT == "CTSFT" and CTSFT.value == "CTSFT" and CTSFT.name == "CTSFT" and CTSFT in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[CTSFT] is CTConfig and PEFT_TYPE_TO_TUNER_MAPPING[CTSFT] is CTModel
    assert len([t for t in PeftType if t == "CTSFT"]) == 1
    assert CTConfig().peft_type is CTSFT


def test_the_defaults_are_those_of_the_papers():
    c = CTConfig()
    assert (c.k, c.form, c.basis, c.weight_from, c.universal_mode) == (64, "diagonal", "weight", "top", "residual")
    assert (c.target_modules, c.seed, c.amplitude_dropout, c.store_basis, c.save_dtype) == (
        None,
        0,
        0,
        False,
        "float32",
    )
    assert not c.from_disk


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "dense"}, r"form='dense' is unknown; choose one of diagonal, core, scores, gains\."),
        (
            {"basis": "fourier"},
            r"basis='fourier' is unknown; choose one of weight, random, universal, .*, file, learned\.",
        ),
        ({"weight_from": "middle"}, r"weight_from='middle' is unknown; choose one of top, bottom, random\."),
        ({"universal_mode": "both"}, r"universal_mode='both' is unknown; choose one of residual, replace\."),
        ({"save_dtype": "int8"}, r"save_dtype='int8' is unknown; choose one of float32, bfloat16, float16\."),
        ({"k": 0}, r"k=0 must be a whole number of directions, at least 1\."),
        ({"k": 2.5}, r"k=2\.5 must be a whole number"),
        ({"k": True}, r"k=True must be a whole number"),
        ({"k": {"q": 4, "v": -1}}, r"k=-1 must be a whole number"),
        ({"k": {}}, r"k is an empty mapping; give an int or \{module pattern: int\}\."),
        ({"k": {"(q": 4}}, r"k pattern '\(q' is no regular expression"),
        ({"amplitude_dropout": 1.0}, r"amplitude_dropout=1\.0 must be at least 0 and below 1\."),
        ({"amplitude_dropout": -0.1}, r"amplitude_dropout=-0\.1 must be at least 0 and below 1\."),
        ({"weight_from": "bottom", "basis": "random"}, r"weight_from='bottom' .* it needs basis='weight'\."),
        ({"universal_mode": "replace"}, r"it needs basis='universal' and form='scores'\."),
        (
            {"universal_mode": "replace", "basis": "universal", "form": "core"},
            r"needs basis='universal' and form='scores'",
        ),
        (
            {"universal_mode": "replace", "basis": "random", "form": "scores"},
            r"needs basis='universal' and form='scores'",
        ),
        ({"layers_pattern": "layers"}, r"layers_pattern needs layers_to_transform\."),
        ({"format_version": 2}, r"format_version 2 and this ctsft reads 1; install the ctsft that wrote it\."),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_with_a_sentence(options, message):
    with pytest.raises(CTError, match=message) as caught:
        CTConfig(**options)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text


def test_k_for_a_module_is_that_of_the_first_pattern_that_fits_its_end():
    assert CTConfig(k=7).k_for("anything") == 7
    c = CTConfig(k={r"0\..*q_proj": 1, "q_proj|v_proj": 2, ".*mlp.*": 3})
    names = ("model.layers.0.attn.q_proj", "model.layers.10.attn.q_proj", "v_proj", "model.layers.1.mlp.down")
    assert [c.k_for(n) for n in names] == [1, 2, 2, 3]
    for name in ("model.layers.0.attn.o_proj", "my_q_proj", "q_proj.more"):
        with pytest.raises(
            CTError, match=rf"no pattern of k \(.*q_proj.*\) fits {name}; add one, or '\.\*' as the last"
        ):
            c.k_for(name)


def test_a_config_survives_the_disk(tmp_path):
    k = {"q": 4, ".*": 2, "a": 1}
    c = CTConfig(k=k, form="scores", basis="universal", seed=3, task_type="CAUSAL_LM", save_dtype="bfloat16")
    c.save_pretrained(tmp_path)
    for loaded in (CTConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(loaded) is CTConfig and loaded.to_dict() == c.to_dict()
        assert list(loaded.k.items()) == list(k.items())  # the first pattern that fits counts
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["format_version"] == 1 and written["peft_type"] == "CTSFT"


def test_another_format_version_on_disk_is_refused(tmp_path):
    CTConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 9}))
    with pytest.raises(CTError, match="format_version 9"):
        PeftConfig.from_pretrained(tmp_path)
