"""GPT-NeoX and Pythia: parallel blocks with two norms, partial rotary positions, fused heads.

Black et al. (2022), "GPT-NeoX-20B", and Biderman et al. (2023), "Pythia"; the options are those
of `transformers.GPTNeoXConfig`. The fused projection holds query, key and value head by head,
and an untied head is written as `embed_out`.
"""

from typing import Any

from jax_sft.model.families import rows
from jax_sft.model.families.options import activation, head_width
from jax_sft.model.families.rotary_options import context_len, read_rotary
from jax_sft.model.types import DecoderConfig, Family, Layer, Norm, Rotary, Tensor


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.GPTNeoXConfig`.

    Raises:
        ValueError: an option that is not built.
    """
    width = head_width(config, "hidden_size", "num_attention_heads")
    return DecoderConfig(
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_width=width,
        mlp_width=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_positions=context_len(config.rope_parameters, config.max_position_embeddings),
        layers=(Layer(rotary=_rotary(config, width)),) * config.num_hidden_layers,
        norm=Norm("layer", config.layer_norm_eps, bias=True),
        activation=activation(config, "hidden_act"),
        tied_head=config.tie_word_embeddings,
        init_std=config.initializer_range,
        residual_init_std=config.initializer_range,
        attention_scale=width**-0.5,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        mlp_bias=True,
        block="parallel, two norms" if config.use_parallel_residual else "pre",
        embed_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        residual_dropout=config.hidden_dropout,
    )


def _rotary(config: Any, width: int) -> Rotary:
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    turned = int(width * share)
    if turned < 2 or turned % 2 or turned > width:
        raise ValueError(
            f"partial_rotary_factor={share} turns {turned} of a head's {width} numbers, which is"
            f" not built: choose one that turns an even number from 2 to {width}"
        )
    return read_rotary(
        config.rope_parameters, width=turned, num_positions=config.max_position_embeddings
    )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns GPT-NeoX's name table."""
    block, ours = "gpt_neox.layers.{layer}", "layers/attention"
    fused = f"{block}.attention.query_key_value"
    qkv = (f"{ours}/query", f"{ours}/key", f"{ours}/value")
    return (
        Tensor("gpt_neox.embed_in.weight", ("embed/tokens",), vocabulary=True),
        *rows.norm(f"{block}.input_layernorm", "layers/attention_norm", bias=True),
        *rows.norm(f"{block}.post_attention_layernorm", "layers/mlp_norm", bias=True),
        *rows.linear(fused, *qkv, bias=config.qkv_bias, num_groups=config.num_heads),
        *rows.linear(f"{block}.attention.dense", f"{ours}/out", bias=config.out_bias),
        *rows.linear(f"{block}.mlp.dense_h_to_4h", "layers/mlp/up", bias=True),
        *rows.linear(f"{block}.mlp.dense_4h_to_h", "layers/mlp/down", bias=True),
        *rows.norm("gpt_neox.final_layer_norm", "final_norm", bias=True),
        *rows.head(config, "embed_out"),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="gpt_neox.",
    dropout_fields=("hidden_dropout", "attention_dropout", "hidden_dropout"),
    buffers=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    harmless=("is_decoder",),
)
