"""Files and hub datasets to rows: what `config.data.train` may name.

What comes in is a path or a hub name, what goes out are rows and a name for each that
a person can find ("reviews.jsonl line 12"). Tables are read with `datasets`, which keeps
them on disk, as JSONL files stay. JSON, CSV and text in a folder are read as each file is
alone; a file that cannot be read is an error that names the file and the line.
"""

from __future__ import annotations

import glob
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jax_sft.data.json_lines import JoinedRows, JsonLines
from jax_sft.data.text_files import (
    check_unchanged,
    count_lines,
    csv_columns,
    head_of,
    json_array,
    state_of,
    text_lines,
)
from jax_sft.data.types import BadRow

FIRST_ROWS = 100  # what is looked at to learn what rows are
FILE_BITS = 40  # of a row's number the lower ones say the line, those above them the file
_FORMATS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_BUILDERS = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet", "text": "text"}


@dataclass(frozen=True)
class RowNames:
    """A row's index to its name, as RowNames("samples[", "]")(3) == "samples[3]".

    Attributes:
        before: what stands before the number.
        after: what stands behind it.
        numbers: of each row; None: the index is the number.
        step: added to the number, 1 where lines count from 1.
        files: of rows from several files, what stands before the number in each; which file
            it is, is what the number has above FILE_BITS.
    """

    before: str
    after: str = ""
    numbers: np.ndarray | None = None
    step: int = 0
    files: tuple[str, ...] = ()

    def __call__(self, index: int) -> str:
        """The name of the row at index."""
        number = index if self.numbers is None else self.numbers[index]
        if self.files:
            file, number = divmod(int(number), 1 << FILE_BITS)
            return f"{self.files[file]}{number + self.step}{self.after}"
        return f"{self.before}{number + self.step}{self.after}"

    def of(self, indices: Sequence[int]) -> RowNames:
        """The names of the rows that were picked by these indices."""
        picked = np.asarray(indices, np.int64)
        return replace(self, numbers=picked if self.numbers is None else self.numbers[picked])


@dataclass(frozen=True)
class Rows:
    """Rows of a source, a name for each, and how many blank lines were passed over.

    Attributes:
        source: what they came from.
        values: the rows.
        name: a row's index to its name.
        num_blank: blank lines between them.
        are_cells: whether they are CSV cells, all of them str; a filter then compares a
            cell with a number as a number.
        are_sparse: whether a row may lack fields that others have; a table's have None there.
    """

    source: str
    values: Sequence[Any]
    name: Callable[[int], str]
    num_blank: int = 0
    are_cells: bool = False
    are_sparse: bool = False


@dataclass(frozen=True)
class Place:
    """What a source's name stands for: a folder, a file or URL of a kind, or a hub name.

    Attributes:
        what: "folder", "hub", "url" or "file".
        source: the name, with ~ expanded where it is a path.
        kind: of a file or URL, one of `data.format`.
    """

    what: str
    source: str
    kind: str = ""

    @property
    def path(self) -> Path:
        """The name as a path."""
        return Path(self.source)


def find_source(source: str, *, format: str | None = None) -> Place:
    """Says what a name stands for.

    Raises:
        ValueError: it is a path with nothing there, or a file of an unknown format.
    """
    others = "an existing file, a dataset on the hub, or module:function"
    path = Path(source).expanduser()
    if not source:  # which is a path to the current folder
        raise ValueError(f"{source!r} names no source; pass {others}")
    if path.is_dir() and path.resolve() == Path(path.resolve().anchor):
        raise ValueError(f"{source}: the root of all folders is no source; pass {others}")
    if path.is_dir():
        return Place("folder", str(path))
    by_name = _kind_of(path)
    if not path.exists() and "://" not in source:
        if glob.has_magic(source):
            raise ValueError(
                f"{source}: patterns are not read; pass the folder, or a list of files"
            )
        if by_name or format or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise ValueError(f"{source}: no such file; pass {others}")
        return Place("hub", source)
    kind = format or by_name
    if kind is None:
        raise ValueError(
            f"{source}: the format is not clear from the name; set data.format to json, jsonl, "
            "csv, parquet or text"
        )
    if kind == "parquet" and path.suffix == ".gz":
        raise ValueError(f"{source}: Parquet files are compressed inside; unpack it with gunzip")
    return Place("file", str(path), kind) if path.exists() else Place("url", source, kind)


