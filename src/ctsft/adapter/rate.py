"""The learning rate that an adapter asks for: read off its weights, form and K."""

from statistics import median

from torch import Tensor, nn

from ctsft.adapter.forms import FORMS
from ctsft.adapter.store import layers_of
from ctsft.spectral.weights import matrix

# The shares of the forms are the best peak rates of short AdamW runs with linear decay at this K, over the model's
# typical singular value: of `diagonal` on SmolLM2-135M (LOG.md), of the others on a 15M model. An amplitude adds to a
# singular value, so it moves on the scale of those; the more numbers share the work, the smaller the rate.
TUNED_K = 64


def learning_rate(model: nn.Module, adapter_name: str = "default") -> float:
    """The peak AdamW rate for adapter `adapter_name` of `model`: change of a trained number per step, to two digits.

    share(form) * s * sqrt(64 / K), where s is the median over the adapted matrices of |W|_F / sqrt(min(d_out, d_in)),
    the rms singular value, and K is the largest that the config asks for (below 16 it counts as 16). It was read off
    short AdamW runs with linear decay and no weight decay, and is meant for those; the rates that trainers have as
    their default, made for all weights, are thousands of times smaller.

    It knows the weights, the form and K only, not the data or where the directions come from. So it is far too high for
    basis='gradient', whose directions are those in which the loss moves most: give a smaller one of your own there.
    Raises CTError where the model has no such adapter.
    """
    layers = list(layers_of(model, adapter_name, ", so there is nothing to give a rate for").values())
    scale = median(rms_singular_value(m.get_base_layer(), m.base_weight()) for m in layers)
    config = layers[0].ctsft_config[adapter_name]
    return rate(config.form, config.k if isinstance(config.k, int) else max(config.k.values()), scale)


def rms_singular_value(module: nn.Module, weight: Tensor) -> float:
    """|W|_F / sqrt(min(d_out, d_in)) of the `weight` of `module`."""
    w = matrix(module, weight)
    return float(w.float().norm()) / min(w.shape) ** 0.5


def rate(form: str, k: int, scale: float) -> float:
    """share(form) * `scale` * sqrt(64 / `k`), to two digits; `k` below 16 counts as 16 (see `learning_rate`)."""
    return float(f"{FORMS[form].rate * scale * (TUNED_K / max(k, 16)) ** 0.5:.2g}")
