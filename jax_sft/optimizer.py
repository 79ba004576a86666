"""The learning rate's schedule, the optimizer, and which parameters train.

What comes in: trlX's names and kwargs. What goes out: an optax schedule and transformation whose
numbers are torch.optim's, and masks over parameter paths. Gradients are clipped elsewhere, by
the train step, which needs their norm anyway. Missing kwargs have torch.optim's defaults, or
optax's where torch has no such optimizer.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

DecayMask = Callable[[Any], Any]

# Adafactor keeps two vectors in place of a matrix whose sides are both at least this long.
# Below optax's 128, so that a stacked attention kernel [L, D, H, C] is factored too.
_MIN_FACTORED_SIZE = 32

# Muon's matrices: (axes multiplied away, axes that come out); the other axes, layers, are apart.
_MUON_AXES = {
    "attention/query/kernel": ((-3,), (-2, -1)),
    "attention/key/kernel": ((-3,), (-2, -1)),
    "attention/value/kernel": ((-3,), (-2, -1)),
    "attention/out/kernel": ((-3, -2), (-1,)),
    "mlp/up/kernel": ((-2,), (-1,)),
    "mlp/gate/kernel": ((-2,), (-1,)),
    "mlp/down/kernel": ((-2,), (-1,)),
    "experts/gate/kernel": ((-2,), (-1,)),
    "experts/up/kernel": ((-2,), (-1,)),
    "experts/down/kernel": ((-2,), (-1,)),
}
# Gives Muon's updates AdamW's usual size, so that one lr serves both (arXiv 2502.16982, 2.2).
_MUON_RMS = 0.2


def make_schedule(
    name: str, kwargs: Mapping[str, Any], *, lr: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """A schedule from the number of updates made so far to the learning rate.

    Step s of the warm-up has lr * (s + 1) / (warmup_steps + 1), so that no step is wasted on 0;
    then the named schedule starts at its own step 0.

    Args:
        name: "cosine_annealing", "linear" or "constant".
        kwargs: the schedule's arguments, as torch.optim.lr_scheduler names them; a `T_max` or
            `total_iters` of None is the number of steps after the warm-up.
        lr: the learning rate that the schedule scales.
        warmup_steps: steps of linear rise.
        total_steps: steps of the whole run.

    Returns:
        The schedule; it takes an int32 scalar and returns a float32 scalar.

    Raises:
        ValueError: an unknown name or argument.
    """
    makers = {"cosine_annealing": _cosine_annealing, "linear": _linear, "constant": _constant}
    after = _make(makers, "scheduler", name, kwargs, lr, max(1, total_steps - warmup_steps))

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        rising = lr * (step + 1) / (warmup_steps + 1)
        rate = after(jnp.maximum(step - warmup_steps, 0))
        return jnp.where(step < warmup_steps, rising, rate).astype(jnp.float32)

    return schedule


def _make(makers: Mapping[str, Callable], kind: str, name: str, kwargs: Mapping, *args: Any) -> Any:
    """Calls the named maker; its keyword arguments are the kwargs that the name takes."""
    if name not in makers:
        known = f"expected one of {', '.join(makers)}"
        hint = "; for less optimizer memory take adafactor, or optimizer.state_dtype=bfloat16"
        raise ValueError(f"{kind}.name is {name!r}; {known}{hint if '8bit' in name else ''}")
    takes = makers[name].__kwdefaults__ or {}
    for argument in kwargs:
        if argument not in takes:
            raise ValueError(
                f"{kind}.kwargs.{argument} is not an argument of {name}; "
                f"it takes: {', '.join(takes) or 'none'}"
            )
    return makers[name](*args, **kwargs)


def _cosine_annealing(
    lr: float, num_steps: int, *, T_max: float | None = None, eta_min: float = 0.0
) -> optax.Schedule:
    """torch.optim.lr_scheduler.CosineAnnealingLR in its closed form, periodic beyond T_max."""
    period = num_steps if T_max is None else T_max
    # In integers where it can be: float32 loses the phase of a late step.
    exact = float(period).is_integer() and 2 * period < 2**31

    def schedule(step: jax.Array) -> jax.Array:
        phase = step % (2 * int(period)) if exact else step
        return eta_min + (lr - eta_min) * (1 + jnp.cos(math.pi * (phase / period))) / 2

    return schedule


def _linear(
    lr: float,
    num_steps: int,
    *,
    start_factor: float = 1 / 3,
    end_factor: float = 1.0,
    total_iters: int | None = None,
) -> optax.Schedule:
    """torch.optim.lr_scheduler.LinearLR in its closed form."""
    length = num_steps if total_iters is None else total_iters

    def schedule(step: jax.Array) -> jax.Array:
        share = jnp.minimum(step, length) / length
        return lr * (start_factor + (end_factor - start_factor) * share)

    return schedule


def _constant(lr: float, num_steps: int) -> optax.Schedule:
    return lambda step: jnp.full_like(step, lr, dtype=jnp.float32)


def make_optimizer(
    name: str, kwargs: Mapping[str, Any], *, schedule: optax.Schedule, decay_mask: DecayMask
) -> optax.GradientTransformation:
    """The optax transformation for a name, scaled by the schedule and without clipping.

    Args:
        name: "adamw", "adam", "sgd", "adafactor", "lion" or "muon".
        kwargs: its arguments, as torch.optim names them; `lr` is left to the schedule.
        schedule: from the number of updates so far to the learning rate.
        decay_mask: from the parameter tree to a tree of bools: where weight decay applies.

    Returns:
        The transformation; its updates are to be added to the parameters.

    Raises:
        ValueError: an unknown name, with the list, or an unknown argument.
    """
    makers = {
        "adamw": _adamw,
        "adam": _adam,
        "sgd": _sgd,
        "adafactor": _adafactor,
        "lion": _lion,
        "muon": _muon,
    }
    kwargs = {argument: value for argument, value in kwargs.items() if argument != "lr"}
    update = _make(makers, "optimizer", name, kwargs, decay_mask)
    return optax.chain(update, optax.scale_by_learning_rate(schedule))


def _adamw(
    mask: DecayMask,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps)
    return optax.chain(adam, optax.add_decayed_weights(weight_decay, mask))


def _adam(
    mask: DecayMask,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """torch.optim.Adam: the decay is part of the gradient, so the moments see it."""
    adam = optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps)
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), adam)


def _sgd(
    mask: DecayMask, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    if nesterov and not momentum:
        raise ValueError("optimizer.kwargs.nesterov is true but momentum is 0; set one, as 0.9")
    decay = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(decay, optax.trace(momentum, nesterov)) if momentum else decay


def _adafactor(
    mask: DecayMask,
    *,
    decay_rate: float = 0.8,
    clipping_threshold: float = 1.0,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235) relative to the parameters' scale, with decoupled decay.

    Root mean squares of a stacked parameter are over all its layers.
    """
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=decay_rate, min_dim_size_to_factor=_MIN_FACTORED_SIZE
        ),
        optax.clip_by_block_rms(clipping_threshold),
        optax.scale_by_param_block_rms(),
        optax.add_decayed_weights(weight_decay, mask),
    )


