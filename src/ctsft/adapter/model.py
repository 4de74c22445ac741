"""CT-SFT as a PEFT method: choose the targets, make their bases, put the layers in, and register it all with peft."""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn

from ctsft.adapter.config import CTSFT, RECOMPUTABLE, CTConfig
from ctsft.adapter.layer import CTEmbedding, CTLayer, CTLinear
from ctsft.adapter.store import adapted, base_fingerprint, check_same_base, pack, unpack
from ctsft.compat import linear_names, selects, shortest_names
from ctsft.errors import CTError
from ctsft.progress import watched
from ctsft.spectral.basis import Basis, paired, random_basis, replacing, two_sides, weight_basis
from ctsft.spectral.cache import keeps_bases, key_of, read_bases, write_bases
from ctsft.spectral.decompose import iterated, one_thread, principal_directions, seconds
from ctsft.spectral.weights import (
    MATRIX_MODULES,
    checked,
    fingerprint,
    matrix,
    takes_part_transposed,
    universal_gram,
    universal_members,
    width,
)

WORTH_KEEPING = 1.0  # seconds of work (estimated) from which bases are kept on disk
LAST_UNIVERSAL: dict[str, Tensor] = {}


@dataclass
class Plan:
    """All that adding an adapter needs, made and checked before the model is touched. Keyed by module name."""

    k: dict[str, int]
    bases: dict[str, Basis | None]  # None: to be read from the file
    owners: dict[str, str]  # second uses of a tied weight -> the use that owns the adapter
    fingerprint: str  # of the base weights that the bases were made from


def make_plan(model: nn.Module, config: CTConfig) -> Plan:
    """Find the targets of `config` in `model` and make their bases. Raises CTError before anything has changed."""
    if any(isinstance(m, CTLayer) and m.merged for m in model.modules()):
        raise CTError(
            "an adapter is merged into these weights, so a new basis would be that of W + dW; unmerge it first."
        )
    targets, owners = find_targets(model, config)
    weights = {n: matrix(m) for n, m in targets.items()}
    now = base_fingerprint(model, config, targets)
    check_same_base(config, now)
    ks = {n: config.k_for(n) for n in targets}
    if config.fingerprint is not None and config.stored_basis:
        return Plan(ks, dict.fromkeys(targets), owners, config.fingerprint)
    for name, w in weights.items():
        check_k(config, name, w, ks[name])
    return Plan(ks, make_bases(model, config, weights, ks, now), owners, now)


