"""What users hand in becomes Samples: lists, datasets, files, hub names, functions.

What comes in is any sequence of texts, of [prompt, output, ...] lists or of rows with
fields, what goes out is a Samples that builds each Sample when it is read. Every row is
checked once at the start, so that a wrong one is named before anything runs.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_sft.data.row_filter import RowFilter
from jax_sft.data.row_reader import RowReader, read_prompt, short
from jax_sft.data.sources import Rows, load_rows
from jax_sft.data.types import Sample, Samples, Turn


def read_samples(
    samples: Sequence[Any],
    *,
    text_field: str = "text",
    prompt_field: str = "prompt",
    output_field: str = "output",
    messages_field: str = "messages",
    template: str | None = None,
    filter: str | None = None,
    max_samples: int | None = None,
) -> Samples:
    """Reads what Python users hand in.

    Args:
        samples: a sequence of str, of [prompt, output, ...] lists or tuples, or of dicts
            with the fields below; a `datasets.Dataset` or `datasets.Column`.
        text_field: a row's text, where it has not both a prompt and an output.
        prompt_field: a row's prompt.
        output_field: a row's output.
        messages_field: a row's conversation.
        template: "alpaca", or a text such as "Q: {question}\\nA: " that a row's fields
            fill; it is the prompt where the row has an output, else the whole text.
        filter: keeps the rows where it is true, such as "label == 1".
        max_samples: reads no further than this many kept rows.

    Returns:
        Samples, all of text or all of dialogues.

    Raises:
        ValueError: there are no samples, or one of them is wrong; it is named.
    """
    reader = RowReader(text_field, prompt_field, output_field, messages_field, template)
    rows = Rows("samples", _as_sequence(samples), lambda index: f"samples[{index}]")
    return _read(rows, reader, filter=filter, max_samples=max_samples)


def load_samples(
    source: str,
    *,
    split: str = "train",
    format: str | None = None,
    num_proc: int = 1,
    text_field: str = "text",
    prompt_field: str = "prompt",
    output_field: str = "output",
    messages_field: str = "messages",
    template: str | None = None,
    filter: str | None = None,
    max_samples: int | None = None,
) -> Samples:
    """Reads what a config names: a file, a hub name, or a function that returns samples.

    Args:
        source: a path (json, jsonl, csv, parquet, txt, each also .gz), a hub name,
            "module:function" or "path/to/file.py:function".
        split: of a hub dataset.
        format: overrides the file's suffix.
        num_proc: processes that read a dataset.
        text_field: this and the rest as in `read_samples`.
        prompt_field: a row's prompt.
        output_field: a row's output.
        messages_field: a row's conversation.
        template: what a row's fields fill.
        filter: which rows are kept.
        max_samples: how many of them.

    Raises:
        ValueError: the source cannot be read, or a sample in it is wrong.
    """
    reader = RowReader(text_field, prompt_field, output_field, messages_field, template)
    if _names_function(source):
        values = _as_sequence(load_function(source)())
        rows = Rows(source, values, lambda index: f"{source} sample {index}")
    else:
        rows = load_rows(source, split=split, format=format, num_proc=num_proc)
    return _read(rows, reader, filter=filter, max_samples=max_samples)


def load_eval_prompts(
    source: str | Sequence[Any],
) -> tuple[list[str | list[str]], dict[str, list[Any]]]:
    """Reads prompts to generate from.

    Args:
        source: prompts, each a str, a [prompt, output, ..., prompt] list, or a dict with
            "prompt" and metadata; or a file of them or "module:function".

    Returns:
        The prompts, and the metadata: for each key besides "prompt", a list with one
        value a prompt.

    Raises:
        ValueError: a prompt is wrong, or the prompts differ in their keys.
    """
    name: Callable[[int], str] = lambda index: f"eval_prompts[{index}]"  # noqa: E731
    if not isinstance(source, str):
        values = _as_sequence(source, what="eval_prompts")
    elif _names_function(source):
        values = _as_sequence(load_function(source)(), what="eval_prompts")
    else:
        rows = load_rows(source)
        values, name = rows.values, rows.name
    if not len(values):
        raise ValueError("eval_prompts is empty; pass at least one prompt, or None for none")
    prompts: list[str | list[str]] = []
    metadata: dict[str, list[Any]] = {}
    for index, value in enumerate(values):
        row = dict(value) if isinstance(value, Mapping) else {"prompt": value}
        if "prompt" not in row:
            raise ValueError(f'{name(index)} has keys {sorted(row)}; it needs the key "prompt"')
        prompts.append(read_prompt(row.pop("prompt"), name(index)))
        if not index:
            metadata = {key: [] for key in row}
        if row.keys() != metadata.keys():
            raise ValueError(
                f"{name(index)} has the keys {sorted(row)} beside its prompt, {name(0)} has "
                f"{sorted(metadata)}; give every prompt the same keys"
            )
        for key, extra in row.items():
            metadata[key].append(extra)
    return prompts, metadata


def load_function(spec: str) -> Callable[..., Any]:
    """Imports "module:function" or "path/to/file.py:function".

    Raises:
        ValueError: there is no such module or file, or nothing callable in it.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(f"{spec!r} names no function; write module:function or file.py:function")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else None
        module = module or importlib.import_module(place)
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
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _names_function(source: str) -> bool:
    """Whether a source is module:function and not a path, a URL or C:\\\\file."""
    place, _, name = source.rpartition(":")
    return bool(place) and name.isidentifier() and not Path(source).exists()


