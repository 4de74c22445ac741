"""A base that torch wraps, by compile or FSDP2: the same adapter, the same file."""

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from ctsft import resize, save_adapter
from helpers import adapt, assert_same_bits, coefficients, logits, randomise, tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FILES = ("adapter_model.safetensors", "adapter_config.json")
OPTIONS = [
    {},
    {"basis": "random", "form": "scores"},
    {"weight_from": "random", "form": "core"},
    {"basis": "universal", "form": "scores", "universal_mode": "replace"},
    {"basis": "gradient"},
    {"target_modules": ["q_proj", "lm_head"]},
]


def content(folder):
    return [(folder / name).read_bytes() for name in FILES]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_compiled_base_has_the_same_adapter(options, tmp_path):
    model = randomise(adapt(tiny(), **options))
    save_adapter(model, tmp_path / "plain")
    base = tiny()
    compiled = adapt(torch.compile(base, backend="eager"), **options)
    randomise(compiled)
    save_adapter(compiled, tmp_path / "compiled")
    assert content(tmp_path / "compiled") == content(tmp_path / "plain")
    there = PeftModel.from_pretrained(tiny(), tmp_path / "compiled").eval()
    assert_same_bits(logits(there), logits(model))
    back = PeftModel.from_pretrained(torch.compile(tiny(), backend="eager"), tmp_path / "plain").eval()
    assert_same_bits(logits(back), logits(compiled))


def test_k_of_an_adapter_on_a_compiled_base_changes(tmp_path):
    compiled = adapt(torch.compile(tiny(), backend="eager"))
    resize(compiled, 6)
    save_adapter(randomise(compiled), tmp_path / "a")
    assert all(c.numel() == 6 for c in coefficients(PeftModel.from_pretrained(tiny(), tmp_path / "a")).values())


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"basis": "universal", "form": "scores"}, {"store_basis": True}], ids=str)
def test_saving_under_fsdp2_with_a_full_state_dict(options, tmp_path, alone):
    model = randomise(adapt(tiny(), **options))
    save_adapter(model, tmp_path / "plain")
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=alone)
    fully_shard(model, mesh=alone)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.save_pretrained(tmp_path / "sharded", state_dict=whole, save_embedding_layers=False)
    assert content(tmp_path / "sharded") == content(tmp_path / "plain")


class Wrapped(nn.Module):
    """What FSDP1 puts around a module: its name is in the names below, and not in those of a state dict."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


def test_saving_under_fsdp1_with_a_full_state_dict(tmp_path):
    model = randomise(adapt(tiny(tie_word_embeddings=False), modules_to_save=["lm_head"]))
    save_adapter(model, tmp_path / "plain")
    layers = model.get_base_model().model.layers
    for i in range(len(layers)):
        layers[i] = Wrapped(layers[i])
    whole = {name.replace("_fsdp_wrapped_module.", ""): value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "sharded", state_dict=whole, save_embedding_layers=False)
    assert content(tmp_path / "sharded") == content(tmp_path / "plain")
