"""Rotary positions: what turns queries and keys by their positions.

In: the kinds of rotary positions that a decoder's layers have, each token's position and the
length of its example. Out: sines and cosines, made once for all layers; and heads, turned.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_sft.model.types import Rotary


class Turns(NamedTuple):
    """Sines and cosines of every pair's angle, float32, for each kind N of rotary positions."""

    sin_NBTR: jax.Array
    cos_NBTR: jax.Array


def make_turns(
    kinds: Sequence[Rotary | None], positions_BT: jax.Array, segment_ids_BT: jax.Array
) -> Turns | None:
    """Makes the sines and cosines of all kinds.

    Args:
        kinds: distinct ones of a decoder's layers; None turns nothing.
        positions_BT: int32, from 0 within each segment.
        segment_ids_BT: int32; one segment's tokens stand side by side.

    Returns:
        The turns, R pairs wide; None where no kind turns anything.
    """
    widths = {len(kind.frequencies) for kind in kinds if kind is not None}
    if not widths:
        return None
    assert len(widths) == 1, f"kinds of rotary positions turn {widths} pairs"
    (num_pairs,) = widths
    lens_BT1 = None
    if any(kind is not None and kind.long_from is not None for kind in kinds):
        lens_BT1 = _segment_lens(positions_BT, segment_ids_BT)[..., None]
    sines, cosines = [], []
    for kind in kinds:
        # Without frequencies the angle is 0: sine 0, cosine 1.
        kind = kind or Rotary((0.0,) * num_pairs)
        angles_BTR = positions_BT[..., None] * _frequencies(kind, lens_BT1)
        sines.append(jnp.sin(angles_BTR) * kind.factor)
        cosines.append(jnp.cos(angles_BTR) * kind.factor)
    return Turns(jnp.stack(sines), jnp.stack(cosines))


def turn(
    x_BTHC: jax.Array, sin_BTR: jax.Array, cos_BTR: jax.Array, *, interleaved: bool
) -> jax.Array:
    """Turns the first 2·R numbers of each head, pair by pair; the others stay.

        (a, b)  ->  (a · cos - b · sin, b · cos + a · sin)

    Args:
        x_BTHC: queries or keys.
        sin_BTR: float32.
        cos_BTR: float32.
        interleaved: pairs are neighbours, else they are R apart.
    """
    num_pairs = sin_BTR.shape[-1]
    sin_BT1R, cos_BT1R = sin_BTR[:, :, None], cos_BTR[:, :, None]
    turned = x_BTHC[..., : 2 * num_pairs].astype(jnp.float32)
    if interleaved:
        a_BTHR, b_BTHR = turned[..., 0::2], turned[..., 1::2]
    else:
        a_BTHR, b_BTHR = jnp.split(turned, 2, axis=-1)
    pairs = (a_BTHR * cos_BT1R - b_BTHR * sin_BT1R, b_BTHR * cos_BT1R + a_BTHR * sin_BT1R)
    if interleaved:
        turned = jnp.stack(pairs, axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate(pairs, axis=-1)
    kept = x_BTHC[..., 2 * num_pairs :]
    return jnp.concatenate([turned.astype(x_BTHC.dtype), kept], axis=-1)


def _frequencies(kind: Rotary, lens_BT1: jax.Array | None) -> jax.Array:
    """Returns radians a position: [R], or [B, T, R] where they depend on the example's length."""
    frequencies_R = jnp.array(kind.frequencies, jnp.float32)
    if kind.long_from is None:
        return frequencies_R[None, None]
    if kind.long_frequencies is not None:
        long_R = jnp.array(kind.long_frequencies, jnp.float32)
        return jnp.where(lens_BT1 > kind.long_from, long_R, frequencies_R)
    # Dynamic NTK scaling: https://www.reddit.com/r/LocalLLaMA/comments/14mrgpr
    width = 2 * len(kind.frequencies)
    grown_BT1 = jnp.maximum(lens_BT1 / kind.long_from, 1.0)
    stretch_BT1 = kind.ntk_factor * grown_BT1 - (kind.ntk_factor - 1.0)
    base_BT1 = kind.ntk_base * stretch_BT1 ** (width / (width - 2))
    exponents_R = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return 1.0 / base_BT1 ** exponents_R[None, None]


def _segment_lens(positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Returns for each token the length of its segment, as far as it is here."""
    is_new_BT = segment_ids_BT != jnp.roll(segment_ids_BT, 1, axis=1)
    runs_BT = jnp.cumsum(is_new_BT.at[:, 0].set(False), axis=1)
    rows_B1 = jnp.arange(runs_BT.shape[0])[:, None]
    lens_BN = jnp.zeros_like(positions_BT).at[rows_B1, runs_BT].max(positions_BT + 1)
    return jnp.take_along_axis(lens_BN, runs_BT, axis=1)
