"""Mixtral: Mistral with a mixture of experts in the place of every MLP.

Jiang et al. (2024), "Mixtral of Experts", section 2.1; the options are those of
`transformers.MixtralConfig`. On disk each expert is by itself, its three kernels named w1 (gate),
w2 (down) and w3 (up).
"""

import dataclasses
from typing import Any

from jax_sft.model.families import llama, rows
from jax_sft.model.types import DecoderConfig, Experts, Family, Layer, Tensor

# Of the training loss, not of the logits.
AUXILIARY_LOSS_FIELDS = ("output_router_logits", "router_aux_loss_coef")


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.MixtralConfig`.

    Raises:
        ValueError: an option that is not built.
    """
    layer = Layer(window=config.sliding_window, rotary=llama.rotary(config), sparse=True)
    return dataclasses.replace(
        llama.without_biases(config, (layer,) * config.num_hidden_layers),
        experts=Experts(
            num_experts=config.num_local_experts,
            num_chosen=config.num_experts_per_tok,
            mlp_width=config.intermediate_size,
            renormalise=True,
        ),
    )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns Mixtral's name table."""
    theirs, ours = "model.layers.{layer}.block_sparse_moe", "layers/experts"
    return (
        *llama.frame(config),
        *llama.attention(config),
        *rows.linear(f"{theirs}.gate", f"{ours}/router", bias=False),
        *rows.linear(f"{theirs}.experts.{{index}}.w1", f"{ours}/gate", bias=False),
        *rows.linear(f"{theirs}.experts.{{index}}.w3", f"{ours}/up", bias=False),
        *rows.linear(f"{theirs}.experts.{{index}}.w2", f"{ours}/down", bias=False),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
    harmless=AUXILIARY_LOSS_FIELDS,
)
