"""Schedules and optimizers: hand-computed numbers, torch.optim's, and masks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_sft.config_keys import OPTIMIZERS, SCHEDULERS
from jax_sft.optimizer import make_optimizer, make_schedule, trained_mask


def constant(lr):
    return make_schedule("constant", {}, lr=lr, warmup_steps=0, total_steps=10)


def everywhere(params):
    return jax.tree.map(lambda _: True, params)


def run(name, kwargs, params, grads, *, lr=0.1, decay_mask=everywhere):
    optimizer = make_optimizer(name, kwargs, schedule=constant(lr), decay_mask=decay_mask)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


def rates(name, kwargs, steps, *, lr=1.0, warmup_steps=0, total_steps=10):
    schedule = make_schedule(
        name, kwargs, lr=lr, warmup_steps=warmup_steps, total_steps=total_steps
    )
    return [float(schedule(jnp.int32(step))) for step in steps]


def test_cosine_goes_down_to_eta_min_and_back():
    kwargs = {"T_max": 4, "eta_min": 0.2}
    expected = [1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.2, 0.6, 1.0]
    np.testing.assert_allclose(
        rates("cosine_annealing", kwargs, [0, 1, 2, 4, 6, 8]), expected, 1e-6
    )


def test_cosine_without_T_max_ends_with_the_run():
    got = rates("cosine_annealing", {}, [2, 6, 10], warmup_steps=2, total_steps=10)
    np.testing.assert_allclose(got, [1.0, 0.5, 0.0], atol=1e-7)


def test_trlx_default_is_constant():
    got = rates("cosine_annealing", {"T_max": 1e12, "eta_min": 1e-4}, [0, 1000, 10**6], lr=1e-4)
    assert got == [np.float32(1e-4)] * 3


def test_linear_by_hand():
    kwargs = {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 4}
    assert rates("linear", kwargs, [0, 1, 4, 9]) == [1.0, 0.75, 0.0, 0.0]
    kwargs = {"start_factor": 1.0, "end_factor": 0.0, "total_iters": None}
    assert rates("linear", kwargs, [2, 6, 10], warmup_steps=2, total_steps=10) == [1.0, 0.5, 0.0]


def test_warmup_rises_without_a_step_of_zero():
    assert rates("constant", {}, [0, 1, 2, 3, 4], warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("T_max", [7, 10.5, 1000, 1e12])
def test_cosine_equals_torch_beyond_T_max(T_max):
    torch = pytest.importorskip("torch")
    steps = [0, 1, 5, 7, 11, 20, 999, 1001, 54321]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max, eta_min=0.02)
    expected = []
    for step in steps:
        scheduler.last_epoch = step
        expected += scheduler._get_closed_form_lr()
    got = rates("cosine_annealing", {"T_max": T_max, "eta_min": 0.02}, steps, lr=0.3)
    # A period that is no integer has its phase in float32: 54321 / 10.5 turns x 6e-8 x pi x lr.
    np.testing.assert_allclose(got, expected, atol=3e-4 if T_max == 10.5 else 1e-7)


@pytest.mark.parametrize("kwargs", [{}, dict(start_factor=1.0, end_factor=0.1, total_iters=6)])
def test_linear_equals_torch(kwargs):
    torch = pytest.importorskip("torch")
    kwargs = {"total_iters": 5} | kwargs
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, **kwargs)
    expected = []
    for step in range(12):
        scheduler.last_epoch = step
        expected += scheduler._get_closed_form_lr()
    np.testing.assert_allclose(rates("linear", kwargs, range(12), lr=0.3), expected, 1e-6)


def test_adamw_by_hand():
    # Step 1 of Adam is the gradient's sign; the decay takes lr * weight_decay of the parameter.
    params = {"w": jnp.array([2.0, -1.0])}
    got = run("adamw", {"weight_decay": 0.5}, params, [{"w": jnp.array([3.0, -4.0])}])
    np.testing.assert_allclose(got["w"], [2 - 0.1 - 0.1, -1 + 0.1 + 0.05], 1e-6)


def test_adam_decay_is_part_of_the_gradient():
    # gradient + 0.5 * parameter = 1 - 1 = 0 moves nothing; a decoupled decay would.
    params = {"w": jnp.array([-2.0, 4.0])}
    got = run("adam", {"weight_decay": 0.5}, params, [{"w": jnp.array([1.0, 1.0])}])
    np.testing.assert_allclose(got["w"], [-2.0, 3.9], 1e-6)


def test_sgd_by_hand():
    grads = [{"w": jnp.array(1.0)}, {"w": jnp.array(2.0)}]
    plain = run("sgd", {}, {"w": jnp.array(0.0)}, grads)
    heavy = run("sgd", {"momentum": 0.5}, {"w": jnp.array(0.0)}, grads)
    nesterov = run("sgd", {"momentum": 0.5, "nesterov": True}, {"w": jnp.array(0.0)}, grads)
    # buffers 1, 2.5; Nesterov's steps 1 + 0.5, 2 + 1.25
    np.testing.assert_allclose([plain["w"], heavy["w"]], [-0.3, -0.35], 1e-6)
    np.testing.assert_allclose(nesterov["w"], -0.475, 1e-6)


@pytest.mark.parametrize(
    ("name", "torch_name", "kwargs"),
    [
        ("adamw", "AdamW", {}),
        ("adamw", "AdamW", {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
        ("adam", "Adam", {"betas": (0.8, 0.99), "eps": 1e-8, "weight_decay": 0.1}),
        ("adam", "Adam", {}),
        ("sgd", "SGD", {"weight_decay": 0.1}),
        ("sgd", "SGD", {"momentum": 0.9, "weight_decay": 0.01}),
        ("sgd", "SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ],
)
def test_twenty_steps_equal_torch(name, torch_name, kwargs):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 3)).astype(np.float32)
    grads = rng.normal(size=(20, 5, 3)).astype(np.float32)
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    oracle = getattr(torch.optim, torch_name)([weight], lr=0.01, **kwargs)
    for grad in grads:
        weight.grad = torch.from_numpy(grad)
        oracle.step()
    got = run(name, kwargs, {"w": jnp.asarray(start)}, [{"w": g} for g in grads], lr=0.01)
    # float32 of numbers about 1, twenty steps
    np.testing.assert_allclose(got["w"], weight.detach().numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_decay_applies_where_the_mask_is_true(name):
    params = {"kernel": jnp.full((4, 4), 2.0), "bias": jnp.full((4,), 2.0), "frozen": None}
    grads = [jax.tree.map(jnp.zeros_like, params)]
    mask = lambda params: {"kernel": True, "bias": False, "frozen": None}  # noqa: E731
    got = run(name, {"weight_decay": 0.25}, params, grads, decay_mask=mask)
    assert got["bias"].tolist() == [2.0] * 4
    assert got["frozen"] is None
    assert (got["kernel"] < 2.0).all()
    if name not in ("adam",):  # the others' zero gradient leaves the decay alone: lr * 0.25 * 2
        np.testing.assert_allclose(got["kernel"], 1.95, 1e-6)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_each_optimizer_descends(name):
    params = {
        "embed": {"tokens": jnp.full((40, 36), 0.5)},
        "layers": {"attention": {"query": {"kernel": jnp.full((2, 36, 2, 4), 0.5)}}},
    }
    got = run(name, {}, params, [params] * 5, lr=0.01)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(got), strict=True):
        assert (after < before).all() and (after > 0).all()


def test_adafactor_state_is_vectors():
    params = {"w": jnp.ones((64, 48))}
    optimizer = make_optimizer("adafactor", {}, schedule=constant(1.0), decay_mask=everywhere)
    sizes = [leaf.size for leaf in jax.tree.leaves(optimizer.init(params))]
    assert max(sizes) == 64


def test_muon_orthogonalizes_each_layers_whole_kernel():
    # [L, D, H, C]: each layer is a D x (H * C) matrix; the update's singular values are near
    # equal, and its entries' root mean square is lr * 0.2.
    shape = (2, 16, 2, 8)
    grads = [
        {
            "layers": {
                "attention": {"query": {"kernel": jax.random.normal(jax.random.key(0), shape)}}
            }
        }
    ]
    params = jax.tree.map(jnp.zeros_like, grads[0])
    got = run("muon", {}, params, grads, lr=1.0)["layers"]["attention"]["query"]["kernel"]
    for layer in np.asarray(got).reshape(2, 16, 16):
        values = np.linalg.svd(layer, compute_uv=False)
        assert values.max() < 2 * values.min()  # Newton-Schulz leaves them within 0.7 to 1.2
        np.testing.assert_allclose(np.sqrt((layer**2).mean()), 0.2, rtol=0.15)


def test_muon_leaves_embeddings_to_adam():
    params = {"embed": {"tokens": jnp.zeros((8, 4))}}
    got = run("muon", {}, params, [jax.tree.map(jnp.ones_like, params)])
    # Adam's 1 - 0.999 in float32 is good to 6e-8 / 1e-3, of which the root takes half.
    np.testing.assert_allclose(got["embed"]["tokens"], -0.1, 3e-5)


def test_trained_mask():
    paths = ["embed/tokens", "frozen_layers/mlp/up/kernel", "layers/mlp/up/kernel"]
    paths += ["final_norm/scale", "head/kernel"]
    assert all(trained_mask(paths, -1).values())
    assert list(trained_mask(paths, 2).values()) == [False, False, True, True, True]
    assert list(trained_mask(paths, 0).values()) == [False, False, False, True, False]
    with pytest.raises(ValueError, match="num_layers_unfrozen is -2"):
        trained_mask(paths, -2)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="'adam_8bit_bnb'.*adamw.*take adafactor"):
        make_optimizer("adam_8bit_bnb", {}, schedule=constant(1.0), decay_mask=everywhere)
    with pytest.raises(ValueError, match="momentum is not an argument of adamw.*betas, eps"):
        run("adamw", {"momentum": 0.9}, {}, [])
    with pytest.raises(ValueError, match="'cosine'.*cosine_annealing, linear, constant"):
        rates("cosine", {}, [])
    with pytest.raises(ValueError, match="T_max is not an argument of constant.*none"):
        rates("constant", {"T_max": 3}, [])
    with pytest.raises(ValueError, match="nesterov is true but momentum is 0"):
        run("sgd", {"nesterov": True}, {}, [])


def test_the_configs_names_are_these():
    for name, arguments in OPTIMIZERS.items():
        given = {k: True if k == "nesterov" else 0.5 for k in arguments}
        if "betas" in given:
            given["betas"] = (0.5, 0.5)
        make_optimizer(name, given, schedule=constant(1.0), decay_mask=everywhere)
        for other in {"betas", "momentum", "eps", "decay_rate"} - set(arguments):
            with pytest.raises(ValueError, match=f"{other} is not an argument of {name}"):
                make_optimizer(name, {other: 1}, schedule=constant(1.0), decay_mask=everywhere)
    for name, arguments in SCHEDULERS.items():
        rates(name, dict.fromkeys(arguments, 2), [0])


def test_no_tracer_leaks(no_leaked_tracers):
    run("adamw", {}, {"w": jnp.ones(2)}, [{"w": jnp.ones(2)}])
