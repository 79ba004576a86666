"""Law 2: one device or eight, and whatever the mesh: the same losses, norms and gradients."""

import functools

import jax
import numpy as np
import optax
import pytest
from tiny_models import (
    assert_close_trees,
    draw_examples,
    draw_params,
    one_device,
    paths_and_leaves,
    tiny_gpt2,
)

from jax_sft import recipe
from jax_sft.config import default_sft_config
from jax_sft.data.batches import Batches
from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.placement import Placement
from jax_sft.sharding import make_mesh, named_sharding
from jax_sft.train_step import batch_sums

ROW_LEN = 32
NUM_STEPS = 3
LR = 0.01
VOCAB_SIZE = 257  # prime, as GPT-2's 50257: it is padded where the tensor axis splits it
MODEL = dict(
    model_type="gpt2", n_layer=2, n_embd=32, n_head=4, n_positions=64, vocab_size=VOCAB_SIZE
)
# Dense and sparse layers, windows, fewer key/value heads than devices: what GPT-2 has not.
EXPERTS = dict(
    model_type="qwen3_moe",
    num_hidden_layers=3,
    mlp_only_layers=[0],
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_experts=4,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    use_sliding_window=True,
    sliding_window=6,
    vocab_size=VOCAB_SIZE,
)
# data, fsdp, sequence, tensor; and the rows of a microbatch, None for the whole batch.
MESHES = {
    "data": ((8, 1, 1, 1), None),
    "fsdp": ((1, 8, 1, 1), None),
    "sequence": ((1, 1, 8, 1), None),
    "data x tensor": ((2, 1, 1, 4), None),
    "data x fsdp x sequence, microbatches": ((2, 2, 2, 1), 4),
    "fsdp x sequence x tensor": ((1, 2, 2, 2), None),
}


def mesh_of(sizes):
    return make_mesh(**dict(zip(("data", "fsdp", "sequence", "tensor"), sizes, strict=True)))


@functools.cache
def batches():
    lengths = np.random.default_rng(0).integers(1, ROW_LEN + 1, 60).tolist()
    examples = draw_examples(lengths, vocab_size=VOCAB_SIZE, trained=0.5)
    return Batches(examples, seq_length=ROW_LEN, batch_size=8)


def run_steps(mesh, minibatch_size, fields=MODEL, **method):
    """Losses and gradient norms of some steps, the first gradients, the last parameters."""
    config = default_sft_config().evolve(
        train=dict(seq_length=ROW_LEN, batch_size=8, minibatch_size=minibatch_size),
        optimizer=dict(name="sgd", kwargs=dict(lr=LR, momentum=0.9), max_grad_norm=None),
        scheduler=dict(name="constant", kwargs={}),
        method=method,
    )
    model = CausalLM.open(None, fields=fields, placement=Placement(mesh=mesh))
    update = recipe.make_update(config, model, num_steps=NUM_STEPS)
    step_fn, _ = recipe.compile_step(config, model, update)
    state = update.init(draw_params(model))
    history, grads = [], None
    for step in range(NUM_STEPS):
        batch = batches().place(step, named_sharding(mesh, "batch", "tokens"))
        state, metrics = step_fn(state, batch)
        assert metrics.ok
        history.append((float(metrics.loss), float(metrics.grad_norm), int(metrics.num_trained)))
        # After the first step, momentum is the gradient.
        grads = grads or jax.device_get(optax.tree.get(state.opt_state, "trace"))
    return history, strip(grads), strip(jax.device_get(state.params))


def strip(params):
    """Drops the vocabulary's padding, which no two meshes share."""
    tables = {"embed": "tokens", "head": "kernel"}
    for module, name in tables.items():
        if module in params:
            table = params[module][name]
            assert not table[VOCAB_SIZE:].any(), "padding is trained, or was not zero"
            params = params | {module: params[module] | {name: table[:VOCAB_SIZE]}}
    return params


@functools.cache
def on_one_device():
    return run_steps(one_device(), None)


def test_experts_too():
    """The auxiliary loss is of each row, so that microbatches change nothing either."""
    history, grads, params = run_steps(one_device(), None, EXPERTS, router_aux_loss=0.1)
    got = run_steps(mesh_of((1, 2, 2, 2)), 4, EXPERTS, router_aux_loss=0.1)
    np.testing.assert_allclose(got[0], history, rtol=1e-5)
    assert_close_trees(got[1], grads, rtol=2e-5)
    assert_close_trees(got[2], params, rtol=1e-5)
    model = CausalLM.open(None, fields=EXPERTS, placement=Placement(mesh=one_device()))
    batch = batches().place(0, named_sharding(one_device(), "batch", "tokens"))
    loss, weight = jax.jit(batch_sums, static_argnums=0)(model.decoder, draw_params(model), batch)
    assert abs(loss / weight - history[0][0]) > 0.1, "the auxiliary loss is not there"


@pytest.mark.parametrize(("sizes", "minibatch_size"), MESHES.values(), ids=MESHES)
def test_steps_are_those_of_one_device(sizes, minibatch_size, capfd, caplog):
    history, grads, params = on_one_device()
    capfd.readouterr()
    with jax.log_compiles():
        got_history, got_grads, got_params = run_steps(mesh_of(sizes), minibatch_size)
    # Sums of about 100 float32 terms in another order, some of which cancel.
    np.testing.assert_allclose(got_history, history, rtol=1e-5)
    assert_close_trees(got_grads, grads, rtol=1e-5)
    assert_close_trees(got_params, params, rtol=1e-5)
    compiled = [line for line in caplog.messages if "Finished XLA compilation" in line]
    assert sum("train_step" in line for line in compiled) == 1, compiled
    # XLA says here when it could only reshard by giving every device the whole array.
    assert "rematerialization" not in capfd.readouterr().err


def test_random_weights_are_the_same_on_every_mesh():
    models = [
        CausalLM.open(None, fields=MODEL, placement=Placement(mesh=mesh))
        for mesh in (one_device(), mesh_of((1, 2, 2, 2)))
    ]
    for model in models:
        model.init(seed=7)
    one, eight = (strip(jax.device_get(model.params)) for model in models)
    assert models[1].decoder.vocab_padding == 1
    for (path, ours), (_, theirs) in zip(
        paths_and_leaves(eight), paths_and_leaves(one), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=path)


def test_logits_of_a_padded_vocabulary_are_those_of_one_device():
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 16))
    one = tiny_gpt2(vocab_size=VOCAB_SIZE)(tokens)
    four = tiny_gpt2(vocab_size=VOCAB_SIZE, mesh=mesh_of((2, 1, 1, 4)))(tokens)
    assert four.shape == (2, 16, VOCAB_SIZE)
    np.testing.assert_allclose(four, one, rtol=0, atol=1e-5 * np.abs(one).max())
