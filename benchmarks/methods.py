"""Other spectral and frozen-basis methods at about the trained numbers of `diagonal` K=64: step time over ours (limit:
above 1 for each), memory beside the bare model, and seconds to start.

Measured are peft's own TinyLoRA, PSOFT, VeRA, FourierFT, LoRA and IA3, and, from checkouts under --peers, the layer
code of SVFT, LoRA-XS and EigenTune, which runs only when that folder is given.

    python benchmarks/methods.py --layers 1 --peers ~/checkouts    # in it SVFT/, LoRA-XS/, eigentune/
"""

import argparse
import contextlib
import copy
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import common as c
import torch
from peft import FourierFTConfig, IA3Config, PsoftConfig, TinyLoraConfig, VeraConfig
from torch import Tensor, nn

from ctsft.spectral.basis import weight_basis

ALL: Any = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
NOTE = """Start-up is the making of the adapter on a loaded model, its decompositions included. Memory is what the \
adapted model holds beside the bare one. TinyLoRA's r=2 is its default: 64 numbers move the 4 entries of a 2 x 2 \
matrix there, and up to 64 entries at r=8. VeRA, IA3, LoRA and SVFT-plain cannot go down to 64 numbers a matrix. SVFT \
puts U (S + M) Vh in the place of W, so that rank 64 cuts W itself to 64 directions; its torch_sparse is replaced by a \
stand-in of index sums. LoRA-XS is its own forward over peft's LoRA; its scikit-learn start-up is not run, the same \
factors are put in."""


# ------------------------------------------------------------------------------------------------------ published code


class SparseTensor:
    """What SVFT uses of torch_sparse: the sum of two square sparse matrices, and a product with a dense one."""

    def __init__(self, row: Tensor, col: Tensor, value: Tensor) -> None:
        self.row, self.col, self.value = row, col, value

    def __add__(self, other: "SparseTensor") -> "SparseTensor":
        if torch.equal(self.row, other.row) and torch.equal(self.col, other.col):
            return SparseTensor(self.row, self.col, self.value + other.value)
        pairs = zip((self.row, self.col, self.value), (other.row, other.col, other.value), strict=True)
        return SparseTensor(*(torch.cat(pair) for pair in pairs))

    def __matmul__(self, dense: Tensor) -> Tensor:
        return torch.zeros_like(dense).index_add(0, self.row, self.value.to(dense.dtype)[:, None] * dense[self.col])


