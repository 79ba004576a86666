"""What a family's file says about its models: the switches of the decoder, and a name table.

`DecoderConfig` holds every number and switch that the shared decoder reads. `Tensor` is one
row of the table that maps a family's tensor names to ours; that one table drives import,
export, shape errors, LoRA's targets and the masks over parameters. `Family` puts both together.
"""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm over a token's hidden state, in float32.

    Attributes:
        kind: "layer" (mean 0, variance 1) or "rms" (mean square 1).
        eps: added to the variance or mean square.
        scale: has a learned factor.
        scale_offset: added to the factor; 1 where a checkpoint stores its distance from 1.
        bias: has a learned bias.
    """

    kind: str
    eps: float
    scale: bool = True
    scale_offset: float = 0.0
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class QKNorm:
    """A norm of queries and keys, before rotary positions.

    Attributes:
        norm: its kind.
        over: "head": over each head's C numbers, with one scale_C for all heads; "each_head":
            the same with a scale_HC; "all_heads": over all H·C numbers, with a scale_HC.
    """

    norm: Norm
    over: str


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions (RoFormer, Su et al. 2021, section 3.2.2).

    A pair of numbers of a head is turned by position · frequency, in radians.

    Attributes:
        frequencies: one for each pair; 2 · len(frequencies) of a head's numbers are turned,
            its first, and the others left as they are.
        interleaved: pairs are neighbours (0, 1), (2, 3), ..., else (0, R/2), (1, R/2 + 1), ...
        factor: on sine and cosine (the attention factor of YaRN and LongRoPE).
        long_from: examples of more tokens than this use other frequencies; None for none.
        long_frequencies: those, where they are fixed (LongRoPE).
        ntk_factor: where they are not: the factor of dynamic NTK scaling, whose base grows with
            the example's length.
        ntk_base: its base at `long_from` tokens.
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False
    factor: float = 1.0
    long_from: int | None = None
    long_frequencies: tuple[float, ...] | None = None
    ntk_factor: float = 1.0
    ntk_base: float = 10000.0


@dataclasses.dataclass(frozen=True)
class Alibi:
    """Attention with linear biases (Press et al. 2022): slope_H · key position, on the scores.

    Attributes:
        slopes: one a head.
        bfloat16: the product is rounded to bfloat16, as Falcon computes it.
        factor: on the product; the scores it is added to have been scaled already.
    """

    slopes: tuple[float, ...]
    bfloat16: bool = False
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of an MLP (Mixtral, Jiang et al. 2024, section 2.1).

    Attributes:
        num_experts: experts a layer (E).
        num_chosen: experts that a token goes to.
        mlp_width: inner width of one (F).
        renormalise: the chosen experts' probabilities are divided by their sum.
    """

    num_experts: int
    num_chosen: int
    mlp_width: int
    renormalise: bool


