"""CT-SFT as a PEFT method: the layers put into a model, and all of it registered with peft."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import Tensor, nn

from ctsft.adapter.arithmetic import add_weighted
from ctsft.adapter.bare import load_adapter
from ctsft.adapter.bases import prepare
from ctsft.adapter.config import CTSFT, CTConfig
from ctsft.adapter.layer import CTEmbedding, CTLayer, CTLinear
from ctsft.adapter.read import unpack
from ctsft.adapter.seal import COEFFICIENTS
from ctsft.adapter.store import pack
from ctsft.adapter.swap import load_onto
from ctsft.adapter.targets import choice
from ctsft.compat import COMPILED, keep_names_of, read_adapters_by, uncompiled
from ctsft.errors import CTError
from ctsft.spectral.weights import clean_name


class CTModel(BaseTuner):
    """peft's view of CT-SFT."""

    prefix = "ctsft_"
    tuner_layer_cls = CTLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        if config.modules_to_save and any(COMPILED in f"{name}." for name, _ in model.named_modules()):
            raise CTError(
                "modules_to_save of a compiled base would be saved under names that a plain one does not have; add the "
                "adapter first, and compile then."
            )
        model = uncompiled(model)  # else names of a compiled base would be other ones
        self.prepared = prepare(model, config)
        targets = config.target_modules
        kwargs.pop("state_dict", None)  # targets come from the config alone: the packed file does not name them
        super().inject_adapter(model, adapter_name, *args, **kwargs | {"low_cpu_mem_usage": False})
        config.target_modules = targets  # peft shortens long lists
        del self.prepared

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        """Whether `key` is a target: while an adapter is added, those that `prepare` found."""
        key = clean_name(key)
        prepared, chosen = vars(self).get("prepared"), choice(peft_config, key)
        if prepared is None or not chosen:
            return chosen
        return key in prepared.bases or key in prepared.owners

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
        prepared, current_key = self.prepared, clean_name(current_key)
        if current_key in prepared.owners:
            owner = next(m for n, m in self.model.named_modules() if clean_name(n) == prepared.owners[current_key])
            assert isinstance(owner, CTLayer)
            layer.share(adapter_name, owner)
        else:
            basis, k = prepared.bases[current_key], prepared.k[current_key]
            layer.update_layer(adapter_name, peft_config, basis, k, prepared.fingerprint)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add the adapter `adapter_name`, the sum of `adapters` times `weights`; see `arithmetic.add_weighted`."""
        if combination_type != "linear":
            raise CTError(f"combination_type={combination_type!r} is unknown; CT-SFT has linear, which is exact.")
        add_weighted(self.model, self.peft_config, adapters, weights, adapter_name)

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Tied weights share one adapter and are merged once (see Prepared.owners): nothing to warn of."""

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


if CTSFT not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="ctsft", config_cls=CTConfig, model_cls=CTModel, prefix=CTModel.prefix)
read_adapters_by(load_adapter, load_onto)
keep_names_of(COEFFICIENTS)