def module_at(path: Path) -> types.ModuleType:
    """The Python file at `path`, imported alone."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def linears(model: nn.Module) -> list[str]:
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def svft(base: nn.Module, peers: Path, **options: Any) -> nn.Module:
    with contextlib.suppress(ImportError):
        importlib.import_module("torch_sparse")
    if "torch_sparse" not in sys.modules:
        stand_in: Any = types.ModuleType("torch_sparse")
        stand_in.SparseTensor, stand_in.transpose = SparseTensor, None
        sys.modules["torch_sparse"] = stand_in
    layers = module_at(peers / "SVFT" / "svft" / "svft_layers.py")

    def made(linear: nn.Linear) -> nn.Module:
        on_cpu = copy.deepcopy(linear).to("cpu", torch.float32)
        return layers.LinearWithSVFT(on_cpu, **options).to(linear.weight.device, linear.weight.dtype)

    model = c.twin(base)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        layers.create_and_replace_modules(model, linears(model), made)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith((".svft_layer.s", ".svft_layer.gate")))
    return model


def lora_xs(base: nn.Module, peers: Path, rank: int) -> nn.Module:
    latent = module_at(peers / "LoRA-XS" / "utils" / "latent_utils.py")
    model = c.adapt(base, c.lora(rank), autocast_adapter_dtype=False)
    for layer in (m for m in model.modules() if hasattr(m, "lora_A")):
        w: Any = layer.weight
        factors = weight_basis(w, rank)
        assert factors.u is not None and factors.vh is not None
        layer.lora_A["default"].weight.data.copy_(factors.vh)
        layer.lora_B["default"].weight.data.copy_(factors.u * (factors.u * (w.float().cpu() @ factors.vh.T)).sum(0))
        layer.default_lora_latent_mapping = nn.Linear(rank, rank, bias=False).to(w.device, w.dtype)
        nn.init.normal_(layer.default_lora_latent_mapping.weight, std=1e-5)
        layer.forward = types.MethodType(latent.forward_latent, layer)
        layer.set_adapter(["default"])  # a list, as its forward has it
        layer.requires_grad_(False)
        layer.default_lora_latent_mapping.requires_grad_(True)
    return model


def eigentune(base: nn.Module, peers: Path, rank: int) -> nn.Module:
    sys.path.insert(0, str(peers / "eigentune"))
    try:
        package = importlib.import_module("eigentune")
    finally:
        sys.path.pop(0)
    return package.get_eigentune_model(c.twin(base), package.EigenTuneConfig(rank=rank))


# ---------------------------------------------------------------------------------------------------------------- arms


def makers(args: argparse.Namespace, base: nn.Module) -> Iterator[tuple[str, Callable[[], nn.Module] | None]]:
    """Names and makers of the arms; None for a peer whose folder is not there."""
    k = args.k
    root = int(k**0.5)  # the side of a square of about k numbers
    turn = max(2, round((2 * k) ** 0.5 - 1.5))  # PSOFT trains r (r - 1) / 2 + 2 r numbers
    inner = [n for n in linears(base) if n.endswith("down_proj")]
    yield f"diagonal K={k}", lambda: c.adapt(base, c.ours(args, basis="weight"))
    for r in dict.fromkeys((2, root)):
        config = TinyLoraConfig(r=r, u=k, save_projection=False, **ALL)
        yield f"TinyLoRA r={r}, u={k}", partial(c.adapt, base, config)
    yield f"PSOFT r={turn}", lambda: c.adapt(base, PsoftConfig(r=turn, psoft_alpha=turn, **ALL))
    for r in (1, k):
        yield f"VeRA r={r}", partial(c.adapt, base, VeraConfig(r=r, save_projection=False, **ALL))
    yield f"FourierFT n={k}", lambda: c.adapt(base, FourierFTConfig(n_frequency=k, **ALL))
    yield "LoRA r=1", lambda: c.adapt(base, c.lora(1), autocast_adapter_dtype=False)
    ia3 = IA3Config(target_modules=linears(base), feedforward_modules=inner, task_type="CAUSAL_LM")
    yield "IA3", lambda: c.adapt(base, ia3)
    published: dict[str, tuple[str, Callable[..., nn.Module], dict[str, Any]]] = {
        "SVFT plain": ("SVFT", svft, {"off_diag": 0}),
        "SVFT banded, 1 off": ("SVFT", svft, {"off_diag": 1}),
        f"SVFT rank {k}": ("SVFT", svft, {"off_diag": 0, "rank": k}),
        f"LoRA-XS r={root}": ("LoRA-XS", lora_xs, {"rank": root}),
        f"EigenTune diagonal r={k}": ("eigentune", eigentune, {"rank": k}),
    }
    for name, (folder, make, options) in published.items():
        there = args.peers is not None and (args.peers / folder).is_dir()
        yield name, partial(make, base, args.peers, **options) if there else None


def main(argv: list[str] | None = None) -> str:
    p = c.parser(__doc__, layers=1, repeats=9)
    p.add_argument("--peers", type=Path, help="folder with checkouts of SVFT, LoRA-XS and eigentune")
    args = c.parse(p, argv)
    base = c.load(args)
    batch, count = c.batch_for(base, args.tokens), len(linears(base))
    arms: dict[str, nn.Module] = {"frozen": c.twin(base)}
    absent, start_up = [], {"frozen": "0"}
    for name, make in makers(args, base):
        if make is None:
            absent.append(name)
            continue
        c.say(f"making {name}")
        torch.manual_seed(0)
        start = c.CLOCKS[args.clock]()
        arms[name] = make()
        start_up[name] = "not run" if name.startswith("LoRA-XS") else f"{c.CLOCKS[args.clock]() - start:.1f}"
    for name, model in arms.items():  # a peer whose numbers get no gradient would be fast for nothing
        model(**batch).loss.backward()
        if lost := [n for n, q in model.named_parameters() if q.requires_grad and q.grad is None]:
            raise RuntimeError(f"{name}: {lost[0]} gets no gradient.")

    times = c.interleaved({n: c.training_step(m, batch) for n, m in arms.items()}, args)
    one = times[f"diagonal K={args.k}"]
    rows: list[list[str]] = []
    for n, m in arms.items():
        numbers, extra = sum(q.numel() for q in c.trained(m)) / count, c.extra_bytes(m, base) / 1e6
        step, ratio = c.spread(1000 * times[n], 0), c.spread(times[n] / one)
        rows.append([n, f"{numbers:.0f}", step, ratio, f"{extra:.1f}", start_up[n]])
    rows += [[n, "not there", "", "", "", ""] for n in absent]
    head = ["arm", "trained numbers a matrix", "ms a step", f"over diagonal K={args.k}", "extra MB", "start-up, s"]
    return c.show(c.setting(args, base), c.table(head, rows), NOTE)


if __name__ == "__main__":
    main()
