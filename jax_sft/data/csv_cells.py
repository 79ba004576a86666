"""A CSV cell in a filter: a text that compares with a number as a number.

A CSV file has no types. Its cells are read as they are written, so that "007" trains as
"007", and `label == 1` still means the number; `zip == "02139"` means the text.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any


class Cell(str):
    """A str whose comparisons go by what it is compared with.

        Cell("2") == 2.0      Cell("02") == 2      Cell("02") != "2"      Cell("True") == True
        Cell("10") > Cell("9")     as both are numbers

    `<` and its like between a number and a cell that is none raise TypeError.
    """

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: Any) -> bool:
        return _compare(self, other, operator.eq)

    def __ne__(self, other: Any) -> bool:
        return not self == other

    def __lt__(self, other: Any) -> bool:
        return _compare(self, other, operator.lt)

    def __le__(self, other: Any) -> bool:
        return _compare(self, other, operator.le)

    def __gt__(self, other: Any) -> bool:
        return _compare(self, other, operator.gt)

    def __ge__(self, other: Any) -> bool:
        return _compare(self, other, operator.ge)

    def __neg__(self) -> float:
        number = _number(self)
        if number is None:
            raise TypeError(f"{str(self)!r} is no number")
        return -number

    def __bool__(self) -> bool:
        return len(self) > 0 and _number(self) != 0


def _compare(cell: Cell, other: Any, operation: Callable[[Any, Any], bool]) -> bool:
    number = _number(cell)
    if isinstance(other, Cell):
        both = number is not None and _number(other) is not None
        return operation(number, _number(other)) if both else operation(str(cell), str(other))
    if isinstance(other, str) or other is None:
        return operation(str(cell), other)
    if number is None and operation is operator.eq:
        return False
    if number is None:
        raise TypeError(f"{str(cell)!r} is no number")
    return operation(number, other)


def _number(cell: Cell) -> int | float | None:
    """What a cell says as a number, true and false being 1 and 0; None where it is none."""
    text = str(cell).strip().lower()
    if text in ("true", "false"):
        return int(text == "true")
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else None
    return None
