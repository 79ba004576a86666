"""Rows of token ids say what is trained by labels, a mask or weights, or all of it is."""

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_sft.data.samples import read_samples
from jax_sft.data.token_rows import MASKS, read_token_row
from jax_sft.data.types import BadRow


def read(**row):
    tokens = read_token_row(row, "row 3")
    assert tokens.ids_T.dtype == tokens.targets_T.dtype == np.int32
    assert tokens.weights_T.dtype == np.float32
    return [array.tolist() for array in (tokens.ids_T, tokens.targets_T, tokens.weights_T)] + [
        tokens.is_masked
    ]


def test_the_docstrings_example():
    assert read(
        input_ids=[5, 6, 7, 8, 0],
        attention_mask=[1, 1, 1, 1, 0],
        labels=[-100, -100, 7, 9, -100],
    ) == [[5, 6, 7, 8], [5, 6, 7, 9], [0, 0, 1, 1], True]


def test_without_labels_or_a_mask_all_is_trained():
    assert read(input_ids=[5, 6]) == [[5, 6], [5, 6], [1, 1], False]
    assert read(input_ids=np.array([5, 6], np.int64), labels=None)[3] is False
    assert read(input_ids=(0, 5, 6), attention_mask=[0, 1, 1])[0] == [5, 6]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("mask", [[0, 1, 1], [False, True, True], [0.0, 1.0, 1.0]])
def test_masks(name, mask):
    assert read(input_ids=[5, 6, 7], **{name: mask}) == [[5, 6, 7], [5, 6, 7], [0, 1, 1], True]


def test_weights_masks_and_labels_multiply():
    row = dict(input_ids=[5, 6, 7], loss_weights=[1, 0.5, 2])
    assert read(**row)[2] == [1, 0.5, 2]
    assert read(**row, labels=[-100, 6, 7])[2] == [0, 0.5, 2]
    assert read(**row, labels=[-100, 6, 7], loss_mask=[1, 0, 1])[2] == [0, 0, 2]


@pytest.mark.parametrize(
    ("row", "problem", "reason"),
    [
        ({}, "row 3 input_ids is None; pass a list of ints", "missing_field"),
        ({"input_ids": "abc"}, "row 3 input_ids is 'abc' (str)", "wrong_type"),
        ({"input_ids": ["a", "b"]}, "row 3 input_ids is ['a', 'b'] (list); pass a", "wrong_type"),
        ({"input_ids": [[1], [2, 3]]}, "row 3 input_ids is [[1], [2, 3]] (list)", "wrong_type"),
        ({"input_ids": [1, None]}, "row 3 input_ids is [1, None] (list)", "wrong_type"),
        ({"input_ids": [1.5, 2]}, "row 3 input_ids has 1.5; token ids are ints", "wrong_type"),
        ({"input_ids": [True, False]}, "row 3 input_ids has True", "wrong_type"),
        ({"input_ids": [1, -1]}, "row 3 input_ids has -1; token ids are from 0", "wrong_type"),
        ({"input_ids": [1, 2**31]}, "row 3 input_ids has 2147483648", "wrong_type"),
        ({"input_ids": [1]}, "row 3 has 1 token ids; there must be two", "too_few_tokens"),
        ({"input_ids": []}, "row 3 has 0 token ids", "too_few_tokens"),
        (
            {"input_ids": [1, 2], "attention_mask": [0, 1]},
            "row 3 has 1 token ids",
            "too_few_tokens",
        ),
        (
            {"input_ids": [1, 2], "labels": [1]},
            "row 3 has 2 input_ids, but 1 labels; give every id one",
            "mismatched_lengths",
        ),
        (
            {"input_ids": [1, 2], "loss_mask": [1, 1, 1]},
            "row 3 has 2 input_ids, but 3 loss_mask",
            "mismatched_lengths",
        ),
        ({"input_ids": [1, 2], "labels": 1}, "row 3 labels is 1 (int)", "wrong_type"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "row 3 labels has -1", "wrong_type"),
        ({"input_ids": [1, 2], "labels": [1.5, 2]}, "row 3 labels has 1.5", "wrong_type"),
        ({"input_ids": [1, 2.0**70]}, "has 1.1805916207174113e+21; token ids are", "wrong_type"),
        ({"input_ids": [1, -100]}, "row 3 input_ids has -100; token ids are from 0", "wrong_type"),
        ({"input_ids": [1, 2], "loss_mask": [1, 2]}, "is [1, 2] (list); a mask is", "wrong_type"),
        ({"input_ids": [1, 2], "loss_weights": [1, -2]}, "weights are numbers fro", "wrong_type"),
        ({"input_ids": [1, 2], "loss_weights": [1, np.nan]}, "weights are numbers", "wrong_type"),
    ],
)
def test_wrong_rows_are_named(row, problem, reason):
    with pytest.raises(BadRow) as caught:
        read_token_row(row, "row 3")
    message = str(caught.value)
    assert message.startswith("row 3") and problem in message and caught.value.reason == reason


def test_rows_of_tokens_are_known_by_their_field():
    rows = [
        {"input_ids": [5, 6], "labels": [-100, 6], "text": "a"},
        {"input_ids": [5, 6, 7], "labels": None, "messages": []},
    ]
    for samples in (read_samples(rows), read_samples(datasets.Dataset.from_list(rows))):
        assert samples.format == "tokens"
        assert [sample.content.is_masked for sample in samples] == [True, False]
    rows = [rows[0], {"input_ids": None, "text": "a"}, {"text": "b"}, "c", {}]
    assert read_samples(rows).format == "text", "as most of the first rows are"
    samples = read_samples(rows, row_format="tokens")
    problems = {1: "is text, but the samples are read as tokens", 2: "is text, but", 3: "is text"}
    problems[4] = "samples[4] has the fields [], but not 'input_ids'"
    for index, problem in problems.items():
        with pytest.raises(BadRow) as caught:
            samples[index]
        assert problem in str(caught.value)
        assert caught.value.reason == ("other_format" if index < 4 else "missing_field")


@given(st.data())
def test_token_rows_are_those_of_the_obvious_reference(data):
    n = data.draw(st.integers(2, 8))
    lists = {
        "input_ids": st.integers(0, 50_000),
        "labels": st.integers(0, 50_000) | st.just(-100),
        "completion_mask": st.integers(0, 1),
        "loss_weights": st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    }
    row = {
        name: data.draw(st.lists(values, min_size=n, max_size=n))
        for name, values in lists.items()
        if name == "input_ids" or data.draw(st.booleans())
    }
    targets, weights = [], []
    for t, token in enumerate(row["input_ids"]):
        label = row.get("labels", row["input_ids"])[t]
        targets.append(token if label == -100 else label)
        mask, weight = row.get("completion_mask", [1] * n)[t], row.get("loss_weights", [1] * n)[t]
        weights.append(0 if label == -100 else mask * weight)
    assert read(**row) == [row["input_ids"], targets, weights, len(row) > 1]


def test_whole_floats_are_ids():
    """Arrow makes every row's ids floats where one row has a float: only that row is wrong."""
    row = read_token_row({"input_ids": [5.0, 6.0, 7.0], "labels": [-100.0, 6.0, 7.0]}, "row 3")
    assert row.ids_T.tolist() == [5, 6, 7] and row.weights_T.tolist() == [0, 1, 1]
