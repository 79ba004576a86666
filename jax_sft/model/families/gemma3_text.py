"""Gemma 3, the text model: Gemma 2 with normed queries and keys, and rotary bases by layer type.

Gemma Team (2025), "Gemma 3 Technical Report", section 2; the options are those of
`transformers.Gemma3TextConfig`. Layers with a window and layers without have rotary positions of
their own; the soft cap on attention's scores is gone.
"""

from typing import Any

from jax_sft.model.families import gemma, gemma2, llama, rows
from jax_sft.model.families.options import layer_windows, require_off
from jax_sft.model.families.rotary_options import context_len, read_rotary
from jax_sft.model.types import DecoderConfig, Family, Layer, QKNorm, Tensor


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.Gemma3TextConfig`.

    Raises:
        ValueError: an option that is not built: attention in both directions, or a soft cap on
            scores, which `transformers` has a field for and does not apply.
    """
    require_off(config, "attn_logit_softcapping")
    windows = layer_windows(config)
    rotaries = {
        kind: read_rotary(
            config.rope_parameters[kind],
            width=config.head_dim,
            num_positions=config.max_position_embeddings,
        )
        for kind in set(config.layer_types)
    }
    layers = tuple(
        Layer(window=window, rotary=rotaries[kind])
        for window, kind in zip(windows, config.layer_types, strict=True)
    )
    return gemma2.both_norms_config(
        config,
        layers=layers,
        num_positions=min(
            context_len(config.rope_parameters[kind], config.max_position_embeddings)
            for kind in rotaries
        ),
        qk_norm=QKNorm(gemma.norm(config), over="head"),
    )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns Gemma 3's name table."""
    theirs, ours = "model.layers.{layer}.self_attn", "layers/attention"
    return (
        *gemma2.tensors(config),
        *rows.norm(f"{theirs}.q_norm", f"{ours}/query_norm", bias=False),
        *rows.norm(f"{theirs}.k_norm", f"{ours}/key_norm", bias=False),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
    harmless=("_sliding_window_pattern",),  # the config's class has made `layer_types` of it
)