@dataclasses.dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer.

    Attributes:
        window: a token sees this many tokens, itself among them; None for all before it.
        rotary: its rotary positions; None for none.
        sparse: has experts, where the config has any, instead of an MLP.
    """

    window: int | None = None
    rotary: Rotary | None = None
    sparse: bool = False


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape and switches of a decoder.

    Attributes:
        width: hidden width (D).
        num_heads: query heads (H).
        num_kv_heads: key/value heads (K); divides `num_heads`.
        head_width: width of a head (C).
        mlp_width: inner width of the MLP (F).
        vocab_size: entries of the vocabulary that the tokenizer may use.
        num_positions: longest context, in tokens.
        layers: what differs between them; as many as the model has (L).
        norm: kind of the blocks' norms and the final one.
        activation: a name in `layers.ACTIVATIONS`.
        tied_head: the token embedding is also the output vocabulary.
        init_std: standard deviation of random weights.
        residual_init_std: the same for the projections that write to the residual stream.

        embed_width: width of token embeddings and vocabulary; projected to and from `width`
            where it is another. None: `width`.
        embed_scale: factor on the token embeddings.
        embed_norm: a norm follows the embeddings.
        positions: what is added to the embeddings: "learned", "sinusoidal" or "none".
        position_offset: unused entries at the start of those positions.
        recompute_from: a row that becomes longer than this while it is generated has its cached
            keys and values computed anew, since longer rows have other rotary positions from
            their first token on; None for never.

        attention_scale: factor on q·k.
        scale_by_layer: also divide q·k by the layer's number, from 1.
        attention_softcap: scores are cap · tanh(score / cap); None for no cap.
        alibi: biases by distance, or None.
        qk_norm: norm of queries and keys, or None.
        qkv_bias: biases on queries, keys and values.
        out_bias: on attention's output.
        mlp_bias: on the MLP's kernels.
        gated_mlp: activation(gate(x)) · up(x), instead of activation(up(x)).
        experts: what sparse layers have, or None.

        block: how a block uses its norms:
            "pre": x + f(norm(x)), for attention, then for the MLP;
            "post": x + norm(f(x));
            "both": x + norm(f(norm(x)));
            "sum": norm(x + f(x));
            "pre, from norm": norm(x) + f(norm(x)), BLOOM's option;
            "parallel": x + attention(norm(x)) + mlp(norm(x)), one norm for both;
            "parallel, two norms": the same with a norm for each.
        residual_scale: factor on what is added to the residual stream.
        final_norm: a norm follows the last block.
        logit_scale: factor on the logits.
        logit_softcap: logits are cap · tanh(logit / cap); None for no cap.
        head_bias: a bias on the logits.

        embed_dropout: rate on the embeddings' sum.
        attention_dropout: rate on the attention weights.
        residual_dropout: rate on what a block adds to the residual stream.
    """

    width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    vocab_size: int
    num_positions: int
    layers: tuple[Layer, ...]
    norm: Norm
    activation: str
    tied_head: bool
    init_std: float
    residual_init_std: float

    embed_width: int | None = None
    embed_scale: float = 1.0
    embed_norm: bool = False
    positions: str = "none"
    position_offset: int = 0
    recompute_from: int | None = None

    attention_scale: float = 1.0
    scale_by_layer: bool = False
    attention_softcap: float | None = None
    alibi: Alibi | None = None
    qk_norm: QKNorm | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = False
    experts: Experts | None = None

    block: str = "pre"
    residual_scale: float = 1.0
    final_norm: bool = True
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    head_bias: bool = False

    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0

    @property
    def num_layers(self) -> int:
        """Blocks (L)."""
        return len(self.layers)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One kind of tensor, in the checkpoint and in our parameter tree.

    The checkpoint's tensor, turned to [in, out] where `transpose` says so, is cut along its
    last axis into `num_groups` equal groups, and each group into one part for each of `ours`.
    The parts of all groups, joined, are reshaped to our shape:

        theirs                              ours
        h.3.attn.c_attn.weight  [D, 3·D]    layers/attention/query/kernel  [3] of [L, D, H, C]
          num_groups=1: q q q k k k v v v   layers/attention/key/kernel    [3] of [L, D, K, C]
          num_groups=H: q k v q k v q k v   layers/attention/value/kernel  [3] of [L, D, K, C]

    Attributes:
        theirs: name in a `transformers` checkpoint; "{layer}" stands for the layer's number,
            and such tensors are stacked along our leading axis L; "{index}" for the number
            along our next axis, such as an expert or a head.
        ours: slash-joined paths in our parameter tree.
        transpose: theirs is [out, in], as in `torch.nn.Linear`.
        vocabulary: the leading axis is the vocabulary, which we may pad for sharding.
        num_groups: see above.
        num_row_axes: how many leading axes of ours are theirs' rows; None: those of a kernel's
            inputs, and none of a bias or a norm's factor, which have columns alone.
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False
    vocabulary: bool = False
    num_groups: int = 1
    num_row_axes: int | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """What the decoder, import and export need to know about one `model_type`.

    Attributes:
        decoder_config: from a `transformers` config to ours; raises ValueError for a value
            that is not built. A field of the config that it does not read, that is not in
            `harmless`, and that is not at its class's default is refused by its name.
        tensors: the name table for a config; names as `transformers` writes them.
        prefix: start of the names of the base model's tensors, which may be missing in a file.
        buffers: regular expressions for tensors that are no parameters, and are dropped.
        dropout_fields: the config's names of dropout rates, in the order embed, attention,
            residual; None where it has none.
        harmless: fields of the config that do not change a model's numbers.
    """

    decoder_config: Callable[[Any], DecoderConfig]
    tensors: Callable[[DecoderConfig], tuple[Tensor, ...]]
    prefix: str
    dropout_fields: tuple[str | None, str | None, str | None]
    buffers: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
