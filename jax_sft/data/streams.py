"""Sources that are read while training, in bounded memory: rows from any index on.

What comes in is a source's name, an IterableDataset or anything that can be iterated
again and again, what goes out is a Stream. An index counts what lies in the source,
whatever a filter keeps, so that a run that stopped at an index resumes at it exactly.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from jax_sft.data.row_filter import RowFilter
from jax_sft.data.row_reader import RowReader
from jax_sft.data.samples import check_no_frame, keeps, load_function, names_function
from jax_sft.data.sources import (
    FILE_BITS,
    FIRST_ROWS,
    Place,
    RowNames,
    file_splits,
    find_source,
    is_lines,
    names_of,
    names_part,
    open_dataset,
    readable,
    undecoded,
)
from jax_sft.data.text_files import (
    check_unchanged,
    csv_columns,
    csv_rows,
    json_value,
    state_of,
    text_lines,
)
from jax_sft.data.types import BadRow, Content


@dataclass(frozen=True)
class Stream:
    """Rows of one format that are read in order, from any index on, as often as needed.

    Attributes:
        format: of the rows, as of Samples.
        source: what they come from.
        to_content: (row, its origin) to what it holds; raises BadRow; can be pickled.
        name: a row's index to its origin.
    """

    format: str
    source: str
    to_content: Callable[[Any, str], Content]
    name: Callable[[int], str]
    _rows_from: Callable[[int], Iterator[tuple[int, Any]]]
    _keep: RowFilter | None
    _are_cells: bool
    _max_samples: int | None

    @property
    def options(self) -> str:
        """What else decides which rows there are and what they hold; "" where nothing does."""
        reader, plain = self.to_content.__self__, RowReader()
        said = {name: value for name, value in vars(reader).items() if value != vars(plain)[name]}
        del said["format"]  # the rows tell it
        if self._keep is not None:
            said["filter"] = self._keep.expression
        if self._max_samples is not None:
            said["max_samples"] = self._max_samples
        return repr(said) if said else ""

    def rows_from(
        self, start: int, left_out: Counter[str] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yields (index, row) for the rows that are kept, from an index on.

        Indices rise, but not by one where blank lines or rows that the filter leaves
        out lie between. With `max_samples` the rows before start are read too, for
        they count.

        Args:
            start: an index; the first row's is 0.
            left_out: counts those behind start that are not kept, by reason.

        Raises:
            ValueError: the source cannot be read on, or changed since it was opened.
        """
        num_kept = 0
        with closing(self._rows_from(0 if self._max_samples is not None else start)) as rows:
            for index, row in rows:
                if num_kept == self._max_samples:
                    return
                if self._keep is not None:
                    origin = self.name(index)
                    if not keeps(self._keep, row, origin, are_cells=self._are_cells):
                        if left_out is not None and index >= start:
                            left_out["filter"] += 1
                        continue
                num_kept += 1
                if index >= start:
                    yield index, row


def open_stream(
    source: str | Iterable[Any],
    *,
    split: str = "train",
    format: str | None = None,
    row_format: str | None = None,
    text_field: str = "text",
    prompt_field: str = "prompt",
    output_field: str = "output",
    messages_field: str = "messages",
    template: str | None = None,
    filter: str | None = None,
    max_samples: int | None = None,
    train_turns: str = "all",
) -> Stream:
    """Opens a source to be read while training; its first rows tell the format.

    Args:
        source: what `load_samples` takes, but no JSON array; a function may return a
            generator, and is called for each pass. Or an IterableDataset, or an object
            that gives the same rows each time it is iterated.
        split: of a hub dataset.
        format: overrides the file's suffix.
        row_format: this and the rest as in `read_samples`.
        text_field: a row's text.
        prompt_field: a row's prompt.
        output_field: a row's output.
        messages_field: a row's conversation.
        template: what a row's fields fill.
        filter: which rows are kept.
        max_samples: how many of them.
        train_turns: which answers of a conversation are trained.

    Raises:
        ValueError: the source cannot be streamed, is empty, or is of no known format.
    """
    reader = RowReader(
        text_field=text_field,
        prompt_field=prompt_field,
        output_field=output_field,
        messages_field=messages_field,
        template=template,
        train_turns=train_turns,
        format=row_format,
    )
    rows = _open(source, split=split, format=format)
    keep = None if filter is None else RowFilter(filter)
    if next(rows.rows_from(0), None) is None:
        raise ValueError(f"{rows.source} is empty; there must be at least one sample")
    stream = Stream(
        "",
        rows.source,
        reader.content,
        rows.name,
        rows.rows_from,
        keep,
        rows.are_cells,
        max_samples,
    )
    first = list(islice(stream.rows_from(0), FIRST_ROWS))
    if not first:
        raise ValueError(
            f"data.filter {filter!r} keeps no row of {rows.source}; correct it, or set None"
        )
    reader = reader.for_rows([row for _, row in first], [rows.name(index) for index, _ in first])
    return replace(stream, format=reader.format, to_content=reader.content)


