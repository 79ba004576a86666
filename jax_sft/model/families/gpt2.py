"""GPT-2: learned positions, pre-norm blocks, one fused query/key/value projection, tied head.

Weights are Radford et al. (2019), "Language Models are Unsupervised Multitask Learners"; the
options are those of `transformers.GPT2Config`. Its linear layers are `Conv1D`, which stores
[in, out], so that nothing is transposed but an untied head.
"""

import math
from typing import Any

from jax_sft.model.families import rows
from jax_sft.model.families.options import activation, head_width, require
from jax_sft.model.types import DecoderConfig, Family, Layer, Norm, Tensor


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.GPT2Config`.

    Raises:
        ValueError: an option that is not built, such as cross-attention.
    """
    require(config, add_cross_attention=False)
    width = head_width(config, "n_embd", "n_head")
    return DecoderConfig(
        width=config.n_embd,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_width=width,
        mlp_width=4 * config.n_embd if config.n_inner is None else config.n_inner,
        vocab_size=config.vocab_size,
        num_positions=config.n_positions,
        layers=(Layer(),) * config.n_layer,
        norm=Norm("layer", config.layer_norm_epsilon, bias=True),
        activation=activation(config, "activation_function"),
        tied_head=config.tie_word_embeddings,
        init_std=config.initializer_range,
        # GPT-2 paper, section 2.3: residual projections shrink with the depth.
        residual_init_std=config.initializer_range / math.sqrt(2 * config.n_layer),
        positions="learned",
        attention_scale=width**-0.5 if config.scale_attn_weights else 1.0,
        scale_by_layer=config.scale_attn_by_inverse_layer_idx,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        embed_dropout=config.embd_pdrop,
        attention_dropout=config.attn_pdrop,
        residual_dropout=config.resid_pdrop,
    )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns GPT-2's name table."""
    block, ours = "transformer.h.{layer}", "layers/attention"
    qkv = (f"{ours}/query", f"{ours}/key", f"{ours}/value")
    kept = {"bias": True, "transpose": False}
    return (
        Tensor("transformer.wte.weight", ("embed/tokens",), vocabulary=True),
        Tensor("transformer.wpe.weight", ("embed/positions",)),
        *rows.norm(f"{block}.ln_1", "layers/attention_norm", bias=True),
        *rows.linear(f"{block}.attn.c_attn", *qkv, **kept),
        *rows.linear(f"{block}.attn.c_proj", f"{ours}/out", **kept),
        *rows.norm(f"{block}.ln_2", "layers/mlp_norm", bias=True),
        *rows.linear(f"{block}.mlp.c_fc", "layers/mlp/up", **kept),
        *rows.linear(f"{block}.mlp.c_proj", "layers/mlp/down", **kept),
        *rows.norm("transformer.ln_f", "final_norm", bias=True),
        *rows.head(config),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="transformer.",
    dropout_fields=("embd_pdrop", "attn_pdrop", "resid_pdrop"),
    buffers=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    # Of the first, our scores and softmax are in float32 whatever it says.
    harmless=("reorder_and_upcast_attn", "n_ctx"),
)
