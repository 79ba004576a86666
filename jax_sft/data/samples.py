"""What users hand in becomes Samples: lists, datasets, files, hub names, functions.

What comes in is any sequence of texts, of [prompt, output, ...] lists, of conversations
or of rows with fields, what goes out is a Samples that reads each row when it is asked
for. The first rows are looked at for their format; a wrong row is a BadRow when it is
read, which tokenization does once for each.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_sft.data.conversations import is_messages, read_chat_prompt
from jax_sft.data.csv_cells import Cell
from jax_sft.data.json_lines import JoinedRows, JsonLines
from jax_sft.data.row_checks import short
from jax_sft.data.row_filter import RowFilter
from jax_sft.data.row_reader import RowReader, read_prompt
from jax_sft.data.sources import FIRST_ROWS, RowNames, Rows, load_rows, undecoded
from jax_sft.data.types import BadRow, Conversation, Samples


def read_samples(
    samples: Sequence[Any],
    *,
    row_format: str | None = None,
    text_field: str = "text",
    prompt_field: str = "prompt",
    output_field: str = "output",
    messages_field: str = "messages",
    template: str | None = None,
    filter: str | None = None,
    max_samples: int | None = None,
    train_turns: str = "all",
) -> Samples:
    """Reads what Python users hand in.

    Args:
        samples: a sequence of str, of [prompt, output, ...] lists or tuples, of lists of
            message dicts, or of dicts with the fields below; a `datasets.Dataset` or
            `datasets.Column`.
        row_format: "text", "dialogue", "prompt_output", "messages", "sharegpt" or
            "tokens"; None: as the first rows are, by the order that RowReader gives.
        text_field: a row's text.
        prompt_field: a row's prompt.
        output_field: a row's output.
        messages_field: a row's conversation.
        template: "alpaca", or a text such as "Q: {question}\\nA: " that a row's fields
            fill; it is the prompt where the row has an output, else the whole text.
        filter: keeps the rows where it is true, such as "label == 1".
        max_samples: reads no further than this many kept rows.
        train_turns: the answers of a conversation that are trained: "all", "last" or
            "flagged", those whose messages say so.

    Returns:
        Samples, all of one format; reading one raises BadRow where its row is wrong.

    Raises:
        ValueError: there are no samples, or the first ones are of no known format.
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
    rows = Rows("samples", as_sequence(samples), RowNames("samples[", "]"))
    return _read(rows, reader, filter=filter, max_samples=max_samples)


