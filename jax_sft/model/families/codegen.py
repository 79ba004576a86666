"""CodeGen: GPT-J with one fused projection, laid out as it was cut for four TPU cores.

Nijkamp et al. (2022), "CodeGen: An Open Large Language Model for Code with Multi-Turn Program
Synthesis"; the options are those of `transformers.CodeGenConfig`. Each core's quarter of the
projection holds queries, values and keys of a quarter of the heads, in that order.
"""

from typing import Any

from jax_sft.model.families import gptj, rows
from jax_sft.model.types import DecoderConfig, Family, Tensor

_NUM_CORES = 4


def decoder_config(config: Any) -> DecoderConfig:
    """Builds the decoder's config from a `transformers.CodeGenConfig`.

    Raises:
        ValueError: an option that is not built.
    """
    if config.n_head % _NUM_CORES:
        raise ValueError(
            f"n_head={config.n_head} does not divide by {_NUM_CORES}, the parts of CodeGen's"
            " fused projection: choose a multiple"
        )
    return gptj.decoder_config(config)


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Returns CodeGen's name table."""
    qkv = tuple(f"layers/attention/{part}" for part in ("query", "value", "key"))
    fused = "transformer.h.{layer}.attn.qkv_proj"
    return (
        *rows.linear(fused, *qkv, bias=False, num_groups=_NUM_CORES),
        *gptj.all_but_qkv(config),
    )


FAMILY = Family(
    decoder_config=decoder_config,
    tensors=tensors,
    prefix="transformer.",
    dropout_fields=gptj.FAMILY.dropout_fields,
    buffers=(r"transformer\.h\.\d+\.attn\.causal_mask",),
    harmless=("n_ctx",),
)
