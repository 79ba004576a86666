"""XGLM: fixed sine positions from 2 on, scaled embeddings, norms first.

Lin et al. (2021), "Few-shot Learning with Multilingual Language Models"; the options are those
of `transformers.XGLMConfig`.
"""

import math
from typing import Any

from jax_sft.model.families import rows
from jax_sft.model.families.options import activation, head_width, require
from jax_sft.model.types import DecoderConfig, Family, Layer, Norm, Tensor

_EPS = 1e-5  # which the config does not state
_FIRST_POSITION = 2


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.XGLMConfig`.

    Raises:
        ValueError: an option that is not built, such as cross-attention.
    """
    require(config, add_cross_attention=False)
    _check_padding(config.pad_token_id)
    width = head_width(config, "d_model", "attention_heads")
    return DecoderConfig(
        width=config.d_model,
        num_heads=config.attention_heads,
        num_kv_heads=config.attention_heads,
        head_width=width,
        mlp_width=config.ffn_dim,
        vocab_size=config.vocab_size,
        num_positions=config.max_position_embeddings,
        layers=(Layer(),) * config.num_layers,
        norm=Norm("layer", _EPS, bias=True),
        activation=activation(config, "activation_function"),
        tied_head=config.tie_word_embeddings,
        init_std=config.init_std,
        residual_init_std=config.init_std,
        embed_scale=math.sqrt(config.d_model) if config.scale_embedding else 1.0,
        positions="sinusoidal",
        position_offset=_FIRST_POSITION,
        attention_scale=width**-0.5,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        embed_dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        residual_dropout=config.dropout,
    )


def _check_padding(pad_token_id: int | None) -> None:
    """The sines of the position numbered as the pad token are zero; no text may reach it."""
    if pad_token_id is not None and not 0 <= pad_token_id < _FIRST_POSITION:
        raise ValueError(
            f"pad_token_id={pad_token_id} is not built: XGLM erases the position of that number,"
            " so that only None, 0 and 1 leave every token its position"
        )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns XGLM's name table."""
    block, ours = "model.layers.{layer}", "layers/attention"
    attention = f"{block}.self_attn"
    return (
        Tensor("model.embed_tokens.weight", ("embed/tokens",), vocabulary=True),
        *rows.norm(f"{block}.self_attn_layer_norm", "layers/attention_norm", bias=True),
        *rows.linear(f"{attention}.q_proj", f"{ours}/query", bias=True),
        *rows.linear(f"{attention}.k_proj", f"{ours}/key", bias=True),
        *rows.linear(f"{attention}.v_proj", f"{ours}/value", bias=True),
        *rows.linear(f"{attention}.out_proj", f"{ours}/out", bias=True),
        *rows.norm(f"{block}.final_layer_norm", "layers/mlp_norm", bias=True),
        *rows.linear(f"{block}.fc1", "layers/mlp/up", bias=True),
        *rows.linear(f"{block}.fc2", "layers/mlp/down", bias=True),
        *rows.norm("model.layer_norm", "final_norm", bias=True),
        *rows.head(config),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="model.",
    dropout_fields=("dropout", "attention_dropout", "dropout"),
    buffers=(r"model\.embed_positions\.weights",),
    # The first two drop in training, in places where the decoder does not.
    harmless=("activation_dropout", "layerdrop", "decoder_start_token_id"),
)
