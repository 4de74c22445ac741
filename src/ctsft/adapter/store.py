"""What is on disk: one flat tensor of trained numbers, a checksum of the basis, and the basis only where it must be.

A basis that the base weights determine is recomputed when the adapter is loaded. It is written when the user asks
(`store_basis=True`), when it came from data, and when the base weights are no longer those it was made from.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ctsft.adapter.config import CTConfig
from ctsft.adapter.forms import FORMS
from ctsft.adapter.layer import CTLayer
from ctsft.adapter.seal import CHECKSUM, COEFFICIENTS, hash_tensors
from ctsft.choices import LEARNED
from ctsft.compat import FSDP
from ctsft.errors import CTError
from ctsft.spectral.basis import checksum
from ctsft.spectral.kinds import kind_of
from ctsft.spectral.weights import clean_name, ends, fingerprint, universal_members, width

UNIVERSAL, BASIS = "ctsft.basis_universal", "ctsft.basis."


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
    members = covered(model, config, targets)
    return fingerprint((n, m.base_weight() if isinstance(m, CTLayer) else m.weight) for n, m in members.items())  # type: ignore[misc]


def covered(model: nn.Module, config: CTConfig, targets: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules, bare or as CTLayers, whose weights `base_fingerprint` covers, by clean name."""
    if not kind_of(config.basis).shared:
        return targets
    layers = {m.base_layer: m for m in model.modules() if isinstance(m, CTLayer)}
    return targets | {n: layers.get(m, m) for n, m in universal_members(model, width(model)).items()}  # type: ignore[call-overload]


def uncovered_ends(model: nn.Module, config: CTConfig, targets: dict[str, nn.Module]) -> dict[str, str]:
    """Hashes of the embeddings and the head that `base_fingerprint` leaves out and the adapter does not bring whole.

    By clean name; a tied weight is hashed once.
    """
    seen = {id(m.weight) for m in covered(model, config, targets).values()}
    left = {n: w for n, w in ends(model) if id(w) not in seen and not n.endswith(tuple(config.modules_to_save or ()))}
    hashes = {id(w): fingerprint([("", w)]) for w in {id(w): w for w in left.values()}.values()}
    return {n: hashes[id(w)] for n, w in left.items()}


def sharded(model: nn.Module) -> bool:
    """Whether weights of `model` lie in pieces on several devices (FSDP): frozen ones are those of before."""
    bases = [m.base_layer.weight for m in model.modules() if isinstance(m, CTLayer)]
    return any(type(p.data).__name__ == "DTensor" for p in model.parameters()) or any(w.ndim != 2 for w in bases)  # type: ignore[operator,union-attr]


