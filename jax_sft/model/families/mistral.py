"""Mistral: Llama whose attention sees a window of the past, the same in every layer.

Jiang et al. (2023), "Mistral 7B", section 2; the options are those of
`transformers.MistralConfig`.
"""

from typing import Any

from jax_sft.model.families import llama
from jax_sft.model.types import DecoderConfig, Family, Layer


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.MistralConfig`.

    Raises:
        ValueError: an option that is not built.
    """
    layer = Layer(window=config.sliding_window, rotary=llama.rotary(config))
    return llama.without_biases(config, (layer,) * config.num_hidden_layers)


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=llama.tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
)
