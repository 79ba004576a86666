"""attend(): against plain float64 arithmetic, and what it must not see or keep."""

import dataclasses
import functools
import itertools
import json
import math
import re

import jax
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from kernels import ON_GPU, RUN_HERE, dtype_of, tolerance
from tiny_models import tiny_gpt2

from jax_sft.model import attention, attention_xla
from jax_sft.model.attention import attend, choose_backend
from jax_sft.model.attention_cudnn import COUNTS_KEY_HEADS, MEAN_LEN, find_runs
from jax_sft.model.attention_xla import QUERY_BLOCK
from jax_sft.model.types import Alibi
from jax_sft.sharding import make_mesh

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


STATIC = ("scale", "dropout_rate", "window", "softcap", "alibi", "backend")


@functools.partial(jax.jit, static_argnames=STATIC)
def run(q, k, v, q_positions, k_positions, q_segments, k_segments, scale, backend="xla", **options):
    if ON_GPU:
        q, k, v = (x.astype(dtype_of(backend)) for x in (q, k, v))
    out = attend(
        q,
        k,
        v,
        q_positions_BT=q_positions,
        k_positions_BS=k_positions,
        q_segment_ids_BT=q_segments,
        k_segment_ids_BS=k_segments,
        scale=scale,
        backend="splash_interpreted" if backend == "splash" else backend,
        **options,
    )
    return out.astype(jax.numpy.float32)


def draw(num_queries, num_keys, kv_heads=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(2, num_queries, 4, 8), (2, num_keys, kv_heads, 8), (2, num_keys, kv_heads, 8)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def counting(length):
    return np.broadcast_to(np.arange(length, dtype=np.int32), (2, length))


def ones(length):
    return np.ones((2, length), np.int32)


@pytest.mark.parametrize("backend", RUN_HERE)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_row_longer_than_a_block_with_grouped_heads(kv_heads, backend):
    num_tokens = QUERY_BLOCK + 1
    q, k, v = draw(num_tokens, num_tokens, kv_heads)
    where = (counting(num_tokens), counting(num_tokens), ones(num_tokens), ones(num_tokens))
    got = run(q, k, v, *where, 0.3, backend=backend)
    # Weights sum to 1 over values of about 1: the dtype's own rounding.
    atol = tolerance(backend, 5e-6, 0.03)
    np.testing.assert_allclose(got, naive(q, k, v, *where, 0.3), rtol=0, atol=atol)


@pytest.mark.parametrize("backend", RUN_HERE)
@pytest.mark.parametrize(
    "options",
    [
        dict(window=1),
        dict(window=2),
        dict(window=90),
        dict(softcap=0.7),
        dict(alibi=Alibi(SLOPES, factor=0.5)),
        dict(window=7, softcap=0.7, alibi=Alibi(SLOPES)),
    ],
    ids=str,
)
def test_windows_caps_and_biases(options, backend):
    """Two segments a row, the second beginning in the first block, or where the last begins."""
    if backend != "xla" and "alibi" in options or backend == "cudnn" and "softcap" in options:
        pytest.skip("the kernel has nothing of the kind, and is not chosen for it")
    num_tokens = 2 * QUERY_BLOCK
    q, k, v = draw(num_tokens, num_tokens)
    border_B1 = np.array([[40], [QUERY_BLOCK]])
    starts = np.where(np.arange(num_tokens) < border_B1, 0, border_B1)
    positions = (np.arange(num_tokens) - starts).astype(np.int32)
    segments = (1 + (starts > 0)).astype(np.int32)
    where = (positions, positions, segments, segments)
    got = run(q, k, v, *where, 0.3, **options, backend=backend)
    expected = naive(q, k, v, *where, 0.3, **options)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance(backend, 1e-5, 0.03))
    without = naive(q, k, v, *where, 0.3)
    assert np.abs(expected - without).max() > 0.1, "the options change nothing here"


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


