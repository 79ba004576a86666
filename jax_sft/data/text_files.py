"""Text files as they are found: opened, counted, and the line named where they are wrong.

What comes in is a path (a .gz file is read as what is in it), what goes out are lines,
JSON values, or a CSV file's columns. A fault is a ValueError
that names the file, the line and the remedy; where lines are rows, one that is wrong is
a BadRow in its place, and the others are read.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import sys
import zlib
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from jax_sft.data.types import BadRow

_BLANK = re.compile(r"[ \t\r\n]*")


@contextmanager
def open_text(
    path: Path, *, newline: str | None = None, errors: str = "strict"
) -> Iterator[IO[str]]:
    """Opens a file as UTF-8 text; bytes that are none are an error that names their line.

    With another word for `errors` they are what `open` makes of them.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        opened = opener(path, "rt", encoding="utf-8-sig", newline=newline, errors=errors)
    except OSError as error:
        raise ValueError(
            f"{path}: it cannot be opened ({error.strerror}); see to its rights, or pass a copy"
        ) from error
    with opened as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            line, begins = _line_that_is_no_text(path)
            raise ValueError(_no_text(path, line, error, begins)) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: no whole gzip file ({error}); make it again") from error


def _no_text(path: Path, line: int, error: UnicodeDecodeError, begins: bytes) -> str:
    remedy = "convert the file to UTF-8"
    if begins.startswith(b"\x1f\x8b"):
        remedy = "it holds gzip data: unpack it, once more if it was unpacked"
    return f"{path} line {line}: not UTF-8 text ({error.reason}); {remedy}"


def _line_that_is_no_text(path: Path) -> tuple[int, bytes]:
    """The number of the line, and what the file begins with."""
    opener = gzip.open if path.suffix == ".gz" else open
    begins = b""
    with opener(path, "rb") as file:
        for number, line in enumerate(file, 1):
            begins = begins or line[:2]
            try:
                line.decode()
            except UnicodeDecodeError:
                return number, begins
    return 1, begins  # a character is cut where the file ends


