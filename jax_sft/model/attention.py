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

from jax_sft.model.types import Alibi

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
    window: int | None = None,
    softcap: float | None = None,
    alibi: Alibi | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Averages the values that each query may see, weighted by softmax(scale · q·k).

    Scores and softmax are in float32. Queries go in chunks, and each chunk's scores are made
    again in the backward pass, so that no [B, H, T, S] array is kept. Where T equals S the
    queries and keys must be the same tokens in the same order, with positions that rise along
    each segment; then the keys behind a chunk's last query, and those before the window of its
    first, are skipped.

    Args:
        q_BTHC: queries, any float dtype.
        k_BSKC: keys; K divides H, and each key head serves H / K query heads.
        v_BSKC: values.
        q_positions_BT: int32, the query's position within its segment.
        k_positions_BS: int32, the key's.
        q_segment_ids_BT: int32; a query sees keys of the same segment only.
        k_segment_ids_BS: int32.
        scale: factor on q·k.
        window: a query sees this many keys, its own among them; None for all before it.
        softcap: scores are cap · tanh(score / cap); None for no cap.
        alibi: what is added to the scores by distance, or None.
        dropout_rate: share of the weights set to 0 while training.
        dropout_key: PRNG key, needed where `dropout_rate` is above 0.

    Returns:
        out_BTHC, in the dtype of the values.
    """
    B, T, H, C = q_BTHC.shape
    S, K = k_BSKC.shape[1:3]
    # Heads before tokens, once: otherwise every product would bring them there for itself.
    q_BKGTC = jnp.moveaxis(q_BTHC.reshape(B, T, K, H // K, C), 1, 3)
    k_BKSC, v_BKSC = jnp.swapaxes(k_BSKC, 1, 2), jnp.swapaxes(v_BSKC, 1, 2)
    attend_chunk = jax.checkpoint(_attend_chunk, static_argnums=(6, 7), prevent_cse=False)
    bias_BHS = None if alibi is None else _alibi_bias(alibi, k_positions_BS)
    out = []
    for start in range(0, T, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, T)
        seen = slice(0 if window is None else max(0, start - window + 1), stop)
        if T != S:
            seen = slice(0, S)
        distance_BTS = q_positions_BT[:, start:stop, None] - k_positions_BS[:, None, seen]
        mask_BTS = q_segment_ids_BT[:, start:stop, None] == k_segment_ids_BS[:, None, seen]
        mask_BTS &= distance_BTS >= 0
        if window is not None:
            mask_BTS &= distance_BTS < window
        bias_BKG1S = None
        if bias_BHS is not None:
            bias_BKG1S = bias_BHS[:, :, seen].reshape(B, K, H // K, 1, -1)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, start)
        chunk = (q_BKGTC[..., start:stop, :], k_BKSC[:, :, seen], v_BKSC[:, :, seen])
        out.append(attend_chunk(*chunk, mask_BTS, bias_BKG1S, scale, softcap, dropout_rate, key))
    return jnp.moveaxis(jnp.concatenate(out, axis=3), 3, 1).reshape(B, T, H, C)


def _attend_chunk(
    q_BKGTC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    mask_BTS: jax.Array,
    bias_BKG1S: jax.Array | None,
    scale: float | jax.Array,
    softcap: float | None,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    scores_BKGTS = jnp.einsum(
        "BKGTC,BKSC->BKGTS", q_BKGTC, k_BKSC, preferred_element_type=jnp.float32
    )
    mask_B11TS = jnp.where(mask_BTS, 0.0, MASKED)[:, None, None]
    if softcap is None:
        scores_BKGTS = scores_BKGTS * scale + mask_B11TS
    else:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS * (scale / softcap)) + mask_B11TS
    if bias_BKG1S is not None:
        scores_BKGTS = scores_BKGTS + bias_BKG1S
    largest_BKGT1 = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))
    weights_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT1)
    # Divided by at the end, where there are C numbers a query, and not S.
    total_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
    if dropout_rate:
        kept = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights_BKGTS.shape)
        weights_BKGTS = jnp.where(kept, weights_BKGTS / (1.0 - dropout_rate), 0.0)
    out_BKGTC = jnp.einsum("BKGTS,BKSC->BKGTC", weights_BKGTS.astype(v_BKSC.dtype), v_BKSC)
    return (out_BKGTC / total_BKGT1).astype(v_BKSC.dtype)


def _alibi_bias(alibi: Alibi, positions_BS: jax.Array) -> jax.Array:
    """Returns bias_BHS; by the key's position alone, since softmax ignores what all keys share."""

    def rounded(x: jax.Array) -> jax.Array:
        # A cast to bfloat16 and back may be optimised away; this may not.
        return jax.lax.reduce_precision(x, 8, 7) if alibi.bfloat16 else x

    slopes_H = rounded(jnp.array(alibi.slopes, jnp.float32))
    positions_BS = rounded(positions_BS.astype(jnp.float32))
    return alibi.factor * rounded(slopes_H[None, :, None] * positions_BS[:, None, :])
