"""Reading an adapter's tensors into a model: all of them checked first, then put in at once."""

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ctsft.adapter.config import CTConfig, is_local
from ctsft.adapter.forms import FORMS
from ctsft.adapter.layer import CTLayer
from ctsft.adapter.seal import CHECKSUM, COEFFICIENTS, check_tensors, without_prefix
from ctsft.adapter.store import BASIS, UNIVERSAL, adapted, whole_modules
from ctsft.errors import CTError
from ctsft.models.reading import one_sentence
from ctsft.spectral.basis import Basis, checksum, two_sides
from ctsft.spectral.kinds import kind_of
from ctsft.spectral.weights import clean_name, matrix, takes_part_transposed, width

# Of a checksum's order sqrt(K). Another machine's rounding moves it by 1e-7, or where it tips a bfloat16 by 1e-4;
# turned directions move it by their angle.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-3}

Layout = dict[str, tuple[torch.dtype, tuple[int, ...] | None]]  # name -> dtype and shape (None: checked elsewhere)


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default", trainable: bool = False
) -> Any:
    """The PeftModel of `model`, or `model` if it is one, with the adapter that lies in `folder` (or on the hub).

    As peft's from_pretrained and load_adapter: in eval mode and frozen, unless `trainable`. But whatever is wrong with
    the folder, a broken adapter_config.json too, is one CTError. All of it is checked before `model` is touched; where
    only the fit is wrong, `model` has layers put in, and its own weights as they were.
    """
    source = Path(folder) if is_local(Path(folder)) else os.fspath(folder)
    with one_sentence(source):
        CTConfig.from_pretrained(source)
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, os.fspath(source), adapter_name, is_trainable=trainable)
        model.load_adapter(os.fspath(source), adapter_name, is_trainable=trainable)
        return model


