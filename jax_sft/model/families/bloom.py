"""BLOOM: linear biases by distance instead of positions, a norm on the embeddings.

BigScience (2022), "BLOOM: A 176B-Parameter Open-Access Multilingual Language Model"; the options
are those of `transformers.BloomConfig`. The fused projection holds query, key and value head by
head.
"""

import math
from typing import Any

import numpy as np

from jax_sft.model.families import rows
from jax_sft.model.families.options import head_width
from jax_sft.model.types import Alibi, DecoderConfig, Family, Layer, Norm, Tensor

# The longest rows that BLOOM was trained on (its paper, table 3). The config has no field for
# them, as the biases reach any length; `seq_length` in config.json, which some checkpoints
# have, takes its place.
_TRAINED_LEN = 2048


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.BloomConfig`.

    Raises:
        ValueError: an option that is not built.
    """
    in_slices, num_slices = config.slow_but_exact, config.pretraining_tp
    if in_slices and num_slices > 1:
        raise ValueError(
            "slow_but_exact=True with pretraining_tp > 1 is not built, as it leaves out biases:"
            " set slow_but_exact=False"
        )
    width = head_width(config, "hidden_size", "n_head")
    from_norm = config.apply_residual_connection_post_layernorm
    return DecoderConfig(
        width=config.hidden_size,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_width=width,
        mlp_width=4 * config.hidden_size,
        vocab_size=config.vocab_size,
        num_positions=getattr(config, "seq_length", None) or _TRAINED_LEN,
        layers=(Layer(),) * config.n_layer,
        norm=Norm("layer", config.layer_norm_epsilon, bias=True),
        activation="gelu_new",
        tied_head=config.tie_word_embeddings,
        init_std=config.initializer_range,
        residual_init_std=config.initializer_range,
        embed_norm=True,
        attention_scale=width**-0.5,
        alibi=Alibi(alibi_slopes(config.n_head)),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        block="pre, from norm" if from_norm else "pre",
        attention_dropout=config.attention_dropout,
        residual_dropout=config.hidden_dropout,
    )


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Returns one slope a head (Press et al. 2022, section 3, and their code).

        8 heads  ->  1/2, 1/4, 1/8, ..., 1/256
        6 heads  ->  1/4, 1/16, 1/64, 1/256 of four heads, and 1/2, 1/8 of eight

    Where their number is no power of two, the next smaller one's slopes are followed by every
    other of the next larger one's. In float32, as `transformers` computes them.
    """
    floor = 2 ** math.floor(math.log2(num_heads))
    slopes = [
        *_geometric(floor, range(1, floor + 1)),
        *_geometric(2 * floor, range(1, 2 * (num_heads - floor), 2)),
    ]
    return tuple(float(slope) for slope in slopes)


def _geometric(num_heads: int, powers: range) -> np.ndarray:
    return np.float32(2.0 ** (-8.0 / num_heads)) ** np.array(powers, np.float32)


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns BLOOM's name table."""
    block, ours = "transformer.h.{layer}", "layers/attention"
    fused = f"{block}.self_attention.query_key_value"
    qkv = (f"{ours}/query", f"{ours}/key", f"{ours}/value")
    return (
        Tensor("transformer.word_embeddings.weight", ("embed/tokens",), vocabulary=True),
        *rows.norm("transformer.word_embeddings_layernorm", "embed/norm", bias=True),
        *rows.norm(f"{block}.input_layernorm", "layers/attention_norm", bias=True),
        *rows.linear(fused, *qkv, bias=True, num_groups=config.num_heads),
        *rows.linear(f"{block}.self_attention.dense", f"{ours}/out", bias=True),
        *rows.norm(f"{block}.post_attention_layernorm", "layers/mlp_norm", bias=True),
        *rows.linear(f"{block}.mlp.dense_h_to_4h", "layers/mlp/up", bias=True),
        *rows.linear(f"{block}.mlp.dense_4h_to_h", "layers/mlp/down", bias=True),
        *rows.norm("transformer.ln_f", "final_norm", bias=True),
        *rows.head(config),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="transformer.",
    dropout_fields=(None, "attention_dropout", "hidden_dropout"),
)
