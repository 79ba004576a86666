"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and windows by layer.

Yang et al. (2024), "Qwen2 Technical Report", section 2.2.1; the options are those of
`transformers.Qwen2Config`.
"""

import dataclasses
from typing import Any

from jax_sft.model.families import llama, options
from jax_sft.model.types import DecoderConfig, Family, Layer

# The config's class has made `layer_types` and `sliding_window` of them.
WINDOW_FIELDS = ("use_sliding_window", "max_window_layers")


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.Qwen2Config`.

    Raises:
        ValueError: an option that is not built.
    """
    rotary = llama.rotary(config)
    return dataclasses.replace(
        llama.without_biases(config),
        layers=tuple(Layer(window=window, rotary=rotary) for window in windows(config)),
        qkv_bias=True,
    )


def windows(config: Any) -> list[int | None]:
    """Returns each layer's window.

    Raises:
        ValueError: a layer type that is not built, or windows that are both on and off.
    """
    if "sliding_attention" in config.layer_types and not config.use_sliding_window:
        raise ValueError(
            "layer_types has 'sliding_attention' with use_sliding_window=False, which is not built:"
            " set use_sliding_window=True and sliding_window, or make all layers full_attention"
        )
    return options.layer_windows(config)


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=llama.tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
    harmless=WINDOW_FIELDS,
)
