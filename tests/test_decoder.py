"""The decoder: its parameters, its two stacks, its dtypes, and what remat may not change."""

import dataclasses
import functools
import math
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from tiny_models import paths_and_leaves, tiny_gpt2

from jax_sft.compiled import read_collectives
from jax_sft.model import decoder as decoder_file
from jax_sft.model.attention_splash import TILE
from jax_sft.model.decoder import empty_cache, init_params, logical_axes, look_up, mask_padding
from jax_sft.model.layers import ACTIVATIONS
from jax_sft.sharding import MESH_AXES, make_mesh, named_sharding

TOKENS = np.random.default_rng(0).integers(0, 67, (2, 12), dtype=np.int32)
POSITIONS = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
ONES = np.ones((2, 12), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(decoder, params, key=None):
    rngs = None if key is None else {"dropout": key}
    return decoder.apply({"params": params}, TOKENS, POSITIONS, ONES, rngs=rngs)[0]


@functools.partial(jax.jit, static_argnums=0)
def gradients(decoder, params):
    def loss(params):
        hidden_BTD, _ = decoder.apply({"params": params}, TOKENS, POSITIONS, ONES)
        return jnp.sum(jnp.sin(hidden_BTD))

    return jax.grad(loss)(params)


def with_numerics(decoder, **changes):
    return decoder.clone(numerics=dataclasses.replace(decoder.numerics, **changes))


def test_parameters_are_those_of_the_docstring():
    model = tiny_gpt2(tie_word_embeddings=False, n_inner=48)
    shapes, axes = logical_axes(model.decoder)
    got = {path: leaf.shape for path, leaf in paths_and_leaves(model.params)}
    assert got == {
        "embed/tokens": (67, 32),
        "embed/positions": (64, 32),
        "head/kernel": (67, 32),
        "layers/attention_norm/scale": (2, 32),
        "layers/attention_norm/bias": (2, 32),
        "layers/mlp_norm/scale": (2, 32),
        "layers/mlp_norm/bias": (2, 32),
        **{f"layers/attention/{name}/kernel": (2, 32, 4, 8) for name in ("query", "key", "value")},
        **{f"layers/attention/{name}/bias": (2, 4, 8) for name in ("query", "key", "value")},
        "layers/attention/out/kernel": (2, 4, 8, 32),
        "layers/attention/out/bias": (2, 32),
        "layers/mlp/up/kernel": (2, 32, 48),
        "layers/mlp/up/bias": (2, 48),
        "layers/mlp/down/kernel": (2, 48, 32),
        "layers/mlp/down/bias": (2, 32),
        "final_norm/scale": (32,),
        "final_norm/bias": (32,),
    }
    named = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    for shape, names in zip(jax.tree.leaves(shapes), named, strict=True):
        assert len(names) == len(shape.shape)
        assert set(names) <= set(MESH_AXES)
    # Every matrix can be split over the fsdp axis.
    for (path, leaf), names in zip(paths_and_leaves(model.params), named, strict=True):
        assert path.endswith(("bias", "scale")) or "embed" in names, (path, leaf.shape)


@pytest.mark.parametrize("tile", [1, 128])
@pytest.mark.parametrize("at_once", [6, 1 << 26])
@pytest.mark.parametrize("held", [jnp.float32, jnp.bfloat16])
def test_gradients_of_a_common_token_are_summed_in_float32(held, at_once, tile, monkeypatch):
    """999 ones; a bfloat16 stays at 256, since 257 is none. Columns differ."""
    monkeypatch.setattr(decoder_file, "_SUMMED_AT_ONCE", at_once)
    monkeypatch.setattr(decoder_file, "_TILE", tile)
    rows_BT = jnp.zeros((2, 500), jnp.int32).at[1, 3].set(2)

    def total(table_ND):
        x_BTD = look_up(table_ND, rows_BT, axis="vocab", dtype=jnp.bfloat16)
        return jnp.sum(x_BTD.astype(jnp.float32) * jnp.arange(4.0)[None, None])

    grads_ND = jax.jit(jax.grad(total))(jnp.ones((3, 4), held))
    assert grads_ND.dtype == held
    expected_ND = jnp.array([[999.0], [0.0], [1.0]]) * jnp.arange(4.0)[None]
    np.testing.assert_array_equal(grads_ND, expected_ND.astype(jnp.bfloat16).astype(held))


@pytest.mark.parametrize(("columns", "gets_all"), [(128, False), (64, True)])
def test_no_device_gets_the_whole_table(columns, gets_all):
    """Nor its whole gradient: eight devices exchange ids, and the columns of the rows found.

    Where a device has fewer than 128 columns it is the other way round.
    """
    mesh = make_mesh(data=1, fsdp=8, sequence=1, tensor=1)
    N, D, B, T = 4096, 8 * columns, 8, 16
    table = jax.ShapeDtypeStruct((N, D), jnp.float32, sharding=named_sharding(mesh, None, "embed"))
    rows_sharding = named_sharding(mesh, "batch", "tokens")
    rows = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=rows_sharding)

    def rows_and_grads(table_ND, rows_BT):
        x_BTD, backward = jax.vjp(
            lambda table_ND: look_up(table_ND, rows_BT, axis="vocab", dtype=jnp.float32), table_ND
        )
        return x_BTD, *backward(x_BTD)

    with jax.set_mesh(mesh):
        where = (named_sharding(mesh, "batch", "tokens", None), table.sharding)
        compiled = jax.jit(rows_and_grads, out_shardings=where).lower(table, rows).compile()
    largest = max(collective.num_bytes for collective in read_collectives(compiled.as_text()))
    assert largest == N * D * 4 if gets_all else largest <= B * T * D * 4


