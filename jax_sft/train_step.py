"""One optimizer step: sums of losses over microbatches, one division, one update.

In: the state and a batch, both sharded. Out: the next state and the step's sums, still on the
devices. The step is a pure function, jitted once by `train.py`, with the state donated. A step
whose loss or gradient norm is not finite, or that trains no token, leaves the whole state as
it was and says so in `StepMetrics.ok`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_sft.data.types import Batch
from jax_sft.loss import cross_entropy
from jax_sft.model.decoder import Decoder, vocabulary
from jax_sft.rounding import in_float32, kept_in, round_like

_ROUNDING = 1  # folded into a microbatch's key, which is the dropout's own

# (params, batch, key) -> (loss_sum, weight_sum)
LossFn = Callable[[dict, Batch, jax.Array], tuple[jax.Array, jax.Array]]


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        step: int32 scalar, updates made so far.
        params: the whole parameter tree, trained or not.
        opt_state: optax state of the trained parameters alone.

    Both may be kept in bfloat16; a step computes in float32, and rounds at random.
    """

    step: jax.Array
    params: dict
    opt_state: Any


class StepMetrics(NamedTuple):
    """What a step measured, as scalars on the devices.

    Attributes:
        loss: float32, mean over the global batch's weights.
        grad_norm: float32, before clipping.
        learning_rate: float32.
        num_tokens: int32, tokens that are no padding.
        num_trained: int32, tokens with a weight above 0.
        ok: bool, whether the state was updated.
    """

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    num_tokens: jax.Array
    num_trained: jax.Array
    ok: jax.Array


def partition(params: dict, trained: dict) -> tuple[dict, dict]:
    """Splits a tree into (trained, frozen) by a tree of bools; the other's leaves are None."""
    kept = jax.tree.map(lambda x, is_trained: x if is_trained else None, params, trained)
    rest = jax.tree.map(lambda x, is_trained: None if is_trained else x, params, trained)
    return kept, rest


def combine(kept: dict, rest: dict) -> dict:
    """Puts together what `partition` split."""
    return jax.tree.map(lambda a, b: b if a is None else a, kept, rest, is_leaf=lambda x: x is None)


