"""What a family's file says about its models: the switches of the decoder, and a name table.

`DecoderConfig` holds every number and switch that the shared decoder reads. `Tensor` is one
row of the table that maps a family's tensor names to ours; that one table drives import,
export, shape errors and the masks over parameters. `Family` puts both together.
"""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape and switches of a decoder.

    Attributes:
        num_layers: blocks (L).
        width: hidden width (D).
        num_heads: query heads (H).
        num_kv_heads: key/value heads (K); divides `num_heads`.
        head_width: width of a head (C).
        mlp_width: inner width of the MLP (F).
        vocab_size: entries of the vocabulary that the tokenizer may use.
        num_positions: longest context, in tokens.
        activation: "gelu" (exact), "gelu_new" (tanh approximation), "relu", "silu" or "tanh".
        norm_eps: added to the variance in a layer norm.
        attention_scale: factor on q·k.
        scale_by_layer: also divide q·k by the layer's number, from 1.
        tied_head: the token embedding is also the output vocabulary.
        init_std: standard deviation of random weights.
        residual_init_std: the same for the projections that write to the residual stream.
        embed_dropout: rate on the embeddings' sum.
        attention_dropout: rate on the attention weights.
        residual_dropout: rate on what a block adds to the residual stream.
    """

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    vocab_size: int
    num_positions: int
    activation: str
    norm_eps: float
    attention_scale: float
    scale_by_layer: bool
    tied_head: bool
    init_std: float
    residual_init_std: float
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One kind of tensor, in the checkpoint and in our parameter tree.

    The checkpoint's tensor, turned to [in, out] where `transpose` says so, is cut along its
    last axis into one part for each of `ours`, and each part is reshaped to our shape:

        theirs                              ours
        h.3.attn.c_attn.weight  [D, 3·D]    layers/attention/query/kernel  [3] of [L, D, H, C]
                                            layers/attention/key/kernel    [3] of [L, D, K, C]
                                            layers/attention/value/kernel  [3] of [L, D, K, C]

    Attributes:
        theirs: name in a `transformers` checkpoint; "{layer}" stands for the layer's number,
            and such tensors are stacked along our leading axis L.
        ours: slash-joined paths in our parameter tree.
        transpose: theirs is [out, in], as in `torch.nn.Linear`.
        vocabulary: the leading axis is the vocabulary, which we may pad for sharding.
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False
    vocabulary: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """What the decoder, import and export need to know about one `model_type`.

    Attributes:
        decoder_config: from a `transformers` config to ours; raises ValueError for an option
            that would change the numbers and is not built.
        tensors: the name table for a config; names as `transformers` writes them.
        prefix: start of the names of the base model's tensors, which may be missing in a file.
        buffers: regular expressions for tensors that are no parameters, and are dropped.
        dropout_fields: the config's names of dropout rates, in the order embed, attention,
            residual.
    """

    decoder_config: Callable[[Any], DecoderConfig]
    tensors: Callable[[DecoderConfig], tuple[Tensor, ...]]
    prefix: str
    buffers: tuple[str, ...]
    dropout_fields: tuple[str, str, str]
