"""Private names of other packages: for each, what breaks when it changes.

A failure here after an update of peft, torch, TRL or Python says where to mend, in ctsft/compat.py or in the class that
overrides the method.
"""

import ast
import copy
import importlib
import inspect
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ctsft import CTConfig, compat
from ctsft.adapter.layer import CTLayer
from ctsft.adapter.model import CTModel
from helpers import adapt, logits, tiny

SOURCE = Path(__file__).parents[1] / "src" / "ctsft"


# ---- CPython


def test_a_module_whose_file_still_runs_is_seen(tmp_path, monkeypatch):
    """Else CTSFT would be registered with peft while a file of ctsft is half imported, and that import fails."""
    code = "import sys\nfrom ctsft.compat import being_imported\nseen = being_imported(sys.modules[__name__])\n"
    (tmp_path / "half_way.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("half_way")
    del sys.modules["half_way"]
    assert module.seen and not compat.being_imported(module)
    assert not compat.being_imported(SimpleNamespace())


# ---- peft


def test_the_new_member_of_peft_s_enum_is_like_any_other():
    """Else add_adapter, Trainer and every reader of adapter_config.json meet a method that is no PeftType."""
    member = compat.add_peft_type("CTSFT")
    assert compat.add_peft_type("CTSFT") is member is PeftType("CTSFT") is PeftType["CTSFT"] is PeftType.CTSFT
    assert isinstance(member, PeftType) and list(PeftType).count(member) == 1
    assert (member.name, member.value, json.dumps(member)) == ("CTSFT", "CTSFT", '"CTSFT"')
    assert copy.deepcopy(member) is member is pickle.loads(pickle.dumps(member))


def test_all_linear_is_every_linear_layer_but_the_head():
    """Else adapters without target_modules land on other modules than before, and old ones no longer load."""
    config = CTConfig()
    names = compat.linear_names(tiny(), config)
    assert len(names) == 14 and all(n.endswith("_proj") for n in names) and config.target_modules is None
    assert compat.linear_names(adapt(tiny()).base_model.model, config) == names  # also where adapters are


def test_names_are_shortened_as_far_as_they_tell_modules_apart():
    """Else adapter_config.json lists every module, or selects others than were asked for."""
    assert compat.shortest_names({"a.0.q", "a.1.q"}, {"a.0.k", "a.1.k"}) == ["q"]
    assert compat.shortest_names({"a.0.q"}, {"a.1.q"}) == ["0.q"]
    assert compat.shortest_names([], ["a"]) == []


@pytest.mark.parametrize(
    ("options", "selected"),
    [
        ({"target_modules": ["q"]}, ["m.h.0.q", "m.h.1.q"]),
        ({"target_modules": r".*\.1\..*"}, ["m.h.1.q", "m.h.1.kq"]),
        ({"target_modules": ["q", "kq"], "exclude_modules": ["m.h.0.q"]}, ["m.h.1.q", "m.h.1.kq"]),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, ["m.h.1.q"]),
        ({"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "h"}, ["m.h.0.q"]),
    ],
    ids=str,
)
def test_a_config_selects_modules_as_in_peft(options, selected):
    """Else target_modules means one thing for us and another for peft, which then puts in layers without a basis."""
    assert [n for n in ("m.h.0.q", "m.h.1.q", "m.h.1.kq") if compat.selects(CTConfig(**options), n)] == selected


def test_an_embedding_s_factor_is_read():
    """Else an adapted Gemma adds its change to the embedding unscaled."""
    model = adapt(tiny(), target_modules=["embed_tokens"])
    layer = model.get_base_model().get_input_embeddings()
    assert compat.embed_scale(layer) == 1.0
    layer.base_layer.embed_scale = torch.tensor(3.0, dtype=torch.bfloat16)
    assert compat.embed_scale(layer) == 3.0 and compat.embed_scale(layer).dtype == torch.float32


# What ctsft overrides or calls in the classes of others, and what breaks when it is renamed there.
CONTRACT = {
    (CTModel, BaseTuner): {
        "inject_adapter": "no basis is made before the layers go in",
        "_create_and_replace": "no layer is put in",
        "_replace_module": "the layer does not take the place of its base module",
        "_check_tied_modules": "peft warns of tied weights, or edits the config",
        "_check_merge_allowed": "peft refuses to merge an adapter of a tied head",
        "_get_adapter_state_dict": "the file holds one tensor a layer in place of one flat tensor",
        "_remove_adapter_name_from_key": "the keys of the file are cut",
        "_remap_adapter_state_dict_for_load": "the file is not unpacked, and the adapter loads as zeros",
    },
    (CTModel, PeftModel): {"_enable_peft_forward_hooks": "adapter_names= is silently ignored"},
    (CTLayer, BaseTunerLayer): {
        "get_base_layer": "the weights are not found",
        "_get_embed_scale": "an adapted Gemma adds its change unscaled",
        "_move_adapter_to_device_of_base_layer": "the trained numbers are cast to the base's dtype",
        "supports_lora_conversion": "peft converts an adapter that replaces W into a LoRA that adds to it",
        "merge": "peft merges by itself",
        "unmerge": "the base weight's bits are not restored",
    },
    (CTLayer, nn.Module): {
        "_apply": "model.to(dtype) casts the trained numbers and the directions",
        "_replicate_for_data_parallel": "nn.DataParallel stops with an error about devices in place of a sentence",
    },
}


@pytest.mark.parametrize(
    ("ours", "theirs", "name"), [(*classes, name) for classes, names in CONTRACT.items() for name in names]
)
def test_methods_of_others_that_we_override_or_call_are_there(ours, theirs, name):
    assert hasattr(theirs, name), f"{theirs.__name__}.{name} is gone: {CONTRACT[ours, theirs][name]}"
    known = list(inspect.signature(getattr(theirs, name)).parameters)
    takes = inspect.signature(getattr(ours, name)).parameters.values()
    whatever = any(p.kind is p.VAR_POSITIONAL for p in takes) and any(p.kind is p.VAR_KEYWORD for p in takes)
    assert whatever or [p.name for p in takes] == known, f"{name} has other arguments: {known}"


# ---- torch


def hooks():
    module, everywhere = nn.Linear(2, 2), torch.nn.modules.module
    yield module, module.register_forward_hook(lambda *_: None)
    yield module, module.register_forward_pre_hook(lambda *_: None)
    yield module, module.register_full_backward_hook(lambda *_: None)
    yield module, module.register_full_backward_pre_hook(lambda *_: None)
    yield module, everywhere.register_module_forward_hook(lambda *_: None)
    yield module, everywhere.register_module_forward_pre_hook(lambda *_: None)
    yield module, everywhere.register_module_full_backward_hook(lambda *_: None)
    yield module, everywhere.register_module_full_backward_pre_hook(lambda *_: None)


def test_every_hook_and_a_new_forward_is_seen():
    """Else the fused product goes past what a user has hung on the base module."""
    for module, handle in hooks():
        assert compat.does_more(module)
        handle.remove()
        assert not compat.does_more(module)
    module.forward = module.forward
    assert compat.does_more(module)


def test_transforms_of_torch_func_are_seen():
    """Else torch.func meets a node of autograd that it cannot transform, and stops with an error."""
    seen = []

    def f(x):
        seen.append(compat.under_functorch())
        return x.sin().sum()

    x = torch.ones(3)
    f(x)
    torch.func.grad(f)(x)
    torch.func.vmap(f)(x[:, None])
    assert seen == [False, True, True] and not compat.under_functorch()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_names_of_wrapped_modules_are_cleaned():
    """Else an adapter saved from a compiled or sharded model has other names than the bare model, and does not load."""
    from torch.distributed.fsdp._common_utils import FSDP_PREFIX

    assert FSDP_PREFIX == compat.FSDP
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)))
    assert {compat.unwrapped(n) for n, _ in model.named_parameters()} == {"0.weight", "0.bias"}
    assert any(compat.COMPILED in n for n, _ in model.named_parameters())
    assert compat.unwrapped(f"a.{FSDP_PREFIX}b.{compat.COMPILED}c") == "a.b.c"


