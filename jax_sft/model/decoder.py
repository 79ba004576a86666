"""The decoder: tokens in, hidden states out; one Flax module for every family.

Blocks are stacked along a leading axis L and scanned, so that compile time does not grow with
depth. Parameters are a plain nested dict of arrays (names in `Decoder`); their logical axes
are in `logical_axes`. With a cache, the keys and values of a token stand in the slot of its
position, so that a row's length is all that decoding needs to know.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jax_sft.model.block import Block, Cache, Tokens, Which, kinds
from jax_sft.model.layers import Linear, NamedAxes, NormLayer, Numerics, broadcast, named
from jax_sft.model.rotary import make_turns
from jax_sft.model.types import DecoderConfig
from jax_sft.sharding import constrain, num_shards

_POLICIES = jax.checkpoint_policies
# What a block keeps for its backward pass beside its input, from the most memory to the least;
# the rest is computed again. "product" is what `layers.kept` names, "attended" what
# attention gives, whose scores are computed again anyway (its backward pass does).
REMAT_POLICIES = {
    "none": None,  # keeps everything
    "dots": _POLICIES.save_only_these_names("product", "attended"),
    "offload": _POLICIES.save_and_offload_only_these_names(  # products in the host's memory
        names_which_can_be_saved=["attended"],
        names_which_can_be_offloaded=["product"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "minimal": _POLICIES.save_only_these_names("attended"),
    "full": _POLICIES.nothing_saveable,
}


class Stack(NamedTuple):
    """Layers that are stacked and scanned together.

    Attributes:
        name: in the parameter tree.
        first: its first layer among all.
        num_layers: how many it has.
        sparse: whether they have experts.
    """

    name: str
    first: int
    num_layers: int
    sparse: bool


def find_stacks(config: DecoderConfig, num_frozen_layers: int) -> list[Stack]:
    """Splits the layers into stacks of equal parameters.

    layers   dense dense | dense sparse sparse     (the first two frozen)
    stacks   frozen_layers   layers_2   layers_3   (by their first layer, where several)
    """
    parts = {
        "frozen_layers": range(num_frozen_layers),
        "layers": range(num_frozen_layers, config.num_layers),
    }
    stacks = []
    for name, part in parts.items():
        runs = [list(run) for _, run in itertools.groupby(part, lambda i: config.layers[i].sparse)]
        for run in runs:
            stack_name = name if len(runs) == 1 else f"{name}_{run[0]}"
            stacks.append(Stack(stack_name, run[0], len(run), config.layers[run[0]].sparse))
    return stacks


class Decoder(nn.Module):
    """The whole decoder, without the product with the vocabulary (see `vocabulary`).

    Its parameters, by path; which of them there are is the config's to say ("frozen_layers"
    holds the bottom `num_frozen_layers` layers, which training does not touch; see
    `find_stacks`):

        embed/tokens [V, E]   embed/positions [S, D]   embed/norm   embed/project/kernel [E, D]
        layers/{attention, mlp}_norm and _post_norm/{scale, bias} [L, D]
        layers/attention/{query, key, value}/kernel [L, D, H or K, C]   .../bias [L, H or K, C]
        layers/attention/{query, key}_norm/scale [L, C] or [L, H or K, C]
        layers/attention/out/kernel [L, H, C, D]                        .../bias [L, D]
        layers/mlp/{gate, up}/kernel [L, D, F]   .../bias [L, F]
        layers/mlp/down/kernel [L, F, D]         .../bias [L, D]
        layers/experts/router/kernel [L, D, X]   layers/experts/{gate, up}/kernel [L, X, D, F]
        layers/experts/down/kernel [L, X, F, D]
        final_norm/{scale, bias} [D]   final_project/kernel [D, E]
        head/kernel [V, E]   head/bias [V]

    An adapted linear layer also has lora_a [L, inputs, R], lora_b [L, R, outputs] and, with
    DoRA, lora_magnitude [L, outputs].

    Attributes:
        config: shape and switches.
        numerics: dtypes, rematerialisation, dropout, adapters.
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
        """Computes the hidden states that are multiplied with the vocabulary.

        Args:
            tokens_BT: int32 token ids.
            positions_BT: int32, from 0 within each segment; with a cache, also the slot.
            segment_ids_BT: int32; tokens see earlier tokens of their own segment only. With a
                cache, tokens are of segment 1, and padding of segment 0.
            cache: keys and values so far; this call's tokens are added.

        Returns:
            hidden_BTE in `numerics.dtype`, and the cache with this call's tokens.
        """
        c, n = self.config, self.numerics
        rotaries = kinds([layer.rotary for layer in c.layers])
        windows = kinds([layer.window for layer in c.layers])
        turns = make_turns(rotaries, positions_BT, segment_ids_BT)
        tokens = Tokens(positions_BT, segment_ids_BT, turns)
        x_BTD = Embed(c, n, self.vocab_padding, name="embed")(tokens_BT, positions_BT)
        if not c.tied_head or c.head_bias:
            Head(c, n, self.vocab_padding, name="head")()
        carry = (x_BTD, cache)
        for stack in find_stacks(c, self.num_frozen_layers):
            layers = range(stack.first, stack.first + stack.num_layers)
            which = Which(
                jnp.array(layers, jnp.int32),
                jnp.array([windows.index(c.layers[i].window) for i in layers], jnp.int32),
                jnp.array([rotaries.index(c.layers[i].rotary) for i in layers], jnp.int32),
            )
            block = _scan(n.remat, stack.num_layers)(c, n, stack.sparse, name=stack.name)
            carry, _ = block(carry, tokens, which)
        x_BTD, cache = carry
        if c.final_norm:
            x_BTD = NormLayer(c.norm, (c.width,), ("norm",), n, name="final_norm")(x_BTD)
        if c.embed_width is not None:
            shape, axes = (c.width, c.embed_width), ("embed", "norm")
            project = Linear(shape, axes, 1, c.init_std, n, bias=False, name="final_project")
            x_BTD, _ = project(x_BTD)
        return x_BTD if c.logit_scale == 1.0 else c.logit_scale * x_BTD, cache