def _lion(
    mask: DecayMask, *, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Lion (arXiv 2302.06675); its lr is a third to a tenth of AdamW's."""
    lion = optax.scale_by_lion(b1=betas[0], b2=betas[1])
    return optax.chain(lion, optax.add_decayed_weights(weight_decay, mask))


def _muon(
    mask: DecayMask,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Muon for the layers' kernels, Adam for the rest, such as adapters."""
    muon = optax.contrib.scale_by_muon(
        beta=momentum, eps=eps, nesterov=nesterov, weight_dimension_numbers=_muon_axes
    )
    adam = optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps)
    return optax.chain(
        optax.partition({"muon": optax.chain(muon, _scale_by_sides()), "adam": adam}, _muon_labels),
        optax.add_decayed_weights(weight_decay, mask),
    )


def _muon_spec(path: tuple) -> optax.contrib.MuonDimensionNumbers | None:
    name = "/".join(jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-3:])
    return optax.contrib.MuonDimensionNumbers(*_MUON_AXES[name]) if name in _MUON_AXES else None


def _muon_axes(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: _muon_spec(path), params)


def _muon_labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if _muon_spec(path) else "adam", params
    )


def _scale_by_sides() -> optax.GradientTransformation:
    """Scales an orthogonal matrix to entries of root mean square _MUON_RMS."""

    def scaled(path: tuple, update: jax.Array) -> jax.Array:
        sides = (math.prod(update.shape[axis] for axis in axes) for axes in _muon_spec(path))
        return update * (_MUON_RMS * math.sqrt(max(sides)))

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(scaled, updates)
    )


def trained_mask(paths: Iterable[str], num_layers_unfrozen: int) -> dict[str, bool]:
    """Which parameters train.

    Args:
        paths: parameters such as "layers/attention/query/kernel"; the bottom layers of a model
            that is partly frozen are under "frozen_layers/".
        num_layers_unfrozen: -1: everything trains; n > 0: the top n layers, the final norm and
            an untied head; 0: the final norm alone.

    Returns:
        A bool for each path.

    Raises:
        ValueError: a number below -1.
    """
    if num_layers_unfrozen < -1:
        raise ValueError(
            f"num_layers_unfrozen is {num_layers_unfrozen}; expected a number of layers, or -1: all"
        )
    tops = ("layers", "final_", "head") if num_layers_unfrozen else ("final_norm",)
    return {path: num_layers_unfrozen == -1 or path.startswith(tops) for path in paths}
