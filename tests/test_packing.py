"""Rows hold every example once, nearly full, and are filled with what they name."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sft.data.packing import fill_rows, plan_rows
from jax_sft.data.types import examples_from_parts

ROW_LEN = 16
LENGTHS = st.lists(st.integers(1, ROW_LEN), min_size=1, max_size=80).map(np.array)
OPTIONS = st.fixed_dictionaries(
    {
        "packing": st.sampled_from(["best_fit", "none"]),
        "shuffle": st.booleans(),
        "seed": st.integers(0, 9),
        "epoch": st.integers(0, 9),
    }
)


def lengths_of_rows(plan, lengths_N):
    return [lengths_N[plan.row(row)].tolist() for row in range(plan.num_rows)]


def make_examples(lengths):
    """Example i counts up from 100 * i, with weight i + 1."""
    parts = []
    for index, length in enumerate(lengths):
        ids = 100 * index + np.arange(length + 1, dtype=np.int32)
        parts.append((ids[:-1], ids[1:], np.full(length, index + 1, np.float32)))
    return examples_from_parts(parts)


@given(LENGTHS, OPTIONS)
@settings(deadline=None, max_examples=80)
def test_every_example_is_in_exactly_one_row_that_has_room(lengths_N, options):
    plan = plan_rows(lengths_N, ROW_LEN, **options)
    assert sorted(plan.examples_N.tolist()) == list(range(len(lengths_N)))
    rows = lengths_of_rows(plan, lengths_N)
    assert all(0 < sum(row) <= ROW_LEN for row in rows)
    assert plan.num_tokens == lengths_N.sum()
    assert plan.efficiency == plan.num_tokens / (plan.num_rows * ROW_LEN)
    if options["packing"] == "none":
        assert plan.num_rows == len(lengths_N)


@given(LENGTHS, OPTIONS)
@settings(deadline=None, max_examples=60)
def test_a_plan_is_a_function_of_seed_and_epoch(lengths_N, options):
    plan, again = (plan_rows(lengths_N, ROW_LEN, **options) for _ in range(2))
    assert plan.examples_N.tolist() == again.examples_N.tolist()
    assert plan.row_starts.tolist() == again.row_starts.tolist()


@given(LENGTHS, st.integers(0, 9), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_every_epoch_has_the_same_number_of_rows(lengths_N, seed, epoch):
    first = plan_rows(lengths_N, ROW_LEN, seed=seed, epoch=0)
    later = plan_rows(lengths_N, ROW_LEN, seed=seed, epoch=epoch)
    assert first.num_rows == later.num_rows
    assert sorted(lengths_of_rows(first, lengths_N)) == sorted(lengths_of_rows(later, lengths_N))


@given(LENGTHS)
@settings(deadline=None, max_examples=80)
def test_stacks_place_as_best_fit_decreasing_does(lengths_N):
    """The textbook loop: each item, longest first, into the fullest row that has room."""
    rooms = []
    for length in sorted(lengths_N.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else ROW_LEN) - length)
    plan = plan_rows(lengths_N, ROW_LEN)
    taken = [ROW_LEN - sum(row) for row in lengths_of_rows(plan, lengths_N)]
    assert sorted(taken) == sorted(rooms)


def test_worked_example_of_the_docstring():
    plan = plan_rows(np.array([5, 3, 4, 2]), 8, shuffle=False)
    assert lengths_of_rows(plan, np.array([5, 3, 4, 2])) == [[5, 3], [4, 2]]
    plan = plan_rows(np.array([5, 3, 4, 2]), 8, shuffle=False, packing="none")
    assert plan.examples_N.tolist() == [0, 1, 2, 3]


def test_shuffling_differs_between_epochs_and_seeds():
    lengths_N = np.random.default_rng(0).integers(1, 17, 200)
    for packing in ("best_fit", "none"):
        orders = {
            tuple(plan_rows(lengths_N, 16, packing=packing, seed=s, epoch=e).examples_N)
            for s, e in itertools.product(range(3), range(3))
        }
        assert len(orders) == 9


def test_shuffling_mixes_examples_of_one_length():
    """Which of the equal examples meet must change, not only the order of the rows."""
    partners = set()
    for epoch in range(8):
        plan = plan_rows(np.full(40, 8), 16, epoch=epoch)
        [row] = [r for r in range(plan.num_rows) if 0 in plan.row(r)]
        partners |= set(plan.row(row).tolist()) - {0}
    assert len(partners) > 3


def test_short_examples_fill_rows_to_over_99_percent():
    lengths_N = np.random.default_rng(0).lognormal(4.5, 0.9, 20_000).astype(int).clip(1, 1024)
    assert plan_rows(lengths_N, 1024).efficiency > 0.999
    assert plan_rows(lengths_N, 1024, shuffle=False).efficiency > 0.99


def test_unshuffled_rows_keep_the_order_of_the_data_within_a_window():
    lengths_N = np.random.default_rng(1).integers(1, 17, 6000)
    plan = plan_rows(lengths_N, 16, shuffle=False)
    firsts = [plan.row(row)[0] for row in range(plan.num_rows)]
    assert firsts == sorted(firsts)
    assert all((np.diff(plan.row(row)) > 0).all() for row in range(plan.num_rows))
    # A window is 256 rows' worth of tokens, here about 480 examples.
    assert abs(plan.examples_N - np.arange(6000)).max() < 600
    assert plan.num_rows > 3 * 256, "the test needs several windows"


def test_rows_longer_than_16_bits_pack_too():
    lengths_N = np.array([70_000, 60_000, 50_000, 20_000])
    plan = plan_rows(lengths_N, 120_000)
    assert sorted(map(sorted, lengths_of_rows(plan, lengths_N))) == [
        [20_000, 60_000],
        [50_000, 70_000],
    ]


@pytest.mark.parametrize("length", [0, 17])
def test_a_length_that_no_row_can_hold_is_named(length):
    with pytest.raises(ValueError, match=f"example 1 has {length} tokens, rows have 16"):
        plan_rows(np.array([3, length]), 16)


def test_an_unknown_packing_is_named():
    with pytest.raises(ValueError, match="'first_fit'; choose one of 'best_fit', 'none'"):
        plan_rows(np.array([3]), 16, packing="first_fit")


@given(LENGTHS, OPTIONS)
@settings(deadline=None, max_examples=60)
def test_rows_are_filled_with_the_examples_that_the_plan_names(lengths_N, options):
    examples = make_examples(lengths_N)
    plan = plan_rows(lengths_N, ROW_LEN, **options)
    batch = fill_rows(plan, range(plan.num_rows), examples, ROW_LEN)
    for row in range(plan.num_rows):
        end = 0
        for segment, index in enumerate(plan.row(row), start=1):
            example = examples[int(index)]
            span = slice(end, end + len(example.inputs_T))
            end = span.stop
            assert batch.inputs_BT[row, span].tolist() == example.inputs_T.tolist()
            assert batch.targets_BT[row, span].tolist() == example.targets_T.tolist()
            assert batch.weights_BT[row, span].tolist() == example.weights_T.tolist()
            assert batch.positions_BT[row, span].tolist() == list(range(len(example.inputs_T)))
            assert set(batch.segment_ids_BT[row, span].tolist()) == {segment}
        assert not any(array[row, end:].any() for array in batch)


def test_worked_example_of_a_batch():
    examples = make_examples([3, 2])
    plan = plan_rows(examples.lengths_N, 6, shuffle=False)
    batch = fill_rows(plan, [0], examples, 6)
    assert batch.inputs_BT.tolist() == [[0, 1, 2, 100, 101, 0]]
    assert batch.targets_BT.tolist() == [[1, 2, 3, 101, 102, 0]]
    assert batch.weights_BT.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.segment_ids_BT.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert [array.dtype for array in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]


def test_rows_beyond_the_plan_are_padding():
    examples = make_examples([3, 2, 9])
    plan = plan_rows(examples.lengths_N, 10)
    batch = fill_rows(plan, [5, 0, plan.num_rows], examples, 10)
    assert (batch.segment_ids_BT > 0).any(axis=1).tolist() == [False, True, False]
    assert not batch.weights_BT[[0, 2]].any()
    assert fill_rows(plan, [7], examples, 10).weights_BT.shape == (1, 10)
    assert fill_rows(plan, [], examples, 10).weights_BT.shape == (0, 10)
