"""Attention by cuDNN's flash kernel, for NVIDIA GPUs.

In: queries, keys and values of one device and their segments. Out: the averages. cuDNN's causal
mask alone would let packed examples see each other. On Hopper and newer it is told where each
example begins; elsewhere, and for windows, it is given the mask of a whole row as a bias.

Told where examples begin, it keeps a row of logsumexps for each, as long as the row of tokens:

    segment_ids   1 1 1 2 2        first    a b c . .      kept for the backward pass:
                                   second   d e . . .      a b c d e
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_sft.model.attention_xla import pad_tokens

MEAN_LEN = 64  # rows with more examples than of this length on average take the mask
# Before it, keys' offsets were counted with the number of query heads.
COUNTS_KEY_HEADS = jax.__version_info__ >= (0, 11, 2)


class Runs(NamedTuple):
    """Where a device's segments stand in their rows; M is how many a row has room for.

    Attributes:
        starts_BM: int32 [B, M + 1], the first slot of each; -1 where there are no more.
        lengths_BM: int32 [B, M], likewise.
        numbers_BT: int32, which of all rows' segments each token is in.
        places_BT: int32, where in it.
        fit: bool scalar, whether all of them have found room.
    """

    starts_BM: jax.Array
    lengths_BM: jax.Array
    numbers_BT: jax.Array
    places_BT: jax.Array
    fit: jax.Array


def attend_by_cudnn(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    q_segment_ids_BT: jax.Array,
    k_segment_ids_BS: jax.Array,
    q_slots_T: jax.Array,
    scale: jax.Array,
    *,
    window: int | None,
) -> jax.Array:
    """Averages the values that each query may see; see `attention.attend`.

    Args:
        q_BTHC: queries, bfloat16 or float16.
        k_BSKC: keys of the whole rows.
        v_BSKC: their values.
        q_segment_ids_BT: int32.
        k_segment_ids_BS: int32.
        q_slots_T: int32, each query's index among the keys.
        scale: factor on q·k.
        window: a query sees this many keys, its own among them; None for all before it.

    Returns:
        out_BTHC.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # private: not at import

    T, S = q_BTHC.shape[1], k_BSKC.shape[1]
    # Its backward pass has no odd lengths: what is added is a segment of its own.
    room_T, room_S = T % 2, S % 2
    qkv = (
        pad_tokens((q_BTHC * scale).astype(q_BTHC.dtype), room_T),
        pad_tokens(k_BSKC, room_S),
        pad_tokens(v_BSKC, room_S),
    )
    ids = (
        pad_tokens(q_segment_ids_BT, room_T, -1),
        pad_tokens(k_segment_ids_BS, room_S, -1),
        jnp.pad(q_slots_T, (0, room_T), constant_values=S),
    )
    by_mask = functools.partial(_attend, functools.partial(_by_mask, window), ids)
    if T != S or window is not None or not cudnn.check_compute_capability("9.0"):
        out_BTHC = by_mask(*qkv)
    else:
        runs = find_runs(ids[0], max(2, T // MEAN_LEN) + room_T)
        by_starts = functools.partial(_attend, _by_starts, runs)
        out_BTHC = jax.lax.cond(runs.fit, by_starts, by_mask, *qkv)
    return out_BTHC[:, :T]


def find_runs(segment_ids_BT: jax.Array, num_most: int) -> Runs:
    """Finds where rows' segments begin, and how long they are; padding is one of them.

    segment_ids  1 1 1 2 2 0 0     starts  0 3 5 -1     lengths  3 2 2     (num_most = 3)

    Args:
        segment_ids_BT: int32, equal along each segment.
        num_most: M, segments that there is room for.
    """
    B, T = segment_ids_BT.shape
    slots_T = jnp.arange(T, dtype=jnp.int32)
    changes_BT = jnp.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1] - 1) != 0
    starts_BT = jnp.sort(jnp.where(changes_BT, slots_T[None], T), axis=1)
    room = max(0, num_most + 1 - T)
    starts_BM = jnp.pad(starts_BT, ((0, 0), (0, room)), constant_values=T)[:, : num_most + 1]
    lengths_BM = jnp.diff(starts_BM, axis=1)
    return Runs(
        starts_BM=jnp.where(starts_BM < T, starts_BM, -1),
        lengths_BM=jnp.where(lengths_BM > 0, lengths_BM, -1),
        numbers_BT=jnp.cumsum(changes_BT).reshape(B, T) - 1,
        places_BT=slots_T[None] - jax.lax.cummax(jnp.where(changes_BT, slots_T[None], 0), axis=1),
        fit=jnp.all(jnp.sum(changes_BT, axis=1) <= num_most),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    kernel: Callable, where: Any, q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array
) -> jax.Array:
    """Calls a kernel, whose backward pass then keeps averages, and a logsumexp a token and head."""
    return kernel(where, q_BTHC, k_BSKC, v_BSKC)


