"""Law 10, the step's half: what is not finite, or trains nothing, changes nothing and is said."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import draw_examples, lay_out, on_device, paths_and_leaves, tiny_gpt2

from jax_sft.train_step import batch_sums, init_state, train_step

NUM_MICROBATCHES = 2
SCHEDULE = optax.linear_schedule(1e-2, 0.0, 10)


@functools.cache
def batch():
    return on_device(lay_out(draw_examples([16, 9, 12, 3]), [[0], [1], [2], [3]], 16))


def make_step(params, loss_fn):
    trained = jax.tree.map(lambda _: True, params)
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(SCHEDULE))
    step = functools.partial(
        train_step,
        loss_fn=loss_fn,
        optimizer=optimizer,
        schedule=SCHEDULE,
        trained=trained,
        num_microbatches=NUM_MICROBATCHES,
        max_grad_norm=1.0,
        seed=0,
    )
    return jax.jit(step), init_state(params, optimizer, trained=trained)


@functools.cache
def model_step():
    """A step of a real model, and its state after one good update, so that moments are not 0."""
    lm = tiny_gpt2()
    step, state = make_step(lm.params, functools.partial(batch_sums, lm.decoder))
    state, metrics = step(state, batch())
    assert metrics.ok and int(state.step) == 1
    return step, state


def with_token(state, token, value):
    """The state with the embedding of one token set to a value."""
    tokens_VD = state.params["embed"]["tokens"].at[token].set(value)
    embed = state.params["embed"] | {"tokens": tokens_VD}
    return state._replace(params=state.params | {"embed": embed})


def assert_unchanged(after, before):
    for (path, ours), (_, theirs) in zip(
        paths_and_leaves(after), paths_and_leaves(before), strict=True
    ):
        assert ours.tobytes() == theirs.tobytes(), f"{path} has changed"


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_a_loss_that_is_not_finite_changes_nothing(value):
    step, state = model_step()
    # A token of the second microbatch alone: rows n, n + 2, ... make microbatch n.
    only_there = set(np.asarray(batch().inputs_BT[1, :9]).tolist())
    only_there -= set(np.asarray(batch().inputs_BT)[::2].flatten().tolist())
    before = with_token(state, only_there.pop(), value)
    after, metrics = step(before, batch())
    assert not metrics.ok
    assert not np.isfinite(metrics.loss)
    assert_unchanged(after, before)


def test_a_batch_without_a_trained_token_changes_nothing():
    step, state = model_step()
    nothing = batch()._replace(weights_BT=jnp.zeros_like(batch().weights_BT))
    after, metrics = step(state, nothing)
    assert not metrics.ok
    assert int(metrics.num_trained) == 0
    assert int(metrics.num_tokens) == 40
    assert_unchanged(after, state)


def test_an_infinite_gradient_of_a_finite_loss_changes_nothing():
    def loss_fn(params, batch, key):
        # The square root's slope at 0 is infinite, and its value is 0.
        return jnp.sum(jnp.sqrt(jnp.abs(params["w"]))), jnp.sum(batch.weights_BT)

    step, state = make_step({"w": jnp.array([0.0, 4.0])}, loss_fn)
    after, metrics = step(state, batch())
    assert np.isfinite(metrics.loss)
    assert not np.isfinite(metrics.grad_norm)
    assert not metrics.ok
    assert_unchanged(after, state)


def test_the_next_good_step_goes_on_as_if_nothing_had_been():
    step, state = model_step()
    nothing = batch()._replace(weights_BT=jnp.zeros_like(batch().weights_BT))
    skipped, _ = step(state, nothing)
    after, metrics = step(skipped, batch())
    expected, expected_metrics = step(state, batch())
    assert metrics.ok
    assert int(after.step) == 2
    np.testing.assert_array_equal(metrics.learning_rate, expected_metrics.learning_rate)
    assert_unchanged(after, expected)
