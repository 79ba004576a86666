"""Examples in flat arrays behave as a sequence, and Samples are built when they are read."""

import datasets
import numpy as np
import pytest

from jax_sft.data.types import (
    Counts,
    Example,
    Examples,
    Origins,
    Samples,
    Turn,
    examples_from_parts,
    join_examples,
    join_origins,
)


def make_examples(lengths, start=0):
    parts = []
    for index, length in enumerate(lengths, start):
        ids = 10 * index + np.arange(length + 1)
        parts.append((ids[:-1], ids[1:], np.ones(length)))
    return examples_from_parts(
        parts, origins=[f"row {i}" for i in range(start, start + len(parts))]
    )


def contents(examples):
    return [(example.ids, example.weights_T.tolist(), example.origin) for example in examples]


def test_examples_are_a_sequence():
    examples = make_examples([3, 1, 2])
    assert len(examples) == 3 and examples.lengths_N.tolist() == [3, 1, 2]
    assert examples[0].ids == [0, 1, 2, 3] and examples[-1].ids == [20, 21, 22]
    assert [example.origin for example in examples] == ["row 0", "row 1", "row 2"]
    with pytest.raises(IndexError):
        examples[3]


@pytest.mark.parametrize(
    "index",
    [slice(None), slice(1, 3), slice(2, 99), slice(2, 1), slice(-2, None), slice(None, None, 2)],
)
def test_a_slice_of_examples_is_examples(index):
    examples = make_examples([3, 1, 2, 4])
    part = examples[index]
    assert contents(part) == contents(list(examples)[index])
    assert len(part.inputs) == part.lengths_N.sum()
    assert part.offsets[0] == 0 and part.inputs.dtype == np.int32


@pytest.mark.parametrize("index", [slice(1, 3), slice(2, 1), slice(-2, None), slice(None, None, 2)])
def test_names_that_are_made_when_asked_for_go_with_their_examples(index):
    listed = make_examples([3, 1, 2, 4])
    origins = Origins(np.array([0, 0, 7, 9]), "line {}".format)
    examples = Examples(
        listed.inputs, listed.targets, listed.weights, listed.offsets, origins=origins
    )
    names = ["line 0", "line 0", "line 7", "line 9"]
    assert [example.origin for example in examples[index]] == names[index]
    assert isinstance(examples[index].origins, Origins)
    assert examples[-1].origin == "line 9"


def test_names_of_several_sources_are_joined():
    parts = [
        Origins(np.array([1, 3]), "a {}".format),
        Origins(np.array([], np.int64), "b {}".format),
        Origins(np.array([0, 0, 2]), "c {}".format),
    ]
    expected = ["a 1", "a 3", "c 0", "c 0", "c 2"]
    joined = join_origins(parts)
    assert list(joined) == expected and isinstance(joined, Origins)
    assert list(join_origins([joined, parts[0]])) == [*expected, "a 1", "a 3"]
    assert list(join_origins([joined, ["row 5"]])) == [*expected, "row 5"]
    assert list(join_origins([])) == []


def test_joined_blocks_are_one():
    blocks = [make_examples([3, 1]), make_examples([]), make_examples([2], start=2)]
    joined = join_examples(blocks, origins=["row 0", "row 1", "row 2"])
    assert contents(joined) == contents(make_examples([3, 1, 2]))
    assert len(join_examples([])) == 0


def test_text_needs_a_tokenizer():
    example = Example(np.array([1]), np.array([2]), np.array([1.0]))
    with pytest.raises(ValueError, match="has no tokenizer"):
        example.text()


def test_samples_are_read_the_same_by_index_and_in_order():
    table = datasets.Dataset.from_dict({"a": [str(i) for i in range(2500)], "b": [0] * 2500})
    samples = Samples(table, lambda row, origin: (Turn(row["a"], 1.0),))
    assert list(samples) == [samples[i] for i in range(2500)]
    assert samples[-1].origin == "row 2499" and samples[2499].content[0].text == "2499"
    assert samples[7:9] == [samples[7], samples[8]]


def test_counts_add_up_as_they_grow():
    counts = Counts(rows_read=1, kept=1)
    counts.drop("too_long", 2)
    counts.drop("too_long")
    assert (counts.rows_read, counts.dropped) == (4, {"too_long": 3})