@pytest.mark.parametrize("num_layers_unfrozen", [0, 1])
def test_two_stacks_are_one_model(num_layers_unfrozen):
    whole = tiny_gpt2(scale_attn_by_inverse_layer_idx=True)
    placement = {"num_layers_unfrozen": num_layers_unfrozen}
    split = tiny_gpt2(scale_attn_by_inverse_layer_idx=True, placement=placement)
    num_frozen = 2 - num_layers_unfrozen
    layers = whole.params["layers"]
    params = {k: v for k, v in whole.params.items() if k != "layers"}
    params["frozen_layers"] = jax.tree.map(lambda x: x[:num_frozen], layers)
    if num_layers_unfrozen:
        params["layers"] = jax.tree.map(lambda x: x[num_frozen:], layers)
    assert jax.tree.structure(params) == jax.tree.structure(split.params)
    expected = hidden_states(whole.decoder, whole.params)
    np.testing.assert_allclose(hidden_states(split.decoder, params), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("remat", ["dots", "offload", "minimal", "full"])
def test_remat_changes_no_gradient(remat):
    model = tiny_gpt2()
    expected = gradients(model.decoder, model.params)
    got = gradients(with_numerics(model.decoder, remat=remat), model.params)
    for (path, ours), (_, theirs) in zip(
        paths_and_leaves(got), paths_and_leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5, err_msg=path)


def kept(decoder, params):
    """What the backward pass is given beside the parameters, traced alone and anew."""

    def residuals(params):
        _, backward = jax.vjp(functools.partial(hidden_states.__wrapped__, decoder), params)
        given = {id(leaf) for leaf in jax.tree.leaves(params)}
        return [leaf for leaf in jax.tree.leaves(backward) if id(leaf) not in given]

    return jax.make_jaxpr(residuals)(params).out_avals


@pytest.mark.parametrize(
    ("attention", "on_hopper"),
    [("xla", False), ("splash_interpreted", False), ("cudnn", False), ("cudnn", True)],
)
@pytest.mark.parametrize(
    ("remat", "num_kept", "num_on_host"), [("minimal", 2, 0), ("dots", 7, 0), ("offload", 7, 5)]
)
def test_remat_keeps_what_it_says_and_once(
    remat, num_kept, num_on_host, attention, on_hopper, monkeypatch
):
    """Attention's averages and logsumexps; of six products all but the last, which is added."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda least: on_hopper)
    model = tiny_gpt2()
    decoder = with_numerics(model.decoder, attention=attention, dtype=jnp.bfloat16)
    full, some = (
        kept(with_numerics(decoder, remat=name), model.params) for name in ("full", remat)
    )
    assert len(some) - len(full) == num_kept
    assert sum(x.memory_space == jax.memory.Space.Host for x in some) == num_on_host
    # One logsumexp a head and token, also where cuDNN makes a row of them for each example.
    row_len = TILE if attention.startswith("splash") else TOKENS.shape[1]
    logsumexps = len(TOKENS) * model.decoder.config.num_heads * row_len
    new = Counter((x.shape, x.dtype.name) for x in some)
    new -= Counter((x.shape, x.dtype.name) for x in full)
    sizes = [math.prod(shape[1:]) for shape, dtype in new if dtype == "float32"]
    assert sizes == [logsumexps]


def test_an_adapters_product_is_not_kept_beside_the_layers():
    """Only x·A is, which is as narrow as the rank."""
    plain = tiny_gpt2()
    adapted = tiny_gpt2(peft_config=dict(r=4, target_modules="all-linear"))
    counts = []
    for model in (plain, adapted):
        decoder = with_numerics(model.decoder, remat="dots")
        shapes = [x.shape for x in kept(decoder, model.params)]
        counts.append(Counter(shape[-1] for shape in shapes if len(shape) > 2))
    new = counts[1] - counts[0]
    assert new[4] >= 4 and not {32, 128} & set(new), new


def test_bfloat16_computes_in_bfloat16_near_float32():
    model = tiny_gpt2(placement={"dtype": "bfloat16"})
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {np.dtype("float32")}
    half = hidden_states(model.decoder, model.params)
    assert half.dtype == jnp.bfloat16
    full = hidden_states(with_numerics(model.decoder, dtype=jnp.float32), model.params)
    # bfloat16 rounds by 0.4%; a few dozen roundings on hidden states of about 1.
    np.testing.assert_allclose(np.float32(half), full, rtol=0, atol=0.1)


def test_dropout_draws_by_its_key():
    model = tiny_gpt2(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    decoder = model.training_decoder
    assert decoder.numerics.dropout
    one, same, other = (
        hidden_states(decoder, model.params, jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert not tiny_gpt2().training_decoder.numerics.dropout


def test_initialisation_honours_initializer_range():
    model = tiny_gpt2(n_layer=8)
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(model.decoder, jax.random.key(0)))
    # The standard deviation of n draws is known to 1 part in sqrt(2 n): here below 2%.
    for path, expected in {
        "embed/tokens": 0.2,
        "embed/positions": 0.2,
        "layers/attention/query/kernel": 0.2,
        "layers/mlp/up/kernel": 0.2,
        "layers/attention/out/kernel": 0.05,  # 0.2 / sqrt(2 · 8 layers)
        "layers/mlp/down/kernel": 0.05,
    }.items():
        leaf = dict(paths_and_leaves(params))[path]
        np.testing.assert_allclose(leaf.std(), expected, rtol=0.08, err_msg=path)
    layers = dict(paths_and_leaves(params))["layers/mlp/up/kernel"]
    assert (layers[0] != layers[1]).any(), "every layer has the same weights"
    for path, leaf in paths_and_leaves(params):
        if path.endswith(("bias", "scale")):
            np.testing.assert_array_equal(leaf, float(path.endswith("scale")), err_msg=path)


def test_logits_of_padding_are_minus_infinity():
    logits = jnp.zeros((2, 3, 5))
    assert mask_padding(logits, 5) is logits
    got = mask_padding(logits, 3)
    np.testing.assert_array_equal(got[0, 0], [0, 0, 0, -np.inf, -np.inf])


def test_a_cache_has_the_models_shape_and_the_given_dtype():
    cache = empty_cache(tiny_gpt2().decoder.config, 3, 10, jnp.bfloat16)
    assert cache.keys_LBSKC.shape == cache.values_LBSKC.shape == (2, 3, 10, 4, 8)
    assert cache.keys_LBSKC.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu", "silu", "tanh"])
def test_activations_are_torchs(name):
    torch = pytest.importorskip("torch")
    theirs = {
        "gelu": torch.nn.functional.gelu,
        "gelu_new": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
    }
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    got = ACTIVATIONS[name](x)
    np.testing.assert_allclose(got, theirs[name](torch.tensor(x)).numpy(), rtol=0, atol=2e-6)
