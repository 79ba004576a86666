"""Gemma: Llama with a scaled embedding, norms stored as their distance from 1, a GELU gate.

Gemma Team (2024), "Gemma: Open Models Based on Gemini Research and Technology"; the options are
those of `transformers.GemmaConfig`. Heads may be wider than the width over their number.
"""

import dataclasses
import math
from typing import Any

from jax_sft.model.families import llama
from jax_sft.model.families.options import require_off
from jax_sft.model.types import DecoderConfig, Family, Norm


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.GemmaConfig`.

    Raises:
        ValueError: an option that is not built, such as attention in both directions.
    """
    require_off(config, "use_bidirectional_attention")
    return dataclasses.replace(
        llama.decoder_config(config),
        norm=norm(config),
        mlp_bias=False,
        embed_scale=math.sqrt(config.hidden_size),
    )


def norm(config: Any) -> Norm:
    """All of Gemma's norms: the checkpoint stores 0 where the factor is 1."""
    return Norm("rms", config.rms_norm_eps, scale_offset=1.0)


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=llama.tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
)
