"""The safetensors files of a folder: names to slices on the way in, names to files out.

In comes a folder with `model.safetensors`, or shards and their index; out comes any slice of
any tensor, read from the disk without the rest. The other way, tensors come one by one and
are appended to their file, so that no more than one is held. Files are read, not mapped: what
has been touched of a mapped file counts as the process's memory. Knows no model and no device.
"""

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_UNFINISHED = ".unfinished"
# Of part of its columns, a row that is shorter is read whole, with its neighbours.
_ROW_BYTES = 16 << 10
_BUFFER_BYTES = 8 << 20
# Columns of a matrix that are turned around at once: what is read and written of them stays in
# the processor's cache, which makes it three to five times as fast.
_STRIP = 64
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# The dtypes of floating-point weights, by the names in the file's header.
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype.name: code for code, dtype in _DTYPES.items()}
FLOATS = tuple(_CODES)


class TensorSpec(NamedTuple):
    """A tensor's shape and dtype; the dtype is a name such as "bfloat16"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements in the file."""
        return math.prod(self.shape) * _DTYPES[_CODES[self.dtype]].itemsize


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, its numbers in C order, in one piece or in several.

    Attributes:
        spec: its shape and dtype.
        path: of the file.
        pieces: first byte and number of bytes of each, in order.
    """

    spec: TensorSpec
    path: Path
    pieces: tuple[tuple[int, int], ...]

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part; `index` has a slice for every axis, with start and stop."""
        shape = [axis.stop - axis.start for axis in index]
        block = np.empty(shape, _DTYPES[_CODES[self.spec.dtype]])
        with self.path.open("rb", buffering=0) as file:
            self._read_into(block, file, 0, self.spec.shape, index)
        return block

    def _read_into(
        self,
        block: np.ndarray,
        file: BinaryIO,
        first: int,
        shape: tuple[int, ...],
        index: tuple[slice, ...],
    ) -> None:
        """Fills a block with a part of the [shape] that begins at byte `first` of the tensor."""
        rows, columns = index[0], index[1:]
        row_bytes = math.prod(shape[1:]) * block.itemsize
        first += rows.start * row_bytes
        if columns == tuple(slice(0, size) for size in shape[1:]):
            self._fill(block, file, first)
        elif row_bytes > _ROW_BYTES:
            for row, target in enumerate(block):
                self._read_into(target, file, first + row * row_bytes, shape[1:], columns)
        else:
            step = _BUFFER_BYTES // row_bytes
            for row in range(0, len(block), step):
                part = block[row : row + step]
                whole_rows = np.empty((len(part), *shape[1:]), block.dtype)
                self._fill(whole_rows, file, first + row * row_bytes)
                part[...] = whole_rows[(slice(None), *columns)]

    def _fill(self, block: np.ndarray, file: BinaryIO, first: int) -> None:
        """Fills a contiguous block with the tensor's bytes from `first` on."""
        target = memoryview(block.reshape(-1).view(np.uint8))
        for start, num_bytes in self.pieces:
            if first < num_bytes:
                size = min(num_bytes - first, len(target))
                _read_bytes(target[:size], file, start + first)
                target = target[size:]
            first = max(0, first - num_bytes)


def _read_bytes(target: memoryview, file: BinaryIO, start: int) -> None:
    file.seek(start)
    while target:
        num_bytes = file.readinto(target)  # of more than 2 GiB, the system gives less
        if not num_bytes:
            raise ValueError(f"{file.name} was cut while it was read; copy or download it again")
        target = target[num_bytes:]


class WeightFiles:
    """The tensors in a folder's safetensors files, open for reading slices.

    Attributes:
        folder: where they are.
        specs: shape and dtype of each tensor by its name; a dtype that is no floating-point
            type keeps the name it has in the file.
        format: what the files say that wrote them, such as "pt" or "flax"; None if nothing.
    """

    def __init__(self, folder: Path) -> None:
        """Opens every file and reads its header.

        Raises:
            ValueError: no safetensors weights, a missing shard, or a damaged file.
        """
        self.folder = folder
        self.specs: dict[str, TensorSpec] = {}
        self.format: str | None = None
        self._tensors: dict[str, StoredTensor] = {}
        for path in find_files(folder, SINGLE_FILE, INDEX_FILE):
            header, start = _read_header(path)
            self.format = header.pop("__metadata__", {}).get("format", self.format)
            for name, entry in header.items():
                first, stop = entry["data_offsets"]
                code = entry["dtype"]
                dtype = _DTYPES[code].name if code in _DTYPES else code
                self.specs[name] = TensorSpec(tuple(entry["shape"]), dtype)
                pieces = ((start + first, stop - first),)
                self._tensors[name] = StoredTensor(self.specs[name], path, pieces)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor, in its own dtype; `index` has a slice for every axis."""
        return self._tensors[name].read(index)


def contiguous(tensor: np.ndarray) -> np.ndarray:
    """Returns a tensor with its numbers in C order; a copy only where they are in another."""
    if tensor.flags.c_contiguous:
        return tensor
    copy = np.empty(tensor.shape, tensor.dtype)
    for first in range(0, tensor.shape[-1], _STRIP):
        copy[..., first : first + _STRIP] = tensor[..., first : first + _STRIP]
    return copy


def as_bytes(tensor: np.ndarray) -> np.ndarray:
    """Returns a tensor's bytes in C order; bfloat16 has no buffer of its own."""
    return contiguous(tensor).reshape(-1).view(np.uint8)


