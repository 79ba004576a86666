"""Attention in blocks of queries and keys, in plain XLA: for CPUs, and where no kernel serves.

In: queries, keys and values of one device, where each stands, the options. Out: the averages.
Scores exist for one block of queries and one of keys at a time, in both directions (online
softmax: Milakov and Gimelshein 2018; backward: FlashAttention-2, Dao 2023, algorithm 2). Blocks
in which no query sees a key are skipped: above the diagonal, outside the window, and between
packed examples, so that a long row of short examples costs what those cost:

    segments     1 1 1 1 2 2 | 2 2 2 3 3 3 | 3 3 3 4 4 4
    queries 0         x      |             |
    queries 1         x      |      x      |
    queries 2                |      x      |      x          (five of nine blocks are computed)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

QUERY_BLOCK = 128
KEY_BLOCK = 128
MASKED = -1e30  # finite, so that a row without any key has no NaN


class Options(NamedTuple):
    """What is known when the program is traced; see `attention.attend`.

    Attributes:
        window: how many keys a query sees, or None.
        softcap: of the scores, or None.
        dropout_rate: share of the weights set to 0.
        query_block: queries at a time.
        key_block: keys at a time.
    """

    window: int | None
    softcap: float | None
    dropout_rate: float
    query_block: int
    key_block: int


class Places(NamedTuple):
    """Where queries and keys stand, and what else their scores depend on.

    Attributes:
        q_segment_ids_BT: int32.
        k_segment_ids_BS: int32.
        q_positions_BT: int32, within the segment.
        k_positions_BS: int32.
        q_slots_T: int32, each query's index among the keys, or None.
        bias_BKG1S: float32, added to the scores, or None.
        scale: float32, factor on the scores.
        dropout_keys_BH: PRNG keys, or None.
    """

    q_segment_ids_BT: jax.Array
    k_segment_ids_BS: jax.Array
    q_positions_BT: jax.Array
    k_positions_BS: jax.Array
    q_slots_T: jax.Array | None
    bias_BKG1S: jax.Array | None
    scale: jax.Array
    dropout_keys_BH: jax.Array | None


def attend_in_blocks(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    q_segment_ids_BT: jax.Array,
    k_segment_ids_BS: jax.Array,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_slots_T: jax.Array | None,
    bias_BHS: jax.Array | None,
    scale: jax.Array,
    dropout_keys_BH: jax.Array | None,
    *,
    window: int | None,
    softcap: float | None,
    dropout_rate: float,
) -> jax.Array:
    """Averages the values that each query may see; see `attention.attend`.

    Args:
        q_BTHC: queries.
        k_BSKC: keys of the whole rows.
        v_BSKC: values of the whole rows.
        q_segment_ids_BT: int32, from 0.
        k_segment_ids_BS: int32, from 0.
        q_positions_BT: int32.
        k_positions_BS: int32.
        q_slots_T: int32, each query's index among the keys, which are the same tokens in the same
            order; None where they are others, such as a cache.
        bias_BHS: float32, added to the scores, or None.
        scale: float32 scalar, factor on q·k.
        dropout_keys_BH: PRNG keys, or None.
        window: how many keys a query sees, or None.
        softcap: of the scores, or None.
        dropout_rate: share of the weights set to 0.

    Returns:
        out_BTHC, in the dtype of the values.
    """
    B, T, H, C = q_BTHC.shape
    S, K = k_BSKC.shape[1:3]
    query_block = min(QUERY_BLOCK, T)
    key_block = S if q_slots_T is None else min(KEY_BLOCK, S)
    q_room, k_room = -T % query_block, -S % key_block
    if q_slots_T is not None:
        q_slots_T = jnp.pad(q_slots_T, (0, q_room), mode="edge")
    if bias_BHS is not None:
        bias_BHS = jnp.pad(bias_BHS, ((0, 0), (0, 0), (0, k_room))).reshape(B, K, H // K, 1, -1)
    places = Places(
        pad_tokens(q_segment_ids_BT, q_room, -2),  # neither meets anything
        pad_tokens(k_segment_ids_BS, k_room, -1),
        pad_tokens(q_positions_BT, q_room),
        pad_tokens(k_positions_BS, k_room),
        q_slots_T,
        bias_BHS,
        scale,
        dropout_keys_BH,
    )
    # Heads before tokens, once: otherwise every product would bring them there for itself.
    q_BKGTC = jnp.moveaxis(pad_tokens(q_BTHC, q_room).reshape(B, -1, K, H // K, C), 1, 3)
    k_BKSC, v_BKSC = (jnp.swapaxes(pad_tokens(x, k_room), 1, 2) for x in (k_BSKC, v_BSKC))
    options = Options(window, softcap, dropout_rate, query_block, key_block)
    out_BKGTC = _attend(options, q_BKGTC, k_BKSC, v_BKSC, places)
    return jnp.moveaxis(out_BKGTC, 3, 1).reshape(B, -1, H, C)[:, :T]


def pad_tokens(x: jax.Array, room: int, value: int = 0) -> jax.Array:
    """Adds `room` tokens behind the last of each row: the second axis of x."""
    widths = ((0, 0), (0, room)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value) if room else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q_BKGTC, k_BKSC, v_BKSC, places):
    return _forward(options, q_BKGTC, k_BKSC, v_BKSC, places)[0]


def _forward(o: Options, q_BKGTC, k_BKSC, v_BKSC, places: Places):
    spans = _spans(o, places)

    def attend_block(i):
        q_BKGNC = _block(q_BKGTC, i, o.query_block, axis=3)

        def add_keys(j, sums):
            largest_BKGN, total_BKGN, out_BKGNC = sums
            scores_BKGNM, _ = _scores(o, q_BKGNC, k_BKSC, places, i, j)
            new_BKGN = jnp.maximum(largest_BKGN, jnp.max(scores_BKGNM, axis=-1))
            weights_BKGNM = jnp.exp(scores_BKGNM - new_BKGN[..., None])
            shrink_BKGN = jnp.exp(largest_BKGN - new_BKGN)
            total_BKGN = total_BKGN * shrink_BKGN + jnp.sum(weights_BKGNM, axis=-1)
            kept_BKGNM = _drop(o, places, i, j, weights_BKGNM).astype(v_BKSC.dtype)
            v_BKMC = _block(v_BKSC, j, o.key_block, axis=2)
            added_BKGNC = _dot("BKGNM,BKMC->BKGNC", kept_BKGNM, v_BKMC)
            return new_BKGN, total_BKGN, out_BKGNC * shrink_BKGN[..., None] + added_BKGNC

        zeros_BKGN = jnp.zeros(q_BKGNC.shape[:-1], jnp.float32)
        none = (zeros_BKGN + MASKED, zeros_BKGN, jnp.zeros(q_BKGNC.shape, jnp.float32))
        largest_BKGN, total_BKGN, out_BKGNC = _over_keys(spans, i, add_keys, none)
        out_BKGNC = (out_BKGNC / total_BKGN[..., None]).astype(v_BKSC.dtype)
        return out_BKGNC, largest_BKGN + jnp.log(total_BKGN)

    num_blocks = q_BKGTC.shape[3] // o.query_block
    out, logsumexp = jax.lax.map(attend_block, jnp.arange(num_blocks))
    # Both are kept for the backward pass where "attended" is (see `decoder.REMAT_POLICIES`).
    out_BKGTC = checkpoint_name(_join(out), "attended")
    logsumexp_BKGT = checkpoint_name(_join(logsumexp), "attended")
    return out_BKGTC, (q_BKGTC, k_BKSC, v_BKSC, places, out_BKGTC, logsumexp_BKGT)


def _backward(o: Options, residuals, d_out_BKGTC):
    q_BKGTC, k_BKSC, v_BKSC, places, out_BKGTC, logsumexp_BKGT = residuals
    spans = _spans(o, places)
    # What a query's weights cost together: softmax takes it off each of them.
    both = (d_out_BKGTC.astype(jnp.float32), out_BKGTC.astype(jnp.float32))
    mean_BKGT = jnp.einsum("BKGTC,BKGTC->BKGT", *both)

    def add_queries(d_kv, i):
        of_queries = (q_BKGTC, d_out_BKGTC, logsumexp_BKGT, mean_BKGT)
        q_BKGNC, d_out_BKGNC, logsumexp_BKGN, mean_BKGN = (
            _block(x, i, o.query_block, axis=3) for x in of_queries
        )

        def add_keys(j, sums):
            d_q_BKGNC, d_k_BKSC, d_v_BKSC = sums
            k_BKMC, v_BKMC = (_block(x, j, o.key_block, axis=2) for x in (k_BKSC, v_BKSC))
            scores_BKGNM, d_cap_BKGNM = _scores(o, q_BKGNC, k_BKSC, places, i, j)
            weights_BKGNM = jnp.exp(scores_BKGNM - logsumexp_BKGN[..., None])
            kept_BKGNM = _drop(o, places, i, j, weights_BKGNM).astype(d_out_BKGNC.dtype)
            d_v_BKMC = _dot("BKGNM,BKGNC->BKMC", kept_BKGNM, d_out_BKGNC)
            d_kept_BKGNM = _dot("BKGNC,BKMC->BKGNM", d_out_BKGNC, v_BKMC)
            d_weights_BKGNM = _drop(o, places, i, j, d_kept_BKGNM)
            d_scores_BKGNM = weights_BKGNM * (d_weights_BKGNM - mean_BKGN[..., None])
            if d_cap_BKGNM is not None:
                d_scores_BKGNM = d_scores_BKGNM * d_cap_BKGNM
            d_scores_BKGNM = (d_scores_BKGNM * places.scale).astype(q_BKGNC.dtype)
            d_k_BKMC = _dot("BKGNM,BKGNC->BKMC", d_scores_BKGNM, q_BKGNC)
            return (
                d_q_BKGNC + _dot("BKGNM,BKMC->BKGNC", d_scores_BKGNM, k_BKMC),
                _add_block(d_k_BKSC, j, d_k_BKMC),
                _add_block(d_v_BKSC, j, d_v_BKMC),
            )

        zeros_BKGNC = jnp.zeros(q_BKGNC.shape, jnp.float32)
        d_q_BKGNC, *d_kv = _over_keys(spans, i, add_keys, (zeros_BKGNC, *d_kv))
        return tuple(d_kv), d_q_BKGNC.astype(q_BKGTC.dtype)

    num_blocks = q_BKGTC.shape[3] // o.query_block
    zeros_BKSC = jnp.zeros(k_BKSC.shape, jnp.float32)
    d_kv, d_q = jax.lax.scan(add_queries, (zeros_BKSC, zeros_BKSC), jnp.arange(num_blocks))
    return _join(d_q), *(x.astype(k_BKSC.dtype) for x in d_kv), None


_attend.defvjp(_forward, _backward)


def _scores(o: Options, q_BKGNC, k_BKSC, places: Places, i, j):
    """Returns the scores of block i of the queries and j of the keys, and the cap's derivative."""
    q_segment_ids_BN, q_positions_BN = (
        _block(x, i, o.query_block, axis=1)
        for x in (places.q_segment_ids_BT, places.q_positions_BT)
    )
    k_segment_ids_BM, k_positions_BM = (
        _block(x, j, o.key_block, axis=1) for x in (places.k_segment_ids_BS, places.k_positions_BS)
    )
    distance_BNM = q_positions_BN[:, :, None] - k_positions_BM[:, None]
    mask_BNM = q_segment_ids_BN[:, :, None] == k_segment_ids_BM[:, None]
    mask_BNM &= distance_BNM >= 0
    if o.window is not None:
        mask_BNM &= distance_BNM < o.window
    k_BKMC = _block(k_BKSC, j, o.key_block, axis=2)
    scores_BKGNM = _dot("BKGNC,BKMC->BKGNM", q_BKGNC, k_BKMC) * places.scale
    d_cap_BKGNM = None
    if o.softcap is not None:
        share_BKGNM = jnp.tanh(scores_BKGNM / o.softcap)
        scores_BKGNM, d_cap_BKGNM = o.softcap * share_BKGNM, 1.0 - jnp.square(share_BKGNM)
    if places.bias_BKG1S is not None:
        scores_BKGNM = scores_BKGNM + _block(places.bias_BKG1S, j, o.key_block, axis=4)
    return jnp.where(mask_BNM[:, None, None], scores_BKGNM, MASKED), d_cap_BKGNM


