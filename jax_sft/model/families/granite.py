"""Granite 3 (dense): Llama with factors on embeddings, scores, residuals and logits.

The factors are those of maximal update parametrisation (Yang et al. 2022, "Tensor Programs V");
the options are those of `transformers.GraniteConfig`.
"""

import dataclasses
from typing import Any

from jax_sft.model.families import llama
from jax_sft.model.types import DecoderConfig, Family


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.GraniteConfig`.

    Raises:
        ValueError: an option that is not built.
    """
    return dataclasses.replace(
        llama.decoder_config(config),
        embed_scale=config.embedding_multiplier,
        attention_scale=config.attention_multiplier,
        residual_scale=config.residual_multiplier,
        logit_scale=1 / config.logits_scaling,
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=llama.tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
)
