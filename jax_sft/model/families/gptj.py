"""GPT-J: parallel blocks under one norm, rotary positions on neighbouring pairs, a head bias.

Wang and Komatsuzaki (2021), "GPT-J-6B: A 6 Billion Parameter Autoregressive Language Model";
the options are those of `transformers.GPTJConfig`. Only the first `rotary_dim` numbers of a
head are turned.
"""

from typing import Any

from jax_sft.model.families import rows
from jax_sft.model.families.options import activation, head_width
from jax_sft.model.families.rotary_options import read_rotary
from jax_sft.model.types import DecoderConfig, Family, Layer, Norm, Tensor

_BASE = 10000.0  # of the rotary positions, which the config does not state


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.GPTJConfig`, or one with its fields.

    Raises:
        ValueError: an option that is not built.
    """
    width = head_width(config, "n_embd", "n_head")
    turned = config.rotary_dim
    if not turned or turned % 2 or turned > width:
        raise ValueError(
            f"rotary_dim={turned!r} is not built: choose an even number from 2 to the heads'"
            f" width, {width}"
        )
    rotary = read_rotary(
        {"rope_theta": _BASE}, width=turned, num_positions=config.n_positions, interleaved=True
    )
    return DecoderConfig(
        width=config.n_embd,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_width=width,
        mlp_width=4 * config.n_embd if config.n_inner is None else config.n_inner,
        vocab_size=config.vocab_size,
        num_positions=config.n_positions,
        layers=(Layer(rotary=rotary),) * config.n_layer,
        norm=Norm("layer", config.layer_norm_epsilon, bias=True),
        activation=activation(config, "activation_function"),
        tied_head=config.tie_word_embeddings,
        init_std=config.initializer_range,
        residual_init_std=config.initializer_range,
        attention_scale=width**-0.5,
        mlp_bias=True,
        block="parallel",
        head_bias=True,
        embed_dropout=config.embd_pdrop,
        attention_dropout=config.attn_pdrop,
        residual_dropout=config.resid_pdrop,
    )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns GPT-J's name table."""
    attention, ours = "transformer.h.{layer}.attn", "layers/attention"
    return (
        *rows.linear(f"{attention}.q_proj", f"{ours}/query", bias=False),
        *rows.linear(f"{attention}.k_proj", f"{ours}/key", bias=False),
        *rows.linear(f"{attention}.v_proj", f"{ours}/value", bias=False),
        *all_but_qkv(config),
    )


def all_but_qkv(config: DecoderConfig) -> tuple[Tensor, ...]:
    """The rows that CodeGen, which fuses queries, keys and values, shares."""
    block = "transformer.h.{layer}"
    return (
        Tensor("transformer.wte.weight", ("embed/tokens",), vocabulary=True),
        *rows.norm(f"{block}.ln_1", "layers/attention_norm", bias=True),
        *rows.linear(f"{block}.attn.out_proj", "layers/attention/out", bias=False),
        *rows.linear(f"{block}.mlp.fc_in", "layers/mlp/up", bias=True),
        *rows.linear(f"{block}.mlp.fc_out", "layers/mlp/down", bias=True),
        *rows.norm("transformer.ln_f", "final_norm", bias=True),
        *rows.head(config),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="transformer.",
    dropout_fields=("embd_pdrop", "attn_pdrop", "resid_pdrop"),
    buffers=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)
