"""Phi-3, Phi-3.5 and Phi-4: Llama with fused projections, partial rotary positions and LongRoPE.

Abdin et al. (2024), "Phi-3 Technical Report"; the options are those of `transformers.Phi3Config`.
One kernel makes queries, keys and values, another gate and up.
"""

import dataclasses
from typing import Any

from jax_sft.model.families import llama, rows
from jax_sft.model.families.options import turned_width
from jax_sft.model.families.rotary_options import read_rotary
from jax_sft.model.types import DecoderConfig, Family, Layer, Tensor


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.Phi3Config`.

    Raises:
        ValueError: an option that is not built.
    """
    rotary = read_rotary(
        config.rope_parameters,
        width=turned_width(config, llama.head_width(config)),
        num_positions=config.max_position_embeddings,
    )
    layer = Layer(window=config.sliding_window, rotary=rotary)
    return dataclasses.replace(
        llama.without_biases(config, (layer,) * config.num_hidden_layers),
        residual_dropout=config.resid_pdrop,
        # As in `Phi3ForCausalLM.prepare_inputs_for_generation`; other families with LongRoPE, and
        # any with dynamic NTK scaling, keep in `transformers` the keys that they have cached.
        recompute_from=rotary.long_from,
    )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns Phi-3's name table."""
    block = "model.layers.{layer}"
    qkv = (f"layers/attention/{name}" for name in ("query", "key", "value"))
    return (
        *llama.frame(config),
        *rows.linear(f"{block}.self_attn.qkv_proj", *qkv, bias=False),
        *rows.linear(f"{block}.self_attn.o_proj", "layers/attention/out", bias=False),
        *rows.linear(f"{block}.mlp.gate_up_proj", "layers/mlp/gate", "layers/mlp/up", bias=False),
        *rows.linear(f"{block}.mlp.down_proj", "layers/mlp/down", bias=False),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="model.",
    dropout_fields=(None, "attention_dropout", "resid_pdrop"),
    buffers=llama.BUFFERS,
    # Of the first, the config's class has made a part of `rope_parameters`; the second is a rate
    # that `transformers` does not apply.
    harmless=("original_max_position_embeddings", "embd_pdrop"),
)
