"""attend(): against plain float64 arithmetic, and what it must not see or keep."""

import functools

import jax
import numpy as np
import pytest

from jax_sft.model.attention import BACKENDS, QUERY_CHUNK, attend, choose_backend
from jax_sft.model.types import Alibi

SLOPES = (0.5, 0.25, 0.125, 0.0625)


def naive(
    q,
    k,
    v,
    q_positions,
    k_positions,
    q_segments,
    k_segments,
    scale,
    window=None,
    softcap=None,
    alibi=None,
):
    """One [T, S] matrix of weights for each row and head, in float64."""
    q, k, v = (np.float64(x) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    seen = (q_segments[:, :, None] == k_segments[:, None]) & (
        q_positions[:, :, None] >= k_positions[:, None]
    )
    if window is not None:
        seen &= q_positions[:, :, None] - k_positions[:, None] < window
    scores = np.einsum("BTHC,BSHC->BHTS", q, k) * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if alibi is not None:
        distance = q_positions[:, None, :, None] - k_positions[:, None, None]
        scores = scores - alibi.factor * np.array(alibi.slopes)[:, None, None] * distance
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("BHTS,BSHC->BTHC", weights / weights.sum(-1, keepdims=True), v)


STATIC = ("scale", "dropout_rate", "window", "softcap", "alibi")


@functools.partial(jax.jit, static_argnames=STATIC)
def run(q, k, v, q_positions, k_positions, q_segments, k_segments, scale, **options):
    return attend(
        q,
        k,
        v,
        q_positions_BT=q_positions,
        k_positions_BS=k_positions,
        q_segment_ids_BT=q_segments,
        k_segment_ids_BS=k_segments,
        scale=scale,
        **options,
    )


def draw(num_queries, num_keys, kv_heads=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(2, num_queries, 4, 8), (2, num_keys, kv_heads, 8), (2, num_keys, kv_heads, 8)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def counting(length):
    return np.broadcast_to(np.arange(length, dtype=np.int32), (2, length))


def ones(length):
    return np.ones((2, length), np.int32)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_row_longer_than_a_chunk_with_grouped_heads(kv_heads):
    num_tokens = QUERY_CHUNK + 9
    q, k, v = draw(num_tokens, num_tokens, kv_heads)
    where = (counting(num_tokens), counting(num_tokens), ones(num_tokens), ones(num_tokens))
    got = run(q, k, v, *where, 0.3)
    # Weights sum to 1 over values of about 1: float32's own rounding.
    np.testing.assert_allclose(got, naive(q, k, v, *where, 0.3), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(window=1),
        dict(window=20),
        dict(window=90),
        dict(softcap=0.7),
        dict(alibi=Alibi(SLOPES, factor=0.5)),
        dict(window=7, softcap=0.7, alibi=Alibi(SLOPES)),
    ],
    ids=str,
)
def test_windows_caps_and_biases(options):
    """Two segments a row, the second beginning in the first chunk and ending in the last."""
    num_tokens = QUERY_CHUNK + 9
    q, k, v = draw(num_tokens, num_tokens)
    starts = np.where(np.arange(num_tokens) < 40, 0, 40)
    positions = np.broadcast_to(np.arange(num_tokens) - starts, (2, num_tokens)).astype(np.int32)
    segments = np.broadcast_to(1 + (starts > 0), (2, num_tokens)).astype(np.int32)
    where = (positions, positions, segments, segments)
    got = run(q, k, v, *where, 0.3, **options)
    expected = naive(q, k, v, *where, 0.3, **options)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    without = naive(q, k, v, *where, 0.3)
    assert np.abs(expected - without).max() > 0.1, "the options change nothing here"


def test_keys_before_a_window_are_not_computed():
    num_tokens = 4 * QUERY_CHUNK
    q, k, v = draw(num_tokens, num_tokens)
    where = (counting(num_tokens), counting(num_tokens), ones(num_tokens), ones(num_tokens))
    text = str(jax.make_jaxpr(functools.partial(run, scale=0.3, window=9))(q, k, v, *where))
    assert f"{QUERY_CHUNK},{QUERY_CHUNK + 8}]" in text
    assert f"{QUERY_CHUNK},{2 * QUERY_CHUNK}]" not in text


def test_alibi_in_bfloat16_rounds_slope_position_and_product():
    """Falcon's: 1.2 is 1.203125, 257 is 256, and 0.75 of what 308 rounds to is added."""
    q, k, v = (np.zeros((1, 1, 1, 2), np.float32), np.zeros((1, 2, 1, 2)), np.zeros((1, 2, 1, 2)))
    v[0, 1] = 1.0
    positions = np.array([[300]]), np.array([[0, 257]])
    segments = np.ones((1, 1), np.int32), np.ones((1, 2), np.int32)
    alibi = Alibi((1.2,), bfloat16=True, factor=1 / 308)
    got = run(
        q, k.astype(np.float32), v.astype(np.float32), *positions, *segments, 1.0, alibi=alibi
    )
    np.testing.assert_allclose(got[0, 0, 0], np.e / (1 + np.e), rtol=1e-6)


def test_queries_over_a_cache_see_slots_up_to_their_own():
    q, k, v = draw(3, 12)
    q_positions = np.array([[0, 1, 2], [5, 6, 7]], np.int32)
    where = (q_positions, counting(12), ones(3), ones(12))
    got = run(q, k, v, *where, 0.3)
    np.testing.assert_allclose(got, naive(q, k, v, *where, 0.3), rtol=0, atol=5e-6)
    k[:, 8:], v[:, 8:] = 1e9, 1e9
    np.testing.assert_array_equal(run(q, k, v, *where, 0.3), got)


def test_padding_is_finite_and_apart():
    q, k, v = draw(6, 6)
    segments = np.array([[1, 1, 2, 2, 0, 0]] * 2, np.int32)
    positions = np.array([[0, 1, 0, 1, 0, 0]] * 2, np.int32)
    got = np.asarray(run(q, k, v, positions, positions, segments, segments, 0.3))
    assert np.isfinite(got).all()
    q[:, 4:], k[:, 4:], v[:, 4:] = 7.0, 7.0, 7.0
    other = np.asarray(run(q, k, v, positions, positions, segments, segments, 0.3))
    np.testing.assert_array_equal(other[:, :4], got[:, :4])


def test_dropout_keeps_the_mean_and_needs_its_key():
    q, k, v = draw(64, 64)
    v[:] = 1.0
    where = (counting(64), counting(64), ones(64), ones(64))
    kwargs = dict(scale=0.0, dropout_rate=0.25)
    got, other = (
        np.asarray(run(q, k, v, *where, **kwargs, dropout_key=jax.random.key(seed)))
        for seed in (0, 1)
    )
    assert (got != other).any()
    # 512 sums of 64 kept or dropped weights: their mean has a deviation below 0.01.
    assert abs(got[:, -1].mean() - 1.0) < 0.1
    # The first query sees one key: it is dropped, or scaled by 1 / 0.75.
    assert set(np.unique(got[:, 0].round(4))) <= {0.0, np.float32(1.3333)}


def test_no_whole_score_array_is_made():
    num_tokens = 4 * QUERY_CHUNK
    q, k, v = draw(num_tokens, num_tokens, 4)
    where = (counting(num_tokens), counting(num_tokens), ones(num_tokens), ones(num_tokens))
    loss = jax.grad(lambda *qkv: run(*qkv, *where, 0.3).sum(), argnums=(0, 1, 2))
    text = str(jax.make_jaxpr(loss)(q, k, v))
    assert f"{QUERY_CHUNK},{num_tokens}]" in text, "the text does not show the chunks' scores"
    assert f"{num_tokens},{num_tokens}]" not in text


def test_backends_are_chosen_by_name():
    assert [choose_backend(name) for name in BACKENDS] == ["xla", "xla"]
    with pytest.raises(ValueError, match="model.attention='flash' is unknown: choose one of"):
        choose_backend("flash")
