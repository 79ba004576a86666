"""Tokenized data on disk: flat arrays, written block by block, mapped and not read.

What comes in are the Parts of one block of rows after another, what goes out are Examples
whose tokens stay on disk. A killed build leaves its finished blocks to go on from; a folder
is whole once its manifest is there, and what was damaged since then is found.

    folder/  inputs.npy  targets.npy  weights.npy    [tokens]
             offsets.npy  [N + 1]   rows.npy  [N]     see Examples, and Part.rows over all rows
             blocks.jsonl     a line for each finished block, while it is built
             manifest.json    instead of it in the end: the same, and what the rows are
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from jax_sft.data.tokenization import Part
from jax_sft.data.types import Counts

DTYPES = {
    "inputs": np.dtype("<i4"),
    "targets": np.dtype("<i4"),
    "weights": np.dtype("<f4"),
    "offsets": np.dtype("<i8"),
    "rows": np.dtype("<i8"),
}
_HEADER_BYTES = 128
# Bytes before the first block; the offsets begin with a zero.
_STARTS = {name: _HEADER_BYTES + 8 * (name == "offsets") for name in DTYPES}
_CHUNK_BYTES = 1 << 22
_BLOCKS, _MANIFEST = "blocks.jsonl", "manifest.json"


class TokenWriter:
    """Appends blocks to a folder's arrays, behind those that an earlier build finished there.

    Args:
        folder: made if missing; nobody else writes to it or maps it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.blocks = _intact_blocks(folder)
        (folder / _BLOCKS).write_text("".join(map(_line, self.blocks)))
        self._files: dict[str, IO[bytes]] = {}
        for name in DTYPES:
            path = _array(folder, name)
            path.touch()
            file = self._files[name] = path.open("r+b")
            size = _STARTS[name] + sum(block["bytes"][name] for block in self.blocks)
            file.truncate(size)
            if not self.blocks:
                file.write(bytes(size))
            file.seek(size)
        self._journal = (folder / _BLOCKS).open("a")
        self._num_tokens = sum(block["bytes"]["inputs"] for block in self.blocks) // 4

    @property
    def num_blocks(self) -> int:
        """Blocks that are finished."""
        return len(self.blocks)

    def append(self, part: Part, first_row: int) -> None:
        """Writes a block, whose first row has this index among all rows."""
        ends = self._num_tokens + np.cumsum(part.lengths, dtype=np.int64)
        arrays = {
            "inputs": part.inputs,
            "targets": part.targets,
            "weights": part.weights,
            "offsets": ends,
            "rows": part.rows + first_row,
        }
        block: dict[str, Any] = {"bytes": {}, "crc32": {}, "counts": asdict(part.counts)}
        for name, array in arrays.items():
            data = np.ascontiguousarray(array, DTYPES[name]).data.cast("B")
            self._files[name].write(data)
            self._files[name].flush()
            block["bytes"][name], block["crc32"][name] = len(data), zlib.crc32(data)
        self._journal.write(_line(block))
        self._journal.flush()
        self.blocks.append(block)
        self._num_tokens += len(part.inputs)

    def finish(self, about: dict[str, Any], numbers: np.ndarray | None) -> None:
        """Makes the folder whole.

        Args:
            about: what JSON gives back unchanged.
            numbers: int64, kept beside it.
        """
        for name, file in self._files.items():
            file.seek(0)
            file.write(_header(name, _num_items(name, self.blocks)))
            file.close()
        counts = Counts()
        for block in self.blocks:
            counts.add(Counts(**block["counts"]))
        body = {"about": about, "counts": asdict(counts), "numbers": None}
        body["blocks"] = [{key: block[key] for key in ("bytes", "crc32")} for block in self.blocks]
        if numbers is not None:
            np.save(self.folder / "numbers.npy", np.asarray(numbers, np.int64))
            path = self.folder / "numbers.npy"
            body["numbers"] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        temporary = self.folder / f"{_MANIFEST}.tmp"
        temporary.write_text(json.dumps({"crc32": _body_crc32(body), "body": body}))
        temporary.rename(self.folder / _MANIFEST)
        self._journal.close()
        (self.folder / _BLOCKS).unlink()

    def close(self) -> None:
        """Leaves what is written as it is: finished, or to go on from."""
        for file in (*self._files.values(), self._journal):
            with suppress(OSError):  # of a full disk, which an earlier call has told
                file.close()


