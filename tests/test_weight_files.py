"""Slices of files read piece by piece, and what is said of a folder without weights."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jax_sft.model import weight_files
from jax_sft.model.weight_files import (
    StoredTensor,
    TensorSpec,
    WeightFiles,
    as_bytes,
    contiguous,
)


@st.composite
def blocks(draw):
    """A shape, and a slice of every axis."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    bounds = [sorted(draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)))) for n in shape]
    return shape, tuple(slice(start, max(stop, start + 1)) for start, stop in bounds)


@pytest.mark.parametrize("row_bytes", [0, 40, 160])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_slice_of_a_tensor_in_any_pieces(tmp_path_factory, row_bytes, data):
    shape, index = data.draw(blocks())
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    content = values.tobytes()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(content) - 1)), max_size=4)))
    bounds = [0, *(cut for cut in cuts if cut < len(content)), len(content)]
    path = tmp_path_factory.getbasetemp() / "pieces"
    pieces, written = [], b""
    for first, stop in zip(bounds, bounds[1:], strict=False):
        written += b"between"
        pieces.append((len(written), stop - first))
        written += content[first:stop]
    path.write_bytes(written)
    tensor = StoredTensor(TensorSpec(shape, "float32"), path, tuple(pieces))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_files, "_ROW_BYTES", row_bytes)
        patch.setattr(weight_files, "_BUFFER_BYTES", 160)
        np.testing.assert_array_equal(tensor.read(index), values[index], strict=True)


def test_of_long_rows_only_the_columns_asked_for_are_read(tmp_path, monkeypatch):
    values = np.arange(12 * 8192, dtype=np.float32).reshape(12, 8192)
    save_file({"a": values}, tmp_path / "model.safetensors")
    files, sizes = WeightFiles(tmp_path), []
    read = weight_files._read_bytes

    def count(target, file, start):
        sizes.append(len(target))
        read(target, file, start)

    monkeypatch.setattr(weight_files, "_read_bytes", count)
    block = files.read("a", (slice(2, 9), slice(4096, 5120)))
    np.testing.assert_array_equal(block, values[2:9, 4096:5120])
    assert sum(sizes) == block.nbytes


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((4, 4), np.float32)}, path)
    files = WeightFiles(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="model.safetensors was cut while it was read"):
        files.read("a", (slice(0, 4), slice(0, 4)))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["pytorch_model.bin"], ("pytorch_model.bin", "pickle", "M.from_pretrained('{}').save")),
        (
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "extra.pt"],
            ("only as pytorch_model-00001-of-00002.bin", "save_pretrained('{}')"),
        ),
        (["tf_model.h5"], ("tf_model.h5", "transformers 4", "from_tf=True")),
        (["m-Q4_K_M.gguf"], ("m-Q4_K_M.gguf", "gguf_file='m-Q4_K_M.gguf'")),
        (["consolidated.00.pth"], ("only consolidated.00.pth", "script")),
        (["model.ckpt"], ("only model.ckpt", "script")),
        (["weights.pt"], ("only weights.pt", "script")),
        (["weights.h5"], ("only weights.h5", "script")),
        (["adapter_config.json", "adapter_model.safetensors"], ("adapter", "base model")),
        ([], ("has no weights", 'model.init="random"')),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else None,
)
def test_what_is_said_of_a_folder_without_weights(tmp_path, names, words):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError) as caught:
        WeightFiles(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and "\n" not in message
    assert [word for word in words if word.format(tmp_path) not in message] == [], message


def test_the_format_is_that_of_the_writer(tmp_path):
    tensors = {"a": np.ones(3, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert WeightFiles(tmp_path).format is None
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "flax"})
    assert WeightFiles(tmp_path).format == "flax"
    header = json.dumps({"__metadata__": {}, "a": {"dtype": "I8", "shape": [2]}})
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header.encode()
    )
    with pytest.raises(ValueError, match="no whole safetensors"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize("shape", [(150,), (3, 200), (200, 3), (70, 2, 130)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_turned_tensors_are_copied_to_the_order_of_the_file(shape, dtype):
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    assert contiguous(values) is values
    turned = contiguous(values.T)
    assert turned.flags.c_contiguous
    np.testing.assert_array_equal(turned, values.T, strict=True)
    assert as_bytes(values.T).tobytes() == values.T.tobytes()
