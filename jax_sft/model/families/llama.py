"""Llama 1 to 3.3: RMS norms, rotary positions, grouped heads, gated MLP.

Touvron et al. (2023), "LLaMA", and Grattafiori et al. (2024), "The Llama 3 Herd of Models";
the options are those of `transformers.LlamaConfig`. A family that is Llama but for a switch
takes what is here and replaces that.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax_sft.model.families import options, rows
from jax_sft.model.families.rotary_options import context_len, read_rotary
from jax_sft.model.types import DecoderConfig, Family, Layer, Norm, Rotary, Tensor

DROPOUT_FIELDS = (None, "attention_dropout", None)
# Older checkpoints hold them.
BUFFERS = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


def decoder_config(config: Any, layers: Sequence[Layer] | None = None) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.LlamaConfig`, or one with its fields.

    Args:
        config: the config.
        layers: a family's own; None for Llama's, which are all alike.

    Raises:
        ValueError: an option that is not built.
    """
    if layers is None:
        layers = (Layer(rotary=rotary(config)),) * config.num_hidden_layers
    attention_bias = getattr(config, "attention_bias", False)
    return DecoderConfig(
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_width=head_width(config),
        mlp_width=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_positions=num_positions(config),
        layers=tuple(layers),
        norm=Norm("rms", config.rms_norm_eps),
        activation=options.activation(config, "hidden_act"),
        tied_head=config.tie_word_embeddings,
        init_std=config.initializer_range,
        residual_init_std=config.initializer_range,
        attention_scale=head_width(config) ** -0.5,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=getattr(config, "mlp_bias", False),
        gated_mlp=True,
        attention_dropout=config.attention_dropout,
    )


def without_biases(config: Any, layers: Sequence[Layer]) -> DecoderConfig:
    """Builds the same for a family that has no biases, whatever fields its config carries."""
    return dataclasses.replace(
        decoder_config(config, layers), qkv_bias=False, out_bias=False, mlp_bias=False
    )


def head_width(config: Any) -> int:
    """Returns `head_dim`, which some families' configs need not have."""
    stated = getattr(config, "head_dim", None)
    return stated or options.head_width(config, "hidden_size", "num_attention_heads")


def rotary(config: Any) -> Rotary:
    """Returns the rotary positions of a config whose layers and whole heads are turned alike.

    Raises:
        ValueError: an option that is not built.
    """
    parameters = config.rope_parameters
    share = parameters.get("partial_rotary_factor", 1.0)
    # Without scaling, `transformers` does not read it here.
    if parameters.get("rope_type", "default") != "default" and share != 1.0:
        raise ValueError(
            f"partial_rotary_factor={share} with rope_type={parameters['rope_type']!r} is not"
            " built for this model_type: only 1.0 is"
        )
    return read_rotary(
        parameters, width=head_width(config), num_positions=config.max_position_embeddings
    )


def num_positions(config: Any) -> int:
    """Returns the longest context."""
    return context_len(config.rope_parameters, config.max_position_embeddings)


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns Llama's name table."""
    return (*frame(config), *attention(config), *mlp(config))


def frame(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Everything but what the norms stand before: embedding, norms, head."""
    block = "model.layers.{layer}"
    return (
        Tensor("model.embed_tokens.weight", ("embed/tokens",), vocabulary=True),
        *rows.norm(f"{block}.input_layernorm", "layers/attention_norm", bias=False),
        *rows.norm(f"{block}.post_attention_layernorm", "layers/mlp_norm", bias=False),
        *rows.norm("model.norm", "final_norm", bias=False),
        *rows.head(config),
    )


def attention(config: DecoderConfig) -> tuple[Tensor, ...]:
    """The four projections, each by itself."""
    theirs, ours = "model.layers.{layer}.self_attn", "layers/attention"
    return (
        *rows.linear(f"{theirs}.q_proj", f"{ours}/query", bias=config.qkv_bias),
        *rows.linear(f"{theirs}.k_proj", f"{ours}/key", bias=config.qkv_bias),
        *rows.linear(f"{theirs}.v_proj", f"{ours}/value", bias=config.qkv_bias),
        *rows.linear(f"{theirs}.o_proj", f"{ours}/out", bias=config.out_bias),
    )


def mlp(config: DecoderConfig) -> tuple[Tensor, ...]:
    """The gated MLP's three."""
    theirs, ours = "model.layers.{layer}.mlp", "layers/mlp"
    return (
        *rows.linear(f"{theirs}.gate_proj", f"{ours}/gate", bias=config.mlp_bias),
        *rows.linear(f"{theirs}.up_proj", f"{ours}/up", bias=config.mlp_bias),
        *rows.linear(f"{theirs}.down_proj", f"{ours}/down", bias=config.mlp_bias),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="model.",
    dropout_fields=DROPOUT_FIELDS,
    buffers=BUFFERS,
    harmless=("pretraining_tp",),  # splits products, and changes only how they round
)