def unpack(model: nn.Module, config: CTConfig, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Install what `pack` made into the layers of `adapter_name`: the basis at once, the rest as a state dict to load.

    Raises CTError, with nothing installed, when the tensors are not those that were saved, do not fit the model, or
    were trained on other directions than those found here.
    """
    layers, tensors = list(adapted(model, adapter_name)), without_prefix(tensors)
    check_read(model, config, adapter_name, tensors)
    stored = any(k.startswith("ctsft.basis") for k in tensors)
    bases = {name: layer.ctsft_basis[adapter_name] for name, layer in layers}
    if stored:
        shared = tensors.get(UNIVERSAL, torch.empty(0, 0))
        sides = two_sides(shared, {config.k_for(clean_name(n)) for n, _ in layers})
        bases |= {n: stored_basis(config, clean_name(n), layer, tensors, sides) for n, layer in layers}
    shapes = {}
    for name, layer in layers:
        basis = bases[name]
        assert basis is not None
        shapes[name] = layer.form(adapter_name).shape(matrix(layer.get_base_layer()).shape, basis, basis.k)
    numbers, found = sum(map(math.prod, shapes.values())), tensors[COEFFICIENTS].shape
    if found != (numbers,) or tensors[CHECKSUM].shape != (len(layers),):
        raise CTError(
            f"the file holds {found.numel()} numbers for {tensors[CHECKSUM].numel()} matrices and this model takes "
            f"{numbers} for {len(layers)}; it is an adapter of another model."
        )
    rotated = []
    for (name, basis), expected in zip(bases.items(), tensors[CHECKSUM].tolist(), strict=True):
        assert basis is not None
        if not abs(checksum(basis, clean_name(name)) - expected) <= TOLERANCE[basis.dtype] * math.sqrt(basis.k):
            rotated.append(clean_name(name))
    if rotated and stored:
        raise CTError(f"the basis in the file is not the one that was saved (first: {rotated[0]}); it is damaged.")
    if rotated and not (config.unread and config.from_disk):  # nobody has compared the base weights
        raise CTError(
            f"the directions here are not those that the tensors were saved with in {len(rotated)} of {len(layers)} "
            f"matrices (first: {rotated[0]}): they are of another base, seed or kind of basis."
        )
    if rotated:
        raise CTError(
            f"the directions recomputed here differ from those that the adapter was trained on in {len(rotated)} of "
            f"{len(layers)} matrices (first: {rotated[0]}): another machine's rounding turned near-equal ones; save it "
            "with store_basis=True where it was trained, or use its LoRA export."
        )
    pieces = tensors[COEFFICIENTS].float().split([math.prod(shape) for shape in shapes.values()])
    numbers_of = {n: piece.reshape(shape) for (n, shape), piece in zip(shapes.items(), pieces, strict=True)}
    config.unread = False
    others = {n: t for n, t in tensors.items() if not n.startswith("ctsft.")}
    return others | install(model, adapter_name, bases, numbers_of)


def check_read(model: nn.Module, config: CTConfig, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """CTError unless `tensors` are sealed as `config` says and are exactly those that `model` takes."""
    layers = {clean_name(n): m for n, m in adapted(model, adapter_name)}
    renamed = whole_modules(model, adapter_name)
    in_file = {renamed.get(n, n): t for n, t in tensors.items()}
    check_tensors(in_file, renamed.values(), config.tensors_hash if config.unread else None)
    if config.unread and config.tensors_hash is None:
        warnings.warn(
            "the adapter was saved by an older ctsft without a hash of its numbers, so damage to them cannot be found; "
            "save it anew.",
            UserWarning,
            stacklevel=2,
        )
    stored = any(n.startswith("ctsft.basis") for n in tensors)
    if config.unread and stored != config.stored_basis:
        raise CTError(
            f"adapter_config.json says {'a' if config.stored_basis else 'no'} stored basis and the file holds "
            f"{'one' if stored else 'none'}; take both files from the same folder."
        )
    expected: Layout = {COEFFICIENTS: (getattr(torch, config.save_dtype), None), CHECKSUM: (torch.float32, None)}
    expected |= stored_layout(model, config, layers, tensors) if stored else {}
    for name in [*renamed, *expected]:
        if name not in tensors:
            told = f"basis for {name.removeprefix(BASIS).rpartition('.')[0]}" if name.startswith(BASIS) else name
            raise CTError(f"the file holds no {told}; it is damaged or of another model.")
    state = model.state_dict() if renamed else {}
    shape: tuple[int, ...] | None
    for name, tensor in tensors.items():
        if name in renamed:
            own = state[name]
            shape, good = tuple(own.shape), tensor.is_floating_point() == own.is_floating_point()
        else:
            dtype, shape = expected.get(name, (None, None))
            good = tensor.dtype == dtype
        if not good or shape not in (None, tuple(tensor.shape)):
            raise CTError(
                f"the file holds {renamed.get(name, name)} as {tensor.dtype} {tuple(tensor.shape)}, which is not what "
                "this adapter has on this model; it is damaged or of another model."
            )


def stored_layout(
    model: nn.Module, config: CTConfig, layers: dict[str, CTLayer], tensors: Mapping[str, Tensor]
) -> Layout:
    """dtype and shape of every tensor of a stored basis."""
    dtype, both = getattr(torch, config.basis_dtype), FORMS[config.form].both
    shared = kind_of(config.basis).shared and not both
    ks = {n: config.k_for(n) for n in layers}
    d_model = width(model) if shared else 0
    expected: Layout = {}
    if shared:
        expected[UNIVERSAL] = dtype, (max(ks.values()), d_model)
    for name, layer in layers.items():
        (d_out, d_in), k, own = matrix(layer.get_base_layer()).shape, ks[name], f"{BASIS}{name}"
        left = f"{own}.u" in tensors  # of one side, which one it is depends on who made it
        if not shared:
            expected |= {f"{own}.u": (dtype, (d_out, k))} if both or left else {}
            expected |= {f"{own}.vh": (dtype, (k, d_in))} if both or not left else {}
        if config.universal_mode == "replace":
            transposed = takes_part_transposed(name, torch.Size((d_out, d_in)), d_model) if shared else left
            expected[f"{own}.start"] = torch.float32, (d_in if transposed else d_out, k)
        elif config.start == "mean":
            expected[f"{own}.start"] = torch.float32, (k,)
    return expected


def install(
    model: nn.Module, adapter_name: str, bases: Mapping[str, Basis | None], numbers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Give `bases` to the layers of `adapter_name`, and return the state dict to load of their trained `numbers`."""
    layers = dict(adapted(model, adapter_name))
    for name, layer in layers.items():
        if bases[name] is not layer.ctsft_basis[adapter_name]:
            layer.ctsft_basis[adapter_name] = bases[name]
            parameter, zeros = layer.ctsft_coefficients[adapter_name], torch.zeros(numbers[name].shape)
            if parameter.is_meta:  # low_cpu_mem_usage: it is assigned, and takes no data
                layer.ctsft_coefficients[adapter_name] = nn.Parameter(zeros, parameter.requires_grad)
            else:
                parameter.data = zeros
            layer._move_adapter_to_device_of_base_layer(adapter_name)
    owned = {layer: numbers[name] for name, layer in layers.items()}
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, CTLayer) and adapter_name in module.ctsft_coefficients:
            owner = module.ctsft_owner[0] if module.ctsft_owner else module
            module.ctsft_pending.discard(adapter_name)
            module.ctsft_basis[adapter_name] = owner.ctsft_basis[adapter_name]
            state[f"{name}.ctsft_coefficients.{adapter_name}"] = owned[owner]
    return state


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