def load_rows(
    source: str, *, split: str = "train", format: str | None = None, num_proc: int = 1
) -> Rows:
    """Opens a file (json, jsonl, csv, txt, each also .gz, parquet), a folder or a hub name.

    Args:
        source: a path, a URL that `datasets` can open, or a hub name such as "user/name".
        split: of a hub dataset or a folder.
        format: "json", "jsonl", "csv", "parquet" or "text"; None reads the file's suffix.
        num_proc: processes that `datasets` reads with.

    Raises:
        ValueError: there is nothing under this name, or it cannot be read.
    """
    place = find_source(source, format=format)
    if splits := file_splits(place, split):
        return _load_folder(place, splits, split, num_proc=num_proc)
    if place.what in ("folder", "hub"):
        table = open_dataset(place, split=split, num_proc=num_proc)
        return Rows(place.source, table, names_of(place))
    if place.what == "url":
        return Rows(source, open_dataset(place, num_proc=num_proc), names_of(place))
    rows = _load_file(place, num_proc=num_proc)
    if not names_part(split):
        return rows
    indices = _sliced(place, split, {"train": 0}, len(rows.values))
    has_own = hasattr(rows.values, "select")
    values = rows.values.select(indices) if has_own else [rows.values[i] for i in indices]
    return replace(rows, values=values, name=rows.name.of(indices))


def names_part(split: str) -> bool:
    """Whether a split is a part of a file, as train[:10%]; other names are of hub datasets."""
    return split.startswith("train[")


def _load_file(place: Place, *, num_proc: int) -> Rows:
    path, state = place.path, state_of(place.path)
    if place.kind == "text":
        rows = _load_lines(path)
    elif "json" in place.kind:
        rows = _load_json(path, place.kind)
    else:
        rows = _load_table(place, num_proc=num_proc)
    check_unchanged(path, state)
    return rows


def names_of(place: Place) -> RowNames:
    """Names rows by their number, where lines are not what is counted."""
    named = place.source if place.what in ("hub", "url") else place.path.name
    return RowNames(f"{named} row ")


def open_dataset(
    place: Place,
    *,
    split: str = "train",
    num_proc: int = 1,
    streaming: bool = False,
    columns: Sequence[str] | None = None,
) -> Any:
    """Opens a place with `datasets`: a Dataset, or an IterableDataset to stream.

    Args:
        place: where the rows are.
        split: of a hub dataset or a folder.
        num_proc: processes that `datasets` reads with.
        streaming: whether rows are read when they are asked for.
        columns: of a CSV file, whose cells are then read as they are written.

    Raises:
        ValueError: it cannot be read.
    """
    from datasets import load_dataset, load_from_disk  # takes a second to import

    source = os.path.abspath(place.source) if place.what == "folder" else place.source
    options = {"streaming": True} if streaming else {"num_proc": num_proc if num_proc > 1 else None}
    with readable(place):
        if saved := _saved_dataset(place, split):
            table = load_from_disk(str(saved))
            return undecoded(table.to_iterable_dataset() if streaming else table)
        if files := _parquet_splits(place):
            options |= {"name": _version(file for some in files.values() for file in some)}
            table = load_dataset("parquet", data_files=files, split=split, **options)
            return undecoded(table)
        if place.what in ("folder", "hub"):
            return undecoded(load_dataset(source, split=split, **options))
        if place.kind == "csv":
            options |= _csv_options(columns)
        if place.what == "file":
            options |= {"name": _version([source])}
        builder = _BUILDERS[place.kind]
        return undecoded(load_dataset(builder, data_files=source, split="train", **options))


def undecoded(table: Any) -> Any:
    """Leaves images and sounds as they are: no text needs them, and they need packages."""
    if not hasattr(table, "__len__"):  # a stream, whose columns nobody may know
        return table if table.features is None else table.decode(False)
    for name, feature in table.features.items():
        if getattr(feature, "decode", False):
            table = table.cast_column(name, replace(feature, decode=False))
        elif getattr(getattr(feature, "feature", None), "decode", False):
            table = table.remove_columns(name)  # a list of them, which a cast would copy
    return table


