"""A CSV cell compares as what it is compared with."""

import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_sft.data.csv_cells import Cell
from jax_sft.data.row_filter import RowFilter


def test_the_docstrings_examples():
    assert Cell("2") == 2.0 and Cell("02") == 2 and Cell("02") != "2" and Cell("10") > Cell("9")
    assert Cell("True") == True  # noqa: E712
    assert not Cell("a") == 1 and Cell("a") != 1 and not Cell("") == None  # noqa: E711
    for compare in (operator.lt, operator.le, operator.gt, operator.ge):
        with pytest.raises(TypeError, match="'a' is no number"):
            compare(Cell("a"), 1)
    assert Cell("b") > "a" and Cell("b") > Cell("10")


@pytest.mark.parametrize(
    ("text", "is_true"),
    [("1", True), ("0", False), ("0.0", False), ("", False), ("false", False), ("True", True)]
    + [("no", True), (" ", True), ("nan", True)],
)
def test_a_cell_alone_is_true_unless_it_is_empty_zero_or_false(text, is_true):
    assert RowFilter("cell")({"cell": Cell(text)}) is is_true
    assert RowFilter("not cell")({"cell": Cell(text)}) is not is_true


def test_a_negated_cell_is_a_number():
    assert RowFilter("-cell == 3")({"cell": Cell("-3")})
    with pytest.raises(TypeError, match="'a' is no number"):
        RowFilter("-cell == 3")({"cell": Cell("a")})


@given(
    st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["==", "!=", "<", "<=", ">", ">="]),
)
def test_cells_of_numbers_compare_as_the_numbers(a, b, sign):
    expected = RowFilter(f"a {sign} b")({"a": a, "b": b})
    assert RowFilter(f"a {sign} b")({"a": Cell(a), "b": b}) is expected
    assert RowFilter(f"a {sign} b")({"a": a, "b": Cell(b)}) is expected
    assert RowFilter(f"a {sign} b")({"a": Cell(a), "b": Cell(b)}) is expected
    assert RowFilter("a in [b]")({"a": Cell(a), "b": b}) is (a == b)