def load_samples(
    source: str,
    *,
    split: str = "train",
    format: str | None = None,
    num_proc: int = 1,
    row_format: str | None = None,
    text_field: str = "text",
    prompt_field: str = "prompt",
    output_field: str = "output",
    messages_field: str = "messages",
    template: str | None = None,
    filter: str | None = None,
    max_samples: int | None = None,
    train_turns: str = "all",
) -> Samples:
    """Reads what a config names: a file, a hub name, or a function that returns samples.

    Args:
        source: a path (json, jsonl, csv, txt, each also .gz, parquet), a hub name,
            "module:function" or "path/to/file.py:function".
        split: of a hub dataset.
        format: overrides the file's suffix.
        num_proc: processes that read a dataset.
        row_format: this and the rest as in `read_samples`.
        text_field: a row's text.
        prompt_field: a row's prompt.
        output_field: a row's output.
        messages_field: a row's conversation.
        template: what a row's fields fill.
        filter: which rows are kept. All cells of a CSV file are texts; compared with a
            number, one is taken as a number.
        max_samples: how many of them.
        train_turns: which answers of a conversation are trained.

    Raises:
        ValueError: the source cannot be read, or its first rows are of no known format.
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
    if names_function(source):
        values = as_sequence(load_function(source)(), what=f"what {source} returns")
        rows = Rows(source, values, RowNames(f"{source} sample "))
    else:
        rows = load_rows(source, split=split, format=format, num_proc=num_proc)
    return _read(rows, reader, filter=filter, max_samples=max_samples)


def load_eval_prompts(
    source: str | Sequence[Any],
) -> tuple[list[str | list[str] | Conversation], dict[str, list[Any]]]:
    """Reads prompts to generate from.

    Args:
        source: prompts, each a str, a [prompt, output, ..., prompt] list, a list of
            messages that ends in a user's or a tool's, or a dict with "prompt" (any of
            these) or "messages", and metadata; or a file of them or "module:function".
            "tools" beside messages are the conversation's.

    Returns:
        The prompts, and the metadata: for each key besides the prompt, a list with one
        value a prompt.

    Raises:
        ValueError: a prompt is wrong, or the prompts differ in their keys.
    """
    name: Callable[[int], str] = RowNames("eval_prompts[", "]")
    if not isinstance(source, str):
        values = as_sequence(source, what="eval_prompts")
    elif names_function(source):
        values = as_sequence(load_function(source)(), what="eval_prompts")
    else:
        rows = load_rows(source)
        values, name = _with_all_fields(rows), rows.name
    if not len(values):
        raise ValueError("eval_prompts is empty; pass at least one prompt, or None for none")
    prompts: list[str | list[str] | Conversation] = []
    metadata: dict[str, list[Any]] = {}
    for index, value in enumerate(values):
        prompt, row = _prompt_and_metadata(value, name(index))
        prompts.append(prompt)
        if not index:
            metadata = {key: [] for key in row}
        if row.keys() != metadata.keys():
            raise ValueError(
                f"{name(index)} has the keys {sorted(map(str, row))} beside its prompt, {name(0)} "
                f"has {sorted(map(str, metadata))}; give every prompt the same keys"
            )
        for key, extra in row.items():
            metadata[key].append(extra)
    return prompts, metadata


def _with_all_fields(rows: Rows) -> Sequence[Any]:
    """The rows, each with the fields of all; what it lacks is None."""
    if not rows.are_sparse:
        return rows.values
    values = list(rows.values)
    fields = dict.fromkeys(key for row in values if isinstance(row, Mapping) for key in row)
    return [fields | row if isinstance(row, Mapping) else row for row in values]


def _prompt_and_metadata(
    value: Any, origin: str
) -> tuple[str | list[str] | Conversation, dict[str, Any]]:
    """A prompt, and what its row says besides."""
    if isinstance(value, BadRow):
        raise value
    row = dict(value) if isinstance(value, Mapping) else {"prompt": value}
    field = next((name for name in ("prompt", "messages") if row.get(name) is not None), "prompt")
    if field not in row:
        raise ValueError(
            f'{origin} has keys {sorted(map(str, row))}; it needs the key "prompt" or "messages"'
        )
    is_chat = field == "messages" or is_messages(row[field])
    prompt = row.pop(field)
    if is_chat:
        return read_chat_prompt(prompt, origin, tools=row.pop("tools", None)), row
    return read_prompt(prompt, origin), row


def load_function(spec: str) -> Callable[..., Any]:
    """Imports "module:function" or "path/to/file.py:function".

    Raises:
        ValueError: there is no such module or file, or nothing callable in it.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(f"{spec!r} names no function; write module:function or file.py:function")
    is_file = place.endswith(".py")
    if not is_file and ("/" in place or place.startswith(".")):
        raise ValueError(
            f"{spec!r}: {place!r} is no module's name; write module:{name}, or "
            f"path/to/file.py:{name}"
        )
    try:
        path = Path(place).expanduser()
        module = _import_file(path) if is_file else importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{spec!r}: no module named {error.name!r}; install it, or write path/to/file.py:{name}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{spec!r}: {place} has no function {name!r}; check its name")
    return function


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; pass path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(f"of_user.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for what their annotations name
    spec.loader.exec_module(module)
    return module


def names_function(source: str) -> bool:
    """Whether a source is module:function and not a path, a URL or C:\\\\file."""
    place, _, name = source.rpartition(":")
    return bool(place) and name.isidentifier() and not Path(source).exists()


def as_sequence(samples: Any, *, what: str = "samples") -> Sequence[Any]:
    """Something with a length and an index; the common mistakes are errors."""
    if isinstance(samples, str | bytes | Mapping):
        remedy = (
            'choose a split, as samples["train"]'
            if hasattr(samples, "num_rows")
            else (f"pass a list of them: [{short(samples)}]")
        )
        raise ValueError(f"{what} is a single {type(samples).__name__}; {remedy}")
    if _is_stream(samples):
        raise ValueError(
            f"{what} is an IterableDataset, which has no length; set data.streaming to True, or "
            "pass datasets.Dataset.from_generator"
        )
    check_no_frame(samples, what)
    if not hasattr(samples, "__len__") or not hasattr(samples, "__getitem__"):
        raise ValueError(
            f"{what} is a {type(samples).__name__}, which cannot be indexed; make it a list"
        )
    if _is_table(samples):
        return undecoded(samples.with_format(None))
    if hasattr(samples, "tolist"):  # numpy, pandas
        return samples.tolist()
    return samples if _has_slices(samples) else [samples[index] for index in range(len(samples))]


def check_no_frame(samples: Any, what: str) -> None:
    """Raises ValueError for a table of another library, which gives its columns' names for rows."""
    kind = type(samples).__name__
    if hasattr(samples, "iterrows"):
        raise ValueError(f"{what} is a {kind}; pass datasets.Dataset.from_pandas({what})")
    if hasattr(samples, "to_pydict"):
        remedy = f"datasets.Dataset.from_dict({what}.to_pydict())"
        raise ValueError(f"{what} is a {kind}; pass {remedy}")


def _has_slices(samples: Any) -> bool:
    """Whether several samples can be asked for at once; a deque, say, gives one at a time."""
    try:
        return isinstance(samples, Sequence) and samples[0:0] is not None
    except Exception:  # of whatever class it is
        return False


def _is_table(rows: Any) -> bool:
    return hasattr(rows, "column_names") and hasattr(rows, "with_format")


def _is_stream(rows: Any) -> bool:
    return _is_table(rows) and not hasattr(rows, "__len__")


def _read(rows: Rows, reader: RowReader, *, filter: str | None, max_samples: int | None) -> Samples:
    """Filters, cuts and finds the format; the Samples read their rows when they are asked."""
    values, dropped = rows.values, {"blank_line": rows.num_blank} if rows.num_blank else {}
    name = rows.name
    if not len(values):
        raise ValueError(f"{rows.source} is empty; there must be at least one sample")
    if filter is not None:
        indices, num_passed = _matching(rows, RowFilter(filter), max_samples)
        if not indices:
            raise ValueError(
                f"data.filter {filter!r} keeps none of {num_passed} rows; correct it, or set None"
            )
        if num_passed > len(indices):
            dropped["filter"] = num_passed - len(indices)
        values = _selected(values, indices)
        name = rows.name.of(indices)
    elif max_samples is not None:
        num_kept = min(max_samples, len(values))
        values = _selected(values, range(num_kept))
    first = [values[index] for index in range(min(FIRST_ROWS, len(values)))]
    reader = reader.for_rows(first, [name(index) for index in range(len(first))])
    return Samples(
        values,
        reader.content,
        name=name,
        format=reader.format,
        source=rows.source,
        dropped=dropped,
    )


def _selected(values: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
    has_own = _is_table(values) or isinstance(values, JsonLines | JoinedRows)
    return values.select(indices) if has_own else [values[i] for i in indices]


def _matching(rows: Rows, keep: RowFilter, max_samples: int | None) -> tuple[list[int], int]:
    """The indices of the rows to keep, and how many rows were looked at."""
    values = rows.values
    if _is_table(values):
        missing = sorted(keep.fields - set(values.column_names))
        if not missing and keep.fields:
            values = values.select_columns(sorted(keep.fields))
    indices: list[int] = []
    num_passed, lacking, first = len(values), set(keep.fields), None
    for index, row in enumerate(values):
        if len(indices) == max_samples:
            num_passed = index
            break
        if rows.are_sparse and isinstance(row, Mapping):
            first = first or (rows.name(index), sorted(map(str, row)))
            lacking -= row.keys()
            row = dict.fromkeys(keep.fields) | row
        if keeps(keep, row, rows.name(index), are_cells=rows.are_cells):
            indices.append(index)
    if first is not None and lacking:
        raise _no_field(min(lacking), *first)
    return indices, num_passed


def _no_field(field: str, origin: str, fields: list[str]) -> ValueError:
    return ValueError(f"data.filter reads {field!r}, but {origin} has the fields {fields}")


def keeps(keep: RowFilter, row: Any, origin: str, *, are_cells: bool) -> bool:
    """Whether a filter keeps a row that origin names.

    Raises:
        ValueError: the filter cannot be asked of this row.
    """
    if isinstance(row, BadRow):  # what is wrong with it is said when it is read
        return True
    row = {"text": row} if isinstance(row, str) else row
    if not isinstance(row, Mapping):
        raise ValueError(f"{origin} is no row with fields; set data.filter to None")
    if absent := sorted(keep.fields - row.keys()):
        raise _no_field(absent[0], origin, sorted(map(str, row)))
    if are_cells:
        row = {field: Cell(row[field]) for field in keep.fields}
    try:
        return keep(row)
    except TypeError as error:
        raise ValueError(
            f"data.filter {keep.expression!r} fails on {origin} ({error}); compare fields "
            "with literals of their own type"
        ) from error
