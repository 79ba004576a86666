"""A small expression over a row's fields, such as `label == 1 and lang in ("en", "de")`.

What comes in is the text from `config.data.filter`, what goes out is a predicate on
rows. Comparisons, and/or/not, literals and field names are all there is: a config file
from elsewhere must not be able to run code.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}
Row = Mapping[str, Any]


class RowFilter:
    """A predicate on rows, and the names of the fields that it reads.

    Args:
        expression: comparisons (== != < <= > >= in, not in) of fields and literals,
            joined by and, or, not and parentheses.

    Raises:
        ValueError: the text is no such expression.
    """

    def __init__(self, expression: str) -> None:
        self.expression = expression
        self.fields: set[str] = set()
        try:
            tree = ast.parse(expression.strip(), mode="eval").body
        except (SyntaxError, ValueError) as error:
            raise self._error("it is not an expression") from error
        self._check(tree)
        self._tree = tree

    def __call__(self, row: Row) -> bool:
        """Whether the row is kept."""
        return bool(self._evaluate(self._tree, row))

    def _error(self, problem: str) -> ValueError:
        return ValueError(
            f"data.filter {self.expression!r}: {problem}; compare fields with literals, as in "
            '\'label == 1 and lang in ("en", "de")\''
        )

    def _check(self, node: ast.expr) -> None:
        match node:
            case ast.Name(id=name):
                self.fields.add(name)
            case ast.BoolOp(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    self._check(part)
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                self._check(operand)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                for op in ops:
                    if type(op) not in _COMPARISONS:
                        raise self._error("'is' is not a comparison here, use ==")
                for part in (left, *comparators):
                    self._check(part)
            case ast.Constant(value=str() | int() | float() | None):
                pass
            case _:
                raise self._error(f"{ast.unparse(node)!r} is not allowed")

    def _evaluate(self, node: ast.expr, row: Row) -> Any:
        match node:
            case ast.Name(id=name):
                return row[name]
            case ast.Constant(value=value):
                return value
            case ast.BoolOp(op=ast.And(), values=parts):
                return all(self._evaluate(part, row) for part in parts)
            case ast.BoolOp(values=parts):
                return any(self._evaluate(part, row) for part in parts)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._evaluate(operand, row)
            case ast.UnaryOp(operand=operand):
                return -self._evaluate(operand, row)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return [self._evaluate(part, row) for part in parts]
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                return self._compare(left, ops, comparators, row)
        raise AssertionError(f"unchecked node {node}")

    def _compare(
        self, left: ast.expr, ops: list[ast.cmpop], comparators: list[ast.expr], row: Row
    ) -> bool:
        """A chain such as 0 < label < 3."""
        value = self._evaluate(left, row)
        for op, comparator in zip(ops, comparators, strict=True):
            other = self._evaluate(comparator, row)
            if not _COMPARISONS[type(op)](value, other):
                return False
            value = other
        return True