def time_of_manifest(folder: Path) -> int:
    """When a folder became whole, in nanoseconds; raises FileNotFoundError where it is not."""
    return (folder / _MANIFEST).stat().st_mtime_ns


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a whole folder: "about", "counts", "numbers" and "blocks".

    Raises:
        FileNotFoundError: it is not whole.
        ValueError: the manifest is damaged.
    """
    text = (folder / _MANIFEST).read_bytes()
    try:
        manifest = json.loads(text)
        body = manifest["body"]
        intact = manifest["crc32"] == _body_crc32(body)
    except (ValueError, LookupError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"{folder / _MANIFEST} is damaged")
    return body


def check_arrays(folder: Path, body: dict[str, Any]) -> None:
    """Reads every byte and compares it with the manifest's body.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not as it was written; it is named.
    """
    with ThreadPoolExecutor(len(DTYPES)) as pool:
        list(pool.map(lambda name: _check_array(folder, name, body["blocks"]), DTYPES))
    path, expected = folder / "numbers.npy", body["numbers"]
    if expected and (path.stat().st_size, _crc32(path)) != (expected["bytes"], expected["crc32"]):
        raise ValueError(f"{path} is damaged")


def map_arrays(folder: Path, body: dict[str, Any]) -> tuple[dict[str, np.ndarray], Any]:
    """Maps the arrays of a whole folder, by name, and its numbers; nothing is read yet."""

    def load(path: Path) -> np.ndarray:
        return np.load(path, mmap_mode="r").view(np.ndarray)

    numbers = load(folder / "numbers.npy") if body["numbers"] else None
    return {name: load(_array(folder, name)) for name in DTYPES}, numbers


def _intact_blocks(folder: Path) -> list[dict[str, Any]]:
    """The finished blocks of an earlier build, up to the first that is not as it was written."""
    try:
        lines = (folder / _BLOCKS).read_text().splitlines()
    except FileNotFoundError:
        return []
    blocks: list[dict[str, Any]] = []
    positions = dict(_STARTS)
    for line in lines:
        try:
            entry = json.loads(line)
            block = entry["block"]
            if entry["crc32"] != _body_crc32(block):
                break
            for name in DTYPES:
                with _array(folder, name).open("rb") as file:
                    file.seek(positions[name])
                    if _crc32_of(file, block["bytes"][name]) != block["crc32"][name]:
                        return blocks
                positions[name] += block["bytes"][name]
        except (OSError, ValueError, LookupError, TypeError):
            break
        blocks.append(block)
    return blocks


def _check_array(folder: Path, name: str, blocks: list[dict[str, Any]]) -> None:
    path = _array(folder, name)
    size = _STARTS[name] + sum(block["bytes"][name] for block in blocks)
    start = _header(name, _num_items(name, blocks)).ljust(_STARTS[name], b"\0")
    with path.open("rb") as file:
        intact = path.stat().st_size == size and file.read(_STARTS[name]) == start
        intact = intact and all(
            _crc32_of(file, block["bytes"][name]) == block["crc32"][name] for block in blocks
        )
    if not intact:
        raise ValueError(f"{path} is damaged")


def _array(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _num_items(name: str, blocks: list[dict[str, Any]]) -> int:
    num_bytes = sum(block["bytes"][name] for block in blocks)
    return num_bytes // DTYPES[name].itemsize + (name == "offsets")


def _header(name: str, num_items: int) -> bytes:
    """The head of a .npy file, which has room for any number of items."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file,
        {"descr": DTYPES[name].str, "fortran_order": False, "shape": (num_items,)},
    )
    header = file.getvalue()
    assert len(header) == _HEADER_BYTES, len(header)
    return header


def _line(block: dict[str, Any]) -> str:
    return json.dumps({"crc32": _body_crc32(block), "block": block}) + "\n"


def _body_crc32(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _crc32(path: Path) -> int:
    with path.open("rb") as file:
        return _crc32_of(file, path.stat().st_size)


def _crc32_of(file: IO[bytes], num_bytes: int) -> int:
    """The checksum of the next so many bytes; of those that there are, if they are fewer."""
    crc32 = 0
    for chunk in _chunks(file, num_bytes):
        crc32 = zlib.crc32(chunk, crc32)
    return crc32


def _chunks(file: IO[bytes], num_bytes: int) -> Iterator[bytes]:
    while num_bytes and (chunk := file.read(min(num_bytes, _CHUNK_BYTES))):
        yield chunk
        num_bytes -= len(chunk)
