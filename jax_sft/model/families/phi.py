"""Phi 1, 1.5 and 2: parallel blocks, rotary positions on part of a head, biases everywhere.

Gunasekar et al. (2023), "Textbooks Are All You Need", and Li et al. (2023), "Textbooks Are All
You Need II: phi-1.5"; the options are those of `transformers.PhiConfig`. The logits have a bias,
and Phi-3 and later are another family.
"""

from typing import Any

from jax_sft.model.families import llama, rows
from jax_sft.model.families.options import activation, turned_width
from jax_sft.model.families.rotary_options import read_rotary
from jax_sft.model.types import DecoderConfig, Family, Layer, Norm, QKNorm, Tensor


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.PhiConfig`.

    Raises:
        ValueError: an option that is not built.
    """
    head_width = llama.head_width(config)
    rotary = read_rotary(
        config.rope_parameters,
        width=turned_width(config, head_width),
        num_positions=config.max_position_embeddings,
    )
    norm = Norm("layer", config.layer_norm_eps, bias=True)
    return DecoderConfig(
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_width=head_width,
        mlp_width=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_positions=llama.num_positions(config),
        layers=(Layer(rotary=rotary),) * config.num_hidden_layers,
        norm=norm,
        activation=activation(config, "hidden_act"),
        tied_head=config.tie_word_embeddings,
        init_std=config.initializer_range,
        residual_init_std=config.initializer_range,
        attention_scale=head_width**-0.5,
        qk_norm=QKNorm(norm, over="head") if config.qk_layernorm else None,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        block="parallel",
        head_bias=True,
        embed_dropout=config.embd_pdrop,
        attention_dropout=config.attention_dropout or 0.0,
        residual_dropout=config.resid_pdrop,
    )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns Phi's name table."""
    block, ours = "model.layers.{layer}", "layers/attention"
    table = (
        Tensor("model.embed_tokens.weight", ("embed/tokens",), vocabulary=True),
        *rows.norm(f"{block}.input_layernorm", "layers/attention_norm", bias=True),
        *rows.linear(f"{block}.self_attn.q_proj", f"{ours}/query", bias=True),
        *rows.linear(f"{block}.self_attn.k_proj", f"{ours}/key", bias=True),
        *rows.linear(f"{block}.self_attn.v_proj", f"{ours}/value", bias=True),
        *rows.linear(f"{block}.self_attn.dense", f"{ours}/out", bias=True),
        *rows.linear(f"{block}.mlp.fc1", "layers/mlp/up", bias=True),
        *rows.linear(f"{block}.mlp.fc2", "layers/mlp/down", bias=True),
        *rows.norm("model.final_layernorm", "final_norm", bias=True),
        *rows.head(config),
    )
    if config.qk_norm is not None:
        table += rows.norm(f"{block}.self_attn.q_layernorm", f"{ours}/query_norm", bias=True)
        table += rows.norm(f"{block}.self_attn.k_layernorm", f"{ours}/key_norm", bias=True)
    return table


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="model.",
    dropout_fields=("embd_pdrop", "attention_dropout", "resid_pdrop"),
    buffers=llama.BUFFERS,
)