def text_lines(path: Path) -> Iterator[tuple[int, str | BadRow]]:
    """The lines that are not blank, with their numbers; a BadRow for one that is no UTF-8.

    Raises:
        ValueError: the file holds gzip data.
    """
    with open_text(path, errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            try:
                line.encode()
            except UnicodeEncodeError:
                yield number, _line_of_no_text(path, number, line)
            else:
                if line.strip():
                    yield number, line


def _line_of_no_text(path: Path, number: int, line: str) -> BadRow:
    raw = line.encode(errors="surrogateescape")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        message = _no_text(path, number, error, raw if number == 1 else b"")
        if number == 1 and raw.startswith(b"\x1f\x8b"):
            raise ValueError(message) from error
        return BadRow(message, reason="not_utf8")
    raise AssertionError(f"{path} line {number} is UTF-8")


def filled_places(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the lines that are not blank are.

    Returns:
        Their numbers, from 1, and the bytes that they begin at and end before, in what a .gz
        file holds; int64 each.
    """
    numbers, starts, ends, end = array("q"), array("q"), array("q"), 0
    # Line ends stay as they are, so that bytes can be counted.
    with open_text(path, newline="", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            start, end = end, end + len(line.encode(errors="surrogateescape"))
            if line.strip():
                numbers.append(number)
                starts.append(start)
                ends.append(end)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        has_bom = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    before = len(codecs.BOM_UTF8) if has_bom else 0  # which is no part of the first line
    numbers_N, starts_N, ends_N = (np.array(a, np.int64) for a in (numbers, starts, ends))
    return numbers_N, starts_N + before, ends_N + before


def count_lines(path: Path) -> int:
    """How many lines a file has, blank ones among them."""
    with open_text(path, errors="replace") as file:
        return sum(1 for _ in file)


def head_of(path: Path) -> str:
    """What a file begins with, blanks aside."""
    with open_text(path, errors="replace") as file:
        return file.read(4096).lstrip()


def json_array(path: Path) -> Iterator[Any]:
    """The values of a file that holds one JSON array.

    Raises:
        ValueError: a value is no JSON, or an object has a key twice; it names the line.
    """
    with open_text(path) as file:
        yield from _values_of_array(file.read(), path)


def json_line(line: bytes, path: Path, number: int) -> Any:
    """The value that a line's bytes hold, or a BadRow that names it.

    Raises:
        ValueError: the file holds gzip data.
    """
    try:
        return json_value(line.decode(), path, number)
    except UnicodeDecodeError:
        return _line_of_no_text(path, number, line.decode(errors="surrogateescape"))


def json_value(line: str, path: Path, number: int) -> Any:
    """The value that one line of a file holds, or a BadRow that names the line by its number."""
    try:
        return json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        return _malformed(path, number, error.msg)
    except (_DuplicateKey, RecursionError, ValueError) as error:
        return _unread(path, number, error)


def _values_of_array(text: str, path: Path) -> Iterator[Any]:
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    at = counted = _after_blanks(text, 0)
    line = 1 + text.count("\n", 0, at)
    try:
        at = _after_blanks(text, at + 1)  # the bracket
        while text[at : at + 1] != "]":
            line, counted = line + text.count("\n", counted, at), at
            value, at = decoder.raw_decode(text, at)
            yield value
            at = _after_blanks(text, at)
            if text[at : at + 1] == ",":
                comma, at = at, _after_blanks(text, at + 1)
                if text[at : at + 1] == "]":
                    raise json.JSONDecodeError("Comma behind the last value", text, comma)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        if _after_blanks(text, at + 1) != len(text):
            raise json.JSONDecodeError("Extra data", text, at + 1)
    except json.JSONDecodeError as error:
        raise _malformed(path, error.lineno, error.msg) from error
    except (_DuplicateKey, RecursionError, ValueError) as error:
        raise _unread(path, line, error) from error


def _after_blanks(text: str, start: int) -> int:
    return _BLANK.match(text, start).end()


class _DuplicateKey(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return value


def _malformed(path: Path, line: int, problem: str) -> BadRow:
    return BadRow(
        f"{path} line {line}: malformed JSON ({problem}); correct it, write each value on a line "
        "of its own, or set data.format",
        reason="malformed_json",
    )


def _unread(path: Path, line: int, error: Exception) -> BadRow:
    """What is said of JSON that is well-formed, but not to be read."""
    match error:
        case _DuplicateKey():
            problem = (
                f"an object has the key {error.args[0]!r} twice, so that one value would be lost; "
                "rename one"
            )
        case RecursionError():
            problem = "values nested too deep; flatten them"
        case _:
            problem = "a number of thousands of digits; write it as a text, or shorter"
    return BadRow(f"{path} line {line}: {problem}", reason="unreadable_json")


def csv_columns(path: Path) -> tuple[list[str], np.ndarray]:
    """The columns of a CSV file, and the line that each row begins on; every row is looked at.

    A row of another width is an error: readers shift such a row's cells without a word.

    Raises:
        ValueError: two columns have one name, or a row has not one cell a column.
    """
    columns: list[str] = []
    lines = array("q")
    with closing(_csv_records(path)) as records:
        for line, cells in records:
            if not columns:
                columns = cells
                _check_names(path, columns)
                continue
            if len(cells) != len(columns):
                raise ValueError(
                    f"{path} line {line}: {len(cells)} cells, but {len(columns)} columns; quote "
                    "cells that hold a comma or a quotation mark"
                )
            lines.append(line)
    return columns, np.frombuffer(lines, np.int64) if lines else np.zeros(0, np.int64)


def csv_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file whose columns were checked, one after another."""
    with closing(_csv_records(path)) as records:
        _, columns = next(records, (0, []))
        for _, cells in records:
            yield dict(zip(columns, cells, strict=True))


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The cells of each record that is not blank, and the line that it begins on."""
    with open_text(path, newline="") as file:
        records = csv.reader(file)
        while True:
            line = records.line_num + 1
            try:
                with _long_cells():
                    cells = next(records, None)
            except csv.Error as error:
                raise ValueError(
                    f"{path} line {records.line_num}: malformed CSV ({error})"
                ) from error
            if cells is None:
                return
            if cells and not (len(cells) == 1 and cells[0].isspace()):
                yield line, cells


def _check_names(path: Path, columns: list[str]) -> None:
    for separator in (";", "\t", "|"):
        if len(columns) == 1 and separator in columns[0]:
            raise ValueError(
                f"{path}: its columns seem to be separated by {separator!r}; write commas"
            )
    for name in columns:
        if columns.count(name) > 1:
            raise ValueError(f"{path}: two columns are named {name!r}; rename one of them")


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lifts the limit of 131,072 characters a cell, which is the whole process's."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def state_of(path: Path) -> tuple[int, int]:
    """What changes when a file is written to: its size and its time."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def check_unchanged(path: Path, state: tuple[int, int]) -> None:
    """Raises ValueError if a file was written to since state_of(path) was taken."""
    if not path.exists() or state_of(path) != state:
        raise ValueError(
            f"{path}: the file changed while it was read; read a copy, or wait until it is written"
        )
