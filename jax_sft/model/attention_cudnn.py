"""Attention by cuDNN's flash kernel, for NVIDIA GPUs.

In: queries, keys and values of one device and their segments. Out: the averages. cuDNN's causal
mask alone would let packed examples see each other. On Hopper and newer it is told where each
example begins; elsewhere, and for windows, it is given the mask of a whole row as a bias.
"""

import functools

import jax
import jax.numpy as jnp

# What gives the averages and their logsumexps, in which nothing can be named (see
# `decoder.REMAT_POLICIES`).
CUDNN_PRIMITIVE = "dot_product_attention_fwd_wrapper"
MEAN_LEN = 64  # rows with more examples than of this length on average take the mask


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
    qkv = ((q_BTHC * scale).astype(q_BTHC.dtype), k_BSKC, v_BSKC)
    ids = (q_segment_ids_BT, k_segment_ids_BS, q_slots_T)
    by_mask = functools.partial(_by_mask, ids=ids, window=window)
    if T != S or window is not None or not cudnn.check_compute_capability("9.0"):
        return by_mask(*qkv)
    starts_BM, lengths_BM, fits = find_runs(q_segment_ids_BT, max(2, T // MEAN_LEN))
    by_starts = functools.partial(_by_starts, starts_BM=starts_BM, lengths_BM=lengths_BM)
    return jax.lax.cond(fits, by_starts, by_mask, *qkv)


def find_runs(segment_ids_BT: jax.Array, num_most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds where a row's segments begin, and how long they are; padding is one of them.

    segment_ids  1 1 1 2 2 0 0     starts  0 3 5 -1     lengths  3 2 2     (num_most = 3)

    Args:
        segment_ids_BT: int32, equal along each segment.
        num_most: segments that there is room for.

    Returns:
        starts [B, num_most + 1] and lengths [B, num_most], int32, -1 where there are no more;
        and a bool scalar: whether all of them have found room.
    """
    B, T = segment_ids_BT.shape
    slots_T = jnp.arange(T, dtype=jnp.int32)
    changes_BT = jnp.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1] - 1) != 0
    starts_BT = jnp.sort(jnp.where(changes_BT, slots_T[None], T), axis=1)
    room = max(0, num_most + 1 - T)
    starts_BM = jnp.pad(starts_BT, ((0, 0), (0, room)), constant_values=T)[:, : num_most + 1]
    lengths_BM = jnp.diff(starts_BM, axis=1)
    fits = jnp.all(jnp.sum(changes_BT, axis=1) <= num_most)
    return (
        jnp.where(starts_BM < T, starts_BM, -1),
        jnp.where(lengths_BM > 0, lengths_BM, -1),
        fits,
    )


def _by_starts(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    *,
    starts_BM: jax.Array,
    lengths_BM: jax.Array,
) -> jax.Array:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    # Before JAX 0.12, the keys' offsets were counted with the number of query heads.
    copies = q_BTHC.shape[2] // k_BTKC.shape[2]
    k_BTHC, v_BTHC = (jnp.repeat(x, copies, axis=2) for x in (k_BTKC, v_BTKC))
    return cudnn.dot_product_attention(
        q_BTHC,
        k_BTHC,
        v_BTHC,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=starts_BM,
        kv_offsets=starts_BM,
        scale=1.0,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )


def _by_mask(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    ids: tuple[jax.Array, jax.Array, jax.Array],
    window: int | None,
) -> jax.Array:
    q_segment_ids_BT, k_segment_ids_BS, q_slots_T = ids
    distance_TS = q_slots_T[:, None] - jnp.arange(k_BSKC.shape[1])[None]
    mask_TS = distance_TS >= 0
    if window is not None:
        mask_TS &= distance_TS < window
    mask_BTS = (q_segment_ids_BT[:, :, None] == k_segment_ids_BS[:, None]) & mask_TS[None]
    return jax.nn.dot_product_attention(
        q_BTHC, k_BSKC, v_BSKC, mask=mask_BTS[:, None], scale=1.0, implementation="cudnn"
    )
