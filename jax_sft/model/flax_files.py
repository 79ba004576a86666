"""Old Flax checkpoints, read as if they were what `transformers` writes today.

In comes a folder with `flax_model.msgpack`, or shards and their index, as the Flax classes of
`transformers` 4 wrote them; out comes what `WeightFiles` gives: PyTorch's names, shapes and
slices. Of the files only where each tensor lies is kept, so that slices come from the disk and
the host needs no more memory than for safetensors. (`flax.serialization` would hold a whole file,
twice.) MessagePack holds numbers and strings alone; nothing in it can run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jax_sft.model.weight_files import (
    FLOATS,
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    TensorSpec,
    WeightFiles,
    find_files,
)

FLAX_FILE = "flax_model.msgpack"
FLAX_INDEX_FILE = "flax_model.msgpack.index.json"
# What flax.linen calls a parameter, and what torch.nn calls it.
_LAST_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_CHUNKED = "__msgpack_chunked_array__"


def open_weights(folder: Path) -> "WeightFiles | FlaxFiles":
    """Opens a folder's weights: safetensors, or else an old Flax checkpoint.

    Raises:
        ValueError: neither is there, or a file is missing or damaged.
    """
    has_safetensors = any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    if not has_safetensors and any((folder / n).is_file() for n in (FLAX_FILE, FLAX_INDEX_FILE)):
        return FlaxFiles(MsgpackFiles(folder))
    files = WeightFiles(folder)
    return FlaxFiles(files) if files.format == "flax" else files


class MsgpackFiles:
    """The tensors in a folder's Flax files, open for reading slices.

    Attributes:
        folder: where they are.
        specs: shape and dtype of each tensor by its slash-joined path in Flax's tree.
    """

    def __init__(self, folder: Path) -> None:
        """Finds every tensor in every file.

        Raises:
            ValueError: a missing shard or a damaged file.
        """
        self.folder = folder
        self._tensors: dict[str, StoredTensor] = {}
        for path in find_files(folder, FLAX_FILE, FLAX_INDEX_FILE):
            self._tensors |= _find_tensors(path)
        self.specs = {name: tensor.spec for name, tensor in self._tensors.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor, in its own dtype; `index` has a slice for every axis."""
        return self._tensors[name].read(index)


class FlaxFiles:
    """Files of the names and layouts of Flax, under the names and in the layouts of PyTorch.

        transformer/h/0/attn/c_attn/kernel  [3·D, D]   transformer.h.0.attn.c_attn.weight  [D, 3·D]
        transformer/h/0/ln_1/scale          [D]        transformer.h.0.ln_1.weight         [D]
        transformer/wte/embedding           [V, D]     transformer.wte.weight              [V, D]

    A kernel is turned around, whatever it is in PyTorch: Flax stores [in, out] where
    `torch.nn.Linear` has [out, in], and [out, in] where GPT-2's `Conv1D` has [in, out].

    Attributes:
        folder: where they are.
        specs: shape and dtype of each tensor by its name in PyTorch.
    """

    def __init__(self, files: "MsgpackFiles | WeightFiles") -> None:
        """Renames what the files hold; safetensors join the parts of a name by dots."""
        self.folder = files.folder
        self.specs: dict[str, TensorSpec] = {}
        self._files = files
        self._names: dict[str, str] = {}
        self._turned: set[str] = set()
        for theirs, spec in files.specs.items():
            *parts, last = theirs.replace("/", ".").split(".")
            name = ".".join([*parts, _LAST_NAMES.get(last, last)])
            if last == "kernel":
                spec = spec._replace(shape=spec.shape[::-1])
                self._turned.add(name)
            self.specs[name], self._names[name] = spec, theirs

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor, in its own dtype; `index` has a slice for every axis."""
        if name in self._turned:
            return self._files.read(self._names[name], index[::-1]).T
        return self._files.read(self._names[name], index)


class _Array(NamedTuple):
    """An array in a file; `place` is its first byte and the number of its bytes."""

    shape: list[int]
    dtype: str
    place: tuple[int, int]


def _find_tensors(path: Path) -> dict[str, StoredTensor]:
    try:
        with path.open("rb") as file:
            tree = _read_value(file)
            if not isinstance(tree, dict) or file.tell() != path.stat().st_size:
                raise ValueError("it ends too early or too late")
        return dict(_tensors_in(tree, path, ""))
    except (LookupError, ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is no whole Flax checkpoint; copy or download it again") from None


def _tensors_in(tree: dict, path: Path, above: str) -> Iterator[tuple[str, StoredTensor]]:
    """Yields all tensors of a tree of dicts, each with its slash-joined name."""
    for key, value in tree.items():
        name = above + key
        if isinstance(value, _Array):
            yield name, _tensor(path, value.shape, [value])
        elif _CHUNKED in value:  # so flax.serialization splits what is above 1 GiB
            shape, chunks = (
                [value[part][str(i)] for i in range(len(value[part]))]
                for part in ("shape", "chunks")
            )
            yield name, _tensor(path, shape, chunks)
        else:
            yield from _tensors_in(value, path, f"{name}/")


def _tensor(path: Path, shape: list[int], chunks: list[_Array]) -> StoredTensor:
    spec = TensorSpec(tuple(shape), chunks[0].dtype)
    if spec.dtype in FLOATS and spec.num_bytes != sum(chunk.place[1] for chunk in chunks):
        raise ValueError("a tensor has not the bytes that its shape and dtype take")
    return StoredTensor(spec, path, tuple(chunk.place for chunk in chunks))


# The first byte of a value says what it is and, alone or with bytes that follow, its length:
# https://github.com/msgpack/msgpack/blob/master/spec.md, "Formats".
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_LENGTHS = {
    **{0xC4 + i: ("bytes", 2**i) for i in range(3)},
    **{0xC7 + i: ("extension", 2**i) for i in range(3)},
    **{0xCC + i: ("integer", 2**i) for i in range(4)},
    **{0xD9 + i: ("string", 2**i) for i in range(3)},
    **{0xDC + i: ("list", 2 << i) for i in range(2)},
    **{0xDE + i: ("dict", 2 << i) for i in range(2)},
}


def _read_value(file: BinaryIO) -> Any:
    """Reads one value of MessagePack, and of bytes only (first, number) where they are."""
    code = file.read(1)[0]
    if code < 0x80:
        return code
    if code in _CONSTANTS:
        return _CONSTANTS[code]
    if code < 0xC0:
        kind = "dict" if code < 0x90 else "list" if code < 0xA0 else "string"
        size = code & (0x1F if kind == "string" else 0x0F)
    elif 0xD4 <= code <= 0xD8:
        kind, size = "extension", 1 << (code - 0xD4)
    else:
        kind, num_bytes = _LENGTHS[code]
        size = int.from_bytes(file.read(num_bytes), "big")
    match kind:
        case "integer":
            return size
        case "string":
            return file.read(size).decode()
        case "bytes":
            start = file.tell()
            file.seek(size, 1)
            return start, size
        case "list":
            return [_read_value(file) for _ in range(size)]
        case "dict":
            return {_read_value(file): _read_value(file) for _ in range(size)}
        case "extension":
            return _read_array(file)


def _read_array(file: BinaryIO) -> _Array:
    """Reads flax's own kind of value: its number, then (shape, dtype, bytes)."""
    file.read(1)
    return _Array(*_read_value(file))