def write_weights(
    folder: Path,
    specs: dict[str, TensorSpec],
    tensors: Iterator[np.ndarray],
    *,
    max_shard_bytes: int,
) -> None:
    """Writes tensors as `transformers` names its files, in the place of the folder's weights.

    The files are written aside and moved in when all are whole: until then the old weights
    stay, and old and new are never mixed. The folder's other files stay as they are.

    Args:
        folder: made where it is missing.
        specs: every tensor by name, in the order that `tensors` come in.
        tensors: the tensors, one at a time.
        max_shard_bytes: bytes of tensors in one file; a larger tensor has a file of its own.

    Raises:
        ValueError: the folder cannot be written.
    """
    draft = folder / _UNFINISHED
    shards = _plan_shards(specs, max_shard_bytes)
    existed = folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)  # what a killed process left
        draft.mkdir()
    except OSError as error:
        raise ValueError(
            f"folder {folder} cannot be written ({error.strerror}); save to one that can"
        ) from None
    try:
        for file_name, names in shards.items():
            _write_file(draft / file_name, {name: specs[name] for name in names}, tensors)
        if len(shards) > 1:
            (draft / INDEX_FILE).write_text(_index(specs, shards))
        _move_in(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def find_files(folder: Path, single: str, index: str) -> list[Path]:
    """Returns a folder's files of weights.

    Args:
        folder: the folder.
        single: name of the file where there is one.
        index: name of the JSON file that names the files where there are several.

    Raises:
        ValueError: neither is there, the index is damaged, or a file that it names is missing.
    """
    if (folder / single).is_file():
        return [folder / single]
    if not (folder / index).is_file():
        raise ValueError(f"model folder {folder} {_what_it_has(folder)}")
    try:
        names = set(json.loads((folder / index).read_bytes())["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(
            f"{folder / index} is no index of weights; copy or download it again"
        ) from None
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ValueError(
            f"{folder / index} names {', '.join(missing)}, which the folder lacks; copy or download"
            " the missing files"
        )
    return [folder / name for name in sorted(names)]


def _what_it_has(folder: Path) -> str:
    """Says what is in the place of weights that are read, and the remedy."""

    def found(*patterns: str) -> str:
        return next(
            (path.name for pattern in patterns for path in sorted(folder.glob(pattern))), ""
        )

    def convert(options: str = "") -> str:
        return (
            'python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('
            f'{str(folder)!r}{options}).save_pretrained({str(folder)!r})"'
        )

    if name := found("pytorch_model*.bin"):
        return (
            f"has its weights only as {name}, which is not read (a pickle runs code); convert it"
            f" where torch is installed: {convert()}"
        )
    if name := found("*.gguf"):
        return (
            f"has its weights only as {name}, which is not read; convert it where torch and gguf"
            f" are installed: {convert(f', gguf_file={name!r}')}"
        )
    if name := found("tf_model*.h5"):
        return (
            f"has its weights only as {name}, which is not read; convert it where transformers 4,"
            f" torch and tensorflow are installed: {convert(', from_tf=True')}"
        )
    if name := found("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5"):
        return (
            f"has no {SINGLE_FILE}, only {name}, whose layout is its writer's own; convert it to a"
            " folder that transformers' save_pretrained wrote, with the writer's own script"
        )
    if name := found("adapter_config.json"):
        return f"holds an adapter ({name}) and no model; pass the folder of its base model"
    return (
        f"has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}; pass a folder that has, or train"
        ' from random weights with model.init="random"'
    )


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns what stands in front of the tensors (see `_write_file`), and where they begin."""
    try:
        with safe_open(path, framework="numpy"):  # holds the header against the file's size
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}); copy or download it again"
        ) from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def _plan_shards(specs: dict[str, TensorSpec], max_shard_bytes: int) -> dict[str, list[str]]:
    shards, room = [], 0
    for name, spec in specs.items():
        if not shards or spec.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= spec.num_bytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": names
        for number, names in enumerate(shards, 1)
    }


def _write_file(path: Path, specs: dict[str, TensorSpec], tensors: Iterator[np.ndarray]) -> None:
    """Writes one file: the header's length in 8 bytes, the header, then the tensors.

    https://huggingface.co/docs/safetensors, "Format". The library's own writer takes whole
    files at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.num_bytes
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            tensor = next(tensors)
            assert (tensor.shape, tensor.dtype.name) == (spec.shape, spec.dtype), name
            step = max(1, _BUFFER_BYTES * len(tensor) // max(1, tensor.nbytes))
            for first in range(0, len(tensor), step):
                file.write(as_bytes(tensor[first : first + step]).data)


def _index(specs: dict[str, TensorSpec], shards: dict[str, list[str]]) -> str:
    weight_map = {name: file_name for file_name, names in shards.items() for name in names}
    metadata = {
        "total_parameters": sum(math.prod(spec.shape) for spec in specs.values()),
        "total_size": sum(spec.num_bytes for spec in specs.values()),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def _move_in(draft: Path, folder: Path) -> None:
    """Moves whole files into place; killed on the way, the folder has one set or none."""
    new = sorted(path.name for path in draft.iterdir())
    old = [path for path in folder.glob("model*.safetensors") if _SHARD.fullmatch(path.name)]
    if new != [SINGLE_FILE]:
        # Readers take a single file before an index, and an index as it is.
        (folder / INDEX_FILE).unlink(missing_ok=True)
        (folder / SINGLE_FILE).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name == INDEX_FILE):
        os.replace(draft / name, folder / name)
    if new == [SINGLE_FILE]:
        (folder / INDEX_FILE).unlink(missing_ok=True)
    for path in old:
        if path.name not in new:
            path.unlink()
