"""Old Flax checkpoints: files that transformers' Flax classes wrote, with their own logits."""

import functools
import json
import shutil
from pathlib import Path

import flax.serialization
import flax.traverse_util
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import one_device

from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.flax_files import FlaxFiles, MsgpackFiles, open_weights
from jax_sft.model.placement import Placement
from jax_sft.model.weight_files import WeightFiles

FLAX = Path(__file__).parent / "flax"  # see scripts/make_flax_golden.py
TOKENS_BT = np.array([[3, 7, 2, 9, 10, 4, 5, 5, 1]], np.int32)
FILE, INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"


@functools.cache
def gpt2_tree() -> dict:
    """Flax's own reading, by slash-joined names."""
    tree = flax.serialization.msgpack_restore((FLAX / "gpt2" / FILE).read_bytes())
    return flax.traverse_util.flatten_dict(tree, sep="/")


def write(path: Path, tensors: dict) -> None:
    """Writes as the Flax classes did."""
    tree = flax.traverse_util.unflatten_dict(tensors, sep="/")
    path.write_bytes(flax.serialization.msgpack_serialize(tree))


def whole(spec):
    return tuple(slice(0, size) for size in spec.shape)


def assert_reads(files, tensors, *, num_blocks=10) -> None:
    """Compares all of every tensor, and blocks of it."""
    assert {name: (spec.shape, spec.dtype) for name, spec in files.specs.items()} == {
        name: (values.shape, values.dtype.name) for name, values in tensors.items()
    }
    rng = np.random.default_rng(0)
    for name, values in tensors.items():
        np.testing.assert_array_equal(files.read(name, whole(values)), values, strict=True)
        for _ in range(num_blocks):
            starts = [int(rng.integers(size)) for size in values.shape]
            index = tuple(
                slice(start, int(rng.integers(start, size)) + 1)
                for start, size in zip(starts, values.shape, strict=True)
            )
            np.testing.assert_array_equal(files.read(name, index), values[index], strict=True)


@pytest.mark.parametrize("name", sorted(path.name for path in FLAX.iterdir()))
def test_every_class_loads_with_its_own_logits(name):
    model = CausalLM.from_pretrained(FLAX / name, placement=Placement(mesh=one_device()))
    expected = np.load(FLAX / name / "logits.npy")
    # Two layers of float32, summed in another order.
    error = np.abs(np.asarray(model(TOKENS_BT)) - expected).max()
    assert error < 1e-5 * np.abs(expected).max()


def test_any_slice_is_what_flax_reads():
    assert_reads(MsgpackFiles(FLAX / "gpt2"), gpt2_tree())


def test_kernels_are_turned_around_and_names_are_those_of_pytorch():
    tensors = {
        "transformer/h/0/attn/c_attn/kernel": "transformer.h.0.attn.c_attn.weight",
        "transformer/h/1/ln_1/scale": "transformer.h.1.ln_1.weight",
        "transformer/h/1/ln_1/bias": "transformer.h.1.ln_1.bias",
        "transformer/wte/embedding": "transformer.wte.weight",
    }
    files = open_weights(FLAX / "gpt2")
    assert len(files.specs) == len(gpt2_tree())
    renamed = {
        name: gpt2_tree()[theirs].T if "kernel" in theirs else gpt2_tree()[theirs]
        for theirs, name in tensors.items()
    }
    files.specs = {name: files.specs[name] for name in renamed}
    assert_reads(files, renamed)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_other_dtypes(tmp_path, dtype):
    tensors = {name: values.astype(dtype) for name, values in gpt2_tree().items()}
    write(tmp_path / FILE, tensors)
    assert_reads(MsgpackFiles(tmp_path), tensors)


def test_arrays_in_chunks_that_end_within_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 52)  # 13 of 8 x 24 numbers
    write(tmp_path / FILE, gpt2_tree())
    assert b"__msgpack_chunked_array__" in (tmp_path / FILE).read_bytes()
    assert_reads(MsgpackFiles(tmp_path), gpt2_tree())


def write_shards(folder: Path) -> None:
    names, weight_map = sorted(gpt2_tree()), {}
    for number in (1, 2, 3):
        file, part = f"flax_model-{number:05}-of-00003.msgpack", names[number - 1 :: 3]
        write(folder / file, {name: gpt2_tree()[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(tmp_path):
    write_shards(tmp_path)
    assert_reads(MsgpackFiles(tmp_path), gpt2_tree())
    (tmp_path / "flax_model-00002-of-00003.msgpack").unlink()
    with pytest.raises(ValueError, match="names flax_model-00002.*, which the folder lacks"):
        open_weights(tmp_path)


def test_safetensors_come_first(tmp_path):
    shutil.copytree(FLAX / "gpt2", tmp_path, dirs_exist_ok=True)
    ones = {"transformer.wte.weight": np.ones((2, 3), np.float32)}
    save_file(ones, tmp_path / "model.safetensors", metadata={"format": "pt"})
    files = open_weights(tmp_path)
    assert isinstance(files, WeightFiles)
    assert_reads(files, ones)


def test_safetensors_that_flax_wrote(tmp_path):
    dotted = {name.replace("/", "."): values for name, values in gpt2_tree().items()}
    save_file(dotted, tmp_path / "model.safetensors", metadata={"format": "flax"})
    files, expected = open_weights(tmp_path), open_weights(FLAX / "gpt2")
    assert isinstance(files, FlaxFiles)
    assert_reads(files, {name: expected.read(name, whole(s)) for name, s in expected.specs.items()})


def test_what_is_loaded_is_saved_as_safetensors_bit_for_bit(tmp_path):
    placement = Placement(mesh=one_device())
    CausalLM.from_pretrained(FLAX / "gptj", placement=placement).save_pretrained(tmp_path)
    saved, source = open_weights(tmp_path), open_weights(FLAX / "gptj")
    assert isinstance(saved, WeightFiles)
    assert_reads(saved, {name: source.read(name, whole(s)) for name, s in source.specs.items()})


CONTENT = (FLAX / "gpt2" / FILE).read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        *(CONTENT[:size] for size in (0, 1, 15, 40, 50, 100, 2000, len(CONTENT) - 1)),
        CONTENT + b"\0",
        CONTENT.replace(b"float32", b"float16"),
        b"\xc1" + CONTENT[1:],
        b"\x93\x01\x02\x03",
        b"\x81\x01\x02",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 497764120\n",
    ],
)
def test_damaged_files(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError, match="flax_model.msgpack is no whole Flax checkpoint"):
        open_weights(tmp_path)
