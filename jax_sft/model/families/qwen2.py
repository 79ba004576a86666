"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and windows by layer.

Yang et al. (2024), "Qwen2 Technical Report", section 2.2.1; the options are those of
`transformers.Qwen2Config`.
"""

import dataclasses
from typing import Any

from jax_sft.model.families import llama
from jax_sft.model.families.options import layer_windows
from jax_sft.model.types import DecoderConfig, Family, Layer

# The config's class has made `layer_types` and `sliding_window` of them.
WINDOW_FIELDS = ("use_sliding_window", "max_window_layers")


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.Qwen2Config`.

    Raises:
        ValueError: an option that is not built.
    """
    rotary = llama.rotary(config)
    layers = [Layer(window=window, rotary=rotary) for window in layer_windows(config)]
    return dataclasses.replace(llama.without_biases(config, layers), qkv_bias=True)


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=llama.tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
    harmless=WINDOW_FIELDS,
)