def batch_sums(
    decoder: Decoder,
    params: dict,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    router_aux_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Sums a batch's weighted losses, and its weights.

    Args:
        decoder: the module; with dropout on, `key` is needed.
        params: its parameters.
        batch: rows of packed examples.
        key: of the dropout.
        z_loss: see `loss.cross_entropy`.
        label_smoothing: likewise.
        router_aux_loss: factor on the imbalance of the experts (see `experts.balance`), the mean
            over the layers that have any, which each row adds with its weight.

    Returns:
        loss_sum and weight_sum, float32 scalars.
    """
    (hidden_BTD, _), sown = decoder.apply(
        {"params": params},
        batch.inputs_BT,
        batch.positions_BT,
        batch.segment_ids_BT,
        rngs={"dropout": key} if decoder.numerics.dropout else None,
        mutable=["losses"] if router_aux_loss else [],
    )
    vocabulary_VD, bias_V = vocabulary(decoder.config, params)
    loss_sum, weight_sum = cross_entropy(
        hidden_BTD,
        vocabulary_VD,
        targets_BT=batch.targets_BT,
        weights_BT=batch.weights_BT,
        vocab_size=decoder.config.vocab_size,
        bias_V=bias_V,
        softcap=decoder.config.logit_softcap,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
    )
    if router_aux_loss and sown:
        balance_LB = jnp.concatenate(jax.tree.leaves(sown["losses"]))
        row_weights_B = jnp.sum(batch.weights_BT, axis=1)
        balance = jnp.sum(jnp.mean(balance_LB, axis=0) * row_weights_B)
        loss_sum = loss_sum + router_aux_loss * balance
    return loss_sum, weight_sum


def state_structs(
    params: dict,
    optimizer: optax.GradientTransformation,
    *,
    trained: dict,
    replicated: Any,
    state_dtype: Any = jnp.float32,
) -> TrainState:
    """Describes the state of a run without making it.

    An optimizer's moment lives where its parameter lives: a leaf whose path ends in a
    parameter's path, and that has its shape, gets its sharding. What is left is small.

    Args:
        params: tree of `jax.ShapeDtypeStruct` with shardings.
        optimizer: optax chain.
        trained: tree of bools like the params.
        replicated: sharding of everything else.
        state_dtype: of the optimizer's state.

    Returns:
        A TrainState of `jax.ShapeDtypeStruct` with shardings.
    """
    init = functools.partial(
        init_state, optimizer=optimizer, trained=trained, state_dtype=state_dtype
    )
    state = jax.eval_shape(init, params)
    by_path = {_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        keys = _keys(path)
        matches = (by_path[keys[i:]] for i in range(len(keys)) if keys[i:] in by_path)
        param = next(matches, None)
        is_alike = param is not None and param.shape == leaf.shape
        where = param.sharding if is_alike else replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(place, state)


def _keys(path: tuple) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def init_state(
    params: dict,
    optimizer: optax.GradientTransformation,
    *,
    trained: dict,
    state_dtype: Any = jnp.float32,
) -> TrainState:
    """Builds the state of step 0; run it under jit with output shardings."""
    opt_state = optimizer.init(partition(params, trained)[0])
    return TrainState(jnp.zeros((), jnp.int32), params, kept_in(opt_state, state_dtype))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    trained: dict,
    num_microbatches: int,
    max_grad_norm: float | None,
    seed: int,
    grad_dtypes: dict | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Updates the trained parameters by one global batch.

    Args:
        state: the state before the step.
        batch: the global batch; its rows divide by `num_microbatches`.
        loss_fn: sums of weighted losses and of weights over some rows.
        optimizer: optax chain without clipping; it scales by the schedule itself.
        schedule: the same schedule, to report the learning rate.
        trained: tree of bools like the params.
        num_microbatches: parts that are run one after the other, to save memory.
        max_grad_norm: gradients are scaled down to this global norm; None for no limit.
        seed: base of the keys of dropout and rounding; each step and microbatch has its own.
        grad_dtypes: tree of dtypes like the params, float32 or bfloat16, that sums of gradients
            over microbatches have, rounded at random. For bfloat16 the loss is given the parameter
            in bfloat16, so that a gradient is never anything else. None: float32.

    Returns:
        The next state and the step's metrics.
    """
    kept, rest = partition(state.params, trained)
    loss_key, rounding_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
    if grad_dtypes is None:
        grad_dtypes = jax.tree.map(lambda _: jnp.float32, trained)
    loss_sum, weight_sum, grads = _sum_over_microbatches(
        lambda kept, *args: loss_fn(combine(kept, rest), *args),
        kept,
        batch,
        loss_key,
        num_microbatches=num_microbatches,
        grad_dtypes=partition(grad_dtypes, trained)[0],
    )
    # One division, by the global weight: exact for any mesh and any number of microbatches.
    divisor = jnp.maximum(weight_sum, jnp.finfo(jnp.float32).tiny)
    loss = loss_sum / divisor
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / divisor, grads)
    grad_norm = optax.tree.norm(grads)
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (weight_sum > 0)
    if max_grad_norm is not None:
        shrink = jnp.minimum(1.0, max_grad_norm / jnp.maximum(grad_norm, 1e-12))
        grads = jax.tree.map(lambda g: g * shrink, grads)
    kept = in_float32(kept)
    updates, opt_state = optimizer.update(grads, in_float32(state.opt_state), kept)
    new = TrainState(state.step + 1, combine(optax.apply_updates(kept, updates), rest), opt_state)
    new = round_like(new, state, rounding_key)
    new = jax.tree.map(lambda after, before: jnp.where(ok, after, before), new, state)
    metrics = StepMetrics(
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
        num_tokens=jnp.sum(batch.segment_ids_BT > 0, dtype=jnp.int32),
        num_trained=jnp.sum(batch.weights_BT > 0, dtype=jnp.int32),
        ok=ok,
    )
    return new, metrics


def _sum_over_microbatches(
    loss_fn: LossFn,
    kept: dict,
    batch: Batch,
    key: jax.Array,
    *,
    num_microbatches: int,
    grad_dtypes: dict,
) -> tuple[jax.Array, jax.Array, dict]:
    kept = jax.tree.map(
        lambda x, dtype: x.astype(dtype) if dtype == jnp.bfloat16 else x, kept, grad_dtypes
    )
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if num_microbatches == 1:
        (loss_sum, weight_sum), grads = grad_fn(kept, batch, key)
        return loss_sum, weight_sum, grads

    def split(x_BT: jax.Array) -> jax.Array:
        """[B, T] to [N, B / N, T]; microbatch n takes rows n, n + N, ..., so none changes device"""
        return jnp.moveaxis(x_BT.reshape(-1, num_microbatches, *x_BT.shape[1:]), 1, 0)

    def add(sums, microbatch_and_key):
        microbatch, key = microbatch_and_key
        (loss_sum, weight_sum), grads = grad_fn(kept, microbatch, key)
        found = in_float32((loss_sum, weight_sum, grads))
        total = jax.tree.map(jnp.add, in_float32(sums), found)
        return round_like(total, sums, jax.random.fold_in(key, _ROUNDING)), None

    no_grads = jax.tree.map(lambda x, dtype: jnp.zeros_like(x, dtype), kept, grad_dtypes)
    zeros = (jnp.float32(0), jnp.float32(0), no_grads)
    xs = (jax.tree.map(split, batch), jax.random.split(key, num_microbatches))
    return jax.lax.scan(add, zeros, xs)[0]