def _drop(o: Options, places: Places, i, j, x_BKGNM):
    """Sets some of a block to 0, always the same ones, and scales up the others."""
    if not o.dropout_rate:
        return x_BKGNM
    # By the query, not its block: where a mesh cuts rows, the blocks are others.
    slots_N = _block(places.q_slots_T, i, o.query_block, axis=0)
    num_blocks = places.k_segment_ids_BS.shape[1] // o.key_block

    def draw(key: jax.Array) -> jax.Array:
        keys_N = jax.vmap(jax.random.fold_in, (None, 0))(key, slots_N * num_blocks + j)
        kept_M = functools.partial(jax.random.bernoulli, p=1 - o.dropout_rate, shape=(o.key_block,))
        return jax.vmap(kept_M)(keys_N)

    kept_BKGNM = jax.vmap(jax.vmap(draw))(places.dropout_keys_BH).reshape(x_BKGNM.shape)
    return jnp.where(kept_BKGNM, x_BKGNM / (1.0 - o.dropout_rate), 0.0)


def _spans(o: Options, places: Places) -> tuple[jax.Array, jax.Array] | None:
    """For each block of queries, the first block of keys that it sees and the one behind the last.

    None where there is one block of keys alone.
    """
    if places.k_segment_ids_BS.shape[1] == o.key_block:
        return None

    def extent(x_BT: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        x_BNT = x_BT.reshape(len(x_BT), -1, size)
        return jnp.min(x_BNT, axis=-1), jnp.max(x_BNT, axis=-1)

    q_low_BN, q_high_BN = extent(places.q_segment_ids_BT, o.query_block)
    k_low_BM, k_high_BM = extent(places.k_segment_ids_BS, o.key_block)
    meets_BNM = q_low_BN[:, :, None] <= k_high_BM[:, None]
    meets_BNM &= q_high_BN[:, :, None] >= k_low_BM[:, None]
    meets_NM = jnp.any(meets_BNM, axis=0)
    first_N = places.q_slots_T[:: o.query_block]
    last_N = places.q_slots_T[o.query_block - 1 :: o.query_block]
    start_M = jnp.arange(meets_NM.shape[1]) * o.key_block
    meets_NM &= start_M[None] <= last_N[:, None]
    if o.window is not None:
        meets_NM &= start_M[None] + o.key_block > first_N[:, None] - (o.window - 1)
    return (
        jnp.argmax(meets_NM, axis=1),
        meets_NM.shape[1] - jnp.argmax(meets_NM[:, ::-1], axis=1),
    )


def _over_keys(spans, i, add_keys: Callable, start: Any) -> Any:
    """Runs `add_keys` over the blocks of keys that block i of the queries sees."""
    if spans is None:
        return add_keys(0, start)
    first_N, stop_N = spans
    return jax.lax.fori_loop(first_N[i], stop_N[i], add_keys, start)


def _dot(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)


def _block(x: jax.Array, i: jax.Array, size: int, *, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _add_block(x_BKSC: jax.Array, j: jax.Array, block_BKMC: jax.Array) -> jax.Array:
    size = block_BKMC.shape[2]
    block_BKMC = _block(x_BKSC, j, size, axis=2) + block_BKMC
    return jax.lax.dynamic_update_slice_in_dim(x_BKSC, block_BKMC, j * size, 2)


def _join(blocks: jax.Array) -> jax.Array:
    """Puts the blocks of `lax.map` and `scan` side by side: [N, B, K, G, n, ...] to BKGT..."""
    x = jnp.moveaxis(blocks, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])
