"""Qwen3-MoE: Qwen3 with experts in the place of some or all MLPs, and one window for all layers.

Yang et al. (2025), "Qwen3 Technical Report", section 2; the options are those of
`transformers.Qwen3MoeConfig`. On disk each expert is by itself.
"""

import dataclasses
from typing import Any

from jax_sft.model.families import llama, mixtral, qwen3, rows
from jax_sft.model.types import (
    DecoderConfig,
    Experts,
    Family,
    Layer,
    Norm,
    QKNorm,
    Tensor,
)


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.Qwen3MoeConfig`.

    Raises:
        ValueError: an option that is not built.
    """
    rotary, sparse = llama.rotary(config), sparse_layers(config)
    layers = [Layer(config.sliding_window, rotary, is_sparse) for is_sparse in sparse]
    experts = Experts(
        num_experts=config.num_experts,
        num_chosen=config.num_experts_per_tok,
        mlp_width=config.moe_intermediate_size,
        renormalise=config.norm_topk_prob,
    )
    return dataclasses.replace(
        llama.decoder_config(config, layers),
        mlp_bias=False,
        qk_norm=QKNorm(Norm("rms", config.rms_norm_eps), over="head"),
        experts=experts if any(sparse) else None,
    )


def sparse_layers(config: Any) -> list[bool]:
    """Returns for each layer whether it has experts: every `decoder_sparse_step`th, but for some.

    decoder_sparse_step=2, mlp_only_layers=[3], 6 layers:   MLP  experts  MLP  MLP  MLP  experts
    """
    return [
        config.num_experts > 0
        and (layer + 1) % config.decoder_sparse_step == 0
        and layer not in config.mlp_only_layers
        for layer in range(config.num_hidden_layers)
    ]


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns Qwen3-MoE's name table."""
    dense = any(not layer.sparse for layer in config.layers)
    return (
        *llama.frame(config),
        *llama.attention(config),
        *qwen3.qk_norms(),
        *(llama.mlp(config) if dense else ()),
        *(_experts() if config.experts else ()),
    )


def _experts() -> tuple[Tensor, ...]:
    theirs, ours = "model.layers.{layer}.mlp", "layers/experts"
    return (
        *rows.linear(f"{theirs}.gate", f"{ours}/router", bias=False),
        *rows.linear(f"{theirs}.experts.{{index}}.gate_proj", f"{ours}/gate", bias=False),
        *rows.linear(f"{theirs}.experts.{{index}}.up_proj", f"{ours}/up", bias=False),
        *rows.linear(f"{theirs}.experts.{{index}}.down_proj", f"{ours}/down", bias=False),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
    # The config's class has made `sliding_window` None where it is not used.
    harmless=(*mixtral.AUXILIARY_LOSS_FIELDS, "use_sliding_window"),
)
