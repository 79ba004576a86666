"""The decoder: tokens in, hidden states out; one Flax module for every family.

Blocks are stacked along a leading axis L and scanned, so that compile time does not grow with
depth. Parameters are a plain nested dict of arrays (names in `Decoder`); their logical axes
are in `logical_axes`. With a cache, the keys and values of a token stand in the slot of its
position, so that a row's length is all that decoding needs to know.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_sft.model.attention import attend
from jax_sft.model.types import DecoderConfig
from jax_sft.sharding import constrain, merge_tokens

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

# What a block keeps for its backward pass; the rest is computed again.
REMAT_POLICIES = {
    "none": None,
    # Products with kernels, and what attention gives: its scores are computed again anyway.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attended"),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Cache(NamedTuple):
    """Keys and values of the tokens so far, by layer, row and position."""

    keys_LBSKC: jax.Array
    values_LBSKC: jax.Array


class Tokens(NamedTuple):
    """What a block knows of its tokens beside their hidden states."""

    positions_BT: jax.Array
    segment_ids_BT: jax.Array


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How the numbers are computed, apart from what they mean.

    Attributes:
        dtype: of activations and matrix products; norms, softmax and sums are float32.
        param_dtype: of the parameters.
        remat: a name in `REMAT_POLICIES`.
        dropout: whether the config's dropout rates apply (a "dropout" key is then needed).
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    dropout: bool = False


class LayerNorm(nn.Module):
    """Layer norm over the hidden width, in float32."""

    config: DecoderConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Normalises each token's hidden state."""
        width, dtype = self.config.width, self.numerics.param_dtype
        scale_D = self.param("scale", _axes(nn.initializers.ones, "norm"), (width,), dtype)
        bias_D = self.param("bias", _axes(nn.initializers.zeros, "norm"), (width,), dtype)
        x_BTD = x_BTD.astype(jnp.float32)
        mean_BT1 = jnp.mean(x_BTD, axis=-1, keepdims=True)
        variance_BT1 = jnp.mean(jnp.square(x_BTD - mean_BT1), axis=-1, keepdims=True)
        x_BTD = (x_BTD - mean_BT1) * jax.lax.rsqrt(variance_BT1 + self.config.norm_eps)
        x_BTD = x_BTD * _broadcast(scale_D, x_BTD) + _broadcast(bias_D, x_BTD)
        return x_BTD.astype(self.numerics.dtype)


class Linear(nn.Module):
    """Sums the last axes of x with the first of a kernel, and adds a bias on its other axes.

    Attributes:
        shape: of the kernel, inputs before outputs.
        axes: logical axes of the kernel.
        num_inputs: leading axes of the kernel that are summed over.
        init_std: standard deviation of random weights.
        numerics: dtypes.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    num_inputs: int
    init_std: float
    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Takes x [B, T, *inputs] to [B, T, *outputs]."""
        dtype, param_dtype = self.numerics.dtype, self.numerics.param_dtype
        init = nn.initializers.normal(self.init_std)
        kernel = self.param("kernel", _axes(init, *self.axes), self.shape, param_dtype)
        outputs = self.shape[self.num_inputs :]
        bias_axes = tuple("norm" if axis == "embed" else axis for axis in self.axes)
        bias = self.param(
            "bias",
            _axes(nn.initializers.zeros, *bias_axes[self.num_inputs :]),
            outputs,
            param_dtype,
        )
        kernel_IO = kernel.astype(dtype).reshape(math.prod(self.shape[: self.num_inputs]), -1)
        x_BTI = x.reshape(*x.shape[:2], -1)
        y = (merge_tokens(x_BTI) @ kernel_IO).reshape(*x.shape[:2], *outputs)
        return y + _broadcast(bias.astype(dtype), y)


