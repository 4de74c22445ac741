"""PhotonicGPT, the papers' GPT of 10,193,152 parameters, as an ordinary transformers causal language model.

Pre-norm GPT-2 (Radford et al. 2019) with LayerNorm, a GELU MLP of four times the width, a fused qkv projection, learned
positions, biases and a tied output head. Importing this file registers it with transformers' Auto classes.
"""

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ctsft.errors import CTError


class PhotonicGPTConfig(PreTrainedConfig):
    """Shape of a PhotonicGPT; the defaults are the papers'.

    `tie_word_embeddings=False` gives the output head its own weights. On a checkpoint that was trained tied these are
    random: that is the bug of papers 81 and 82, whose first loss was above that of a uniform guess.

    Raises CTError if `n_head` does not divide `n_embd`.
    """

    model_type = "photonic_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }

    vocab_size: int = 15_007
    n_embd: int = 256
    n_layer: int = 8
    n_head: int = 4
    n_positions: int = 128
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.n_embd % self.n_head:
            raise CTError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}: choose a divisor.")


class ResidualLinear(nn.Linear):
    """A projection that writes into the residual stream: GPT-2 starts it smaller, see `_init_weights`.

    It has a class of its own because transformers initialises, outside its own package, only modules that hold weights.
    """


class Attention(nn.Module):
    def __init__(self, config: PhotonicGPTConfig, layer: int) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.layer = layer
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = ResidualLinear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer)
        # Without a mask the queries are either the whole sequence or its last token, which may see all keys.
        causal = mask is None and q.shape[-2] > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: PhotonicGPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down = ResidualLinear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(GradientCheckpointingLayer):
    def __init__(self, config: PhotonicGPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, past_key_values: Cache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, past_key_values)
        return x + self.mlp(self.ln_2(x))


class PhotonicGPTPreTrainedModel(PreTrainedModel):
    config: PhotonicGPTConfig
    config_class = PhotonicGPTConfig
    base_model_prefix = "model"
    _input_embed_layer = "tok_emb"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_record_outputs = {"hidden_states": Block}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResidualLinear):
            init.normal_(module.weight, std=self.config.initializer_range / math.sqrt(2 * self.config.n_layer))


class PhotonicGPTModel(PhotonicGPTPreTrainedModel):
    """Embeddings, blocks and the last norm, without the output head."""

    def __init__(self, config: PhotonicGPTConfig) -> None:
        super().__init__(config)
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Embedding(config.n_positions, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (batch, length, n_embd) of `input_ids` or `inputs_embeds`.

        `attention_mask` (batch, past + length) is 1 for tokens and 0 for padding on either side; positions are counted
        from it when `position_ids` (batch, length) are not given.

        Raises CTError if a token lies beyond the `n_positions` learned positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise CTError("PhotonicGPT needs either input_ids or inputs_embeds: pass exactly one of them.")
        if inputs_embeds is None:
            inputs_embeds = self.tok_emb(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        length = inputs_embeds.shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            else:
                position_ids = torch.arange(past, past + length, device=inputs_embeds.device)[None]
        n_positions = self.config.n_positions
        if past + length > n_positions and (last := int(position_ids.max()) + 1) > n_positions:
            raise CTError(
                f"The text of {last} tokens is longer than the {n_positions} positions of this PhotonicGPT: "
                "cut it, or generate fewer new tokens."
            )

        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        x = inputs_embeds + self.pos_emb(position_ids)
        for block in self.blocks:
            x = block(x, mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(x), past_key_values=past_key_values)


class PhotonicGPTForCausalLM(PhotonicGPTPreTrainedModel, GenerationMixin):
    """PhotonicGPT with its output head, which shares the token embedding's weight unless `tie_word_embeddings=False`.

    An untied model whose first loss is worse than a uniform guess, ln(vocab_size), says so in one UserWarning.
    """

    _tied_weights_keys = {"head.weight": "model.tok_emb.weight"}

    def __init__(self, config: PhotonicGPTConfig) -> None:
        super().__init__(config)
        self.model = PhotonicGPTModel(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._first_loss_seen = False
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, length, vocab_size), of the last `logits_to_keep` tokens only if that is not 0.

        With `labels` (batch, length; -100 is ignored) also the loss: mean nats per predicted token, or their sum
        divided by `num_items_in_batch` if that is given. The labels are shifted here.
        The rest is as in PhotonicGPTModel.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            self._check_first_loss(logits.detach(), labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _check_first_loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> None:
        if self._first_loss_seen or self.config.tie_word_embeddings:
            return
        self._first_loss_seen = True
        vocab_size = self.config.vocab_size
        per_token = {**kwargs, "num_items_in_batch": None}
        loss = self.loss_function(logits, labels, vocab_size=vocab_size, **per_token).item()
        if loss > math.log(vocab_size):
            warnings.warn(
                f"the first loss {loss:.2f} nats per token is above ln({vocab_size}) = {math.log(vocab_size):.2f}, "
                "worse than uniform: is the output head random (tie_word_embeddings=False)?",
                stacklevel=2,
            )


# exist_ok: the file may be imported again in the same process, for example by importlib.reload.
AutoConfig.register(PhotonicGPTConfig.model_type, PhotonicGPTConfig, exist_ok=True)
AutoModel.register(PhotonicGPTConfig, PhotonicGPTModel, exist_ok=True)
AutoModelForCausalLM.register(PhotonicGPTConfig, PhotonicGPTForCausalLM, exist_ok=True)
