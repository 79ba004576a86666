"""Falcon: parallel or consecutive blocks, one, few or all key/value heads, rotary or linear.

Almazrouei et al. (2023), "The Falcon Series of Open Language Models"; the options are those of
`transformers.FalconConfig`. The 7B and RW models are of the old architecture, where
`multi_query` and `parallel_attn` count; the 40B, 180B and 11B of the new one, whose key/value
heads each come with a group of queries, and whose parallel blocks have one norm or two.
"""

from typing import Any

from jax_sft.model.families import rows
from jax_sft.model.families.bloom import alibi_slopes
from jax_sft.model.families.options import activation, head_width, require
from jax_sft.model.families.rotary_options import context_len, read_rotary
from jax_sft.model.types import Alibi, DecoderConfig, Family, Layer, Norm, Rotary, Tensor


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.FalconConfig`.

    Raises:
        ValueError: an option that is not built.
    """
    width = head_width(config, "hidden_size", "num_attention_heads")
    num_positions = config.max_position_embeddings
    rotary = _rotary(config, width)
    return DecoderConfig(
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=_num_kv_heads(config),
        head_width=width,
        mlp_width=config.ffn_hidden_size,
        vocab_size=config.vocab_size,
        num_positions=context_len(config.rope_parameters, num_positions)
        if rotary
        else num_positions,
        layers=(Layer(rotary=rotary),) * config.num_hidden_layers,
        norm=Norm("layer", config.layer_norm_epsilon, bias=True),
        activation=activation(config, "activation"),
        tied_head=config.tie_word_embeddings,
        init_std=config.initializer_range,
        residual_init_std=config.initializer_range,
        attention_scale=width**-0.5,
        alibi=_alibi(config.num_attention_heads, width) if config.alibi else None,
        qkv_bias=config.bias,
        out_bias=config.bias,
        mlp_bias=config.bias,
        block=_block(config),
        attention_dropout=config.attention_dropout,
        residual_dropout=config.hidden_dropout,
    )


def _num_kv_heads(config: Any) -> int:
    heads, kv_heads = config.num_attention_heads, config.num_kv_heads
    has_one = config.multi_query
    if config.new_decoder_architecture:
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads={heads} does not divide by num_kv_heads={kv_heads}: choose a"
                " multiple"
            )
        return kv_heads
    if has_one:
        return 1
    require(config, num_kv_heads=heads)
    return heads


def _block(config: Any) -> str:
    """Returns the block's order; refuses what `transformers` cannot compute."""
    num_norms = config.num_ln_in_parallel_attn
    if config.new_decoder_architecture:
        require(config, parallel_attn=True)
        known = {None: "parallel, two norms", 2: "parallel, two norms", 1: "parallel"}
    elif config.parallel_attn:
        known = {None: "parallel", 1: "parallel"}
    else:
        return "pre"
    if num_norms not in known:
        raise ValueError(
            f"num_ln_in_parallel_attn={num_norms} is not built for"
            f" new_decoder_architecture={config.new_decoder_architecture}: choose one of"
            f" {list(known)}"
        )
    return known[num_norms]


def _rotary(config: Any, width: int) -> Rotary | None:
    parameters = config.rope_parameters
    if config.alibi:
        return None
    scaled = parameters.get("rope_type", "default") != "default"
    if scaled and parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor={parameters['partial_rotary_factor']} is not built for Falcon:"
            " it turns whole heads"
        )
    return read_rotary(parameters, width=width, num_positions=config.max_position_embeddings)


def _alibi(num_heads: int, width: int) -> Alibi:
    """Scores are (q·k + slope · position) / sqrt(C), with the product in bfloat16."""
    return Alibi(alibi_slopes(num_heads), bfloat16=True, factor=width**-0.5)


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns Falcon's name table."""
    block, ours = "transformer.h.{layer}", "layers/attention"
    fused = f"{block}.self_attention.query_key_value"
    qkv = (f"{ours}/query", f"{ours}/key", f"{ours}/value")
    # Each key/value head comes after its queries.
    groups = config.num_kv_heads
    return (
        Tensor("transformer.word_embeddings.weight", ("embed/tokens",), vocabulary=True),
        *_norms(config),
        *rows.linear(fused, *qkv, bias=config.qkv_bias, num_groups=groups),
        *rows.linear(f"{block}.self_attention.dense", f"{ours}/out", bias=config.out_bias),
        *rows.linear(f"{block}.mlp.dense_h_to_4h", "layers/mlp/up", bias=config.mlp_bias),
        *rows.linear(f"{block}.mlp.dense_4h_to_h", "layers/mlp/down", bias=config.mlp_bias),
        *rows.norm("transformer.ln_f", "final_norm", bias=True),
        *rows.head(config),
    )


def _norms(config: DecoderConfig) -> tuple[Tensor, ...]:
    """The norms of a block, under the names that its order gives them."""
    attention, mlp = {
        "pre": ("input_layernorm", "post_attention_layernorm"),
        "parallel": ("input_layernorm", None),
        "parallel, two norms": ("ln_attn", "ln_mlp"),
    }[config.block]
    block = "transformer.h.{layer}"
    found = rows.norm(f"{block}.{attention}", "layers/attention_norm", bias=True)
    if mlp:
        found += rows.norm(f"{block}.{mlp}", "layers/mlp_norm", bias=True)
    return found


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="transformer.",
    dropout_fields=(None, "attention_dropout", "hidden_dropout"),
    buffers=(r"transformer\.h\.\d+\.self_attention\.rotary_emb\.inv_freq",),
)
