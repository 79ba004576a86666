"""Experts: against a loop over tokens, and the router's balance by hand and by transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import draw_params, one_device

from jax_sft.config import default_sft_config
from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.experts import ExpertsLayer, balance
from jax_sft.model.placement import Placement
from jax_sft.model.pretrained import by_path
from jax_sft.startup import flops_a_step

FIELDS = dict(
    model_type="mixtral",
    num_hidden_layers=1,
    hidden_size=16,
    intermediate_size=12,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=4,
    num_experts_per_tok=2,
    vocab_size=31,
    max_position_embeddings=32,
)


def layer_and_params(*, renormalise=True):
    model = CausalLM.open(None, fields=FIELDS, placement=Placement(mesh=one_device()))
    config = model.decoder.config
    experts = dataclasses.replace(config.experts, renormalise=renormalise)
    config = dataclasses.replace(config, experts=experts)
    params = jax.tree.map(lambda leaf: leaf[0], draw_params(model)["layers"]["experts"])
    return ExpertsLayer(config, model.decoder.numerics), params


@pytest.mark.parametrize("renormalise", [True, False])
def test_each_token_is_the_weighted_sum_of_its_experts(renormalise):
    layer, params = layer_and_params(renormalise=renormalise)
    x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    got = layer.apply({"params": params}, x, np.ones((2, 5), np.int32))
    kernels = {name: np.float64(params[name]["kernel"]) for name in params}
    for row, token in np.ndindex(2, 5):
        h = np.float64(x[row, token])
        probs = np.exp(h @ kernels["router"])
        probs /= probs.sum()
        chosen = np.argsort(-probs)[:2]
        weights = probs[chosen] / (probs[chosen].sum() if renormalise else 1)
        expected = np.zeros(16)
        for weight, expert in zip(weights, chosen, strict=True):
            gate, up = h @ kernels["gate"][expert], h @ kernels["up"][expert]
            expected += weight * (gate / (1 + np.exp(-gate)) * up) @ kernels["down"][expert]
        np.testing.assert_allclose(got[row, token], expected, rtol=0, atol=1e-5)


def test_balance_by_hand():
    """Three tokens and padding; two experts, of which the first is chosen twice."""
    probs = jnp.array([[[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]])
    chosen = jnp.array([[[0], [0], [1], [0]]])
    is_real = jnp.array([[True, True, True, False]])
    # Shares 2/3 and 1/3, mean probabilities 1/2 and 1/2.
    np.testing.assert_allclose(balance(probs, chosen, is_real), [2 * (2 / 3 + 1 / 3) / 2])
    assert balance(probs, chosen, jnp.zeros((1, 4), bool)).tolist() == [0.0]


def test_balance_of_a_row_is_what_transformers_computes_of_it():
    torch = pytest.importorskip("torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 1, 0, 0]])
    expected = load_balancing_loss_func((torch.tensor(logits),), 4, 2, torch.tensor(mask))
    probs = jax.nn.softmax(logits[None], axis=-1)
    got = balance(probs, jax.lax.top_k(probs, 2)[1], jnp.array(mask, bool))
    np.testing.assert_allclose(got, [float(expected)], rtol=1e-6)


def test_flops_are_of_the_experts_that_a_token_meets():
    """Two of four: half of their 4 · 3 · 16 · 12 numbers; router, attention and the rest whole."""
    model = CausalLM.open(None, fields=FIELDS, placement=Placement(mesh=one_device()))
    config = default_sft_config().evolve(train=dict(seq_length=8, batch_size=2))
    num_met = model.num_params - 4 * 3 * 16 * 12 // 2
    trained = dict.fromkeys(by_path(model.param_structs()), True)
    got = flops_a_step(config, model, trained=trained)
    assert got == (6 * num_met + 6 * 16 * 8) * 2 * 8
    nothing = flops_a_step(config, model, trained=dict.fromkeys(trained, False))
    assert nothing == (4 * num_met + 6 * 16 * 8) * 2 * 8
