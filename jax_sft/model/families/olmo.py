"""OLMo 1: Llama with norms that have neither factor nor bias.

Groeneveld et al. (2024), "OLMo: Accelerating the Science of Language Models", section 2.1; the
options are those of `transformers.OlmoConfig`. OLMo 2 takes what is here and moves the norms.
"""

from typing import Any

from jax_sft.model.families import llama, rows
from jax_sft.model.families.options import activation, require_off
from jax_sft.model.types import DecoderConfig, Family, Layer, Norm, Tensor


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.OlmoConfig`, or one with its fields.

    Raises:
        ValueError: an option that is not built, such as clipped queries, keys and values.
    """
    require_off(config, "clip_qkv")
    head_width = llama.head_width(config)
    return DecoderConfig(
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_width=head_width,
        mlp_width=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_positions=llama.num_positions(config),
        layers=(Layer(rotary=llama.rotary(config)),) * config.num_hidden_layers,
        norm=Norm("layer", 1e-5, scale=False),  # no field of the config states the 1e-5
        activation=activation(config, "hidden_act"),
        tied_head=config.tie_word_embeddings,
        init_std=config.initializer_range,
        residual_init_std=config.initializer_range,
        attention_scale=head_width**-0.5,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        gated_mlp=True,
        attention_dropout=config.attention_dropout,
    )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns OLMo's name table: its norms have no tensors."""
    return (
        Tensor("model.embed_tokens.weight", ("embed/tokens",), vocabulary=True),
        *llama.attention(config),
        *llama.mlp(config),
        *rows.head(config),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
)
