"""What is on disk: one flat tensor of trained numbers, a checksum of the basis, and the basis only where it must be.

A basis that the base weights determine is recomputed when the adapter is loaded. It is written when the user asks
(`store_basis=True`), when it came from data, and when the base weights are no longer those it was made from.
"""

import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctsft.adapter.config import CTConfig
from ctsft.adapter.forms import FORMS
from ctsft.adapter.layer import CTLayer
from ctsft.compat import FSDP
from ctsft.errors import CTError
from ctsft.spectral.basis import Basis, checksum, two_sides
from ctsft.spectral.kinds import kind_of
from ctsft.spectral.weights import clean_name, fingerprint, matrix, takes_part_transposed, universal_members, width

COEFFICIENTS, CHECKSUM = "ctsft.coefficients", "ctsft.checksum"
UNIVERSAL, BASIS = "ctsft.basis_universal", "ctsft.basis."
# Of a checksum's order sqrt(K). Another machine's rounding moves it by 1e-7, or where it tips a bfloat16 by 1e-4;
# turned directions move it by their angle.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-3}


def adapted(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, CTLayer]]:
    """The layers that own adapter `adapter_name`, in the model's order; a tied weight's second use owns nothing."""
    for name, module in model.named_modules():
        if isinstance(module, CTLayer) and adapter_name in module.ctsft_coefficients and not module.ctsft_owner:
            yield name, module


def layers_of(model: nn.Module, adapter_name: str = "default", told: str = "") -> dict[str, CTLayer]:
    """The layers of `adapted` by clean name; CTError where there are none, its sentence ending in `told`."""
    found = {clean_name(n): m for n, m in adapted(model, adapter_name)}
    if not found:
        raise CTError(f"the model has no CT-SFT adapter {adapter_name!r}{told}.")
    return found


def base_fingerprint(model: nn.Module, config: CTConfig, targets: dict[str, nn.Module]) -> str:
    """Fingerprint of all base weights that the basis depends on: the adapted ones, and all those of a shared basis.

    `targets`: clean names -> base modules or CTLayers. Weights under a merge count as they were before it.
    """
    members = dict(targets)
    if kind_of(config.basis).shared:
        layers = {m.base_layer: m for m in model.modules() if isinstance(m, CTLayer)}
        members |= {n: layers.get(m, m) for n, m in universal_members(model, width(model)).items()}  # type: ignore[call-overload]
    return fingerprint((n, m.base_weight() if isinstance(m, CTLayer) else m.weight) for n, m in members.items())  # type: ignore[misc]


