"""Cohere's Command R: parallel blocks, layer norms without bias, rotary positions of neighbours.

Weights are Cohere's (2024), without a paper; the options are those of
`transformers.CohereConfig`. The logits are scaled, and Command R+ norms each head's queries and
keys. Command R7B and Command A are Cohere 2, which takes what is here.
"""

import dataclasses
from typing import Any

from jax_sft.model.families import llama, rows
from jax_sft.model.families.options import activation
from jax_sft.model.types import DecoderConfig, Family, Layer, Norm, QKNorm, Rotary, Tensor


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.CohereConfig`.

    Raises:
        ValueError: an option that is not built.
    """
    qk_norm = QKNorm(norm(config), over="each_head")
    return parallel_config(
        config,
        layers=(Layer(rotary=rotary(config)),) * config.num_hidden_layers,
        qk_norm=qk_norm if config.use_qk_norm else None,
    )


def parallel_config(config: Any, **switches: Any) -> DecoderConfig:
    """Builds what Cohere and Cohere 2 have in common.

    Args:
        config: a config of either.
        **switches: those in which they differ.
    """
    head_width = llama.head_width(config)
    return DecoderConfig(
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_width=head_width,
        mlp_width=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_positions=llama.num_positions(config),
        norm=norm(config),
        activation=activation(config, "hidden_act"),
        tied_head=config.tie_word_embeddings,
        init_std=config.initializer_range,
        residual_init_std=config.initializer_range,
        attention_scale=head_width**-0.5,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        gated_mlp=True,
        block="parallel",
        logit_scale=config.logit_scale,
        attention_dropout=config.attention_dropout or 0.0,
        **switches,
    )


def norm(config: Any) -> Norm:
    """All of Cohere's norms."""
    return Norm("layer", config.layer_norm_eps)


def rotary(config: Any) -> Rotary:
    """Rotary positions that turn neighbours."""
    return dataclasses.replace(llama.rotary(config), interleaved=True)


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns Cohere's name table."""
    block, ours = "model.layers.{layer}", "layers/attention"
    table = (
        Tensor("model.embed_tokens.weight", ("embed/tokens",), vocabulary=True),
        *rows.norm(f"{block}.input_layernorm", "layers/attention_norm", bias=False),
        *llama.attention(config),
        *llama.mlp(config),
        *rows.norm("model.norm", "final_norm", bias=False),
        *rows.head(config),
    )
    if config.qk_norm is not None:
        for theirs, name in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            weight = f"{block}.self_attn.{theirs}.weight"  # [H, C], unlike other norms
            table += (Tensor(weight, (f"{ours}/{name}/scale",), num_row_axes=1),)
    return table


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
)