class Attention(nn.Module):
    """Multi-head attention over the tokens of this call, or over a cache."""

    config: DecoderConfig
    numerics: Numerics

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        """Returns what is added to the residual stream, and the cache with these tokens."""
        c = self.config
        D, H, K, C = c.width, c.num_heads, c.num_kv_heads, c.head_width

        def project(name: str, heads: int, axis: str) -> jax.Array:
            axes = ("embed", axis, "head_width")
            linear = Linear((D, heads, C), axes, 1, c.init_std, self.numerics, name=name)
            return constrain(linear(x_BTD), "batch", "tokens", axis, None)

        q_BTHC = project("query", H, "heads")
        k_BTKC = project("key", K, "kv_heads")
        v_BTKC = project("value", K, "kv_heads")
        if cache is None:
            k_BSKC, v_BSKC, k_tokens = k_BTKC, v_BTKC, tokens
        else:
            cache = _write(cache, layer, tokens.positions_BT, k_BTKC, v_BTKC)
            k_BSKC, v_BSKC = cache.keys_LBSKC[layer], cache.values_LBSKC[layer]
            slots_BS = jnp.broadcast_to(jnp.arange(k_BSKC.shape[1])[None], k_BSKC.shape[:2])
            k_tokens = Tokens(slots_BS, jnp.ones_like(slots_BS))
        dropout_rate = c.attention_dropout if self.numerics.dropout else 0.0
        out_BTHC = attend(
            q_BTHC,
            k_BSKC,
            v_BSKC,
            q_positions_BT=tokens.positions_BT,
            k_positions_BS=k_tokens.positions_BT,
            q_segment_ids_BT=tokens.segment_ids_BT,
            k_segment_ids_BS=k_tokens.segment_ids_BT,
            scale=c.attention_scale / (layer + 1) if c.scale_by_layer else c.attention_scale,
            dropout_rate=dropout_rate,
            dropout_key=self.make_rng("dropout") if dropout_rate else None,
        )
        out_BTHC = checkpoint_name(out_BTHC, "attended")
        axes = ("heads", "head_width", "embed")
        out = Linear((H, C, D), axes, 2, c.residual_init_std, self.numerics, name="out")
        return out(out_BTHC), cache


