"""Files and hub datasets to rows: what `config.data.train` may name.

What comes in is a path or a hub name, what goes out are rows and a name for each that
a person can find ("reviews.jsonl line 12"). Tables are read with `datasets`, which keeps
them on disk; a file that cannot be read is an error that names the file and the line.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

_FORMATS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_BUILDERS = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}


@dataclass(frozen=True)
class Rows:
    """Rows of a source, a name for each, and how many blank lines were passed over."""

    source: str
    values: Sequence[Any]
    name: Callable[[int], str]
    num_blank: int = 0


def load_rows(
    source: str, *, split: str = "train", format: str | None = None, num_proc: int = 1
) -> Rows:
    """Opens a file (json, jsonl, csv, parquet, txt, each also .gz), a folder or a hub name.

    Args:
        source: a path, a URL that `datasets` can open, or a hub name such as "user/name".
        split: of a hub dataset or a folder.
        format: "json", "jsonl", "csv", "parquet" or "text"; None reads the file's suffix.
        num_proc: processes that `datasets` reads with.

    Raises:
        ValueError: there is nothing under this name, or it cannot be read.
    """
    suffixes = [suffix for suffix in Path(source).suffixes if suffix != ".gz"]
    by_name = _FORMATS.get(suffixes[-1]) if suffixes else None
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path, split=split, num_proc=num_proc)
    if not path.exists() and "://" not in source:
        if by_name or format or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise ValueError(
                f"{source}: no such file; pass an existing file, a dataset on the hub, or "
                "module:function"
            )
        return _load_hub(source, split=split, num_proc=num_proc)
    kind = format or by_name
    if kind is None:
        raise ValueError(
            f"{source}: the format is not clear from the name; set data.format to json, jsonl, "
            "csv, parquet or text"
        )
    if kind == "text":
        return _load_lines(path)
    if kind in ("json", "jsonl") and path.exists() and not _holds_objects(path, kind):
        return _load_json_values(path, kind)
    return _load_table(str(path) if path.exists() else source, kind, num_proc=num_proc)


def _load_table(source: str, kind: str, *, num_proc: int) -> Rows:
    from datasets import load_dataset  # takes a second to import

    path = Path(source)
    # By default "NA", "None" and "null" in a CSV file are read as missing values.
    options = {"keep_default_na": False} if kind == "csv" else {}
    try:
        table = load_dataset(
            _BUILDERS[kind],
            data_files=source,
            split="train",
            num_proc=_workers(num_proc),
            **options,
        )
    except _datasets_errors() as error:
        fault = _json_fault(path, kind) if "json" in kind and path.exists() else None
        problem = fault or f"{source}: it cannot be read as {kind} ({_first_line(error)})"
        raise ValueError(f"{problem}; correct the file, or set data.format") from error
    if "json" in kind and path.exists() and _is_lines(path, kind):
        numbers = _filled_lines(path)
        return Rows(str(path), table, lambda index: f"{path.name} line {numbers[index]}")
    return Rows(str(path), table, lambda index: f"{path.name} row {index}")


def _load_folder(path: Path, *, split: str, num_proc: int) -> Rows:
    from datasets import load_dataset, load_from_disk

    try:
        if (path / "state.json").exists():
            table = load_from_disk(str(path))
        else:
            table = load_dataset(str(path), split=split, num_proc=_workers(num_proc))
    except _datasets_errors() as error:
        raise ValueError(
            f"{path}: this folder cannot be read as a dataset ({_first_line(error)}); pass one of "
            "its files"
        ) from error
    return Rows(str(path), table, lambda index: f"{path.name} row {index}")


def _load_hub(name: str, *, split: str, num_proc: int) -> Rows:
    from datasets import load_dataset

    try:
        table = load_dataset(name, split=split, num_proc=_workers(num_proc))
    except _datasets_errors() as error:
        raise ValueError(
            f"{name}: neither a file nor a dataset that the hub gives ({_first_line(error)}); pass "
            "a file instead"
        ) from error
    return Rows(name, table, lambda index: f"{name} row {index}")


def _load_lines(path: Path) -> Rows:
    """Each line that is not blank is a text."""
    with _open(path) as file:
        lines = [line.rstrip("\n") for line in file]
    numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
    texts = [lines[number - 1] for number in numbers]
    num_blank = len(lines) - len(texts)
    return Rows(str(path), texts, lambda index: f"{path.name} line {numbers[index]}", num_blank)


def _load_json_values(path: Path, kind: str) -> Rows:
    """Strings or lists, as one JSON array or a value a line; read into memory."""
    if problem := _json_fault(path, kind):
        raise ValueError(f"{problem}; correct the file")
    if _is_lines(path, kind):
        with _open(path) as file:
            values = [json.loads(line) for line in file if line.strip()]
        numbers = _filled_lines(path)
        return Rows(str(path), values, lambda index: f"{path.name} line {numbers[index]}")
    with _open(path) as file:
        return Rows(str(path), json.load(file), lambda index: f"{path.name} row {index}")


def _head(path: Path) -> str:
    with _open(path) as file:
        return file.read(4096).lstrip()


def _is_lines(path: Path, kind: str) -> bool:
    """Whether a JSON file is a value a line, and not one array."""
    return kind == "jsonl" or not _head(path).startswith("[")


def _holds_objects(path: Path, kind: str) -> bool:
    """Whether the values are objects, which `datasets` reads, going by the first."""
    head = _head(path)
    return head.removeprefix("" if _is_lines(path, kind) else "[").lstrip().startswith("{")


def _json_fault(path: Path, kind: str) -> str | None:
    """Where a JSON file stops being JSON, or None if it does not."""
    are_lines = _is_lines(path, kind)
    with _open(path) as file:
        for number, piece in enumerate(file if are_lines else [file.read()], 1):
            try:
                if piece.strip():
                    json.loads(piece)
            except json.JSONDecodeError as error:
                line = number if are_lines else error.lineno
                return f"{path} line {line}: malformed JSON ({error.msg})"
    return None


def _filled_lines(path: Path) -> np.ndarray:
    """The numbers, from 1, of the lines that are not blank."""
    with _open(path) as file:
        return np.fromiter((n for n, line in enumerate(file, 1) if line.strip()), np.int64)


@contextmanager
def _open(path: Path) -> Iterator[IO[str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason}); convert it") from error


def _datasets_errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError

    return DatasetsError, OSError, ValueError, RuntimeError, StopIteration


def _workers(num_proc: int) -> int | None:
    return num_proc if num_proc > 1 else None


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or ["it has no rows"])[0]
