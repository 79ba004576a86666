"""StableLM: layer norms, rotary positions on part of a head, and a norm for each head.

Bellagamente et al. (2024), "Stable LM 2 1.6B Technical Report", section 3; the options are those
of `transformers.StableLmConfig`.
"""

from typing import Any

from jax_sft.model.families import llama, rows
from jax_sft.model.families.options import activation, head_width, require, turned_width
from jax_sft.model.families.rotary_options import read_rotary
from jax_sft.model.types import DecoderConfig, Family, Layer, Norm, QKNorm, Tensor


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.StableLmConfig`.

    Raises:
        ValueError: an option that is not built: dropout after the MLP and not after attention.
    """
    require(config, hidden_dropout=0.0)
    width = head_width(config, "hidden_size", "num_attention_heads")
    rotary = read_rotary(
        config.rope_parameters,
        width=turned_width(config, width),
        num_positions=config.max_position_embeddings,
    )
    qk_norm = QKNorm(Norm("layer", config.layer_norm_eps), over="each_head")
    return DecoderConfig(
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_width=width,
        mlp_width=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_positions=llama.num_positions(config),
        layers=(Layer(rotary=rotary),) * config.num_hidden_layers,
        norm=Norm("layer", config.layer_norm_eps, bias=True),
        activation=activation(config, "hidden_act"),
        tied_head=config.tie_word_embeddings,
        init_std=config.initializer_range,
        residual_init_std=config.initializer_range,
        attention_scale=width**-0.5,
        qk_norm=qk_norm if config.qk_layernorm else None,
        qkv_bias=config.use_qkv_bias,
        gated_mlp=True,
        block="parallel" if config.use_parallel_residual else "pre",
        attention_dropout=config.attention_dropout,
    )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns StableLM's name table; each head's norm of queries and keys is a tensor."""
    block, ours = "model.layers.{layer}", "layers/attention"
    table = (
        Tensor("model.embed_tokens.weight", ("embed/tokens",), vocabulary=True),
        *rows.norm(f"{block}.input_layernorm", "layers/attention_norm", bias=True),
        *llama.attention(config),
        *llama.mlp(config),
        *rows.norm("model.norm", "final_norm", bias=True),
        *rows.head(config),
    )
    if config.block == "pre":
        table += rows.norm(f"{block}.post_attention_layernorm", "layers/mlp_norm", bias=True)
    if config.qk_norm is not None:
        head = "norms.{index}"
        query, key = f"{block}.self_attn.q_layernorm", f"{block}.self_attn.k_layernorm"
        table += rows.norm(f"{query}.{head}", f"{ours}/query_norm", bias=False)
        table += rows.norm(f"{key}.{head}", f"{ours}/key_norm", bias=False)
    return table


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="model.",
    dropout_fields=llama.DROPOUT_FIELDS,
    buffers=llama.BUFFERS,
)