def find_targets(model: nn.Module, config: CTConfig) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The bare modules that `config` matches, by name, and the second uses of their (tied) weights: name -> first use.

    Of modules that share a weight the first in the model's order is the target, whichever was named.
    """
    inside = tuple(n + "." for n, m in model.named_modules() if isinstance(m, CTLayer))
    modules = {
        n: m.base_layer if isinstance(m, CTLayer) else m
        for n, m in model.named_modules()
        if n and not n.startswith(inside)
    }
    if config.target_modules in (None, "all-linear"):
        names = linear_names(model, config)
        config.target_modules = shortest_names(names, set(modules) - names)
    found = [n for n in modules if selects(config, n)]
    regex = isinstance(config.target_modules, str)
    wanted = [str(config.target_modules)] if regex else sorted(config.target_modules)
    unknown = [w for w in wanted if not (found and (regex or matches(w, modules)))]
    if unknown:
        there = sorted({n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, MATRIX_MODULES)})
        raise CTError(f"target_modules {unknown} match nothing in {type(model).__name__}; it has {', '.join(there)}.")

    weights = {n: checked(n, modules[n]) for n in found}
    uses: dict[int, list[str]] = {id(modules[n].weight): [] for n in weights}
    for name, module in modules.items():
        if isinstance(module, MATRIX_MODULES) and id(module.weight) in uses:
            uses[id(module.weight)].append(name)
    owners = {name: names[0] for names in uses.values() for name in names[1:]}
    if config.from_disk and sorted(owners) != sorted(config.target_modules_to_tie or []):
        raise CTError(
            f"the adapter was trained with {config.target_modules_to_tie or 'no module'} tied to a target and here it "
            f"is {sorted(owners) or 'none'}; load the model with its weights tied as they were."
        )
    # Full names: peft would save the whole base embedding next to the bare name `lm_head` or `embed_tokens`.
    targets = {names[0]: modules[names[0]] for names in uses.values()}
    if owners or any(n.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for n in targets):
        config.target_modules = sorted(targets)
    config.target_modules_to_tie = sorted(owners) or None
    return {n: m for n, m in modules.items() if n in targets}, owners


def matches(wanted: str, modules: dict[str, nn.Module]) -> bool:
    return any(n == wanted or n.endswith(f".{wanted}") for n in modules)


def check_k(config: CTConfig, name: str, w: Tensor, k: int) -> None:
    """CTError when the matrix `w` (d_out, d_in) has fewer than `k` directions of the kind asked for."""
    one_sided = config.form == "scores" and config.basis not in ("weight", "gradient")
    limit = max(w.shape) if one_sided and config.basis == "universal" else w.shape[1] if one_sided else min(w.shape)
    if k > limit:
        raise CTError(
            f"k={k} is more than the {limit} directions of {name} ({w.shape[0]} x {w.shape[1]}); lower k, or give a "
            f"mapping such as k={{'{name.rpartition('.')[2]}': {limit}, '.*': {k}}}."
        )


def make_bases(
    model: nn.Module, config: CTConfig, weights: dict[str, Tensor], ks: dict[str, int], now: str, but: str = ""
) -> dict[str, Basis | None]:
    """The basis of every target: another adapter's than `but` where it is the same, else the kept one, else made.

    The bits are those of a fresh computation wherever they come from. Matrices are decomposed side by side, each on one
    thread, so that the bits do not depend on the number of threads. `now`: fingerprint of the base weights.
    """
    others = {n: other_bases(model.get_submodule(n), config, now, but) for n in weights}
    bases: dict[str, Basis | None] = dict.fromkeys(weights)
    for name, w in weights.items():
        for other in others[name]:
            if reaches(config, w.shape, ks[name], other.k) and (other.u is not None or config.form == "scores"):
                bases[name] = sided(config, other.view(ks[name]))
    missing = {n: w for n, w in weights.items() if bases[n] is None}
    if missing:
        bases |= computed(model, config, missing, ks, now)
    for name, w in weights.items():
        made = bases[name]
        for other in others[name]:  # fewer directions of another adapter become views of these
            if made is not None and other.k < made.k and reaches(config, w.shape, other.k, made.k):
                other.refer_to(made)
    return bases


def recipe(config: CTConfig) -> tuple[object, ...]:
    """What decides the directions beside the weights and K."""
    drawn = config.basis == "random" or config.weight_from == "random"
    shared = (config.form == "scores", config.universal_mode) if config.basis == "universal" else ()
    return config.basis, config.weight_from, config.seed if drawn else None, *shared


def other_bases(layer: nn.Module, config: CTConfig, now: str, but: str) -> list[Basis]:
    """Bases of `layer` that adapters other than `but` recomputed by the same recipe from the same base weights."""
    found: list[Basis] = []
    if not isinstance(layer, CTLayer) or config.basis not in RECOMPUTABLE:
        return found
    for name, basis in layer.ctsft_basis.items():
        theirs = layer.ctsft_config[name]
        here = not theirs.stored_basis  # one from a file may have been made elsewhere
        same = recipe(theirs) == recipe(config) and theirs.basis_dtype == config.basis_dtype
        if basis is not None and name != but and here and same and layer.ctsft_fingerprint[name] == now:
            found.append(basis)
    return found


def reaches(config: CTConfig, shape: torch.Size, k: int, found: int) -> bool:
    """Whether the first `k` of `found` directions have the bits of `k` computed alone."""
    top = config.basis == "weight" and config.weight_from == "top"
    return k == found or (top and k < found and iterated(shape, k) and iterated(shape, found))


def computed(
    model: nn.Module, config: CTConfig, weights: dict[str, Tensor], ks: dict[str, int], now: str
) -> dict[str, Basis | None]:
    """Bases read from the cache folder, or made (and kept there, where they cost more than `WORTH_KEEPING`)."""
    work = sum(seconds(w.shape, ks[n], config.weight_from == "top") for n, w in weights.items())
    keep = config.basis == "weight" and work >= WORTH_KEEPING and keeps_bases()
    key = key_of(*recipe(config), now)
    kept = read_bases(key) if keep else {}
    usable = (n for n, w in weights.items() if n in kept and reaches(config, w.shape, ks[n], kept[n].k))
    found = {n: kept[n].own(ks[n]) for n in usable}
    rest = [n for n in weights if n not in found]
    if rest:
        maker, workers = basis_maker(model, config, ks.values()), torch.get_num_threads()
        with one_thread(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            made = pool.map(lambda n: maker(n, weights[n], ks[n]), rest)
            found |= dict(zip(rest, watched(made, "basis", len(rest)), strict=True))
    larger = {n: found[n] for n in rest if n not in kept or kept[n].k < found[n].k}
    if keep and larger:
        write_bases(key, kept | larger)
    return {n: sided(config, found[n]).rounded(getattr(torch, config.basis_dtype)) for n in weights}


def sided(config: CTConfig, basis: Basis) -> Basis:
    """Without the factor that trains: with `scores` the left one, where `basis` has both."""
    return basis.input_side() if config.form == "scores" and config.basis in ("weight", "random") else basis


def basis_maker(model: nn.Module, config: CTConfig, ks: Collection[int]) -> Callable[[str, Tensor, int], Basis]:
    """A function (name, W, K) -> Basis for the kind of basis that `config` names."""
    if config.basis not in RECOMPUTABLE:
        calibrated = config.calibrated
        if calibrated is None:
            raise CTError(
                f"basis='{config.basis}' is made from data: call config = ctsft.calibrate(model, config, batches) "
                "before the adapter is added."
            )

        def from_data(name: str, w: Tensor, k: int) -> Basis:
            if name not in calibrated or calibrated[name].k < k:
                raise CTError(
                    f"the config was calibrated without {k} directions for {name}; call ctsft.calibrate with this "
                    "model and this k."
                )
            basis = calibrated[name].own(k)
            if config.form == "scores":
                return basis.input_side()
            return basis if basis.u is not None else paired(w, basis)

        return from_data
    if config.basis == "universal":
        d_model = width(model)
        if max(ks) > d_model:
            raise CTError(
                f"k={max(ks)} is more than the {d_model} directions of the residual stream that basis='universal' has."
            )
        shared = universal_directions(model, d_model)[: max(ks)]
        sides = two_sides(shared.to(getattr(torch, config.basis_dtype)).contiguous(), ks)

        def universal(name: str, w: Tensor, k: int) -> Basis:
            basis = sides[k][takes_part_transposed(name, w.shape, d_model)]
            if config.form != "scores":
                return paired(w, basis)
            return replacing(w, basis) if config.universal_mode == "replace" else basis

        return universal

    def own(name: str, w: Tensor, k: int) -> Basis:
        if config.basis == "random":
            return random_basis((w.shape[0], w.shape[1]), k, config.seed, name)
        return weight_basis(w, k, config.weight_from, config.seed, name)

    return own


def universal_directions(model: nn.Module, d_model: int) -> Tensor:
    """All directions of the universal basis as rows, (d_model, d_model) float64. Those of the last model are kept.

    The fingerprint of the weights tells whether it is the same model: hashing is far cheaper than the Gram matrix.
    """
    members = universal_members(model, d_model)
    key = fingerprint((n, matrix(m)) for n, m in members.items())
    if key not in LAST_UNIVERSAL:
        made = principal_directions(universal_gram(members, d_model, "universal basis"), d_model)
        LAST_UNIVERSAL.clear()
        LAST_UNIVERSAL[key] = made
    return LAST_UNIVERSAL[key]


class CTModel(BaseTuner):
    """peft's view of CT-SFT."""

    prefix = "ctsft_"
    tuner_layer_cls = CTLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        self.plan = make_plan(model, config)
        targets = config.target_modules
        kwargs.pop("state_dict", None)  # targets come from the config alone: the packed file does not name them
        super().inject_adapter(model, adapter_name, *args, **kwargs | {"low_cpu_mem_usage": False})
        config.target_modules = targets  # peft shortens long lists
        del self.plan

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        kind = CTEmbedding if isinstance(target, nn.Embedding) else CTLinear
        layer = target if isinstance(target, CTLayer) else kind(target)
        if current_key in self.plan.owners:
            owner = self.model.get_submodule(self.plan.owners[current_key])
            assert isinstance(owner, CTLayer)
            layer.share(adapter_name, owner)
        else:
            layer.update_layer(
                adapter_name, peft_config, self.plan.bases[current_key], self.plan.k[current_key], self.plan.fingerprint
            )
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Tied weights share one adapter and are merged once (see Plan.owners): nothing to warn of."""

    def _check_merge_allowed(self) -> None:
        """As above."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise CTError(
                "adapter_names= (several adapters in one batch) is not supported; call set_adapter and run each "
                "adapter's rows alone."
            )
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        packed = pack(model, config, adapter_name, state_dict)
        for key in [k for k in state_dict if ".base_layer." in k or ".ctsft_" in k]:
            del state_dict[key]  # peft would add them for an adapted embedding
        return packed

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key if key.startswith("ctsft.") else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return unpack(model, config, adapter_name, state_dict)


