"""One layer of the decoder: attention and an MLP or experts, and how they meet the residual.

In: hidden states, what is known of their tokens, the cache. Out: the next hidden states. What
may differ from layer to layer comes as numbers, so that all layers are one traced program.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_sft.model.attention import attend
from jax_sft.model.experts import ExpertsLayer
from jax_sft.model.layers import ACTIVATIONS, Linear, NormLayer, Numerics
from jax_sft.model.rotary import Turns, turn
from jax_sft.model.types import DecoderConfig
from jax_sft.sharding import constrain

Kind = TypeVar("Kind")


class Cache(NamedTuple):
    """Keys and values of the tokens so far, by layer, row and position."""

    keys_LBSKC: jax.Array
    values_LBSKC: jax.Array


class Tokens(NamedTuple):
    """What a block knows of its tokens beside their hidden states.

    Attributes:
        positions_BT: int32, from 0 within each segment; with a cache, also the slot.
        segment_ids_BT: int32.
        turns: of each kind of rotary positions; None where there are none.
    """

    positions_BT: jax.Array
    segment_ids_BT: jax.Array
    turns: Turns | None = None


class Which(NamedTuple):
    """Which layer this is, as int32 scalars (or [L], to scan over).

    Attributes:
        number: among all layers, from 0.
        window: among `kinds` of windows.
        rotary: among `kinds` of rotary positions.
    """

    number: jax.Array
    window: jax.Array
    rotary: jax.Array


def kinds(values: Sequence[Kind]) -> list[Kind]:
    """Returns the distinct values, in order of appearance."""
    return list(dict.fromkeys(values))


class Attention(nn.Module):
    """Multi-head attention over the tokens of this call, or over a cache."""

    config: DecoderConfig
    numerics: Numerics

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, cache: Cache | None, which: Which
    ) -> tuple[jax.Array, Cache | None]:
        """Returns what is added to the residual stream, and the cache with these tokens."""
        c, n = self.config, self.numerics
        D, H, C = c.width, c.num_heads, c.head_width
        q_BTHC, k_BTKC, v_BTKC = self._project(x_BTD)
        if c.qk_norm is not None:
            q_BTHC = self._norm("query_norm", q_BTHC, "heads")
            k_BTKC = self._norm("key_norm", k_BTKC, "kv_heads")
        if tokens.turns is not None:
            sin_BTR, cos_BTR = (table[which.rotary] for table in tokens.turns)
            interleaved = any(layer.rotary and layer.rotary.interleaved for layer in c.layers)
            q_BTHC = turn(q_BTHC, sin_BTR, cos_BTR, interleaved=interleaved)
            k_BTKC = turn(k_BTKC, sin_BTR, cos_BTR, interleaved=interleaved)
        if cache is None:
            k_BSKC, v_BSKC, k_tokens = k_BTKC, v_BTKC, tokens
        else:
            cache = _write(cache, which.number, tokens.positions_BT, k_BTKC, v_BTKC)
            k_BSKC, v_BSKC = cache.keys_LBSKC[which.number], cache.values_LBSKC[which.number]
            slots_BS = jnp.broadcast_to(jnp.arange(k_BSKC.shape[1])[None], k_BSKC.shape[:2])
            k_tokens = Tokens(slots_BS, jnp.ones_like(slots_BS))
        out_BTHC = self._attend(q_BTHC, k_BSKC, v_BSKC, tokens, k_tokens, which)
        axes = ("heads", "head_width", "embed")
        out = Linear((H, C, D), axes, 2, c.residual_init_std, n, c.out_bias, name="out")
        return out(out_BTHC)[0], cache

    def _project(self, x_BTD: jax.Array) -> list[jax.Array]:
        c, n = self.config, self.numerics
        heads = {
            "query": (c.num_heads, "heads"),
            "key": (c.num_kv_heads, "kv_heads"),
            "value": (c.num_kv_heads, "kv_heads"),
        }
        projected, low = [], None
        for name, (num_heads, axis) in heads.items():
            shape, axes = (c.width, num_heads, c.head_width), ("embed", axis, "head_width")
            linear = Linear(shape, axes, 1, c.init_std, n, c.qkv_bias, name=name)
            y, low = linear(x_BTD, low if _shares(n, f"attention/{name}") else None)
            projected.append(constrain(y, "batch", "tokens", axis, None))
        return projected

    def _norm(self, name: str, x_BTHC: jax.Array, axis: str) -> jax.Array:
        qk_norm = self.config.qk_norm
        shape, axes, num_axes = x_BTHC.shape[2:], (axis, "head_width"), 1
        if qk_norm.over == "head":
            shape, axes = shape[1:], axes[1:]
        elif qk_norm.over == "all_heads":
            num_axes = 2
        return NormLayer(qk_norm.norm, shape, axes, self.numerics, num_axes, name=name)(x_BTHC)

    def _attend(
        self,
        q_BTHC: jax.Array,
        k_BSKC: jax.Array,
        v_BSKC: jax.Array,
        tokens: Tokens,
        k_tokens: Tokens,
        which: Which,
    ) -> jax.Array:
        c = self.config
        windows = kinds([layer.window for layer in c.layers])
        dropout_rate = c.attention_dropout if self.numerics.dropout else 0.0
        dropout_key = self.make_rng("dropout") if dropout_rate else None
        # A cache's keys are others than the queries: kernels are for rows of the same tokens.
        backend = self.numerics.attention if k_tokens is tokens else "xla"
        scale = c.attention_scale
        if c.scale_by_layer:
            scale = scale / (which.number + 1)

        def attend_within(window: int | None) -> Callable[..., jax.Array]:
            return lambda q_BTHC, k_BSKC, v_BSKC: attend(
                q_BTHC,
                k_BSKC,
                v_BSKC,
                q_positions_BT=tokens.positions_BT,
                k_positions_BS=k_tokens.positions_BT,
                q_segment_ids_BT=tokens.segment_ids_BT,
                k_segment_ids_BS=k_tokens.segment_ids_BT,
                scale=scale,
                window=window,
                softcap=c.attention_softcap,
                alibi=c.alibi,
                dropout_rate=dropout_rate,
                dropout_key=dropout_key,
                backend=backend,
            )

        if len(windows) == 1:
            return attend_within(windows[0])(q_BTHC, k_BSKC, v_BSKC)
        # Each is traced for itself, so that what a window hides is never computed.
        branches = [attend_within(window) for window in windows]
        return jax.lax.switch(which.window, branches, q_BTHC, k_BSKC, v_BSKC)


class MLP(nn.Module):
    """Up, activation, down; or with a gate."""

    config: DecoderConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns what is added to the residual stream."""
        c, n = self.config, self.numerics
        D, F = c.width, c.mlp_width
        activate, low, h_BTF = ACTIVATIONS[c.activation], None, None
        for name in ("gate", "up") if c.gated_mlp else ("up",):
            linear = Linear((D, F), ("embed", "mlp"), 1, c.init_std, n, c.mlp_bias, name=name)
            y_BTF, low = linear(x_BTD, low if _shares(n, f"mlp/{name}") else None)
            h_BTF = activate(y_BTF) if h_BTF is None else h_BTF * y_BTF
        h_BTF = constrain(h_BTF, "batch", "tokens", "mlp")
        axes = ("mlp", "embed")
        down = Linear((F, D), axes, 1, c.residual_init_std, n, c.mlp_bias, name="down")
        return down(h_BTF)[0]