def pack(model: nn.Module, config: CTConfig, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to save for `adapter_name`, its numbers read from `state_dict`; `config` notes how it was done."""
    layers = {clean_name(n): (n.replace(FSDP, ""), m) for n, m in adapted(model, adapter_name)}
    made_from = next(m.ctsft_fingerprint[adapter_name] for _, m in layers.values())
    now = made_from if sharded(model) else base_fingerprint(model, config, {n: m for n, (_, m) in layers.items()})
    kind = kind_of(config.basis)
    stored = config.store_basis or kind.stored or (kind.of_weights and now != made_from)
    shared = kind.shared and not FORMS[config.form].both  # one tensor serves all matrices
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
    tensors |= {COEFFICIENTS: rounded, CHECKSUM: torch.tensor(sums, dtype=torch.float32)}
    whole = {key: state_dict[n] for n, key in whole_modules(model, adapter_name).items()}
    seal = hash_tensors(tensors | whole)
    config.saved_as = {"fingerprint": made_from, "stored_basis": stored, "tensors_hash": seal}
    return tensors


def whole_modules(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """The tensors of `modules_to_save`: their names in the model's state dict, and in the file of `adapter_name`."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            name = name.replace(FSDP, "")
            pairs = module.adapter_state_dict_load_map(adapter_name).items()
            found |= {f"{name}.{own}": f"{name}.{in_file}" for in_file, own in pairs}
    return found


def check_same_base(config: CTConfig, now: str) -> None:
    """Refuse an adapter from disk on other base weights if its directions would be others there; else warn."""
    if not config.from_disk or config.fingerprint == now:
        return
    if not config.stored_basis and kind_of(config.basis).of_weights:
        raise CTError(
            f"the adapter was trained on base weights {config.fingerprint} and these are {now}: without a stored basis "
            "it belongs to the former, and to no other (say, quantised or rounded) weights; load the original base, or "
            "use an adapter saved with store_basis=True, or its LoRA export."
        )
    warnings.warn(
        f"the adapter was trained on base weights {config.fingerprint} and these are {now}; its dW is applied as "
        "it is.",
        UserWarning,
        stacklevel=2,
    )


def note_other_ends(config: CTConfig, now: Mapping[str, str] | None) -> None:
    """Warn where of the base only embeddings or the head (their hashes `now`) are not those of an adapter from disk."""
    then, now = config.uncovered_ends or {}, now or {}
    if other := sorted(n for n in then if n in now and now[n] != then[n]):
        warnings.warn(
            f"the adapter was trained with another {' and another '.join(other)} than this base has: its dW is right "
            "here and is applied, but the model's outputs will not be those that it was trained for.",
            UserWarning,
            stacklevel=2,
        )


def save_adapter(model: Any, folder: str | Path, adapter_name: str = "default") -> int:
    """Save an adapter of a PeftModel, never half-written (see `replace_folder`); returns bytes written.

    Of an adapter that lies in `folder` only its basis_file stays. Raises CTError when `folder` exists and is no
    adapter, has folders in it or is the working folder, or the numbers are not finite.
    """
    folder = Path(folder).resolve()  # what a link means is replaced, not the link
    config = model.peft_config[adapter_name]
    if (
        folder.exists()
        and not (folder / "adapter_config.json").exists()
        and (folder.is_file() or any(folder.iterdir()))
    ):
        raise CTError(f"{folder} exists and is no adapter; choose another place.")
    if folder == Path.cwd():
        raise CTError(f"{folder} is the folder that this process works in, and saving replaces it; give another.")
    if inside := sorted(f.name for f in folder.glob("*") if f.is_dir()):
        raise CTError(f"{folder} holds the folder {inside[0]}, which saving would delete; choose another place.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        new = Path(work) / "new"
        model.save_pretrained(new, selected_adapters=[adapter_name], save_embedding_layers=False)
        written = new / adapter_name if adapter_name != "default" else new
        (written / "README.md").write_text(card(config), encoding="utf-8")
        for name in {LEARNED, Path(config.basis_file).name} if config.basis_file else ():  # as the card says
            if (folder / name).is_file() and not (written / name).exists():
                shutil.copy2(folder / name, written)
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

A fine-tuned change `dW = U C Vh` of a frozen model, whose directions {whence(config)}.
It loads with PEFT once `ctsft` is imported, which makes the method known to it:

```python
import ctsft  # without it, peft stops with KeyError: 'CTSFT'
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this folder")
```

For a server, or a program without ctsft: `ctsft export FOLDER --to lora` writes an ordinary LoRA with the same numbers.
"""


def whence(config: CTConfig) -> str:
    """Where the directions come from, for the card."""
    if config.basis_file is None:
        return "come from its own weights or from data"
    what = f"lie in the file `{config.basis_file}` (checksum {config.basis_checksum}), which many adapters may share"
    return f"{what}: have it there, or put it into this folder"


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`, on the same disk, by renames; after an error `folder` is the old one.

    Between the two renames an old `folder` has a hidden name beside it, where a kill in that instant leaves it.
    """
    for file in new.iterdir():
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if folder.exists():
        old = new.parent / "old" if new.parent != folder.parent else folder.with_name(f".{folder.name}-old")
        try:
            folder.rename(old)
            new.rename(folder)
        finally:
            if not folder.exists():
                old.rename(folder)
        shutil.rmtree(old)
    else:
        new.rename(folder)
