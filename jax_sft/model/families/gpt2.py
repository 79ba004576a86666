"""GPT-2: learned positions, pre-norm blocks, one fused query/key/value projection, tied head.

Weights are Radford et al. (2019), "Language Models are Unsupervised Multitask Learners"; the
options are those of `transformers.GPT2Config`. Its linear layers are `Conv1D`, which stores
[in, out], so that nothing is transposed but an untied head.
"""

import math
from typing import Any

from jax_sft.model.types import DecoderConfig, Family, Tensor

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.GPT2Config`.

    `reorder_and_upcast_attn` changes only how half precision rounds; our scores and softmax
    are in float32 whatever it says.

    Raises:
        ValueError: an unknown activation, a width that the heads do not divide, or
            cross-attention.
    """
    if config.add_cross_attention:
        raise ValueError("add_cross_attention=True is for encoder-decoders: set it to False")
    if config.activation_function not in ACTIVATIONS:
        raise ValueError(
            f"activation_function={config.activation_function!r} is not built: "
            f"choose one of {sorted(ACTIVATIONS)}"
        )
    if config.n_embd % config.n_head:
        raise ValueError(
            f"n_embd={config.n_embd} does not divide by n_head={config.n_head}: "
            "choose a multiple of it"
        )
    head_width = config.n_embd // config.n_head
    return DecoderConfig(
        num_layers=config.n_layer,
        width=config.n_embd,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_width=head_width,
        mlp_width=4 * config.n_embd if config.n_inner is None else config.n_inner,
        vocab_size=config.vocab_size,
        num_positions=config.n_positions,
        activation=ACTIVATIONS[config.activation_function],
        norm_eps=config.layer_norm_epsilon,
        attention_scale=head_width**-0.5 if config.scale_attn_weights else 1.0,
        scale_by_layer=config.scale_attn_by_inverse_layer_idx,
        tied_head=config.tie_word_embeddings,
        init_std=config.initializer_range,
        # GPT-2 paper, section 2.3: residual projections shrink with the depth.
        residual_init_std=config.initializer_range / math.sqrt(2 * config.n_layer),
        embed_dropout=config.embd_pdrop,
        attention_dropout=config.attn_pdrop,
        residual_dropout=config.resid_pdrop,
    )


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns GPT-2's name table."""
    block = "transformer.h.{layer}"
    attention = "layers/attention"
    return (
        Tensor("transformer.wte.weight", ("embed/tokens",), vocabulary=True),
        Tensor("transformer.wpe.weight", ("embed/positions",)),
        *_norm(f"{block}.ln_1", "layers/attention_norm"),
        *_linear(
            f"{block}.attn.c_attn", *(f"{attention}/{name}" for name in ("query", "key", "value"))
        ),
        *_linear(f"{block}.attn.c_proj", f"{attention}/out"),
        *_norm(f"{block}.ln_2", "layers/mlp_norm"),
        *_linear(f"{block}.mlp.c_fc", "layers/mlp/up"),
        *_linear(f"{block}.mlp.c_proj", "layers/mlp/down"),
        *_norm("transformer.ln_f", "final_norm"),
        *(
            ()
            if config.tied_head
            else (Tensor("lm_head.weight", ("head/kernel",), vocabulary=True),)
        ),
    )


def _norm(theirs: str, ours: str) -> tuple[Tensor, Tensor]:
    return (
        Tensor(f"{theirs}.weight", (f"{ours}/scale",)),
        Tensor(f"{theirs}.bias", (f"{ours}/bias",)),
    )


def _linear(theirs: str, *ours: str) -> tuple[Tensor, Tensor]:
    return (
        Tensor(f"{theirs}.weight", tuple(f"{name}/kernel" for name in ours)),
        Tensor(f"{theirs}.bias", tuple(f"{name}/bias" for name in ours)),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="transformer.",
    buffers=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    dropout_fields=("embd_pdrop", "attn_pdrop", "resid_pdrop"),
)
