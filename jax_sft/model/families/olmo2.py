"""OLMo 2: RMS norms after attention and MLP instead of before, and of queries and keys.

Team OLMo (2025), "2 OLMo 2 Furious", section 2; the options are those of
`transformers.Olmo2Config`. The norms of queries and keys are over all heads together.
"""

import dataclasses
from typing import Any

from jax_sft.model.families import llama, olmo, rows
from jax_sft.model.types import DecoderConfig, Family, Norm, QKNorm, Tensor


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.Olmo2Config`.

    Raises:
        ValueError: an option that is not built.
    """
    norm = Norm("rms", config.rms_norm_eps)
    return dataclasses.replace(
        olmo.decoder_config(config),
        norm=norm,
        qk_norm=QKNorm(norm, over="all_heads"),
        block="post",
    )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns OLMo 2's name table."""
    block, ours = "model.layers.{layer}", "layers/attention"
    return (
        *olmo.tensors(config),
        *rows.norm(f"{block}.self_attn.q_norm", f"{ours}/query_norm", bias=False),
        *rows.norm(f"{block}.self_attn.k_norm", f"{ours}/key_norm", bias=False),
        *rows.norm(f"{block}.post_attention_layernorm", "layers/attention_post_norm", bias=False),
        *rows.norm(f"{block}.post_feedforward_layernorm", "layers/mlp_post_norm", bias=False),
        *rows.norm("model.norm", "final_norm", bias=False),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
)