class MLP(nn.Module):
    """Up, activation, down."""

    config: DecoderConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns what is added to the residual stream."""
        c, n = self.config, self.numerics
        D, F = c.width, c.mlp_width
        up = Linear((D, F), ("embed", "mlp"), 1, c.init_std, n, name="up")
        h_BTF = constrain(ACTIVATIONS[c.activation](up(x_BTD)), "batch", "tokens", "mlp")
        axes = ("mlp", "embed")
        return Linear((F, D), axes, 1, c.residual_init_std, n, name="down")(h_BTF)


class Block(nn.Module):
    """One layer: attention and MLP, each on a norm of the residual stream and added to it."""

    config: DecoderConfig
    numerics: Numerics

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], tokens: Tokens, layer: jax.Array
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        """Takes and returns (x_BTD, cache), as `nn.scan` wants it."""
        x_BTD, cache = carry
        c, n = self.config, self.numerics
        dropout = nn.Dropout(c.residual_dropout, deterministic=not n.dropout)
        normed_BTD = LayerNorm(c, n, name="attention_norm")(x_BTD)
        attended_BTD, cache = Attention(c, n, name="attention")(normed_BTD, tokens, cache, layer)
        x_BTD = x_BTD + dropout(attended_BTD)
        x_BTD = x_BTD + dropout(MLP(c, n, name="mlp")(LayerNorm(c, n, name="mlp_norm")(x_BTD)))
        return (constrain(x_BTD, "batch", "tokens", None), cache), None


class Decoder(nn.Module):
    """The whole decoder, without the product with the vocabulary (see `vocabulary`).

    Its parameters, by path ("frozen_layers" holds the bottom `num_frozen_layers` layers, which
    training does not touch, and "layers" the rest; each is absent when it would be empty):

        embed/tokens [V, D]   embed/positions [S, D]   head/kernel [V, D] (where untied)
        layers/attention_norm/{scale, bias} [L, D]     layers/mlp_norm/{scale, bias} [L, D]
        layers/attention/{query, key, value}/kernel [L, D, H or K, C]   .../bias [L, H or K, C]
        layers/attention/out/kernel [L, H, C, D]                        .../bias [L, D]
        layers/mlp/up/kernel [L, D, F]   .../bias [L, F]
        layers/mlp/down/kernel [L, F, D] .../bias [L, D]
        final_norm/{scale, bias} [D]

    Attributes:
        config: shape and switches.
        numerics: dtypes, rematerialisation, dropout.
        vocab_padding: rows of zeros behind the vocabulary, so that it divides over devices.
        num_frozen_layers: bottom layers to keep in a stack of their own.
    """

    config: DecoderConfig
    numerics: Numerics = Numerics()
    vocab_padding: int = 0
    num_frozen_layers: int = 0

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Computes the hidden states after the final norm.

        Args:
            tokens_BT: int32 token ids.
            positions_BT: int32, from 0 within each segment; with a cache, also the slot.
            segment_ids_BT: int32; tokens see earlier tokens of their own segment only. With a
                cache every token is of segment 1.
            cache: keys and values so far; this call's tokens are added.

        Returns:
            hidden_BTD in `numerics.dtype`, and the cache with this call's tokens.
        """
        c, n = self.config, self.numerics
        tokens = Tokens(positions_BT, segment_ids_BT)
        x_BTD = Embed(c, n, self.vocab_padding, name="embed")(tokens_BT, positions_BT)
        if not c.tied_head:
            Head(c, n, self.vocab_padding, name="head")()
        carry = (x_BTD, cache)
        first = 0
        stacks = {
            "frozen_layers": self.num_frozen_layers,
            "layers": c.num_layers - self.num_frozen_layers,
        }
        for name, num_layers in stacks.items():
            if num_layers:
                layers_L = jnp.arange(first, first + num_layers)
                carry, _ = _stack(n.remat, num_layers)(c, n, name=name)(carry, tokens, layers_L)
                first += num_layers
        x_BTD, cache = carry
        return LayerNorm(c, n, name="final_norm")(x_BTD), cache


class Embed(nn.Module):
    """Token and position embeddings, summed."""

    config: DecoderConfig
    numerics: Numerics
    vocab_padding: int

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns x_BTD in the compute dtype."""
        c, n = self.config, self.numerics
        normal = nn.initializers.normal(c.init_std)
        tokens_VD = _vocabulary_param(self, "tokens", c, n, self.vocab_padding)
        positions_SD = self.param(
            "positions",
            _axes(normal, "positions", "embed"),
            (c.num_positions, c.width),
            n.param_dtype,
        )
        # Whole along the width before the look-up: split there, as the parameters are, the rows
        # found could be brought to the batch's sharding only by way of a whole copy a device.
        tokens_VD = constrain(tokens_VD.astype(n.dtype), "vocab", None)
        positions_SD = constrain(positions_SD.astype(n.dtype), "positions", None)
        x_BTD = tokens_VD[tokens_BT] + positions_SD[positions_BT]
        x_BTD = constrain(x_BTD, "batch", "tokens", None)
        return nn.Dropout(c.embed_dropout, deterministic=not n.dropout)(x_BTD)


class Head(nn.Module):
    """An output vocabulary of its own; it is read by `vocabulary`."""

    config: DecoderConfig
    numerics: Numerics
    vocab_padding: int

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns the table, so that it is made when parameters are."""
        return _vocabulary_param(self, "kernel", self.config, self.numerics, self.vocab_padding)


def vocabulary(config: DecoderConfig, params: dict) -> jax.Array:
    """Returns vocabulary_VD, the rows of which are multiplied with the hidden states."""
    return params["embed"]["tokens"] if config.tied_head else params["head"]["kernel"]