def _as_sequence(samples: Any, *, what: str = "samples") -> Sequence[Any]:
    """Something with a length and an index; the common mistakes are errors."""
    if isinstance(samples, str | bytes | Mapping):
        remedy = (
            'choose a split, as samples["train"]'
            if hasattr(samples, "num_rows")
            else (f"pass a list of them: [{short(samples)}]")
        )
        raise ValueError(f"{what} is a single {type(samples).__name__}; {remedy}")
    if hasattr(samples, "iterrows"):
        raise ValueError(f"{what} is a DataFrame; pass datasets.Dataset.from_pandas({what})")
    if not hasattr(samples, "__len__") or not hasattr(samples, "__getitem__"):
        raise ValueError(
            f"{what} is a {type(samples).__name__}, which cannot be indexed; pass list({what})"
        )
    if _is_table(samples):
        return samples.with_format(None)
    if hasattr(samples, "tolist"):  # numpy, pandas
        return samples.tolist()
    is_indexed = isinstance(samples, Sequence)
    return samples if is_indexed else [samples[index] for index in range(len(samples))]


def _is_table(rows: Any) -> bool:
    return hasattr(rows, "column_names") and hasattr(rows, "with_format")


def _read(rows: Rows, reader: RowReader, *, filter: str | None, max_samples: int | None) -> Samples:
    """Filters, cuts and checks; the Samples build their turns again when they are read."""
    values, dropped = rows.values, {"blank_line": rows.num_blank} if rows.num_blank else {}
    name = rows.name
    if not len(values):
        raise ValueError(f"{rows.source} is empty; there must be at least one sample")
    if filter is not None:
        indices, num_passed = _matching(values, rows.name, RowFilter(filter), max_samples)
        if not indices:
            raise ValueError(
                f"data.filter {filter!r} keeps none of {num_passed} rows; correct it, or set None"
            )
        if num_passed > len(indices):
            dropped["filter"] = num_passed - len(indices)
        values = values.select(indices) if _is_table(values) else [values[i] for i in indices]
        name = lambda index: rows.name(indices[index])  # noqa: E731
    elif max_samples is not None:
        num_kept = min(max_samples, len(values))
        values = values.select(range(num_kept)) if _is_table(values) else values[:num_kept]

    def to_sample(row: Any, index: int) -> Sample:
        origin = name(index)
        texts = reader.texts(row, origin)
        turns = (Turn(text, len(texts) == 1 or i % 2 == 1) for i, text in enumerate(texts))
        return Sample(tuple(turns), origin)

    samples = Samples(values, to_sample, dropped=dropped)
    kind = None
    for index, sample in enumerate(samples):
        this = "text" if len(sample.turns) == 1 else "a dialogue"
        kind = kind or this
        if this != kind:
            raise ValueError(
                f"{name(index)} is {this}, but {name(0)} is {kind}; make all samples the same kind"
            )
    return samples


def _matching(
    values: Sequence[Any], name: Callable[[int], str], keep: RowFilter, max_samples: int | None
) -> tuple[list[int], int]:
    """The indices of the rows to keep, and how many rows were looked at."""
    if _is_table(values):
        missing = sorted(keep.fields - set(values.column_names))
        if not missing and keep.fields:
            values = values.select_columns(sorted(keep.fields))
    indices: list[int] = []
    for index, row in enumerate(values):
        if len(indices) == max_samples:
            return indices, index
        if not isinstance(row, Mapping):
            raise ValueError(f"{name(index)} is no row with fields; set data.filter to None")
        if absent := sorted(keep.fields - row.keys()):
            raise ValueError(
                f"data.filter reads {absent[0]!r}, but {name(index)} has the fields {sorted(row)}"
            )
        try:
            kept = keep(row)
        except TypeError as error:
            raise ValueError(
                f"data.filter {keep.expression!r} fails on {name(index)} ({error}); compare fields "
                "with literals of their own type"
            ) from error
        if kept:
            indices.append(index)
    return indices, len(values)