class Embed(nn.Module):
    """What enters the first block: token embeddings, positions where they are added, a norm."""

    config: DecoderConfig
    numerics: Numerics
    vocab_padding: int

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns x_BTD in the compute dtype."""
        c, n = self.config, self.numerics
        tokens_VE = _vocabulary_param(self, "tokens", c, n, self.vocab_padding)
        x_BTD = look_up(tokens_VE, tokens_BT, axis="vocab", dtype=n.dtype)
        if c.embed_scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(c.embed_scale, n.dtype)
        if c.embed_width is not None:
            shape, axes = (c.embed_width, c.width), ("norm", "embed")
            x_BTD, _ = Linear(shape, axes, 1, c.init_std, n, bias=False, name="project")(x_BTD)
        if c.positions == "learned":
            x_BTD = x_BTD + self._learned(positions_BT + c.position_offset)
        elif c.positions == "sinusoidal":
            x_BTD = x_BTD + _sinusoids(positions_BT + c.position_offset, c.width).astype(n.dtype)
        if c.embed_norm:
            x_BTD = NormLayer(c.norm, (c.width,), ("norm",), n, name="norm")(x_BTD)
        x_BTD = constrain(x_BTD, "batch", "tokens", None)
        return nn.Dropout(c.embed_dropout, deterministic=not n.dropout)(x_BTD)

    def _learned(self, rows_BT: jax.Array) -> jax.Array:
        c, n = self.config, self.numerics
        init = named(nn.initializers.normal(c.init_std), "positions", "embed")
        shape = (c.num_positions + c.position_offset, c.width)
        positions_SD = self.param("positions", init, shape, n.param_dtype)
        return look_up(positions_SD, rows_BT, axis="positions", dtype=n.dtype)


_TILE = 128  # columns that a TPU stores together
_SUMMED_AT_ONCE = 1 << 26  # elements


def look_up(table_ND: jax.Array, rows_BT: jax.Array, *, axis: str, dtype: Any) -> jax.Array:
    """Takes rows of a table in the compute dtype; their gradients are summed in float32.

    A row of a common token, or of position 0, gets as many gradients as a batch has such tokens:
    in bfloat16 each would be added with 8 bits of what there is already.

    Args:
        table_ND: the parameter.
        rows_BT: int32.
        axis: logical name of N.
        dtype: of the rows.

    Returns:
        x_BTD.
    """
    shape, held = table_ND.shape, table_ND.dtype
    # A device looks up its own columns for the rows of all devices that have the others, and they
    # exchange what they found; it never has the whole table, nor its whole gradient. With fewer
    # columns than a TPU's tile has, most of what they exchange would be padding.
    mesh = jax.sharding.get_abstract_mesh()
    is_by_columns = shape[1] // num_shards(mesh, "embed") >= _TILE
    batch, columns = ("fsdp_batch", "embed") if is_by_columns else ("batch", None)

    @jax.custom_vjp
    def take(table_ND: jax.Array, rows_BT: jax.Array) -> jax.Array:
        rows_BT = constrain(rows_BT, batch, "tokens")
        x_BTD = constrain(table_ND.astype(dtype), axis, columns)[rows_BT]
        return constrain(constrain(x_BTD, batch, "tokens", columns), "batch", "tokens", None)

    def forward(table_ND: jax.Array, rows_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return take(table_ND, rows_BT), rows_BT

    def sum_columns(rows_BT: jax.Array, d_x_BTC: jax.Array) -> jax.Array:
        sums_NC = jnp.zeros((shape[0], d_x_BTC.shape[-1]), jnp.float32)
        sums_NC = sums_NC.at[rows_BT].add(d_x_BTC.astype(jnp.float32))
        return constrain(sums_NC, axis, columns).astype(dtype)

    def backward(rows_BT: jax.Array, d_x_BTD: jax.Array) -> tuple[jax.Array, None]:
        rows_BT = constrain(rows_BT, batch, "tokens")
        d_x_BTD = constrain(d_x_BTD, batch, "tokens", columns)
        if is_by_columns:
            return sum_columns(rows_BT, d_x_BTD).astype(held), None
        # Some columns after the others: of all, float32 sums would be the largest array there is.
        num_parts = math.gcd(shape[1], 1 << (math.prod(shape) // _SUMMED_AT_ONCE).bit_length())
        parts_PBTC = jnp.moveaxis(d_x_BTD.reshape(*rows_BT.shape, num_parts, -1), 2, 0)
        sums_PNC = jax.lax.map(functools.partial(sum_columns, rows_BT), parts_PBTC)
        return jnp.moveaxis(sums_PNC, 0, 1).reshape(shape).astype(held), None

    take.defvjp(forward, backward)
    return take(table_ND, rows_BT)


class Head(nn.Module):
    """An output vocabulary of its own and its bias; they are read by `vocabulary`."""

    config: DecoderConfig
    numerics: Numerics
    vocab_padding: int

    @nn.compact
    def __call__(self) -> None:
        """Makes them, so that they are there when parameters are drawn."""
        c, n = self.config, self.numerics
        if not c.tied_head:
            _vocabulary_param(self, "kernel", c, n, self.vocab_padding)
        if c.head_bias:
            shape = (c.vocab_size + self.vocab_padding,)
            self.param("bias", named(nn.initializers.zeros, "vocab"), shape, n.param_dtype)


def vocabulary(config: DecoderConfig, params: dict) -> tuple[jax.Array, jax.Array | None]:
    """Returns vocabulary_VE, the rows of which are multiplied with hidden states, and bias_V."""
    vocabulary_VE = params["embed"]["tokens"] if config.tied_head else params["head"]["kernel"]
    return vocabulary_VE, params["head"]["bias"] if config.head_bias else None


def logits(config: DecoderConfig, params: dict, hidden_BTE: jax.Array) -> jax.Array:
    """Returns logits_BTV in float32; entries of the vocabulary's padding are -inf."""
    vocabulary_VE, bias_V = vocabulary(config, params)
    logits_BTV = jnp.einsum(
        "BTE,VE->BTV",
        hidden_BTE,
        vocabulary_VE.astype(hidden_BTE.dtype),
        preferred_element_type=jnp.float32,
    )
    if bias_V is not None:
        logits_BTV = logits_BTV + broadcast(bias_V.astype(jnp.float32), logits_BTV)
    if config.logit_softcap is not None:
        logits_BTV = config.logit_softcap * jnp.tanh(logits_BTV / config.logit_softcap)
    return mask_padding(logits_BTV, config.vocab_size)