def resize(
    model: nn.Module,
    k: int | dict[str, int],
    adapter_name: str = "default",
    optimizer: torch.optim.Optimizer | None = None,
    carry: bool = False,
) -> None:
    """Change K of an adapter in place, also during training: shared directions keep their values, new ones are zero.

    The parameters stay the same objects; a loss from before must not be kept with its graph (detach it), for autograd
    remembers the shapes in there. With `optimizer`, their state is reset, or with `carry` kept for shared
    directions and zero for new ones (papers 81 and 82 reset). Raises CTError, with nothing changed, for a K that a
    matrix or a calibrated basis does not allow.
    """
    layers = dict(adapted(model, adapter_name))
    if not layers:
        raise CTError(f"the model has no CT-SFT adapter {adapter_name!r} to resize.")
    if any(isinstance(m, CTLayer) and m.merged for m in model.modules()):
        raise CTError("an adapter is merged into these weights; unmerge it before K is changed.")
    bare = getattr(getattr(model, "base_model", None), "model", model)
    names = {id(m): n for n, m in bare.named_modules()}
    first = next(iter(layers.values()))
    old = first.ctsft_config[adapter_name]
    new = CTConfig(
        **{f: getattr(old, f) for f in ("form", "basis", "weight_from", "universal_mode", "basis_dtype", "seed")}, k=k
    )
    new.calibrated = old.calibrated or {names[id(m)]: m.ready(adapter_name) for m in layers.values()}
    weights = {names[id(m)]: checked(n, m.get_base_layer()) for n, m in layers.items()}
    now = base_fingerprint(bare, new, {names[id(m)]: m for m in layers.values()})
    if first.ctsft_fingerprint[adapter_name] != now:
        raise CTError("the base weights are not those that the basis was made from, so K cannot be changed.")
    ks = {n: new.k_for(n) for n in weights}
    for name, w in weights.items():
        check_k(new, name, w, ks[name])
    bases = make_bases(bare, new, weights, ks, now, but=adapter_name)

    old.k = k
    state = {} if optimizer is None else optimizer.state
    for layer in (m for m in model.modules() if isinstance(m, CTLayer) and adapter_name in m.ctsft_coefficients):
        owner = layer.ctsft_owner[0] if layer.ctsft_owner else layer
        layer.ctsft_basis[adapter_name] = bases[names[id(owner)]]
        layer.settle()
        if owner is not layer:
            continue
        parameter = layer.ctsft_coefficients[adapter_name]
        shape = layer.coefficient_shape(adapter_name, ks[names[id(layer)]])
        parameter.data, parameter.grad = fitted(parameter.data, shape), None
        if parameter in state:
            moments = state.pop(parameter)
            if carry:
                state[parameter] = {n: fitted(v, shape) if v.ndim else v for n, v in moments.items()}


def fitted(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`old` cut or padded with zeros to `shape`."""
    new = old.new_zeros(shape)
    common = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, shape, strict=True))
    new[common] = old[common]
    return new


if CTSFT not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="ctsft", config_cls=CTConfig, model_cls=CTModel, prefix=CTModel.prefix)
