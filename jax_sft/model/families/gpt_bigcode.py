"""GPT-BigCode, which SantaCoder and StarCoder are: GPT-2 with one key/value head.

Ben Allal et al. (2023), "SantaCoder: don't reach for the stars!", and Li et al. (2023),
"StarCoder: may the source be with you!"; the options are those of
`transformers.GPTBigCodeConfig`. The fused projection holds all queries, then the one key and
value; without `multi_query`, query, key and value head by head.
"""

import math
from typing import Any

from jax_sft.model.families import rows
from jax_sft.model.families.options import activation, head_width, require
from jax_sft.model.types import DecoderConfig, Family, Layer, Norm, Tensor


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.GPTBigCodeConfig`.

    Raises:
        ValueError: an option that is not built, such as cross-attention.
    """
    require(config, add_cross_attention=False)
    width = head_width(config, "n_embd", "n_head")
    return DecoderConfig(
        width=config.n_embd,
        num_heads=config.n_head,
        num_kv_heads=1 if config.multi_query else config.n_head,
        head_width=width,
        mlp_width=4 * config.n_embd if config.n_inner is None else config.n_inner,
        vocab_size=config.vocab_size,
        num_positions=config.n_positions,
        layers=(Layer(),) * config.n_layer,
        norm=Norm("layer", config.layer_norm_epsilon, bias=True),
        activation=activation(config, "activation_function"),
        tied_head=config.tie_word_embeddings,
        init_std=config.initializer_range,
        # As in GPT-2 (its paper, section 2.3).
        residual_init_std=config.initializer_range / math.sqrt(2 * config.n_layer),
        positions="learned",
        attention_scale=width**-0.5 if config.scale_attn_weights else 1.0,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        embed_dropout=config.embd_pdrop,
        attention_dropout=config.attn_pdrop,
        residual_dropout=config.resid_pdrop,
    )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns GPT-BigCode's name table."""
    block, ours = "transformer.h.{layer}", "layers/attention"
    qkv = (f"{ours}/query", f"{ours}/key", f"{ours}/value")
    # One group for each key/value head: (q q ... q k v), or q k v, q k v, ...
    groups = config.num_kv_heads
    return (
        Tensor("transformer.wte.weight", ("embed/tokens",), vocabulary=True),
        Tensor("transformer.wpe.weight", ("embed/positions",)),
        *rows.norm(f"{block}.ln_1", "layers/attention_norm", bias=True),
        *rows.linear(f"{block}.attn.c_attn", *qkv, bias=True, num_groups=groups),
        *rows.linear(f"{block}.attn.c_proj", f"{ours}/out", bias=True),
        *rows.norm(f"{block}.ln_2", "layers/mlp_norm", bias=True),
        *rows.linear(f"{block}.mlp.c_fc", "layers/mlp/up", bias=True),
        *rows.linear(f"{block}.mlp.c_proj", "layers/mlp/down", bias=True),
        *rows.norm("transformer.ln_f", "final_norm", bias=True),
        *rows.head(config),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="transformer.",
    dropout_fields=("embd_pdrop", "attn_pdrop", "resid_pdrop"),
    buffers=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)", r"transformer\.bias"),
    # Our scores and softmax are in float32 whatever the first two say; the last follows
    # from multi_query.
    harmless=(
        "attention_softmax_in_fp32",
        "scale_attention_softmax_in_fp32",
        "num_key_value_heads",
    ),
)