def mask_padding(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Sets what stands behind the vocabulary, along the last axis, to -inf."""
    if logits.shape[-1] == vocab_size:
        return logits
    is_padding_V = jnp.arange(logits.shape[-1]) >= vocab_size
    return jnp.where(broadcast(is_padding_V, logits), -jnp.inf, logits)


def empty_cache(config: DecoderConfig, num_rows: int, num_slots: int, dtype: Any) -> Cache:
    """Returns a cache of zeros for `num_rows` rows of up to `num_slots` tokens."""
    shape = (config.num_layers, num_rows, num_slots, config.num_kv_heads, config.head_width)
    zeros_LBSKC = constrain(jnp.zeros(shape, dtype), None, "batch", None, "kv_heads", None)
    return Cache(zeros_LBSKC, zeros_LBSKC)


def init_params(decoder: Decoder, key: jax.Array) -> dict:
    """Returns random parameters, boxed with their logical axes (see `logical_axes`)."""
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    return decoder.init({"params": key}, tokens_BT, tokens_BT, tokens_BT)["params"]


@functools.lru_cache(maxsize=8)  # asked for about ten times at a start, 0.3 s each
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
    return isinstance(x, NamedAxes)


def _sinusoids(positions_BT: jax.Array, width: int) -> jax.Array:
    """Sines of falling frequency, then cosines (Vaswani et al. 2017, section 3.5)."""
    num_pairs = width // 2
    exponents_R = np.arange(num_pairs, dtype=np.float32) / (num_pairs - 1)
    frequencies_R = np.exp(-math.log(10000.0) * exponents_R)
    angles_BTR = positions_BT[..., None] * frequencies_R[None, None]
    waves = [jnp.sin(angles_BTR), jnp.cos(angles_BTR)]
    padding = [(0, 0), (0, 0), (0, width % 2)]
    return jnp.pad(jnp.concatenate(waves, axis=-1), padding)


def _vocabulary_param(
    module: nn.Module, name: str, config: DecoderConfig, numerics: Numerics, padding: int
) -> jax.Array:
    width = config.embed_width or config.width

    def init(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
        # Drawn at the true size, so that the mesh does not change the weights.
        drawn_VE = nn.initializers.normal(config.init_std)(key, (config.vocab_size, width), dtype)
        return jnp.pad(drawn_VE, ((0, shape[0] - config.vocab_size), (0, 0)))

    shape = (config.vocab_size + padding, width)
    return module.param(name, named(init, "vocab", "embed"), shape, numerics.param_dtype)


def _scan(remat: str, num_layers: int) -> Callable:
    block = Block
    if remat != "none":
        block = nn.remat(Block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0, "losses": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0),
        length=num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
