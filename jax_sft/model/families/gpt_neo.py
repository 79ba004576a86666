"""GPT-Neo: GPT-2 with separate, unscaled q, k, v, and windows in every other layer.

Black et al. (2021), "GPT-Neo: Large Scale Autoregressive Language Modeling with
Mesh-Tensorflow"; the options are those of `transformers.GPTNeoConfig`. Scores are not divided
by the root of the head's width, and "local" layers see `window_size` tokens.
"""

from typing import Any

from jax_sft.model.families import rows
from jax_sft.model.families.options import activation, head_width
from jax_sft.model.types import DecoderConfig, Family, Layer, Norm, Tensor


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.GPTNeoConfig`.

    Raises:
        ValueError: an option that is not built.
    """
    inner = config.intermediate_size
    return DecoderConfig(
        width=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        head_width=head_width(config, "hidden_size", "num_heads"),
        mlp_width=4 * config.hidden_size if inner is None else inner,
        vocab_size=config.vocab_size,
        num_positions=config.max_position_embeddings,
        layers=_layers(config),
        norm=Norm("layer", config.layer_norm_epsilon, bias=True),
        activation=activation(config, "activation_function"),
        tied_head=config.tie_word_embeddings,
        init_std=config.initializer_range,
        residual_init_std=config.initializer_range,
        positions="learned",
        out_bias=True,
        mlp_bias=True,
        embed_dropout=config.embed_dropout,
        attention_dropout=config.attention_dropout,
        residual_dropout=config.resid_dropout,
    )


def _layers(config: Any) -> tuple[Layer, ...]:
    """Each layer's window; `attention_layers` is what the config makes of `attention_types`."""
    windows = {"global": None, "local": config.window_size}
    unknown = set(config.attention_layers) - set(windows)
    if unknown:
        raise ValueError(
            f"attention_types has {sorted(unknown)}, which is not built: choose among"
            f" {list(windows)}"
        )
    if len(config.attention_layers) != config.num_layers:
        raise ValueError(
            f"attention_types gives {len(config.attention_layers)} layers, but"
            f" num_layers={config.num_layers}: make them equal"
        )
    return tuple(Layer(window=windows[kind]) for kind in config.attention_layers)


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns GPT-Neo's name table."""
    block, ours = "transformer.h.{layer}", "layers/attention"
    attention = f"{block}.attn.attention"
    return (
        Tensor("transformer.wte.weight", ("embed/tokens",), vocabulary=True),
        Tensor("transformer.wpe.weight", ("embed/positions",)),
        *rows.norm(f"{block}.ln_1", "layers/attention_norm", bias=True),
        *rows.linear(f"{attention}.q_proj", f"{ours}/query", bias=False),
        *rows.linear(f"{attention}.k_proj", f"{ours}/key", bias=False),
        *rows.linear(f"{attention}.v_proj", f"{ours}/value", bias=False),
        *rows.linear(f"{attention}.out_proj", f"{ours}/out", bias=True),
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
    dropout_fields=("embed_dropout", "attention_dropout", "resid_dropout"),
    buffers=(r"transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)",),
    # The windows are read from what the config makes of it.
    harmless=("attention_types",),
)