# ---- TRL


def sft_trainer(model, folder):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    import tiny as on_disk

    settings = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = Dataset.from_list([{"input_ids": [1, 2, 3]}])
    return SFTTrainer(model, settings, train_dataset=rows, processing_class=on_disk.byte_tokenizer())


def test_trl_takes_a_model_with_an_adapted_head_and_leaves_its_forward(tmp_path):
    """Else `ctsft tune --target-modules lm_head` is refused, or trains with TRL's own loss, past the adapter."""
    model = adapt(tiny(), target_modules=["lm_head", "q_proj"])
    bare = model.get_base_model()
    head, before = bare.get_output_embeddings(), logits(model)
    with compat.plain_head(model):
        assert bare.get_output_embeddings() is head.base_layer
        sft_trainer(model, tmp_path)
        assert "forward" in vars(bare)  # where it no longer is, plain_head need not take it back
    assert bare.get_output_embeddings() is head
    assert not {"forward", "get_output_embeddings"} & set(vars(bare))
    assert torch.equal(logits(model), before)


def test_trl_logs_the_tokens_that_we_count(tmp_path):
    """Else the runs of `ctsft tune` show and record 0 tokens."""
    model = adapt(tiny())
    with compat.plain_head(model):
        trainer = sft_trainer(model, tmp_path)
    model.train()
    compat.count_tokens(trainer, 5)
    compat.count_tokens(trainer, 7)
    trainer.log({"loss": 1.0})
    assert trainer.state.log_history[-1]["num_tokens"] == 12


# ---- that they are gathered


def private_names(tree):
    """(line, name) of every private name of another object, class or module that a parsed file uses."""
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    own |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found = [a.name for a in node.names]
        else:
            found = [node.attr] if isinstance(node, ast.Attribute) else []
        yield from ((node.lineno, n) for n in found if n.startswith("_") and not n.startswith("__") and n not in own)


def test_private_names_are_seen():
    code = "from peft import _a, b\nself._c = 1\nself._c\nmodel._d\ndef _e(): pass\nm._e()\nself._f()\nx.__g__\n"
    assert [n for _, n in private_names(ast.parse(code))] == ["_a", "_d", "_f"]


CALLED = {name for names in CONTRACT.values() for name in names} | {"_init_weights", "_exit"}  # os._exit is public


@pytest.mark.parametrize(
    "path",
    sorted(SOURCE.glob("**/*.py")),
    ids=lambda p: str(p.relative_to(SOURCE)),
)
def test_private_names_are_in_compat(path):
    found = [(line, n) for line, n in private_names(ast.parse(path.read_text(encoding="utf-8"))) if n not in CALLED]
    assert path.stem == "compat" or not found, f"{path}: move {found} to compat.py, with a test"
