"""SmolLM3: Llama whose every fourth layer has no rotary positions.

Yang et al. (2025), "RoPE to NoPE and Back Again", is where it takes that from; the options are
those of `transformers.SmolLM3Config`.
"""

from typing import Any

from jax_sft.model.families import llama
from jax_sft.model.families.options import layer_windows, require
from jax_sft.model.types import DecoderConfig, Family, Layer


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.SmolLM3Config`.

    Raises:
        ValueError: an option that is not built.
    """
    if "sliding_attention" in config.layer_types:
        require(config, use_sliding_window=True)
    rotary = llama.rotary(config)
    # Despite its name, `no_rope_layers` is 1 where a layer has rotary positions; it may be longer
    # than the model.
    turned = config.no_rope_layers[: config.num_hidden_layers]
    layers = [
        Layer(window=window, rotary=rotary if is_turned else None)
        for window, is_turned in zip(layer_windows(config), turned, strict=True)
    ]
    return llama.decoder_config(config, layers)


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=llama.tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
    # The config's class has made `layer_types` and `no_rope_layers` of them.
    harmless=("use_sliding_window", "no_rope_layer_interval"),
)
