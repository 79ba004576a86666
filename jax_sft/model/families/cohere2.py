"""Cohere 2: Cohere with windows, and layers without a window that know no positions.

Team Cohere (2025), "Command A: An Enterprise-Ready Large Language Model", section 2; the options
are those of `transformers.Cohere2Config`.
"""

from typing import Any

from jax_sft.model.families import cohere, llama
from jax_sft.model.families.options import layer_windows
from jax_sft.model.types import DecoderConfig, Family, Layer


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.Cohere2Config`.

    Raises:
        ValueError: an option that is not built.
    """
    rotary = cohere.rotary(config)
    layers = tuple(
        Layer(window=window, rotary=None if window is None else rotary)
        for window in layer_windows(config)
    )
    return cohere.parallel_config(config, layers=layers)


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=cohere.tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
)
