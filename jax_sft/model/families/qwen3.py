"""Qwen3: Qwen2 with a norm of each head's queries and keys instead of their biases.

Yang et al. (2025), "Qwen3 Technical Report", section 2; the options are those of
`transformers.Qwen3Config`.
"""

import dataclasses
from typing import Any

from jax_sft.model.families import llama, qwen2, rows
from jax_sft.model.types import DecoderConfig, Family, Norm, QKNorm, Tensor


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.Qwen3Config`.

    Raises:
        ValueError: an option that is not built.
    """
    return dataclasses.replace(
        qwen2.decoder_config(config),
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        qk_norm=QKNorm(Norm("rms", config.rms_norm_eps), over="head"),
    )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns Qwen3's name table."""
    return (*llama.tensors(config), *qk_norms())


def qk_norms() -> tuple[Tensor, ...]:
    """The norms of queries and keys."""
    theirs, ours = "model.layers.{layer}.self_attn", "layers/attention"
    return (
        *rows.norm(f"{theirs}.q_norm", f"{ours}/query_norm", bias=False),
        *rows.norm(f"{theirs}.k_norm", f"{ours}/key_norm", bias=False),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
    harmless=qwen2.WINDOW_FIELDS,
)