def _attend_forward(kernel, where, q_BTHC, k_BSKC, v_BSKC):
    out_BTHC, backward = jax.vjp(functools.partial(kernel, where), q_BTHC, k_BSKC, v_BSKC)
    named_out_BTHC = checkpoint_name(out_BTHC, "attended")

    def kept(x: jax.Array) -> jax.Array:
        if x is out_BTHC:
            return named_out_BTHC
        if not _is_logsumexp(x):
            return x
        return checkpoint_name(
            x[_places(where, x.shape[1])] if isinstance(where, Runs) else x, "attended"
        )

    return named_out_BTHC, (where, jax.tree.map(kept, backward))


def _attend_backward(kernel, kept, d_out_BTHC):
    where, backward = kept

    def as_given(x: jax.Array) -> jax.Array:
        if not (isinstance(where, Runs) and _is_logsumexp(x)):
            return x
        _, H, T = x.shape
        # Behind an example's end a weight is exp(score - inf): nothing, should the kernel make it.
        rows_SHT = jnp.full((where.lengths_BM.size, H, T), jnp.inf, x.dtype)
        return rows_SHT.at[_places(where, H)].set(x, unique_indices=True)

    return None, *jax.tree.map(as_given, backward)(d_out_BTHC)


_attend.defvjp(_attend_forward, _attend_backward)


def _is_logsumexp(x: jax.Array) -> bool:
    """Whether it is that among what a kernel's backward pass is given."""
    return x.ndim == 3 and x.dtype == jnp.float32


def _places(runs: Runs, num_heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where in [segments, H, T] the logsumexps of [B, H, T] stand."""
    heads_1H1 = jnp.arange(num_heads)[None, :, None]
    return runs.numbers_BT[:, None], heads_1H1, runs.places_BT[:, None]


def _by_starts(runs: Runs, q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array) -> jax.Array:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    copies = 1 if COUNTS_KEY_HEADS else q_BTHC.shape[2] // k_BTKC.shape[2]
    k_BTKC, v_BTKC = (jnp.repeat(x, copies, axis=2) for x in (k_BTKC, v_BTKC))
    return cudnn.dot_product_attention(
        q_BTHC,
        k_BTKC,
        v_BTKC,
        q_seqlen=runs.lengths_BM,
        kv_seqlen=runs.lengths_BM,
        q_offsets=runs.starts_BM,
        kv_offsets=runs.starts_BM,
        scale=1.0,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )


def _by_mask(
    window: int | None,
    ids: tuple[jax.Array, jax.Array, jax.Array],
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
) -> jax.Array:
    q_segment_ids_BT, k_segment_ids_BS, q_slots_T = ids
    distance_TS = q_slots_T[:, None] - jnp.arange(k_BSKC.shape[1])[None]
    mask_TS = distance_TS >= 0
    if window is not None:
        mask_TS &= distance_TS < window
    mask_BTS = (q_segment_ids_BT[:, :, None] == k_segment_ids_BS[:, None]) & mask_TS[None]
    # A query that is added sees all: softmax of nothing would be NaN.
    mask_BTS |= (q_segment_ids_BT < 0)[..., None]
    return jax.nn.dot_product_attention(
        q_BTHC, k_BSKC, v_BSKC, mask=mask_BTS[:, None], scale=1.0, implementation="cudnn"
    )
