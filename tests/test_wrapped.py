"""A base that torch wraps, by compile or FSDP2: the same adapter, the same file."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from ctsft import CTConfig, CTError, export_adapter, resize, save_adapter
from helpers import adapt, assert_same_bits, coefficients, logits, owners, randomise, tiny

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


def with_a_compiled_block():
    base = tiny()
    base.model.layers[1] = torch.compile(base.model.layers[1], backend="eager")
    return base


@pytest.mark.parametrize(
    "options",
    [*(o for o in OPTIONS if o != {"basis": "gradient"}), {"k": {"q_proj": 2, ".*": 3}}],  # torch warns under backward
    ids=str,
)
def test_a_base_with_a_compiled_block_has_the_same_adapter(options, tmp_path):
    torch.compiler.reset()
    model = randomise(adapt(tiny(), **options))
    save_adapter(model, tmp_path / "plain")
    save_adapter(randomise(adapt(with_a_compiled_block(), **options)), tmp_path / "compiled")
    assert content(tmp_path / "compiled") == content(tmp_path / "plain")
    there = PeftModel.from_pretrained(with_a_compiled_block(), tmp_path / "plain").eval()
    assert_same_bits(logits(there), logits(model))
    resize(there, 2)
    there.add_adapter("two", CTConfig(k=2))
    assert all(m.ctsft_basis["two"].k == 2 for m in owners(there, "two").values())


@pytest.mark.parametrize("base", [with_a_compiled_block, lambda: torch.compile(tiny(), backend="eager")])
def test_modules_trained_whole_in_a_compiled_base_are_refused(base):
    """peft would save them under names with `_orig_mod.` in them, which nothing reads."""
    with pytest.raises(CTError, match="add the adapter first, and compile then"):
        adapt(base(), modules_to_save=["lm_head"])


def test_k_of_an_adapter_on_a_compiled_base_changes(tmp_path):
    compiled = adapt(torch.compile(tiny(), backend="eager"))
    resize(compiled, 6)
    save_adapter(randomise(compiled), tmp_path / "a")
    assert all(c.numel() == 6 for c in coefficients(PeftModel.from_pretrained(tiny(), tmp_path / "a")).values())


@pytest.mark.parametrize("compiled", ["base", "block", "all"])
@pytest.mark.parametrize("to", ["lora", "merged"])
def test_an_export_of_a_compiled_model_has_the_names_of_a_plain_one(compiled, to, tmp_path):
    base = {"base": lambda: torch.compile(tiny(), backend="eager"), "block": with_a_compiled_block, "all": tiny}
    model = randomise(adapt(base[compiled]()))
    export_adapter(torch.compile(model, backend="eager") if compiled == "all" else model, tmp_path / to, to)
    export_adapter(randomise(adapt(tiny())), tmp_path / "plain", to)
    ours, plain = (load_file(next((tmp_path / name).glob("*model.safetensors"))) for name in (to, "plain"))
    assert ours.keys() == plain.keys()
    for name, t in plain.items():
        assert_same_bits(ours[name], t)


def test_copies_for_several_gpus_are_refused():
    for layer in owners(adapt(tiny(), target_modules=["q_proj", "lm_head"])).values():
        with pytest.raises(CTError, match=r"nn\.DataParallel, .* leaves the directions on the first; show it one GPU"):
            layer._replicate_for_data_parallel()


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


@pytest.mark.filterwarnings("ignore:.*NO_SHARD", "ignore:.*FSDP:FutureWarning")  # one process shards nothing
@pytest.mark.parametrize("options", [{}, {"store_basis": True}], ids=str)
def test_a_whole_model_in_fsdp1_gives_its_tensors(options, tmp_path, alone):
    """Its names begin with the wrapper's, before those of peft."""
    model = randomise(adapt(tiny(), **options))
    wanted = get_peft_model_state_dict(model)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    found = get_peft_model_state_dict(wrapped)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_same_bits(found[name], tensor)


TWO = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from helpers import adapt, randomise, tiny

dist.init_process_group("gloo")
assert dist.get_world_size() == 2
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
save_to, rank = sys.argv[2], dist.get_rank()


def save(model, name, **whole):
    if rank == 0:
        model.save_pretrained(f"{save_to}/{name}", save_embedding_layers=False, **whole)
    dist.barrier()


model = randomise(adapt(tiny()))
save(model, "plain")
for block in model.get_base_model().model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
assert {type(p.data).__name__ for p in model.parameters()} == {"DTensor"}
save(model, "fsdp2", state_dict=get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))

model = randomise(adapt(tiny()))
sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
assert all(p.ndim < 2 for p in sharded.parameters())
with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
    whole = sharded.state_dict()
save(model, "fsdp1", state_dict=whole)
dist.destroy_process_group()
"""


def test_two_processes_with_half_of_each_weight_save_the_same_file(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    here = [str(tmp_path / "two.py"), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(launch + here, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert content(tmp_path / "fsdp1") == content(tmp_path / "fsdp2") == content(tmp_path / "plain")