def _version(files: Iterable[str]) -> str:
    """What changes when files do, which `datasets` keeps what it made of them under.

    By itself it looks at the time that a file was written at, which copying may set back.
    """
    states = [(file, os.stat(file)) for file in files]
    said = [(file, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in states]
    return hashlib.blake2b(repr(said).encode(), digest_size=16).hexdigest()


@contextmanager
def readable(place: Place) -> Iterator[None]:
    """Makes what `datasets` raises while it reads a place one line that names it."""
    try:
        yield
    except _datasets_errors() as error:
        raise _unreadable(place, error) from error


def _saved_dataset(place: Place, split: str) -> Path | None:
    """The folder that save_to_disk made, of one dataset or of one split among several."""
    if place.what != "folder":
        return None
    folders = (place.path, place.path / split)
    saved = next((folder for folder in folders if (folder / "state.json").exists()), None)
    if saved is None and (place.path / "dataset_dict.json").exists():
        splits = sorted(path.parent.name for path in place.path.glob("*/state.json"))
        raise ValueError(f"it has the splits {splits}, not {split!r}: set data.split")
    return saved


def file_splits(place: Place, split: str) -> dict[str, list[Path]] | None:
    """The files of each split that `datasets` finds in a folder of JSON, CSV or text.

    Args:
        place: where the rows are.
        split: the one that is asked for.

    Returns:
        Files by the split's name; None for other places.

    Raises:
        ValueError: there are no files of data in the folder, or it is a saved dataset without
            this split.
    """
    if place.what != "folder":
        return None
    with readable(place):
        if _saved_dataset(place, split):
            return None
        splits = _found_by_datasets(place, "json", "csv", "text")
    files = [path for paths in splits.values() for path in paths]
    is_plain = all(path.is_file() and _kind_of(path) not in (None, "parquet") for path in files)
    return splits if files and is_plain else None


def _found_by_datasets(place: Place, *builders: str) -> dict[str, list[Path]]:
    """The files of each split of a folder that `datasets` would read with one of its builders."""
    from datasets import load_dataset_builder
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.text.text import Text

    kinds = {"csv": Csv, "json": Json, "parquet": Parquet, "text": Text}
    builder = load_dataset_builder(os.path.abspath(place.source))  # "." has no name
    is_meant = isinstance(builder, tuple(kinds[name] for name in builders))
    if not is_meant or builder.info.features is not None or _has_options(builder.config):
        return {}  # by the options that its README gives, `datasets` reads it
    return {
        str(name): [Path(file) for file in files]
        for name, files in builder.config.data_files.items()
    }


def _has_options(config: Any) -> bool:
    """Whether a folder's config says more than where its files are."""
    said, plain = vars(config), vars(type(config)())
    where = ("name", "version", "data_dir", "data_files", "description")
    return any(said[name] != plain[name] for name in plain if name not in where)


def _parquet_splits(place: Place) -> dict[str, list[str]]:
    """The files of each split of a folder of Parquet; none for other places."""
    if place.what != "folder":
        return {}
    splits = _found_by_datasets(place, "parquet")
    are_here = all(path.is_file() for paths in splits.values() for path in paths)
    return {name: [str(path) for path in paths] for name, paths in splits.items() if are_here}


def _kind_of(path: Path) -> str | None:
    """The kind that a file's name tells, gzipped or not."""
    return _FORMATS.get(Path(path.stem).suffix if path.suffix == ".gz" else path.suffix)


def _csv_options(columns: Sequence[str] | None) -> dict[str, Any]:
    """Cells as they are written: neither numbers, nor "NA" and "None" as missing."""
    from datasets import Features, Value

    options: dict[str, Any] = {"keep_default_na": False}
    if columns is not None:
        options["features"] = Features({column: Value("string") for column in columns})
        options |= {"names": list(columns), "header": 0}  # or a column without a name gets one
    return options


def _unreadable(place: Place, error: Exception) -> ValueError:
    cause = _first_line(error)
    if place.what == "folder":
        remedy = "pass one of its files"
        return ValueError(
            f"{place.source}: this folder cannot be read as a dataset ({cause}); {remedy}"
        )
    if place.what == "hub":
        return ValueError(
            f"{place.source}: neither a file nor a dataset that the hub gives ({cause}); pass a "
            "file instead"
        )
    remedy = "correct the file" if place.what == "file" else "download it and pass the file"
    return ValueError(
        f"{place.source}: it cannot be read as {place.kind} ({cause}); {remedy}, or set data.format"
    )


def _load_table(place: Place, *, num_proc: int) -> Rows:
    path = place.path
    if place.kind == "csv":
        columns, lines = csv_columns(path)
        table = open_dataset(place, num_proc=num_proc, columns=columns) if len(lines) else []
        return Rows(str(path), table, _line_names(path, lines, table), are_cells=True)
    return Rows(str(path), open_dataset(place, num_proc=num_proc), names_of(place))


def _line_names(path: Path, lines: np.ndarray, table: Sequence[Any]) -> RowNames:
    if len(lines) != len(table):
        raise ValueError(
            f"{path}: {len(table)} rows on {len(lines)} lines; write each row on a line of its "
            "own, and nothing to the file while it is read"
        )
    return RowNames(f"{path.name} line ", numbers=lines)


def _load_lines(path: Path) -> Rows:
    """Each line that is not blank is a text."""
    numbers, texts = [], []
    for number, line in text_lines(path):
        numbers.append(number)
        texts.append(line if isinstance(line, BadRow) else line.rstrip("\n"))
    names = RowNames(f"{path.name} line ", numbers=np.array(numbers, np.int64))
    return Rows(str(path), texts, names, count_lines(path) - len(texts))


def _load_json(path: Path, kind: str) -> Rows:
    """Any values: a value a line, or those of one JSON array, which is read into memory."""
    if is_lines(path, kind):
        values = JsonLines(path)
        names = RowNames(f"{path.name} line ", numbers=values.numbers_N)
        return Rows(str(path), values, names, are_sparse=True)
    values = list(json_array(path))
    return Rows(str(path), values, RowNames(f"{path.name} row "), are_sparse=True)


def _load_folder(place: Place, splits: dict[str, list[Path]], split: str, *, num_proc: int) -> Rows:
    """The rows of a split, or of what it names of the splits, as train[:10%] does."""
    wanted = {split: splits[split]} if split in splits else splits
    parts, numbers, starts, num_blank, are_cells = [], [], {}, 0, False
    for name, paths in wanted.items():
        starts[name] = sum(map(len, parts))
        for path in paths:
            rows = _load_file(Place("file", str(path), _kind_of(path)), num_proc=num_proc)
            own = rows.name.numbers
            own = np.arange(len(rows.values)) if own is None else own
            numbers.append(own + (len(parts) << FILE_BITS))
            parts.append(rows.values)
            num_blank += rows.num_blank
            are_cells |= rows.are_cells
    files = line_names(place, [path for paths in wanted.values() for path in paths])
    values, name = JoinedRows(parts), RowNames("", numbers=np.concatenate(numbers), files=files)
    if split not in splits:
        indices = _sliced(place, split, starts, len(values))
        values, name = values.select(indices), name.of(indices)
    return Rows(place.source, values, name, num_blank, are_cells, are_sparse=True)


def _sliced(place: Place, split: str, starts: dict[str, int], end: int) -> np.ndarray:
    """The indices of the rows that a split such as train[:10%] or train+test names."""
    from datasets import ReadInstruction

    ends = [*starts.values(), end][1:]
    lens = {name: end - starts[name] for name, end in zip(starts, ends, strict=True)}
    try:
        spec = ReadInstruction.from_spec("+".join(starts) if split == "all" else split)
        pieces = spec.to_absolute(lens)
    except _datasets_errors() as error:
        raise ValueError(
            f"{place.source}: data.split is {split!r} ({_first_line(error)}); choose one of "
            f"{sorted(starts)}, or a part, such as {min(starts)}[:10%]"
        ) from error
    return np.concatenate([starts[p.splitname] + np.arange(p.from_, p.to) for p in pieces])


def line_names(place: Place, files: Sequence[Path]) -> tuple[str, ...]:
    """What stands before a row's number in each file of a folder."""
    return tuple(
        f"{os.path.relpath(path, place.path)} "
        f"{'line' if is_lines(path, _kind_of(path)) else 'row'} "
        for path in files
    )


def is_lines(path: Path, kind: str) -> bool:
    """Whether a file is a value a line, and not one JSON array."""
    return kind != "json" or not head_of(path).startswith("[")


def _datasets_errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError

    reading = OSError, EOFError, zlib.error, ValueError, RuntimeError, StopIteration
    return DatasetsError, ImportError, *reading


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or ["it has no rows"])[0]