class Block(nn.Module):
    """Attention and an MLP, or experts, added to the residual stream as the config says."""

    config: DecoderConfig
    numerics: Numerics
    sparse: bool

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], tokens: Tokens, which: Which
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        """Takes and returns (x_BTD, cache), as `nn.scan` wants it."""
        x_BTD, cache = carry
        c, n = self.config, self.numerics

        def attention(h_BTD: jax.Array) -> jax.Array:
            nonlocal cache
            out_BTD, cache = Attention(c, n, name="attention")(h_BTD, tokens, cache, which)
            return out_BTD

        def mlp(h_BTD: jax.Array) -> jax.Array:
            if self.sparse:
                return ExpertsLayer(c, n, name="experts")(h_BTD, tokens.segment_ids_BT)
            return MLP(c, n, name="mlp")(h_BTD)

        if c.block.startswith("parallel"):
            h_BTD = self._norm("attention_norm", x_BTD)
            both = c.block == "parallel, two norms"
            mlp_in_BTD = self._norm("mlp_norm", x_BTD) if both else h_BTD
            x_BTD = x_BTD + self._scale(attention(h_BTD)) + self._scale(mlp(mlp_in_BTD))
        else:
            x_BTD = self._add("attention", attention, x_BTD)
            x_BTD = self._add("mlp", mlp, x_BTD)
        return (constrain(x_BTD, "batch", "tokens", None), cache), None

    def _add(self, name: str, branch: Callable, x_BTD: jax.Array) -> jax.Array:
        """Adds a branch to the residual stream; see `DecoderConfig.block`."""
        match self.config.block:
            case "pre":
                return x_BTD + self._scale(branch(self._norm(f"{name}_norm", x_BTD)))
            case "post":
                return x_BTD + self._scale(self._norm(f"{name}_post_norm", branch(x_BTD)))
            case "both":
                h_BTD = branch(self._norm(f"{name}_norm", x_BTD))
                return x_BTD + self._scale(self._norm(f"{name}_post_norm", h_BTD))
            case "sum":
                return self._norm(f"{name}_norm", x_BTD + self._scale(branch(x_BTD)))
            case "pre, from norm":
                h_BTD = self._norm(f"{name}_norm", x_BTD)
                return h_BTD + self._scale(branch(h_BTD))
        raise AssertionError(self.config.block)

    def _norm(self, name: str, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        return NormLayer(c.norm, (c.width,), ("norm",), self.numerics, name=name)(x_BTD)

    def _scale(self, branch_BTD: jax.Array) -> jax.Array:
        """Dropout, and the factor on what is added."""
        rate = self.config.residual_dropout
        if rate and self.numerics.dropout:
            branch_BTD = nn.Dropout(rate, deterministic=False)(branch_BTD)
        scale = self.config.residual_scale
        return branch_BTD if scale == 1.0 else scale * branch_BTD


def _shares(numerics: Numerics, name: str) -> bool:
    return numerics.adapters is not None and name in numerics.adapters.shared


def _write(
    cache: Cache, layer: jax.Array, slots_BT: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array
) -> Cache:
    rows_B1 = jnp.arange(slots_BT.shape[0])[:, None]

    def write(slots_LBSKC: jax.Array, x_BTKC: jax.Array) -> Any:
        return slots_LBSKC.at[layer, rows_B1, slots_BT].set(x_BTKC.astype(slots_LBSKC.dtype))

    return Cache(write(cache.keys_LBSKC, k_BTKC), write(cache.values_LBSKC, v_BTKC))
