"""Law 5. In = out: what is loaded is saved bit for bit, and a trained export loads the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.placement import Placement
from jax_sft.sharding import make_mesh

FIELDS = dict(
    model_type="gpt2",
    vocab_size=13,
    n_positions=8,
    n_embd=8,
    n_layer=2,
    n_head=2,
    bos_token_id=0,
    eos_token_id=0,
    initializer_range=0.2,
)
TOKENS_BT = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)


def place(num_layers_unfrozen=-1, **sizes):
    mesh = make_mesh(**({"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1} | sizes))
    return Placement(mesh=mesh, dtype="float32", num_layers_unfrozen=num_layers_unfrozen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 of random numbers, with a buffer that older versions of transformers wrote."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = CausalLM.open(None, fields=FIELDS, placement=place())
    model.init(seed=0)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(x.shape, np.float32) for name, x in tensors.items()}
    tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "where", [{}, {"fsdp": 4, "tensor": 2, "data": 1, "num_layers_unfrozen": 1}], ids=str
)
def test_loaded_then_saved_is_bit_identical(folder, tmp_path, dtype, where):
    source = {
        name: values.astype(dtype)
        for name, values in load_file(folder / "model.safetensors").items()
    }
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_file(source, tmp_path / "model.safetensors", metadata={"format": "pt"})
    CausalLM.from_pretrained(tmp_path, placement=place(**where)).save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    del source["transformer.h.0.attn.bias"]
    assert set(saved) == set(source)
    for name, values in source.items():
        assert (saved[name].dtype, saved[name].shape) == (values.dtype, values.shape)
        assert saved[name].tobytes() == values.tobytes(), name


def trained(folder):
    """A model whose parameters have moved, on a mesh that pads the vocabulary."""
    model = CausalLM.from_pretrained(folder, placement=place(data=2, fsdp=2, tensor=2))
    rng = np.random.default_rng(1)
    noise = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape), model.params)
    model.params = jax.tree.map(
        lambda x, dx: jax.device_put(x + dx.astype(x.dtype), x.sharding), model.params, noise
    )
    return model


def test_a_trained_export_reloads_to_the_same_logits(folder, tmp_path):
    model = trained(folder)
    model.save_pretrained(tmp_path)
    # The same arithmetic on the same mesh: equal to the last bit.
    same_mesh = CausalLM.from_pretrained(tmp_path, placement=place(data=2, fsdp=2, tensor=2))
    np.testing.assert_array_equal(same_mesh(TOKENS_BT), model(TOKENS_BT))


def test_a_trained_export_loads_in_transformers(folder, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = trained(folder)
    model.save_pretrained(tmp_path)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits_BTV = theirs.eval()(torch.from_numpy(TOKENS_BT).long()).logits.numpy()
    # float32 sums of 8 to 32 terms in another order.
    np.testing.assert_allclose(jnp.asarray(model(TOKENS_BT)), logits_BTV, rtol=1e-4, atol=1e-4)
