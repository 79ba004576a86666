"""Law 1: a packed batch is its examples trained alone, whatever stands beside them."""

import functools

import jax
import numpy as np
import pytest
from kernels import RUN_HERE, dtype_of, tolerance
from tiny_models import assert_close_trees, draw_examples, lay_out, on_device, tiny_gpt2

from jax_sft.model import attention_cudnn
from jax_sft.model.attention import attend
from jax_sft.model.attention_xla import QUERY_BLOCK
from jax_sft.train_step import batch_sums

ROW_LEN = 40
LENGTHS = [7, 12, 1, 20, 3, 16, 9, 40, 11]
# Rows of examples by index, always five, so that one compilation serves all.
LAYOUTS = {
    "full rows": [[0, 1, 3], [7], [2, 4, 5, 6, 8], [], []],
    "another order": [[8, 6, 5, 2, 4], [3, 0, 1], [], [], [7]],
    "padded rows": [[7], [3, 5, 2], [], [0, 1, 4, 6], [8]],
}


@functools.cache
def model(backend):
    return tiny_gpt2(placement={"attention": backend, "dtype": dtype_of(backend)})


@pytest.fixture(autouse=True)
def room_for_all_examples(monkeypatch):
    """cuDNN is told where each example of a row begins: five at most, padding among them."""
    monkeypatch.setattr(attention_cudnn, "MEAN_LEN", 8)


@functools.partial(jax.jit, static_argnums=0)
def sums_and_grads(decoder, params, batch):
    def loss(params):
        return batch_sums(decoder, params, batch)

    (loss_sum, weight_sum), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return loss_sum, weight_sum, grads


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(decoder, params, batch):
    tokens = (batch.inputs_BT, batch.positions_BT, batch.segment_ids_BT)
    return decoder.apply({"params": params}, *tokens)[0]


@functools.cache
def alone(backend):
    """Sums over the examples, each in a batch where all else is padding."""
    lm, examples = model(backend), draw_examples(LENGTHS)
    parts = [
        sums_and_grads(
            lm.decoder, lm.params, on_device(lay_out(examples, [[i], [], [], [], []], ROW_LEN))
        )
        for i in range(len(LENGTHS))
    ]
    return jax.tree.map(lambda *xs: np.sum(np.asarray(xs, np.float64), axis=0), *parts)


@pytest.mark.parametrize("backend", RUN_HERE)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_loss_and_gradients_are_sums_over_examples(backend, layout):
    lm, examples = model(backend), draw_examples(LENGTHS)
    batch = on_device(lay_out(examples, layout, ROW_LEN))
    loss_sum, weight_sum, grads = sums_and_grads(lm.decoder, lm.params, batch)
    alone_loss, alone_weight, alone_grads = alone(backend)
    assert float(weight_sum) == alone_weight
    # Float32 adds up about 100 terms in another order: 100 times its rounding, 6e-8.
    np.testing.assert_allclose(loss_sum, alone_loss, rtol=tolerance(backend, 6e-6, 4e-3))
    assert_close_trees(grads, alone_grads, rtol=tolerance(backend, 1e-5, 3e-2))


@pytest.mark.parametrize("backend", RUN_HERE)
@pytest.mark.parametrize("changed", [0, 2, 8])
def test_changing_an_example_changes_no_other_bit(backend, changed):
    lm = model(backend)
    examples, others = draw_examples(LENGTHS), draw_examples(LENGTHS, seed=1)
    layout = LAYOUTS["full rows"]
    before = lay_out(examples, layout, ROW_LEN)
    row = next(row for row, members in enumerate(layout) if changed in members)
    segment = layout[row].index(changed) + 1
    is_changed = np.zeros_like(before.segment_ids_BT, bool)
    is_changed[row] = before.segment_ids_BT[row] == segment
    inputs = before.inputs_BT.copy()
    inputs[is_changed] = (others[changed].inputs_T + 1) % examples.inputs.max()
    hidden = hidden_states(lm.decoder, lm.params, on_device(before))
    changed_hidden = hidden_states(
        lm.decoder, lm.params, on_device(before._replace(inputs_BT=inputs))
    )
    np.testing.assert_array_equal(
        np.asarray(hidden)[~is_changed], np.asarray(changed_hidden)[~is_changed]
    )
    assert (np.asarray(hidden)[is_changed] != np.asarray(changed_hidden)[is_changed]).any()


@pytest.mark.parametrize(
    "lengths",
    [[300], [128, 172], [127, 2, 130, 41], [50, 78, 100]],
    ids=lambda lengths: "+".join(map(str, lengths)),
)
def test_attention_over_query_chunks_sees_its_own_segment(lengths):
    """300 is no multiple of the query chunk; segments end before, at and behind its borders."""
    assert 300 % QUERY_BLOCK, "choose a length that leaves a part of a chunk"
    rng = np.random.default_rng(0)
    q, k, v, d_out = rng.standard_normal((4, 1, 300, 2, 8)).astype(np.float32)
    segment_ids = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, 300 - sum(lengths)])
    positions = np.concatenate([np.arange(n) for n in [*lengths, 300 - sum(lengths)]])
    got = attend_and_grads(q, k, v, d_out, positions[None], segment_ids[None])
    for segment in range(1, len(lengths) + 1):
        span = np.s_[:, np.flatnonzero(segment_ids == segment)]
        alone = naive_attention_and_grads(q[span], k[span], v[span], d_out[span])
        for ours, theirs in zip(got, alone, strict=True):
            # Softmax weights sum to 1 over values of about 1: float32's own rounding.
            np.testing.assert_allclose(ours[span], theirs, rtol=0, atol=1e-5)


@jax.jit
def attend_and_grads(q, k, v, d_out, positions, segment_ids):
    def attended(q, k, v):
        return attend(
            q,
            k,
            v,
            q_positions_BT=positions,
            k_positions_BS=positions,
            q_segment_ids_BT=segment_ids,
            k_segment_ids_BS=segment_ids,
            scale=0.5,
        )

    out, backward = jax.vjp(attended, q, k, v)
    return out, *backward(d_out)


def naive_attention_and_grads(q, k, v, d_out):
    """Causal attention and its gradients by hand, in float64, with one [T, S] matrix."""
    q, k, v, d_out = (np.float64(x) for x in (q, k, v, d_out))
    scores = np.where(np.tri(q.shape[1]), np.einsum("BTHC,BSHC->BHTS", q, k) * 0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("BTHC,BSHC->BHTS", d_out, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * 0.5
    return (
        np.einsum("BHTS,BSHC->BTHC", weights, v),
        np.einsum("BHTS,BSHC->BTHC", d_scores, k),
        np.einsum("BHTS,BTHC->BSHC", d_scores, q),
        np.einsum("BHTS,BTHC->BSHC", weights, d_out),
    )
