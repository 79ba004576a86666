"""The name table read for a family that GPT-2 is not: transposed, with fewer key/value heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_sft.model import pretrained
from jax_sft.model.families.gpt2 import FAMILY
from jax_sft.model.name_table import BlockReader, _merge, find_kinds, find_names
from jax_sft.model.types import DecoderConfig, Layer, Norm, Tensor
from jax_sft.model.weight_files import WeightFiles

L, D, H, K, C = 2, 6, 4, 2, 3
CONFIG = DecoderConfig(
    layers=(Layer(),) * L,
    width=D,
    num_heads=H,
    num_kv_heads=K,
    head_width=C,
    mlp_width=1,
    vocab_size=5,
    num_positions=1,
    activation="relu",
    norm=Norm("rms", 1e-5),
    attention_scale=1.0,
    tied_head=True,
    init_std=1.0,
    residual_init_std=1.0,
)
QKV = tuple(f"layers/attention/{name}/kernel" for name in ("query", "key", "value"))
TENSORS = (
    Tensor("embed", ("embed/tokens",), vocabulary=True),
    Tensor("h.{layer}.qkv", QKV, transpose=True),
    Tensor("h.{layer}.out", ("layers/attention/out/kernel",), transpose=True),
)
SHAPES = {
    "embed/tokens": (8, D),
    QKV[0]: (L, D, H, C),
    QKV[1]: (L, D, K, C),
    QKV[2]: (L, D, K, C),
    "layers/attention/out/kernel": (L, H, C, D),
}


@pytest.fixture
def family():
    return dataclasses.replace(FAMILY, tensors=lambda config: TENSORS, prefix="", buffers=())


@pytest.fixture
def theirs():
    """[out, in], as torch.nn.Linear has it; query, key and value one below the other."""
    rng = np.random.default_rng(0)
    tensors = {"embed": rng.standard_normal((5, D), np.float32)}
    for layer in range(L):
        tensors[f"h.{layer}.qkv"] = rng.standard_normal(((H + 2 * K) * C, D), np.float32)
        tensors[f"h.{layer}.out"] = rng.standard_normal((D, H * C), np.float32)
    return tensors


def by_hand(theirs):
    qkv = [np.split(theirs[f"h.{layer}.qkv"], [H * C, (H + K) * C]) for layer in range(L)]
    ours = {
        path: np.stack([layer[i].T.reshape(D, -1, C) for layer in qkv])
        for i, path in enumerate(QKV)
    }
    outs = [theirs[f"h.{layer}.out"].T.reshape(H, C, D) for layer in range(L)]
    padded = np.concatenate([theirs["embed"], np.zeros((3, D), np.float32)])
    return ours | {"layers/attention/out/kernel": np.stack(outs), "embed/tokens": padded}


def test_merged_axes():
    merged, axes, index = _merge((slice(1, 3), slice(0, 2)), (4, 8))
    assert (merged, axes) == (slice(8, 24), (2, 8))
    whole = np.arange(32)
    block = whole.reshape(4, 8)[1:3, 0:2]
    np.testing.assert_array_equal(whole[merged].reshape(axes)[index], block)


@pytest.mark.parametrize("path", SHAPES)
def test_any_block_of_any_parameter(tmp_path, family, theirs, path):
    save_file(theirs, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    leaves = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in SHAPES.items()}
    kinds = find_kinds(family, CONFIG, leaves)
    names = find_names(files, kinds, family, CONFIG)
    kind, part = next(
        (kind, part) for kind in kinds for part in kind.parts if part.stacks == ((path, 0),)
    )
    reader = BlockReader(files, names, kind, part, 0, np.dtype(np.float32))
    expected = by_hand(theirs)[path]
    assert expected.shape == SHAPES[path]
    rng = np.random.default_rng(1)
    for _ in range(20):
        starts = [int(rng.integers(size)) for size in expected.shape]
        index = tuple(
            slice(start, int(rng.integers(start, size)) + 1)
            for start, size in zip(starts, expected.shape, strict=True)
        )
        np.testing.assert_array_equal(reader(index), expected[index], strict=True)


def test_transposed_and_split_tensors_come_back(tmp_path, family, theirs):
    params = {}
    for path, values in by_hand(theirs).items():
        *folders, name = path.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = jnp.asarray(values)
    pretrained.save_params(tmp_path, family, config=CONFIG, params=params, source_dtypes={})
    written = load_file(tmp_path / "model.safetensors")
    assert set(written) == set(theirs)
    for name, values in theirs.items():
        np.testing.assert_array_equal(written[name], values, strict=True)
