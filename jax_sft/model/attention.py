"""attend(): causal attention within segments, with one meaning and a backend a platform.

In: queries, keys, values, and for each of them a position and a segment. Out: for each query
the average of the values that it may see. A query sees a key of its own segment that does not
come later, and nothing else: so packed examples never meet, and the mask is made from
positions and segments alone, never from token ids.

    segment    1 1 1 2 2 0        key  1 1 1 2 2 0
    position   0 1 2 0 1 0      query
                                  1    x . . . . .
                                  1    x x . . . .
                                  1    x x x . . .
                                  2    . . . x . .
                                  2    . . . x x .
                                  0    . . . . . x      (padding sees itself, not NaN)
"""

import jax
import jax.numpy as jnp

BACKENDS = ("auto", "xla")
QUERY_CHUNK = 128  # queries at a time: on two CPU cores faster than 64, 256 and 512 (T = 512)
MASKED = -1e30  # finite, so that a row without any key has no NaN


def choose_backend(asked: str) -> str:
    """Returns the backend that "auto" means on this platform, or the one that was asked for.

    Raises:
        ValueError: the name is unknown.
    """
    if asked not in BACKENDS:
        raise ValueError(f"model.attention={asked!r} is unknown: choose one of {BACKENDS}")
    return "xla" if asked == "auto" else asked


def attend(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segment_ids_BT: jax.Array,
    k_segment_ids_BS: jax.Array,
    scale: float | jax.Array,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Averages the values that each query may see, weighted by softmax(scale · q·k).

    Scores and softmax are in float32. Queries go in chunks, and each chunk's scores are made
    again in the backward pass, so that no [B, H, T, S] array is kept. Where T equals S the
    queries and keys must be the same tokens in the same order, with positions that rise along
    each segment; then the keys behind a chunk's last query are skipped.

    Args:
        q_BTHC: queries, any float dtype.
        k_BSKC: keys; K divides H, and each key head serves H / K query heads.
        v_BSKC: values.
        q_positions_BT: int32, the query's position within its segment.
        k_positions_BS: int32, the key's.
        q_segment_ids_BT: int32; a query sees keys of the same segment only.
        k_segment_ids_BS: int32.
        scale: factor on q·k.
        dropout_rate: share of the weights set to 0 while training.
        dropout_key: PRNG key, needed where `dropout_rate` is above 0.

    Returns:
        out_BTHC, in the dtype of the values.
    """
    num_tokens, num_keys = q_BTHC.shape[1], k_BSKC.shape[1]
    out = []
    for start in range(0, num_tokens, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, num_tokens)
        seen = stop if num_tokens == num_keys else num_keys
        mask_BTS = (q_segment_ids_BT[:, start:stop, None] == k_segment_ids_BS[:, None, :seen]) & (
            q_positions_BT[:, start:stop, None] >= k_positions_BS[:, None, :seen]
        )
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, start)
        attend_chunk = jax.checkpoint(_attend_chunk, static_argnums=(5,), prevent_cse=False)
        chunk = (q_BTHC[:, start:stop], k_BSKC[:, :seen], v_BSKC[:, :seen], mask_BTS)
        out.append(attend_chunk(*chunk, scale, dropout_rate, key))
    return jnp.concatenate(out, axis=1)


def _attend_chunk(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    mask_BTS: jax.Array,
    scale: float | jax.Array,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
    scores_BKGTS = jnp.einsum(
        "BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32
    )
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS * scale, MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    if dropout_rate:
        kept = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights_BKGTS.shape)
        weights_BKGTS = jnp.where(kept, weights_BKGTS / (1.0 - dropout_rate), 0.0)
    out_BTKGC = jnp.einsum("BKGTS,BSKC->BTKGC", weights_BKGTS.astype(v_BSKC.dtype), v_BSKC)
    return out_BTKGC.reshape(B, T, H, C)