def test_what_is_dropped_differs_everywhere_and_is_dropped_from_the_gradients(monkeypatch):
    """Keys of unit values: the output is the weights, here of two blocks by two."""
    monkeypatch.setattr(attention_xla, "QUERY_BLOCK", 4)
    monkeypatch.setattr(attention_xla, "KEY_BLOCK", 4)
    q, k, d_out = draw(8, 8, 4)
    v = np.broadcast_to(np.eye(8, dtype=np.float32)[:, None], (2, 8, 4, 8)).copy()
    where = (counting(8), counting(8), ones(8), ones(8))

    @jax.jit
    def out_and_grads(*qkv):
        options = dict(scale=0.3, dropout_rate=0.5, dropout_key=jax.random.key(0))
        # Not the jitted one: it would keep the size of blocks.
        out, backward = jax.vjp(lambda *qkv: run.__wrapped__(*qkv, *where, **options), *qkv)
        return out, *backward(d_out)

    out, *grads = out_and_grads(q, k, v)
    kept = np.asarray(out) > 0
    weights = naive(q, k, v, *where, 0.3)
    np.testing.assert_allclose(out, 2 * kept * weights, rtol=0, atol=1e-6)
    last_of_blocks = [kept[:, i, :, j : j + 4] for i, j in ((3, 0), (7, 0), (7, 4))]
    rows, heads = (kept[0], kept[1]), (kept[:, :, 0], kept[:, :, 1])
    neighbours = (kept[:, 6, :, 4:7], kept[:, 7, :, :3])
    for one, other in [*itertools.combinations(last_of_blocks, 2), rows, heads, neighbours]:
        assert (one != other).any(), "the same weights are dropped twice"
    d_weights = 2 * kept * d_out
    d_scores = 0.3 * weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    expected = (
        np.einsum("BTHS,BSHC->BTHC", d_scores, k),
        np.einsum("BTHS,BTHC->BSHC", d_scores, q),
        np.einsum("BTHS,BTHC->BSHC", out, d_out),
    )
    for ours, theirs in zip(grads, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


@functools.partial(jax.jit, static_argnames=("scale", "window"))
def run_backward(d_out, *arguments, scale, window=None):
    q, k, v, *where = arguments
    attended = functools.partial(run, scale=scale, window=window)
    out, backward = jax.vjp(lambda q, k, v: attended(q, k, v, *where), q, k, v)
    return out, *backward(d_out)


@pytest.mark.parametrize(
    ("segment_lens", "window", "queries", "unseen"),
    [
        ([512], None, np.s_[128:256], np.s_[256:]),
        ([512], 129, np.s_[256:384], np.s_[:128]),
        ([100, 156, 256], None, np.s_[256:384], np.s_[:256]),
    ],
    ids=["later", "before the window", "other examples"],
)
def test_blocks_that_a_query_sees_nothing_of_are_not_computed(
    segment_lens, window, queries, unseen
):
    """A weight of 0 times NaN would be NaN: where it is not, nothing was multiplied."""
    assert QUERY_BLOCK == 128, "this test counts in blocks of 128"
    q, k, v = draw(512, 512)
    segments = np.broadcast_to(np.repeat(np.arange(len(segment_lens)), segment_lens), (2, 512))
    positions = np.concatenate([np.arange(n) for n in segment_lens])
    positions = np.broadcast_to(positions, (2, 512)).astype(np.int32)
    where = (positions, positions, segments.astype(np.int32), segments.astype(np.int32))
    v[:, unseen], k[:, unseen] = np.nan, np.nan
    d_out = np.ones_like(q)
    out, d_q, d_k, d_v = (
        np.asarray(x) for x in run_backward(d_out, q, k, v, *where, scale=0.3, window=window)
    )
    assert np.isfinite(out[:, queries]).all() and np.isfinite(d_q[:, queries]).all()
    assert np.isnan(out[:, unseen]).all(), "the test's NaN reaches nobody"


@pytest.mark.parametrize(
    ("segment_len", "options"),
    [(50, {}), (100, {}), (50, dict(window=70)), (50, dict(softcap=0.7))],
    ids=str,
)
@pytest.mark.parametrize("backend", RUN_HERE)
def test_gradients_are_those_of_the_plain_formula(segment_len, options, backend):
    """Of the segments of 50 there are more than cuDNN is told the starts of."""
    if backend == "cudnn" and "softcap" in options:
        pytest.skip("the kernel has no soft cap, and is not chosen for it")
    num_tokens = QUERY_BLOCK + 9
    q, k, v = draw(num_tokens, num_tokens)
    slots = np.arange(num_tokens, dtype=np.int32)
    segments = np.broadcast_to(slots // segment_len, (2, num_tokens))
    positions = np.broadcast_to(slots % segment_len, (2, num_tokens))
    where = (positions, positions, segments, segments)
    assert_gradients(backend, (q, k, v), where, 0.3, **options)


def assert_gradients(backend, qkv, where, scale, **options):
    """Compares the slope of a sum of sines, in a drawn direction, with that of the formula."""
    rng = np.random.default_rng(1)
    towards = [rng.standard_normal(x.shape).astype(np.float32) for x in qkv]
    attended = functools.partial(run, scale=scale, backend=backend, **options)
    loss = lambda *qkv: jax.numpy.sum(jax.numpy.sin(attended(*qkv, *where)))  # noqa: E731
    grads = jax.grad(loss, (0, 1, 2))(*qkv)
    slope = sum(np.sum(np.float64(g) * d) for g, d in zip(grads, towards, strict=True))
    moved = [
        [np.float64(x) + h * d for x, d in zip(qkv, towards, strict=True)] for h in (1e-5, -1e-5)
    ]
    ends = [np.sin(naive(*qkv, *where, scale, **options)).sum() for qkv in moved]
    # A central difference in float64: its own error is about 1e-8. In bfloat16 what is rounded of
    # all gradients is a part of their length.
    length = math.sqrt(sum(np.sum(np.square(np.float64(g))) for g in grads))
    error = abs(slope - (ends[0] - ends[1]) / 2e-5)
    assert error < (0.03 * length if backend == "cudnn" else 2e-5 * abs(slope))


@pytest.mark.parametrize("backend", RUN_HERE)
def test_rows_of_a_batch_hold_different_numbers_of_examples(backend):
    """One, two, and as many as there is room for; the last of those is padding."""
    lengths = [[512], [200, 312], [100, 1, 64, 127, 30, 90, 40, 60]]
    segments = np.array([np.repeat(np.arange(len(row)) + 1, row) for row in lengths], np.int32)
    segments[2, -60:] = 0
    positions = np.array([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    where = (positions.astype(np.int32),) * 2 + (segments,) * 2
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, 512, heads, 64)).astype(np.float32) for heads in (4, 2, 2))
    got = run(q, k, v, *where, 0.125, backend=backend)
    atol = tolerance(backend, 5e-6, 0.03)
    np.testing.assert_allclose(got, naive(q, k, v, *where, 0.125), rtol=0, atol=atol)
    assert_gradients(backend, (q, k, v), where, 0.125)


@pytest.mark.skipif(not ON_GPU, reason="sums on CPU have one order")
@pytest.mark.parametrize("segment_len", [300, 50])
@pytest.mark.parametrize("backend", RUN_HERE)
def test_the_same_numbers_have_the_same_gradients(backend, segment_len):
    """Bit for bit: a run that resumes is the run that did not stop."""
    rng = np.random.default_rng(0)
    q, k, v, d_out = rng.standard_normal((4, 2, 1024, 4, 64)).astype(np.float32)
    segments = np.broadcast_to(np.arange(1024, dtype=np.int32) // segment_len, (2, 1024))
    positions = np.broadcast_to(np.arange(1024, dtype=np.int32) % segment_len, (2, 1024))

    @jax.jit
    def grads(*qkv):
        where = (positions, positions, segments, segments)
        _, backward = jax.vjp(lambda *qkv: run(*qkv, *where, 0.125, backend=backend), *qkv)
        return backward(d_out)

    first = grads(q, k, v)
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, first, grads(q, k, v))


def test_no_whole_score_array_is_made():
    num_tokens = 4 * QUERY_BLOCK
    q, k, v = draw(num_tokens, num_tokens, 4)
    where = (counting(num_tokens), counting(num_tokens), ones(num_tokens), ones(num_tokens))
    loss = jax.grad(lambda *qkv: run(*qkv, *where, 0.3).sum(), argnums=(0, 1, 2))
    text = str(jax.make_jaxpr(loss)(q, k, v))
    shapes = [json.loads(shape) for shape in set(re.findall(r"\[[0-9,]+\]", text))]
    # Rows, heads, and a block of queries by a block of keys.
    assert max(shapes, key=math.prod) == [2, 4, 1, QUERY_BLOCK, QUERY_BLOCK]


def config_with(**fields):
    return dataclasses.replace(tiny_gpt2().decoder.config, **fields)


@pytest.mark.parametrize(
    ("asked", "platform", "fields", "dtype", "chosen", "reason"),
    [
        ("auto", "cpu", {}, "float32", "xla", ""),
        ("auto", "tpu", {}, "bfloat16", "splash", ""),
        ("auto", "tpu", dict(attention_softcap=50.0), "float32", "splash", ""),
        ("auto", "tpu", dict(alibi=Alibi(SLOPES)), "bfloat16", "xla", "splash has no ALiBi"),
        ("auto", "gpu", {}, "bfloat16", "cudnn", ""),
        ("auto", "gpu", {}, "float32", "xla", "cudnn computes in bfloat16 or float16, not float32"),
        ("auto", "gpu", dict(attention_softcap=50.0), "bfloat16", "xla", "cudnn has no soft cap"),
        ("auto", "gpu", {}, "float16", "cudnn", ""),
        ("auto", "gpu", dict(alibi=Alibi(SLOPES)), "bfloat16", "xla", "cudnn has no ALiBi"),
        ("auto", "gpu", dict(head_width=136), "bfloat16", "xla", "cudnn has no heads of width 136"),
        ("auto", "gpu", dict(head_width=100), "bfloat16", "xla", "cudnn has no heads of width 100"),
        ("xla", "tpu", {}, "bfloat16", "xla", ""),
        ("splash", "cpu", {}, "float32", "splash_interpreted", ""),
    ],
)
def test_auto_is_the_platforms_own_where_that_has_what_is_needed(
    asked, platform, fields, dtype, chosen, reason
):
    got = choose_backend(asked, platform=platform, config=config_with(**fields), dtype=dtype)
    assert got == (chosen, reason)


@pytest.mark.parametrize(
    ("asked", "platform", "fields", "message"),
    [
        ("flash", "cpu", {}, "model.attention='flash' is unknown: choose one of"),
        ("splash", "gpu", {}, "model.attention='splash' is for TPUs, and this is a gpu: choose"),
        ("cudnn", "cpu", {}, "model.attention='cudnn' is for NVIDIA GPUs, and this is a cpu"),
        ("splash", "tpu", dict(alibi=Alibi(SLOPES)), "model.attention='splash' has no ALiBi"),
        ("splash", "cpu", dict(attention_dropout=0.1), "has no dropout of attention weights"),
        ("cudnn", "gpu", dict(attention_dropout=0.1), "has no dropout of attention weights"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(asked, platform, fields, message):
    with pytest.raises(ValueError, match=message):
        choose_backend(asked, platform=platform, config=config_with(**fields), dtype="float32")


@pytest.mark.parametrize("backend", RUN_HERE)
@pytest.mark.parametrize(
    "sizes",
    [(2, 1, 2, 2), (1, 1, 8, 1), (1, 2, 1, 4), (1, 1, 3, 1)],
    ids=["data x sequence x tensor", "sequence", "fsdp x tensor, few key heads", "three"],
)
def test_split_over_devices_it_is_the_same(sizes, backend):
    sizes = dict(zip(("data", "fsdp", "sequence", "tensor"), sizes, strict=True))
    num_devices = math.prod(sizes.values())
    if jax.device_count() < num_devices:
        pytest.skip(f"needs {num_devices} devices")
    mesh = make_mesh(**sizes, devices=jax.devices()[:num_devices])
    # Where it is not a multiple of blocks, those of the devices begin elsewhere.
    num_tokens = 2 * QUERY_BLOCK + 8 * (backend == "xla" or sizes["sequence"] == 3)
    q, k, v = draw(num_tokens, num_tokens)
    segments = np.broadcast_to(np.arange(num_tokens) // 90, (2, num_tokens)).astype(np.int32)
    positions = np.broadcast_to(np.arange(num_tokens) % 90, (2, num_tokens)).astype(np.int32)
    where = (positions, positions, segments, segments)
    options = dict(window=50)
    if backend == "xla":
        options |= dict(alibi=Alibi(SLOPES), dropout_rate=0.2, dropout_key=jax.random.key(0))

    @jax.jit
    def loss_and_grads(q, k, v):
        attended = functools.partial(run, scale=0.3, backend=backend, **options)

        def loss(q, k, v):
            return jax.numpy.sum(jax.numpy.sin(attended(q, k, v, *where)))

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    expected = loss_and_grads(q, k, v)
    with jax.set_mesh(mesh):
        got = jax.jit(loss_and_grads.__wrapped__)(q, k, v)
    # Float32 sums of up to a thousand terms of about 1, in another order.
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_a_backend_that_fails_or_lets_examples_meet_is_found_out(monkeypatch):
    def in_blocks(q, k, v, q_segments, k_segments, slots, scale, *, window):
        row = jax.numpy.broadcast_to(slots, q_segments.shape)
        options = dict(window=window, softcap=None, dropout_rate=0.0)
        places = (q_segments, k_segments, row, row, slots, None, scale, None)
        return attention.attend_in_blocks(q, k, v, *places, **options)

    def causal_alone(q, k, v, q_segments, k_segments, *rest, **options):
        return in_blocks(q, k, v, 0 * q_segments, 0 * k_segments, *rest, **options)

    def without_window(*arguments, window):
        return in_blocks(*arguments, window=None)

    def without_gradient(q, k, v, *rest, **options):
        return in_blocks(q, k, jax.lax.stop_gradient(v), *rest, **options)

    def with_nan_gradient(q, k, v, *rest, **options):
        v = jax.numpy.where(v < 100.0, v, jax.numpy.sqrt(v))  # of 0 times infinity
        return in_blocks(q, k, v, *rest, **options)

    def wrong_behind_the_first_row(*arguments, **options):
        return in_blocks(*arguments, **options) * jax.numpy.array([1, 2])[:, None, None, None]

    def wrong_where_there_is_room(q, k, v, q_segments, *rest, **options):
        num_runs = 1 + jax.numpy.sum(jax.numpy.diff(q_segments[0]) != 0)
        out = in_blocks(q, k, v, q_segments, *rest, **options)
        return jax.numpy.where(num_runs <= q.shape[1] // MEAN_LEN, 2 * out, out)

    def wrong_where_there_is_none(q, k, v, q_segments, *rest, **options):
        out = in_blocks(q, k, v, q_segments, *rest, **options)
        return 3 * out - wrong_where_there_is_room(q, k, v, q_segments, *rest, **options) - out

    layers = [dataclasses.replace(layer, window=60) for layer in config_with().layers]
    config = config_with(layers=tuple(layers))
    check = functools.partial(
        attention.check_backend, "cudnn", config=config, dtype=jax.numpy.bfloat16
    )
    assert check() == "" if ON_GPU else check().startswith("fails here: ")
    monkeypatch.setattr(attention, "attend_by_cudnn", in_blocks)
    assert check() == ""
    for wrong in (
        *(causal_alone, without_window, without_gradient, with_nan_gradient),
        *(wrong_behind_the_first_row, wrong_where_there_is_room, wrong_where_there_is_none),
    ):
        monkeypatch.setattr(attention, "attend_by_cudnn", wrong)
        assert check().startswith("gives other numbers here, by up to "), wrong


@pytest.mark.parametrize(
    ("capability", "window", "kernels"),
    [
        ((9, 0), None, {"Softmax", "ScaleBiasSoftmax"}),
        ((9, 0), 16, {"ScaleBiasSoftmax"}),
        ((8, 0), None, {"ScaleBiasSoftmax"}),
    ],
)
def test_cudnn_is_given_the_examples_starts_or_their_mask(monkeypatch, capability, window, kernels):
    """Lowered for CUDA without a GPU: which of cuDNN's kernels are called, with what."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(
        cudnn, "check_compute_capability", lambda least: least <= ".".join(map(str, capability))
    )
    heads = jax.ShapeDtypeStruct((2, 256, 4, 16), "bfloat16")
    ids = jax.ShapeDtypeStruct((2, 256), "int32")
    # Not the jitted one: it would keep what another capability has given.
    attended = functools.partial(run.__wrapped__, scale=0.3, backend="cudnn", window=window)
    lowered = jax.jit(attended).trace(*[heads] * 3, *[ids] * 4)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"@__cudnn\$fmha(\w+)\(", text)) == kernels
    # Offsets of up to 256 / 64 examples a row, and the end of the last.
    assert ("tensor<2x5xi32>" in text) == ("Softmax" in kernels)
    assert "tensor<2x1x256x256xbf16>" in text, "there is no mask"


def by_plain_arithmetic(q, k, v, *, scale, mask, implementation):
    """`jax.nn.dot_product_attention` where there is no cuDNN; softmax of nothing is NaN."""
    assert implementation == "cudnn" and scale == 1.0
    assert q.shape[1] % 2 == k.shape[1] % 2 == 0, "its backward pass has no odd lengths"
    k, v = (jax.numpy.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jax.numpy.einsum("BTHC,BSHC->BHTS", q, k)
    weights = jax.nn.softmax(jax.numpy.where(mask, scores, -jax.numpy.inf), axis=-1)
    return jax.numpy.einsum("BHTS,BSHC->BTHC", weights, v)


@jax.custom_vjp
def segment_by_segment(q, k, v, starts, lengths):
    return segment_by_segment_forward(q, k, v, starts, lengths)[0]


def segment_by_segment_forward(q, k, v, starts, lengths):
    """Keeps what cuDNN keeps: logsumexps by segment, counted over all rows, and places in it."""
    scores, places = scores_and_places(q, k, starts, lengths)
    logsumexps = jax.nn.logsumexp(scores, axis=-1)
    out = jax.numpy.einsum("BHTS,BSHC->BTHC", jax.numpy.exp(scores - logsumexps[..., None]), v)
    numbers, in_segment = places
    kept = jax.numpy.full((lengths.size, *logsumexps.shape[1:]), jax.numpy.nan)
    heads = np.arange(q.shape[2])[None, :, None]
    kept = kept.at[numbers[:, None], heads, in_segment[:, None]].set(logsumexps)
    return out, (q, k, v, starts, lengths, kept, out)


def segment_by_segment_backward(residuals, d_out):
    q, k, v, starts, lengths, kept, out = residuals
    scores, (numbers, in_segment) = scores_and_places(q, k, starts, lengths)
    heads = np.arange(q.shape[2])[None, :, None]
    weights = jax.numpy.exp(scores - kept[numbers[:, None], heads, in_segment[:, None]][..., None])
    einsum = jax.numpy.einsum
    d_weights = einsum("BTHC,BSHC->BHTS", d_out, v)
    # What stands behind an example's end may count, as weights of scores that are 0.
    is_read = jax.numpy.zeros(kept.shape, bool)
    is_read = is_read.at[numbers[:, None], heads, in_segment[:, None]].set(True)
    weights = weights + jax.numpy.sum(jax.numpy.where(is_read, 0.0, jax.numpy.exp(-kept)))
    d_scores = weights * (d_weights - einsum("BTHC,BTHC->BHT", d_out, out)[..., None])
    d_q, d_k = einsum("BHTS,BSHC->BTHC", d_scores, k), einsum("BHTS,BTHC->BSHC", d_scores, q)
    return d_q, d_k, einsum("BHTS,BTHC->BSHC", weights, d_out), None, None


segment_by_segment.defvjp(segment_by_segment_forward, segment_by_segment_backward)


def scores_and_places(q, k, starts, lengths):
    """Scores, -inf where a query does not look; each token's segment, and where in it it is."""
    slots = np.arange(q.shape[1])
    in_BMT = (slots[None, None] >= starts[:, :-1, None]) & (
        slots[None, None] < (starts[:, :-1] + lengths)[..., None]
    )
    in_BMT &= starts[:, :-1, None] >= 0
    seen = (in_BMT[..., None] & in_BMT[:, :, None]).any(1) & np.tri(len(slots), dtype=bool)[None]
    scores = jax.numpy.einsum("BTHC,BSHC->BHTS", q, k)
    before = jax.numpy.cumsum((lengths > 0).sum(1)) - (lengths > 0).sum(1)
    in_row = jax.numpy.argmax(in_BMT, axis=1)
    in_segment = slots[None] - jax.numpy.take_along_axis(starts, in_row, axis=1)
    places = before[:, None] + in_row, in_segment
    return jax.numpy.where(seen[:, None], scores, -jax.numpy.inf), places


def from_starts(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
    """`cudnn.dot_product_attention` likewise, keeping for its backward pass what cuDNN keeps."""
    assert mask_type == cudnn.MaskType.PADDING_CAUSAL and scale == 1.0
    assert q_seqlen is kv_seqlen and q_offsets is kv_offsets
    assert q.shape[1] % 2 == 0, "its backward pass has no odd lengths"
    assert COUNTS_KEY_HEADS or k.shape == q.shape, "keys' offsets are counted by query heads"
    k, v = (jax.numpy.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return segment_by_segment(q, k, v, q_offsets, q_seqlen)


@pytest.mark.parametrize("sequence", [1, 4])
@pytest.mark.parametrize(
    ("lengths", "window"),
    [
        *(([5, 11], None), ([5, 6, 5], None), ([5, 11], 3)),
        *(([5, 10], None), ([5, 6, 4], None), ([5, 7], None)),
    ],
    ids=["starts", "more than there is room for", "window", "odd starts", "odd", "odd parts"],
)
def test_what_cudnn_is_given_is_what_attend_means(lengths, window, sequence, monkeypatch):
    if ON_GPU:
        pytest.skip("cuDNN itself runs here")
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_plain_arithmetic)
    monkeypatch.setattr(cudnn, "dot_product_attention", from_starts)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda least: True)
    num_tokens = sum(lengths)
    if num_tokens % sequence:
        pytest.skip("rows of odd lengths are not split")
    q, k, v = draw(num_tokens, num_tokens)
    ids = [np.repeat(np.arange(len(row)), row) for row in (lengths, [num_tokens])]
    segments = np.array(ids, np.int32)
    slots = np.arange(num_tokens)
    positions = np.array([slots - np.searchsorted(row, row) for row in ids], np.int32)
    where = (positions, positions, segments, segments)
    attended = functools.partial(run.__wrapped__, scale=0.3, window=window)
    d_out = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)

    def out_and_grads(backend, *qkv):
        out, backward = jax.vjp(lambda *qkv: attended(*qkv, *where, backend=backend), *qkv)
        return out, *backward(d_out)

    with jax.set_mesh(make_mesh(data=8 // sequence, fsdp=1, sequence=sequence, tensor=1)):
        got = jax.jit(functools.partial(out_and_grads, "cudnn"))(q, k, v)
    expected = naive(q, k, v, *where, 0.3, window=window)
    np.testing.assert_allclose(got[0], expected, rtol=0, atol=5e-6)
    # The plain blocks' gradients are held to the formula above.
    for ours, theirs in zip(got, out_and_grads("xla", q, k, v), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


def test_runs_are_where_segments_begin_and_how_long_they_are():
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [0, 0, 0, 0, 0, 0, 0]], np.int32)
    runs = find_runs(segments, 3)
    np.testing.assert_array_equal(runs.starts_BM, [[0, 3, 5, -1], [0, -1, -1, -1]])
    np.testing.assert_array_equal(runs.lengths_BM, [[3, 2, 2], [7, -1, -1]])
    np.testing.assert_array_equal(runs.numbers_BT, [[0, 0, 0, 1, 1, 2, 2], [3] * 7])
    np.testing.assert_array_equal(runs.places_BT, [[0, 1, 2, 0, 1, 0, 1], range(7)])
    assert runs.fit
    assert not find_runs(segments, 2).fit
    runs = find_runs(segments[:, :2], 4)
    np.testing.assert_array_equal(runs.starts_BM[0], [0, -1, -1, -1, -1])
    np.testing.assert_array_equal(runs.lengths_BM[0], [2, -1, -1, -1])
    assert runs.fit
