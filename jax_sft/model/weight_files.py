"""The safetensors files of a folder: names to slices on the way in, names to files out.

In comes a folder with `model.safetensors`, or shards and their index; out comes any slice of
any tensor, read from the disk without the rest. The other way, tensors come one by one and
are appended to their file, so that no more than one is held. Knows no model and no device.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_UNFINISHED = ".unfinished"
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


class WeightFiles:
    """The tensors in a folder's safetensors files, open for reading slices.

    Attributes:
        folder: where they are.
        specs: shape and dtype of each tensor by its name; a dtype that is no floating-point
            type keeps the name it has in the file.
    """

    def __init__(self, folder: Path) -> None:
        """Opens every file and reads its header.

        Raises:
            ValueError: no safetensors weights, a missing shard, or a damaged file.
        """
        self.folder = folder
        self.specs: dict[str, TensorSpec] = {}
        self._files = {}
        for path in _weight_paths(folder):
            try:
                file = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path} is no whole safetensors file ({error}); copy or download it again"
                ) from None
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_slice(name)
                code = tensor.get_dtype()
                dtype = _DTYPES[code].name if code in _DTYPES else code
                self.specs[name] = TensorSpec(tuple(tensor.get_shape()), dtype)
                self._files[name] = file

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor, in its own dtype; `index` has a slice for every axis."""
        return self._files[name].get_slice(name)[index]


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


def _weight_paths(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        try:
            names = set(json.loads((folder / INDEX_FILE).read_bytes())["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(
                f"{folder / INDEX_FILE} is no index of weights; copy or download it again"
            ) from None
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise ValueError(
                f"{folder / INDEX_FILE} names {', '.join(missing)}, which the folder lacks; copy"
                " or download the missing files"
            )
        return [folder / name for name in sorted(names)]
    if any(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"model folder {folder} has its weights only as pytorch_model.bin, which is not read"
            ' (pickle runs code); convert it where torch is installed: python -c "from'
            " transformers import AutoModelForCausalLM as M;"
            f" M.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    raise ValueError(
        f"model folder {folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}; pass a"
        ' folder that has, or train from random weights with model.init="random"'
    )


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
            # Its bytes, without a copy: bfloat16 has no buffer of its own.
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


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
