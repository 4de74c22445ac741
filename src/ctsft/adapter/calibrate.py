"""Calibration: directions read from data, before an adapter is added (gradient: LoRA-GA's idea; activation: EVA)."""

import copy
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ctsft.adapter.bases import check_k
from ctsft.adapter.config import CTConfig
from ctsft.adapter.targets import find_targets
from ctsft.compat import uncompiled
from ctsft.errors import CTError
from ctsft.progress import watched
from ctsft.spectral.kinds import KINDS, kind_of
from ctsft.spectral.weights import matrix


def calibrate(model: nn.Module, config: CTConfig, batches: Iterable[Mapping[str, Tensor]]) -> CTConfig:
    """A copy of `config` that carries directions made from data, on the bare `model`, for `gradient` or `activation`.

    batches: model inputs, input_ids (b, t) with labels for `gradient` (where absent, all tokens but padding).
    `gradient` holds one float32 copy of every adapted matrix, `activation` one (d_in, d_in) Gram matrix for each. The
    model is left as it was. Raises CTError for another kind of basis, no batches, a loss or gradient that is not
    finite, or an embedding under `activation` (its inputs are ids).
    """
    calibration = kind_of(config.basis).calibration
    if calibration is None:
        made_so = " and ".join(f"basis='{name}'" for name, kind in KINDS.items() if kind.calibration)
        raise CTError(f"basis='{config.basis}' needs no data; calibrate is for {made_so}.")
    config = copy.deepcopy(config)
    modules, _ = find_targets(uncompiled(model), config)
    ks = {n: config.k_for(n) for n in modules}
    for name, module in modules.items():
        check_k(config, name, matrix(module), ks[name])
    collected = calibration.collect(model, modules, batches)
    config.calibrated = {n: calibration.make(c, ks[n]) for n, c in watched(collected.items(), "basis")}
    return config
