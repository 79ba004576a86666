"""Rounding at random: right in the mean, the same everywhere, and small updates are not lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_sft.data.types import Batch
from jax_sft.rounding import round_at_random, round_like
from jax_sft.sharding import make_mesh, named_sharding
from jax_sft.train_step import init_state, train_step

# Bfloat16 above 1 and -1 are 1/128 apart, above 2**-120 1/128 of that.
BETWEEN = [1 + 1 / 512, -1 - 3 / 512, 2.0**-120 * (1 + 1 / 1024)]
ONE_TOKEN = Batch(*(np.ones((1, 1), dtype) for dtype in ("i4", "i4", "f4", "i4", "i4")))


@pytest.mark.parametrize("value", BETWEEN)
def test_the_mean_of_many_is_the_number(value):
    spacing = abs(value) / 128
    rounded = round_at_random(jnp.full(100_000, value, jnp.float32), jax.random.key(0))
    rounded = np.asarray(rounded, np.float64)
    assert len(set(rounded)) == 2
    assert np.all(abs(rounded - value) < spacing)
    # The deviation of the mean is at most half the spacing over the root of the number.
    np.testing.assert_allclose(rounded.mean(), value, atol=4 * spacing / 2 / np.sqrt(100_000))


@pytest.mark.parametrize("value", [0.0, 1.0, -1.5, 2.0**-130, np.inf, -np.inf, np.nan])
def test_what_a_bfloat16_can_hold_stays(value):
    rounded = round_at_random(jnp.full(1000, value, jnp.float32), jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(rounded, np.float32), np.float32(value))


def test_a_nan_of_all_ones_stays_nan():
    """To its bits nothing may be added: they would wrap around to zero."""
    bits = jnp.full(1000, 0x7FFFFFFF, jnp.uint32)
    x = jax.lax.bitcast_convert_type(bits, jnp.float32)
    assert np.isnan(np.asarray(round_at_random(x, jax.random.key(0)), np.float32)).all()


def test_only_what_is_kept_in_bfloat16_is_rounded():
    tree = {"a": jnp.float32(1 + 1 / 512), "b": jnp.float32(1 + 1 / 512), "n": jnp.int32(3)}
    held = {"a": jnp.zeros((), jnp.bfloat16), "b": jnp.float32(0), "n": jnp.int32(0)}
    got = round_like(tree, held, jax.random.key(0))
    assert {name: x.dtype.name for name, x in got.items()} == {
        "a": "bfloat16",
        "b": "float32",
        "n": "int32",
    }
    assert (float(got["b"]), int(got["n"])) == (1 + 1 / 512, 3)


def test_arrays_draw_apart_and_the_same_on_any_mesh():
    tree = {name: jnp.full((64, 64), BETWEEN[0], jnp.float32) for name in "ab"}
    held = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    rounded = jax.jit(round_like)(tree, held, jax.random.key(3))
    assert np.any(np.asarray(rounded["a"] != rounded["b"]))
    mesh = make_mesh(data=1, fsdp=4, sequence=1, tensor=2)
    spread = jax.device_put((tree, held), named_sharding(mesh, "embed", "mlp"))
    again = jax.jit(round_like)(*spread, jax.random.key(3))
    for name in "ab":
        np.testing.assert_array_equal(np.asarray(rounded[name]), np.asarray(again[name]))


def step_with(loss_fn, optimizer, *, num_microbatches=1, grad_dtypes=None):
    """A step of one trained vector, "a"."""
    return functools.partial(
        train_step,
        loss_fn=loss_fn,
        optimizer=optimizer,
        schedule=optax.constant_schedule(0.0),
        trained={"a": True},
        num_microbatches=num_microbatches,
        max_grad_norm=None,
        seed=0,
        grad_dtypes=grad_dtypes,
    )


def run(dtype, *, num_steps, optimizer, state_dtype=jnp.float32):
    """Steps on the sum of a vector of parameters that start at 1: gradients are 1."""

    def loss_fn(params, batch, key):
        return jnp.sum(params["a"].astype(jnp.float32)), jnp.float32(1)

    step = jax.jit(step_with(loss_fn, optimizer))
    params = {"a": jnp.ones(256, dtype)}
    state = init_state(params, optimizer, trained={"a": True}, state_dtype=state_dtype)
    for _ in range(num_steps):
        state, _ = step(state, ONE_TOKEN)
    return state


def test_updates_below_half_a_digit_add_up():
    """500 updates of 1e-4, of which rounding to nearest would lose every one."""
    assert jnp.bfloat16(1.0) - jnp.bfloat16(1e-4) == 1.0
    state = run(jnp.bfloat16, num_steps=500, optimizer=optax.sgd(1e-4))
    assert state.params["a"].dtype == jnp.bfloat16
    mean = np.mean(np.asarray(state.params["a"], np.float64))
    # A walk of 500 steps: each draws between neighbours 1/256 apart, with a chance of 1/39.
    deviation = np.sqrt(500 * (1 / 39)) / 256 / np.sqrt(256)
    np.testing.assert_allclose(mean, 0.95, atol=4 * deviation)


def test_a_moment_in_bfloat16_reaches_its_gradient():
    """A second moment from 0 to 1 by thousandths: to nearest, it would stop half way."""
    adam = optax.scale_by_adam(b1=0.9, b2=0.999)
    state = run(jnp.float32, num_steps=4000, optimizer=adam, state_dtype=jnp.bfloat16)
    mu, nu = (optax.tree.get(state.opt_state, name)["a"] for name in ("mu", "nu"))
    assert (mu.dtype, nu.dtype, state.params["a"].dtype) == ("bfloat16", "bfloat16", "float32")
    assert optax.tree.get(state.opt_state, "count").dtype == jnp.int32
    expected = 1 - 0.999**4000
    np.testing.assert_allclose(np.mean(np.asarray(nu, np.float64)), expected, rtol=5e-3)


def test_moments_are_float32_whatever_the_parameters_are():
    state = run(jnp.bfloat16, num_steps=1, optimizer=optax.scale_by_adam())
    assert optax.tree.get(state.opt_state, "nu")["a"].dtype == jnp.float32


def test_every_step_draws_anew_and_the_same_again():
    def after(num_steps):
        state = run(jnp.bfloat16, num_steps=num_steps, optimizer=optax.sgd(1e-3))
        return np.asarray(state.params["a"], np.float32)

    np.testing.assert_array_equal(after(2), after(2))
    went_down = after(1) < 1
    assert went_down.any() and not went_down.all()
    assert np.any((after(2) < after(1)) != went_down)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_over_microbatches_are_in_the_gradients_dtype_and_lose_nothing(dtype):
    """256 and 200 times 1: to nearest, a bfloat16 of 256 would stay what it is."""
    batch = Batch(*(np.ones((201, 1), kind) for kind in ("i4", "i4", "f4", "i4", "i4")))
    batch = batch._replace(inputs_BT=np.array([[256]] + 200 * [[1]], np.int32))
    given = []

    def loss_fn(params, batch, key):
        given.append(params["a"].dtype)
        return jnp.sum(params["a"]) * batch.inputs_BT[0, 0], jnp.float32(1 / 201)

    optimizer = optax.trace(0.9)
    step = step_with(loss_fn, optimizer, num_microbatches=201, grad_dtypes={"a": dtype})
    state = init_state({"a": jnp.ones(1024)}, optimizer, trained={"a": True})
    state, _ = jax.jit(step)(state, batch)
    assert set(given) == {jnp.dtype(dtype)}
    sums = np.asarray(optax.tree.get(state.opt_state, "trace")["a"], np.float64)
    assert (len(set(sums)) == 1) == (dtype == jnp.float32)
    # Each of 200 draws is between neighbours 2 apart, with a chance of a half.
    deviation = np.sqrt(200) / np.sqrt(1024)
    np.testing.assert_allclose(
        sums.mean(), 456, rtol=1e-6, atol=4 * deviation * (len(set(sums)) > 1)
    )
