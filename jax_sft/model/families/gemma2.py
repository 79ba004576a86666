"""Gemma 2: Gemma with norms around each half of a block, soft caps, and windows in turns.

Gemma Team (2024), "Gemma 2: Improving Open Language Models at a Practical Size", section 2; the
options are those of `transformers.Gemma2Config`. Gemma 3 takes what is here and adds to it.
"""

import math
from typing import Any

from jax_sft.model.families import gemma, llama, rows
from jax_sft.model.families.options import activation, layer_windows, require_off
from jax_sft.model.types import DecoderConfig, Family, Layer, Tensor


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.Gemma2Config`.

    Raises:
        ValueError: an option that is not built, such as attention in both directions.
    """
    rotary = llama.rotary(config)
    layers = tuple(Layer(window=window, rotary=rotary) for window in layer_windows(config))
    return both_norms_config(
        config,
        layers=layers,
        num_positions=llama.num_positions(config),
        attention_softcap=config.attn_logit_softcapping,
    )


def both_norms_config(config: Any, **switches: Any) -> DecoderConfig:
    """Builds what Gemma 2 and 3 have in common.

    Args:
        config: a config of either.
        **switches: those in which they differ.
    """
    require_off(config, "use_bidirectional_attention")
    return DecoderConfig(
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_width=config.head_dim,
        mlp_width=config.intermediate_size,
        vocab_size=config.vocab_size,
        norm=gemma.norm(config),
        activation=activation(config, "hidden_activation"),
        tied_head=config.tie_word_embeddings,
        init_std=config.initializer_range,
        residual_init_std=config.initializer_range,
        embed_scale=math.sqrt(config.hidden_size),
        attention_scale=config.query_pre_attn_scalar**-0.5,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        gated_mlp=True,
        block="both",
        logit_softcap=config.final_logit_softcapping,
        attention_dropout=config.attention_dropout or 0.0,
        **switches,
    )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns Gemma 2's name table; what Llama calls "post" is after attention here."""
    block = "model.layers.{layer}"
    return (
        Tensor("model.embed_tokens.weight", ("embed/tokens",), vocabulary=True),
        *rows.norm(f"{block}.input_layernorm", "layers/attention_norm", bias=False),
        *llama.attention(config),
        *rows.norm(f"{block}.post_attention_layernorm", "layers/attention_post_norm", bias=False),
        *rows.norm(f"{block}.pre_feedforward_layernorm", "layers/mlp_norm", bias=False),
        *llama.mlp(config),
        *rows.norm(f"{block}.post_feedforward_layernorm", "layers/mlp_post_norm", bias=False),
        *rows.norm("model.norm", "final_norm", bias=False),
        *rows.head(config),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
)