@dataclass(frozen=True)
class _StreamedRows:
    """What a source is read by, before any filter."""

    source: str
    rows_from: Callable[[int], Iterator[tuple[int, Any]]]
    name: RowNames
    are_cells: bool = False


def _open(source: str | Iterable[Any], *, split: str, format: str | None) -> _StreamedRows:
    if not isinstance(source, str):
        return _StreamedRows("samples", _passes(source), RowNames("samples[", "]"))
    if names_function(source):
        function = load_function(source)
        return _StreamedRows(
            source,
            lambda start: _counted(_iterable(function(), f"what {source} returns"), start),
            RowNames(f"{source} sample "),
        )
    place = find_source(source, format=format)
    if place.what == "file" and names_part(split):
        raise ValueError(
            f"{source}: data.split is {split!r}, but a file that is streamed is read whole: leave "
            "it at 'train', or set data.streaming to False"
        )
    if place.what == "file":
        return _open_file(place)
    if splits := file_splits(place, split):
        if split not in splits:
            raise ValueError(
                f"{place.source}: it has the splits {sorted(splits)}, not {split!r}: set data.split"
            )
        return _open_folder(place, splits[split])
    return _StreamedRows(place.source, _dataset_passes(place, split=split), names_of(place))


def _open_file(place: Place) -> _StreamedRows:
    path, state = place.path, state_of(place.path)
    if place.kind == "json":
        _check_lines(path)
    if "json" in place.kind or place.kind == "text":
        passes = lambda start: _lines(path, start, is_json=place.kind != "text")  # noqa: E731
        name = RowNames(f"{path.name} line ", step=1)
    elif place.kind == "csv":
        _, lines = csv_columns(path)  # looks at every row
        passes = lambda start: _counted(csv_rows(path), start)  # noqa: E731
        name = RowNames(f"{path.name} line ", numbers=lines)
    else:
        passes, name = _dataset_passes(place), names_of(place)

    def rows_from(start: int) -> Iterator[tuple[int, Any]]:
        check_unchanged(path, state)
        yield from passes(start)
        check_unchanged(path, state)

    return _StreamedRows(str(path), rows_from, name, are_cells=place.kind == "csv")


def _open_folder(place: Place, files: Sequence[Path]) -> _StreamedRows:
    """Files one after another; an index says the file, above FILE_BITS, and the line or row."""
    parts = [_open_file(find_source(str(path))) for path in files]

    def rows_from(start: int) -> Iterator[tuple[int, Any]]:
        first, line = divmod(start, 1 << FILE_BITS)
        for number in range(first, len(parts)):
            own = parts[number].rows_from(line if number == first else 0)
            yield from (((number << FILE_BITS) + index, row) for index, row in own)

    are_cells = any(part.are_cells for part in parts)
    what = "row" if are_cells else "line"
    named = tuple(f"{os.path.relpath(path, place.path)} {what} " for path in files)
    name = RowNames("", step=1, files=named)
    return _StreamedRows(place.source, rows_from, name, are_cells)


def _check_lines(path: Path) -> None:
    if not is_lines(path, "json"):
        raise ValueError(
            f"{path}: one JSON array cannot be read piece by piece; write an object a line "
            "(.jsonl), or set data.streaming to False"
        )


def _lines(path: Path, start: int, *, is_json: bool) -> Iterator[tuple[int, Any]]:
    """The lines that are not blank, each with its number from 0."""
    for number, line in text_lines(path):
        if number <= start:
            continue
        if isinstance(line, BadRow):
            yield number - 1, line
        else:
            yield number - 1, json_value(line, path, number) if is_json else line.rstrip("\n")


def _dataset_passes(place: Place, *, split: str = "train") -> Callable[[int], Iterator[Any]]:
    """Passes over what `datasets` reads; what it cannot read on is an error as at the start."""
    passes = _passes(open_dataset(place, split=split, streaming=True))

    def rows_from(start: int) -> Iterator[tuple[int, Any]]:
        with readable(place):
            yield from passes(start)

    return rows_from


def _passes(rows: Any) -> Callable[[int], Iterator[tuple[int, Any]]]:
    """A pass over rows from an index on, once it is sure that there can be another."""
    _iterable(rows, "samples")
    if isinstance(rows, Iterator):
        raise ValueError(
            f"samples is a {type(rows).__name__}, which can be read only once; pass an "
            "IterableDataset, or an object whose __iter__ begins anew"
        )
    if hasattr(rows, "with_format"):  # of datasets
        rows = undecoded(rows.with_format(None))
    return lambda start: _counted(rows, start)


def _iterable(rows: Any, what: str) -> Iterable[Any]:
    check_no_frame(rows, what)
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        remedy = 'a split, as samples["train"]' if hasattr(rows, "keys") else "an IterableDataset"
        raise ValueError(f"{what} is a {type(rows).__name__}, which is no stream; pass {remedy}")
    return rows


def _counted(rows: Iterable[Any], start: int) -> Iterator[tuple[int, Any]]:
    if start and hasattr(rows, "skip"):  # an IterableDataset, which may know a short way
        yield from enumerate(rows.skip(start), start)
    else:
        yield from islice(enumerate(rows), start, None)