def logits(config: DecoderConfig, params: dict, hidden_BTD: jax.Array) -> jax.Array:
    """Returns logits_BTV in float32; entries of the vocabulary's padding are -inf."""
    vocabulary_VD = vocabulary(config, params).astype(hidden_BTD.dtype)
    logits_BTV = jnp.einsum(
        "BTD,VD->BTV", hidden_BTD, vocabulary_VD, preferred_element_type=jnp.float32
    )
    return mask_padding(logits_BTV, config.vocab_size)


def mask_padding(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Sets what stands behind the vocabulary, along the last axis, to -inf."""
    if logits.shape[-1] == vocab_size:
        return logits
    is_padding_V = jnp.arange(logits.shape[-1]) >= vocab_size
    return jnp.where(_broadcast(is_padding_V, logits), -jnp.inf, logits)


def empty_cache(config: DecoderConfig, num_rows: int, num_slots: int, dtype: Any) -> Cache:
    """Returns a cache of zeros for `num_rows` rows of up to `num_slots` tokens."""
    shape = (config.num_layers, num_rows, num_slots, config.num_kv_heads, config.head_width)
    zeros_LBSKC = constrain(jnp.zeros(shape, dtype), None, "batch", None, "kv_heads", None)
    return Cache(zeros_LBSKC, zeros_LBSKC)


def init_params(decoder: Decoder, key: jax.Array) -> dict:
    """Returns random parameters, boxed with their logical axes (see `logical_axes`)."""
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    return decoder.init({"params": key}, tokens_BT, tokens_BT, tokens_BT)["params"]


def logical_axes(decoder: Decoder) -> tuple[dict, dict]:
    """Returns, without computing, each parameter's shape and its logical axes.

    Returns:
        shapes: tree of `jax.ShapeDtypeStruct`.
        axes: the same tree with a tuple of logical axis names at each leaf.
    """
    boxed = jax.eval_shape(lambda: init_params(decoder, jax.random.key(0)))
    axes = jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=_is_boxed)
    return nn.unbox(boxed), axes


def _is_boxed(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)


class _Named(nn.Partitioned):
    """A parameter with the names of its axes; what they mean on a mesh is `sharding.py`'s."""

    def unbox(self, apply_constraint: bool = True) -> Any:
        """Returns the array; flax would look for the names on the mesh."""
        return self.value


def _axes(init: Callable, *axes: str) -> Callable:
    return lambda *args: _Named(init(*args), axes)


def _broadcast(x: jax.Array, y: jax.Array) -> jax.Array:
    """Gives x leading axes of size 1 until it has as many as y."""
    return x.reshape((1,) * (y.ndim - x.ndim) + x.shape)


def _vocabulary_param(
    module: nn.Module, name: str, config: DecoderConfig, numerics: Numerics, padding: int
) -> jax.Array:
    def init(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
        # Drawn at the true size, so that the mesh does not change the weights.
        drawn_VD = nn.initializers.normal(config.init_std)(
            key, (config.vocab_size, shape[1]), dtype
        )
        return jnp.pad(drawn_VD, ((0, shape[0] - config.vocab_size), (0, 0)))

    shape = (config.vocab_size + padding, config.width)
    return module.param(name, _axes(init, "vocab", "embed"), shape, numerics.param_dtype)


def _stack(remat: str, num_layers: int) -> Callable:
    block = Block
    if remat != "none":
        block = nn.remat(Block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0),
        length=num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _write(
    cache: Cache, layer: jax.Array, slots_BT: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array
) -> Cache:
    rows_B1 = jnp.arange(slots_BT.shape[0])[:, None]
    return Cache(
        cache.keys_LBSKC.at[layer, rows_B1, slots_BT].set(k_BTKC.astype(cache.keys_LBSKC.dtype)),
        cache.values_LBSKC.at[layer, rows_B1, slots_BT].set(
            v_BTKC.astype(cache.values_LBSKC.dtype)
        ),
    )
