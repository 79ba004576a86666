"""Law 6 for GPT-2: logits, loss and gradients are those of `transformers` in PyTorch.

Everywhere against stored numbers; where torch is installed, against torch itself too. Ours
runs both examples in one packed row with a padded tail, theirs each example alone.
"""

import functools

import jax
import numpy as np
import pytest
from gpt2_oracle import GOLDEN, IDS, OPTIONS, TRAINED, probe, run_torch, write_folder
from tiny_models import lay_out, on_device, one_device

from jax_sft.data.types import examples_from_parts
from jax_sft.model.causal_lm import CausalLM, Placement
from jax_sft.model.decoder import logits
from jax_sft.train_step import batch_sums

ROW_LEN = 16
# Two layers of float32 in two frameworks, summed in other orders; logits are about 3.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as stored:
        return dict(stored)


@pytest.fixture(scope="module", params=OPTIONS)
def case(request, tmp_path_factory):
    """Name, folder and model of a case."""
    folder = write_folder(tmp_path_factory.mktemp("model"), request.param)
    model = CausalLM.from_pretrained(folder, placement=Placement(mesh=one_device()))
    return request.param, folder, model


def packed_batch():
    parts = [
        (np.array(ids[:-1], np.int32), np.array(ids[1:], np.int32), np.array(trained, np.float32))
        for ids, trained in zip(IDS, TRAINED, strict=True)
    ]
    return on_device(lay_out(examples_from_parts(parts), [[0, 1]], ROW_LEN))


@functools.partial(jax.jit, static_argnums=0)
def logits_loss_grads(decoder, params, batch):
    tokens = (batch.inputs_BT, batch.positions_BT, batch.segment_ids_BT)
    hidden_BTD, _ = decoder.apply({"params": params}, *tokens)

    def loss_sum(params):
        return batch_sums(decoder, params, batch)[0]

    return logits(decoder.config, params, hidden_BTD), *jax.value_and_grad(loss_sum)(params)


@functools.cache
def ours(model):
    decoder, params = model.decoder, model.params
    logits_BTV, loss, grads = logits_loss_grads(decoder, params, packed_batch())
    num_tokens = sum(len(ids) - 1 for ids in IDS)
    grads = their_names(decoder.config.num_layers, grads)
    return {
        "logits": np.asarray(logits_BTV)[0, :num_tokens],
        "loss": np.asarray(loss),
        "probes": np.stack([probe(name, grads[name]) for name in sorted(grads)]),
    }


def their_names(num_layers, tree):
    """Our tree under the names of `transformers`, written out apart from the name table."""
    tree = jax.tree.map(np.asarray, tree)
    named = {
        "transformer.wte.weight": tree["embed"]["tokens"],
        "transformer.wpe.weight": tree["embed"]["positions"],
        "transformer.ln_f.weight": tree["final_norm"]["scale"],
        "transformer.ln_f.bias": tree["final_norm"]["bias"],
    }
    if "head" in tree:
        named["lm_head.weight"] = tree["head"]["kernel"]
    layers = tree["layers"]
    attention, mlp = layers["attention"], layers["mlp"]
    for i in range(num_layers):
        block = f"transformer.h.{i}"
        for theirs, norm in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
            named[f"{block}.{theirs}.weight"] = layers[norm]["scale"][i]
            named[f"{block}.{theirs}.bias"] = layers[norm]["bias"][i]
        qkv = [attention[name] for name in ("query", "key", "value")]
        width = qkv[0]["kernel"].shape[1]
        kernels = [part["kernel"][i].reshape(width, -1) for part in qkv]
        named[f"{block}.attn.c_attn.weight"] = np.concatenate(kernels, axis=1)
        biases = [part["bias"][i].ravel() for part in qkv]
        named[f"{block}.attn.c_attn.bias"] = np.concatenate(biases)
        named[f"{block}.attn.c_proj.weight"] = attention["out"]["kernel"][i].reshape(-1, width)
        named[f"{block}.attn.c_proj.bias"] = attention["out"]["bias"][i]
        for theirs, linear in (("c_fc", "up"), ("c_proj", "down")):
            named[f"{block}.mlp.{theirs}.weight"] = mlp[linear]["kernel"][i]
            named[f"{block}.mlp.{theirs}.bias"] = mlp[linear]["bias"][i]
    return named


def assert_same_numbers(got, expected):
    scale = np.abs(expected["logits"]).max()
    np.testing.assert_allclose(got["logits"], expected["logits"], rtol=0, atol=TOLERANCE * scale)
    np.testing.assert_allclose(got["loss"], expected["loss"], rtol=TOLERANCE)
    # A probe's products are at most its norm times that of a random vector, about sqrt(size).
    sizes = np.abs(expected["probes"]).max(axis=1, keepdims=True)
    errors = np.abs(got["probes"] - expected["probes"]) / sizes
    assert errors.max() < TOLERANCE, errors


def test_numbers_are_the_stored_ones(case, golden):
    name, _, model = case
    keys = ("logits", "loss", "probes")
    assert_same_numbers(ours(model), {key: golden[f"{name}/{key}"] for key in keys})


def test_numbers_are_those_of_torch(case):
    pytest.importorskip("torch")
    _, folder, model = case
    assert_same_numbers(ours(model), run_torch(folder))


def test_rows_side_by_side_are_rows_alone(tmp_path):
    """A batch padded on the right, called as a user calls it."""
    folder = write_folder(tmp_path, "plain")
    model = CausalLM.from_pretrained(folder, placement=Placement(mesh=one_device()))
    tokens = np.zeros((2, 9), np.int32)
    for row, ids in zip(tokens, IDS, strict=True):
        row[: len(ids) - 1] = ids[:-1]
    got = np.asarray(model(tokens))
    expected = ours(model)["logits"]
    together = np.concatenate([got[0, :9], got[1, :5]])
    np.testing.assert_allclose(together, expected, rtol=0, atol=TOLERANCE * np.abs(got).max())
