"""Law 3: microbatches are a matter of memory; the update is that of the whole batch."""

import functools

import jax
import numpy as np
import optax
from tiny_models import assert_close_trees, draw_examples, lay_out, on_device, tiny_gpt2

from jax_sft.train_step import batch_sums, init_state, train_step

# Rows n, n + N, ... make a microbatch; here they train from 1 token to whole rows of 16.
LENGTHS = [16, 1, 9, 2, 16, 3, 12, 1]
SCHEDULE = optax.constant_schedule(0.05)


@functools.cache
def model():
    return tiny_gpt2()


@functools.cache
def batch():
    examples = draw_examples(LENGTHS, trained=0.6)
    return on_device(lay_out(examples, [[i] for i in range(len(LENGTHS))], 16))


@functools.cache
def step_with(num_microbatches):
    lm = model()
    trained = jax.tree.map(lambda _: True, lm.params)
    optimizer = optax.sgd(SCHEDULE, momentum=0.9)
    step = functools.partial(
        train_step,
        loss_fn=functools.partial(batch_sums, lm.decoder, z_loss=1e-2, label_smoothing=0.1),
        optimizer=optimizer,
        schedule=SCHEDULE,
        trained=trained,
        num_microbatches=num_microbatches,
        max_grad_norm=None,
        seed=0,
    )
    return jax.jit(step), init_state(lm.params, optimizer, trained=trained)


def test_the_update_is_that_of_the_whole_batch():
    num_microbatches = 4
    counts = np.asarray(batch().weights_BT).sum(axis=1).reshape(-1, num_microbatches).sum(axis=0)
    assert counts.max() > 2 * counts.min(), "every microbatch trains about as many tokens"
    step, state = step_with(1)
    whole, whole_metrics = step(state, batch())
    step, state = step_with(num_microbatches)
    parts, metrics = step(state, batch())
    # About 60 float32 terms in another order; the mean of means would be off by tenths.
    np.testing.assert_allclose(metrics.loss, whole_metrics.loss, rtol=2e-6)
    np.testing.assert_allclose(metrics.grad_norm, whole_metrics.grad_norm, rtol=1e-5)
    assert int(metrics.num_trained) == int(counts.sum())
    assert int(metrics.num_tokens) == sum(LENGTHS)

    # After the first step, momentum is the gradient.
    expected = optax.tree.get(whole.opt_state, "trace")
    assert_close_trees(optax.tree.get(parts.opt_state, "trace"), expected, rtol=1e-5)
    assert_close_trees(parts.params, whole.params, rtol=1e-6)
