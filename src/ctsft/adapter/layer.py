"""The adapted layer: a frozen base module beside a frozen basis and the few numbers that train."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ctsft.adapter.config import CTConfig
from ctsft.adapter.forms import FORMS, Form
from ctsft.adapter.fused import AdaptedLinear
from ctsft.compat import does_more, embed_scale, under_functorch
from ctsft.errors import CTError
from ctsft.spectral.basis import Basis
from ctsft.spectral.weights import matrix


class CTLayer(nn.Module, BaseTunerLayer):
    """Adapters of one Linear, Conv1D or Embedding.

    `ctsft_coefficients[name]` is what trains, in float32, of the shape that the adapter's form gives it.
    `ctsft_basis[name]` is kept out of the module tree on purpose: frozen, never cast, never in a state dict; the
    universal basis is one tensor that all layers refer to. It is None between the reading of an adapter's config and of
    its stored basis.
    """

    adapter_layer_names = ("ctsft_coefficients",)
    other_param_names = ("ctsft_basis", "ctsft_config", "ctsft_fingerprint")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ctsft_coefficients = nn.ParameterDict()
        self.ctsft_basis: dict[str, Basis | None] = {}
        self.ctsft_config: dict[str, CTConfig] = {}
        self.ctsft_fingerprint: dict[str, str] = {}
        self.ctsft_pending: set[str] = set()  # adapters whose trained numbers are still to be loaded
        # the layer that owns the adapters of a tied weight; a tuple, so that it is no submodule
        self.ctsft_owner: tuple[CTLayer, ...] = ()
        self.merged_adapters = []
        self._unmerged: Tensor | None = None
        self._disable_adapters = False

    # ---- adding and moving

    def update_layer(self, name: str, config: CTConfig, basis: Basis | None, k: int, fingerprint: str) -> None:
        """Add (or overwrite) the adapter `name` with zero coefficients: the output does not change."""
        self.ctsft_config[name] = config
        self.ctsft_fingerprint[name] = fingerprint
        self.ctsft_basis[name] = basis
        device = self.settle()
        self.ctsft_pending.discard(name)
        if config.from_disk:
            self.ctsft_pending.add(name)
        self.ctsft_coefficients[name] = nn.Parameter(torch.zeros(self.coefficient_shape(name, k), device=device))

    def share(self, name: str, owner: "CTLayer") -> None:
        """Use the adapter that `owner` holds for the same (tied) weight."""
        self.ctsft_owner = (owner,)
        self.ctsft_config[name] = owner.ctsft_config[name]
        self.ctsft_fingerprint[name] = owner.ctsft_fingerprint[name]
        self.ctsft_basis[name] = owner.ctsft_basis[name]
        self.ctsft_pending = set(owner.ctsft_pending)
        self.ctsft_coefficients[name] = owner.ctsft_coefficients[name]

    def form(self, name: str) -> Form:
        """The form of adapter `name`: what its trained numbers are beside the basis."""
        return FORMS[self.ctsft_config[name].form]

    def coefficient_shape(self, name: str, k: int) -> tuple[int, ...]:
        """Shape of the trained piece of adapter `name` at `k` directions."""
        return self.form(name).shape(matrix(self.get_base_layer()).shape, self.ctsft_basis[name], k)

    def settle(self) -> torch.device:
        """Bring the bases to the base weight's device, and return it."""
        device = self.get_base_layer().weight.device
        assert isinstance(device, torch.device)
        for basis in self.ctsft_basis.values():
            if basis is not None and device.type != "meta":
                basis.move(device)
        return device

    def _apply(self, fn: Any, recurse: bool = True) -> "CTLayer":
        trained = {p: p.data for p in self.ctsft_coefficients.values()}
        super()._apply(fn, recurse)
        for parameter, exact in trained.items():
            if parameter.dtype != exact.dtype:  # a cast of the model does not reach the trained numbers
                parameter.data = exact.to(parameter.device)
                parameter.grad = None if parameter.grad is None else parameter.grad.to(exact.dtype)
        self.settle()
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As peft's, but the trained numbers stay float32, and stay one parameter where a weight is tied."""
        if adapter_name not in self.ctsft_coefficients:
            return
        if self.ctsft_owner:
            self.ctsft_coefficients[adapter_name] = self.ctsft_owner[0].ctsft_coefficients[adapter_name]
        parameter = self.ctsft_coefficients[adapter_name]
        parameter.data = parameter.data.to(device or self.settle())

    def _replicate_for_data_parallel(self) -> "CTLayer":
        raise CTError(
            "nn.DataParallel, which a Trainer takes by itself where it sees several GPUs, leaves the directions on the "
            "first; show it one GPU (CUDA_VISIBLE_DEVICES=0), or start one process for each (torchrun)."
        )

    # ---- algebra

    def ready(self, name: str) -> Basis:
        """The basis of adapter `name`, or CTError while its file has not been read."""
        basis = self.ctsft_basis[name]
        if basis is None or name in self.ctsft_pending:
            raise CTError(
                f"adapter {name!r} was configured from disk but its weights were never loaded; use "
                "peft.PeftModel.from_pretrained(model, folder)."
            )
        return basis.on_meta() if cast(Tensor, self.get_base_layer().weight).is_meta else basis

    def coefficients(self, name: str) -> Tensor:
        """The trained numbers of adapter `name` in float32, and what it starts from: for `replace`, the scores of W."""
        c, start = self.ctsft_coefficients[name].float(), self.ready(name).start
        return c if start is None else c + self.form(name).begin(start)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """left (d_out, K) and right (K, d_in) with dW = left right; for `replace`, of the whole new W. float32."""
        return self.form(name).factors(self.ready(name), self.coefficients(name))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Dense dW of `adapter`, float32, in the base module's layout. For merging and tests, not used in training."""
        left, right = self.factors(adapter)
        delta = left @ right
        if self.replaces(adapter):
            delta = delta - matrix(self.get_base_layer(), self.base_weight()).float()
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def replaces(self, name: str) -> bool:
        return self.ctsft_config[name].universal_mode == "replace"

    def dropped(self, name: str) -> Tensor:
        """`coefficients` without the directions that amplitude dropout drops for one training step."""
        c, p = self.coefficients(name), self.ctsft_config[name].amplitude_dropout
        if not self.training or p == 0:
            return c
        return self.form(name).weighted(c, F.dropout(torch.ones(self.ready(name).k, device=c.device), p))

    def delta(self, name: str, x: Tensor) -> Tensor:
        """What adapter `name` adds to the output for input `x` (..., d_in); for `replace`, all of W x."""
        return self.form(name).delta(x, self.ready(name), self.dropped(name))

    def present(self) -> list[str]:
        """Active adapters that this layer has; CTError where one replaces W and another would add to it."""
        names = [n for n in self.active_adapters if n in self.ctsft_coefficients]
        if len(names) > 1 and any(self.replaces(n) for n in names):
            raise CTError(
                "an adapter with universal_mode='replace' cannot be active beside another; activate one of them."
            )
        return names

    # ---- merging

    def base_weight(self) -> Tensor:
        """The base module's weight as it was before any merge, in the module's own layout."""
        unmerged = (self.ctsft_owner[0] if self.ctsft_owner else self)._unmerged
        return cast(Tensor, self.get_base_layer().weight).data if unmerged is None else unmerged

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add dW to the base weight; the original is kept, so that `unmerge` restores it bit for bit."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.ctsft_coefficients]
        if any(self.replaces(n) for n in names) and len(names) + len(self.merged_adapters) > 1:
            raise CTError("an adapter with universal_mode='replace' cannot be merged with another.")
        weight = cast(Tensor, self.get_base_layer().weight).data
        if names and not self.ctsft_owner:
            merged = weight.to(torch.promote_types(weight.dtype, torch.float32))
            for name in names:
                merged = merged + self.get_delta_weight(name)
            merged = merged.to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise CTError(f"merging {names} would give NaN or infinite weights; the adapter is broken.")
            self._unmerged = weight.clone() if self._unmerged is None else self._unmerged
            weight.copy_(merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the base weight's exact bits."""
        if self._unmerged is not None:
            cast(Tensor, self.get_base_layer().weight).data.copy_(self._unmerged)
            self._unmerged = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return not self.replaces(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self.present()
        if names and self.replaces(names[0]):
            return self.replaced(names[0], x)
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in names:
            result = result + self.delta(name, x)  # float32 with a float32 basis: the sum is rounded once
        return result.to(dtype)

    def replaced(self, name: str, x: Tensor) -> Tensor:
        """The output where adapter `name` stands in for W."""
        bias = getattr(self.get_base_layer(), "bias", None)
        out = self.delta(name, x)
        return (out if bias is None else out + bias).to(self.get_base_layer().weight.dtype)  # type: ignore[arg-type]


class CTLinear(CTLayer):
    """Adapters of a Linear or Conv1D. One adapter on a bare, frozen Linear goes the fast way: the same, in one node."""

    @property
    def in_features(self) -> int:
        return matrix(self.get_base_layer()).shape[1]

    @property
    def out_features(self) -> int:
        return matrix(self.get_base_layer()).shape[0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [] if self.disable_adapters or self.merged else self.present()
        if len(names) != 1 or self.replaces(names[0]) or not self.bare(x):
            return super().forward(x, *args, **kwargs)
        (name,), base = names, cast(nn.Linear, self.base_layer)
        form, basis, c = self.form(name), self.ready(name), self.dropped(name)
        return AdaptedLinear.apply(x, base.weight, base.bias, form, basis.u, c, basis.vh)  # type: ignore[no-any-return]

    def bare(self, x: Tensor) -> bool:
        """Whether calling the base module on `x` does nothing but the product with its frozen weight.

        Not so under hooks, autocast, torch.compile (which fuses by itself) or torch.func.
        """
        base = self.base_layer
        return (
            type(base) is nn.Linear
            and not any(p.requires_grad for p in base.parameters(recurse=False))
            and not does_more(base)
            and x.dtype == base.weight.dtype
            and not x.is_meta  # which has no autocast to ask for
            and not torch.is_autocast_enabled(x.device.type)
            and not torch.compiler.is_compiling()
            and not under_functorch()
        )


class CTEmbedding(CTLayer):
    """Adapters of an Embedding, W (vocabulary, d_model): row ids pick rows of the left factor."""

    @property
    def in_features(self) -> int:
        return matrix(self.get_base_layer()).shape[0]  # the vocabulary, as in peft's own layers of embeddings

    @property
    def out_features(self) -> int:
        return matrix(self.get_base_layer()).shape[1]

    def delta(self, name: str, x: Tensor) -> Tensor:
        return self.form(name).rows(x, self.ready(name), self.dropped(name)) * self.scale()

    def scale(self) -> Tensor | float:
        """Factor that some embeddings (Gemma's) put on their output."""
        return embed_scale(self)