def pack(model: nn.Module, config: CTConfig, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to save for `adapter_name`, its numbers read from `state_dict`; `config` notes how it was done."""
    layers = {clean_name(n): (n.removeprefix(FSDP), m) for n, m in adapted(model, adapter_name)}
    made_from = next(m.ctsft_fingerprint[adapter_name] for _, m in layers.values())
    now = base_fingerprint(model, config, {n: m for n, (_, m) in layers.items()})
    kind = kind_of(config.basis)
    stored = config.store_basis or kind.stored or now != made_from
    shared = kind.shared and not FORMS[config.form].both  # one tensor serves all matrices
    config.saved_as = {"fingerprint": made_from, "stored_basis": stored}

    parts, sums = [], []
    tensors: dict[str, Tensor] = {}
    for name, (key, layer) in layers.items():
        basis = layer.ready(adapter_name)
        parts.append(state_dict[f"{key}.ctsft_coefficients.{adapter_name}"].detach().flatten().float().cpu())
        sums.append(checksum(basis, name))
        for factor, tensor in basis.tensors().items() if stored else ():
            if shared and factor != "start":
                if basis.k >= tensors.get(UNIVERSAL, torch.empty(0, 0)).shape[0]:
                    tensors[UNIVERSAL] = (tensor if factor == "vh" else tensor.T).cpu().contiguous()
            else:
                tensors[f"{BASIS}{name}.{factor}"] = tensor.cpu().contiguous()
    flat = torch.cat(parts)
    rounded = flat.to(getattr(torch, config.save_dtype))
    if not torch.isfinite(rounded).all():
        raise CTError(
            f"adapter {adapter_name!r} holds NaN, infinite or (in {config.save_dtype}) too large numbers; it was not "
            "saved."
        )
    return tensors | {COEFFICIENTS: rounded, CHECKSUM: torch.tensor(sums, dtype=torch.float32)}


def unpack(model: nn.Module, config: CTConfig, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Install what `pack` made into the layers of `adapter_name`: the basis at once, the rest as a state dict to load.

    Raises CTError when the numbers do not fit the model, or were trained on other directions than those found here.
    """
    other = {k: v for k, v in tensors.items() if not k.startswith("ctsft.")}
    if COEFFICIENTS not in tensors or CHECKSUM not in tensors:
        raise CTError(
            "the file holds no CT-SFT numbers; take adapter_model.safetensors from the same folder as "
            "adapter_config.json."
        )
    layers = list(adapted(model, adapter_name))
    stored = any(k.startswith("ctsft.basis") for k in tensors)
    if stored:
        shared = tensors.get(UNIVERSAL, torch.empty(0, 0))
        sides = two_sides(shared, {config.k_for(clean_name(n)) for n, _ in layers})
        for name, layer in layers:
            basis = stored_basis(config, clean_name(name), layer, tensors, sides)
            layer.ctsft_basis[adapter_name] = basis
            layer.ctsft_coefficients[adapter_name].data = torch.zeros(layer.coefficient_shape(adapter_name, basis.k))
            layer._move_adapter_to_device_of_base_layer(adapter_name)
    flat, sums = tensors[COEFFICIENTS].float(), tensors[CHECKSUM].tolist()
    sizes = [layer.ctsft_coefficients[adapter_name].numel() for _, layer in layers]
    if flat.numel() != sum(sizes) or len(sums) != len(layers):
        raise CTError(
            f"the file holds {flat.numel()} numbers for {len(sums)} matrices and this model takes {sum(sizes)} for "
            f"{len(layers)}; it is an adapter of another model."
        )
    if not torch.isfinite(flat).all():
        raise CTError("the file holds NaN or infinite numbers; it is damaged.")
    rotated = []
    for (name, layer), expected in zip(layers, sums, strict=True):
        found = layer.ctsft_basis[adapter_name]
        assert found is not None
        if not abs(checksum(found, clean_name(name)) - expected) <= TOLERANCE[found.dtype] * math.sqrt(found.k):
            rotated.append(clean_name(name))
    if rotated and stored:
        raise CTError(f"the basis in the file is not the one that was saved (first: {rotated[0]}); it is damaged.")
    if rotated:
        raise CTError(
            f"the directions recomputed here differ from those that the adapter was trained on in {len(rotated)} of "
            f"{len(layers)} matrices (first: {rotated[0]}): another machine's rounding turned near-equal ones; save it "
            "with store_basis=True where it was trained, or use its LoRA export."
        )
    owned = {}
    for (_, layer), piece in zip(layers, flat.split(sizes), strict=True):
        owned[layer] = piece.reshape(layer.ctsft_coefficients[adapter_name].shape)
    for name, module in model.named_modules():
        if isinstance(module, CTLayer) and adapter_name in module.ctsft_coefficients:
            owner = module.ctsft_owner[0] if module.ctsft_owner else module
            module.ctsft_pending.discard(adapter_name)
            module.ctsft_basis[adapter_name] = owner.ctsft_basis[adapter_name]
            other[f"{name}.ctsft_coefficients.{adapter_name}"] = owned[owner]
    return other


def stored_basis(
    config: CTConfig,
    name: str,
    layer: CTLayer,
    tensors: dict[str, Tensor],
    sides: dict[int, tuple[Basis, Basis]],
) -> Basis:
    """The basis of module `name` as it lies in `tensors`; the `sides` of the universal one are shared by all."""
    own = {f: tensors[f"{BASIS}{name}.{f}"] for f in ("u", "vh", "start") if f"{BASIS}{name}.{f}" in tensors}
    if UNIVERSAL in tensors:
        shape, d_model = matrix(layer.get_base_layer()).shape, tensors[UNIVERSAL].shape[1]
        own |= sides[config.k_for(name)][takes_part_transposed(name, shape, d_model)].tensors()
    if not own:
        raise CTError(f"the file holds no basis for {name}; it is an adapter of another model.")
    return Basis(own.get("u"), own.get("vh"), own.get("start"))


def check_same_base(config: CTConfig, now: str) -> None:
    """Refuse an adapter from disk on other base weights, unless its basis was stored; then warn."""
    if not config.from_disk or config.fingerprint == now:
        return
    if not config.stored_basis:
        raise CTError(
            f"the adapter was trained on base weights {config.fingerprint} and these are {now}: without a stored basis "
            "it belongs to the former, and to no other (say, quantised or rounded) weights; load the original base, or "
            "use an adapter saved with store_basis=True, or its LoRA export."
        )
    warnings.warn(
        f"the adapter was trained on base weights {config.fingerprint} and these are {now}; its stored dW is applied "
        "as it is.",
        UserWarning,
        stacklevel=2,
    )


def save_adapter(model: Any, folder: str | Path, adapter_name: str = "default") -> int:
    """Save an adapter of a PeftModel, never half-written (see `replace_folder`); returns bytes written.

    Raises CTError when `folder` exists and is no adapter, or its numbers are not finite.
    """
    folder = Path(folder)
    if (
        folder.exists()
        and not (folder / "adapter_config.json").exists()
        and (folder.is_file() or any(folder.iterdir()))
    ):
        raise CTError(f"{folder} exists and is no adapter; choose another place.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        new = Path(work) / "new"
        model.save_pretrained(new, selected_adapters=[adapter_name], save_embedding_layers=False)
        written = new / adapter_name if adapter_name != "default" else new
        (written / "README.md").write_text(card(model.peft_config[adapter_name]), encoding="utf-8")
        replace_folder(written, folder)
    return sum(f.stat().st_size for f in folder.iterdir() if f.name.startswith("adapter_"))


def card(config: CTConfig) -> str:
    """The model card: what lies here and how to load it."""
    k = config.k if isinstance(config.k, int) else "mixed"
    base = f"base_model: {config.base_model_name_or_path}\n" if config.base_model_name_or_path else ""
    return f"""---
library_name: peft
{base}tags: [ctsft, peft]
---

# CT-SFT adapter ({config.form}, {config.basis} basis, K = {k})

A fine-tuned change `dW = U C Vh` of a frozen model, whose directions come from its own weights or from data.
It loads with PEFT once `ctsft` is imported, which makes the method known to it:

```python
import ctsft  # without it, peft stops with KeyError: 'CTSFT'
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this folder")
```

For a server, or a program without ctsft: `ctsft export FOLDER --to lora` writes an ordinary LoRA with the same numbers.
"""


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`, on the same disk, by renames.

    Between the two renames an old `folder` has a hidden name beside it, where a kill in that instant leaves it.
    """
    for file in new.iterdir():
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if folder.exists():
        old = new.parent / "old" if new.parent != folder.parent else folder.with_name(f".{folder.name}-old")
        folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old)
    else:
        new.rename(folder)
