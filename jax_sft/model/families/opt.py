"""OPT and Galactica: learned positions from 2 on; norms before or after; narrow embeddings.

Zhang et al. (2022), "OPT: Open Pre-trained Transformer Language Models"; the options are those
of `transformers.OPTConfig`. The 350M model is the odd one: its norms follow each sum, it has no
final norm, and its embeddings are projected to and from the width.
"""

from typing import Any

from jax_sft.model.families import rows
from jax_sft.model.families.options import activation, head_width
from jax_sft.model.types import DecoderConfig, Family, Layer, Norm, Tensor

_EPS = 1e-5  # which the config does not state


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.OPTConfig`.

    Raises:
        ValueError: an option that is not built.
    """
    width = head_width(config, "hidden_size", "num_attention_heads")
    embed_width = config.word_embed_proj_dim
    has_norm_weights = config.layer_norm_elementwise_affine
    norms_first = config.do_layer_norm_before
    return DecoderConfig(
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_width=width,
        mlp_width=config.ffn_dim,
        vocab_size=config.vocab_size,
        num_positions=config.max_position_embeddings,
        layers=(Layer(),) * config.num_hidden_layers,
        norm=Norm("layer", _EPS, scale=has_norm_weights, bias=has_norm_weights),
        activation=activation(config, "activation_function"),
        tied_head=config.tie_word_embeddings,
        init_std=config.init_std,
        residual_init_std=config.init_std,
        embed_width=None if embed_width == config.hidden_size else embed_width,
        positions="learned",
        position_offset=2,
        attention_scale=width**-0.5,
        qkv_bias=config.enable_bias,
        out_bias=config.enable_bias,
        mlp_bias=config.enable_bias,
        block="pre" if norms_first else "sum",
        final_norm=norms_first and not config._remove_final_layer_norm,
        attention_dropout=config.attention_dropout,
        residual_dropout=config.dropout,
    )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns OPT's name table."""
    block, ours = "model.decoder.layers.{layer}", "layers/attention"
    attention = f"{block}.self_attn"
    return (
        Tensor("model.decoder.embed_tokens.weight", ("embed/tokens",), vocabulary=True),
        Tensor("model.decoder.embed_positions.weight", ("embed/positions",)),
        *_projections(config),
        *_norm(config, f"{block}.self_attn_layer_norm", "layers/attention_norm"),
        *rows.linear(f"{attention}.q_proj", f"{ours}/query", bias=config.qkv_bias),
        *rows.linear(f"{attention}.k_proj", f"{ours}/key", bias=config.qkv_bias),
        *rows.linear(f"{attention}.v_proj", f"{ours}/value", bias=config.qkv_bias),
        *rows.linear(f"{attention}.out_proj", f"{ours}/out", bias=config.out_bias),
        *_norm(config, f"{block}.final_layer_norm", "layers/mlp_norm"),
        *rows.linear(f"{block}.fc1", "layers/mlp/up", bias=config.mlp_bias),
        *rows.linear(f"{block}.fc2", "layers/mlp/down", bias=config.mlp_bias),
        *_final_norm(config),
        *rows.head(config),
    )


def _norm(config: DecoderConfig, theirs: str, ours: str) -> tuple[Tensor, ...]:
    return rows.norm(theirs, ours, bias=True) if config.norm.scale else ()


def _final_norm(config: DecoderConfig) -> tuple[Tensor, ...]:
    if not config.final_norm:
        return ()
    return _norm(config, "model.decoder.final_layer_norm", "final_norm")


def _projections(config: DecoderConfig) -> tuple[Tensor, ...]:
    if config.embed_width is None:
        return ()
    return (
        *rows.linear("model.decoder.project_in", "embed/project", bias=False),
        *rows.linear("model.decoder.project_out", "final_project", bias=False),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="model.",
    dropout_fields=(None, "attention_dropout", "dropout"),
    harmless=("layerdrop",),  # drops layers in training
)
