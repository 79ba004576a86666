"""JSONL files as a sequence: each row is read and parsed when it is asked for.

What comes in are paths, what goes out are the very values that the lines hold; a line that
cannot be read is a BadRow in its place. Tables are no home for them: their columns have one type,
so that "2024-01-01" becomes a time where all texts of a column look like one, 5 beside 5.5
becomes 5.0, and texts beside a number become the JSON of texts.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_sft.data.text_files import (
    check_unchanged,
    filled_places,
    json_line,
    state_of,
)


class JsonLines(Sequence[Any]):
    """The values of a JSONL file, which is not held in memory.

    Args:
        path: the file; what is in a .gz file is unpacked to the disk.

    Raises:
        ValueError: the file cannot be opened, or is no whole gzip file.

    Attributes:
        path: the file.
        numbers_N: int64, the line of each row, from 1; blank lines are no rows.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._state = path, state_of(path)
        self.numbers_N, self._starts_N, self._ends_N = filled_places(path)
        self._file: _File | None = None

    def __len__(self) -> int:
        return len(self.numbers_N)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, end = int(self._starts_N[index]), int(self._ends_N[index])
        file = self._file = self._file or _File(self.path)
        line = os.pread(file.number, end - start, start)
        check_unchanged(self.path, self._state)
        return json_line(line, self.path, int(self.numbers_N[index]))

    def select(self, indices: Sequence[int]) -> JsonLines:
        """The rows of these indices, in their order."""
        picked = object.__new__(JsonLines)
        vars(picked).update(vars(self))
        for name in ("numbers_N", "_starts_N", "_ends_N"):
            setattr(picked, name, getattr(self, name)[np.asarray(indices, np.int64)])
        return picked

    def close(self) -> None:
        """Lets go of the file, until a row is asked for again."""
        self._file = None


class JoinedRows(Sequence[Any]):
    """The rows of several files, one file's after another's, of which one at a time is open.

    Args:
        parts: the values of each file.
    """

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        self._rows_N = np.arange(self._starts[-1])
        self._last: Sequence[Any] | None = None

    def __len__(self) -> int:
        return len(self._rows_N)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = int(self._rows_N[range(len(self))[index]])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        part = self._parts[number]
        if self._last is not part and isinstance(self._last, JsonLines):
            self._last.close()  # a folder may have more files than a process may open
        self._last = part
        return part[row - int(self._starts[number])]

    def select(self, indices: Sequence[int]) -> JoinedRows:
        """The rows of these indices, in their order."""
        picked = object.__new__(JoinedRows)
        vars(picked).update(vars(self))
        picked._rows_N = self._rows_N[np.asarray(indices, np.int64)]
        return picked


class _File:
    """An open file, or what a .gz file holds; closed when nothing reads from it any more."""

    def __init__(self, path: Path) -> None:
        if path.suffix == ".gz":
            file = tempfile.TemporaryFile()  # noqa: SIM115
            with gzip.open(path, "rb") as packed:
                shutil.copyfileobj(packed, file)
            file.flush()
        else:
            file = path.open("rb")
        weakref.finalize(self, file.close)
        self.number = file.fileno()
