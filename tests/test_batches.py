"""Batches are a pure function of the step, whatever the mesh, and are prepared ahead."""

import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_sft.data.batches import Batches, prefetch
from jax_sft.data.types import Batch, examples_from_parts

T = 16


def make_examples(lengths):
    """Example i consists of the number i + 1, so that tokens tell examples apart."""
    parts = [
        (
            np.full(length, index + 1, np.int32),
            np.full(length, index + 1, np.int32),
            np.ones(length, np.float32),
        )
        for index, length in enumerate(lengths)
    ]
    return examples_from_parts(parts, origins=[f"samples[{i}]" for i in range(len(parts))])


def make_batches(num_examples=40, **options):
    lengths = np.random.default_rng(num_examples).integers(1, T + 1, num_examples)
    options = {"batch_size": 4, "epochs": 3, "seed": 5, **options}
    return Batches(make_examples(lengths), seq_length=T, **options)


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


OPTIONS = st.fixed_dictionaries(
    {
        "num_examples": st.integers(1, 30),
        "batch_size": st.integers(1, 9),
        "shuffle": st.booleans(),
        "packing": st.sampled_from(["best_fit", "none"]),
    }
)


@given(OPTIONS)
@settings(deadline=None, max_examples=60)
def test_every_example_is_seen_exactly_once_an_epoch(options):
    batches = make_batches(**options)
    per_epoch = batches.num_steps // 3
    assert [batches.steps_in_epoch(epoch) for epoch in range(3)] == [per_epoch] * 3
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = np.concatenate([batches.rows(step).inputs_BT.reshape(-1) for step in steps])
        counts = np.bincount(seen[seen > 0], minlength=options["num_examples"] + 1)[1:]
        assert counts.tolist() == batches.examples.lengths_N.tolist()


@given(OPTIONS, st.integers(0, 8), st.integers(0, 8))
@settings(deadline=None, max_examples=60)
def test_the_shards_of_any_hosts_are_the_global_batch(options, cut, other_cut):
    """However many hosts, each asks a fresh plan for its own rows; together they are one batch."""
    size = options["batch_size"]
    whole = make_batches(**options).rows(1 % make_batches(**options).num_steps)
    cuts = sorted({0, min(cut, size), min(other_cut, size), size})
    parts = []
    for lo, hi in zip(cuts[:-1], cuts[1:], strict=True):
        host = make_batches(**options)
        parts.append(host.rows(1 % host.num_steps, (lo, hi)))
    assert same(whole, (np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def test_a_step_does_not_depend_on_the_steps_before_it():
    forward, backward = make_batches(), make_batches()
    later = {step: backward.rows(step) for step in reversed(range(backward.num_steps))}
    for step in range(forward.num_steps):
        assert same(forward.rows(step), later[step])


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_epochs_differ_in_order_unless_it_is_kept(packing):
    for shuffle in (True, False):
        batches = make_batches(packing=packing, shuffle=shuffle)
        first, second = batches.rows(0), batches.rows(batches.steps_in_epoch(0))
        assert same(first, second) is not shuffle


def test_the_last_batch_is_completed_with_rows_of_weight_0():
    batches = make_batches(packing="none", num_examples=10, batch_size=4)
    assert batches.num_steps == 9 and batches.steps_in_epoch(0) == 3
    last = batches.rows(2)
    assert last.weights_BT.any(axis=1).tolist() == [True, True, False, False]
    assert not any(array[2:].any() for array in last)


def test_positions_restart_and_segments_are_apart():
    batch = make_batches(num_examples=60).rows(0)
    starts = batch.positions_BT == 0
    changes = np.diff(batch.segment_ids_BT, axis=1, prepend=0) > 0
    assert (starts & (batch.segment_ids_BT > 0)).tolist() == changes.tolist()
    assert batch.segment_ids_BT.max() > 1, "the test needs packed rows"
    # One number fills one example: a segment never holds two.
    for ids, segments in zip(batch.inputs_BT, batch.segment_ids_BT, strict=True):
        for segment in range(1, segments.max() + 1):
            assert len(set(ids[segments == segment].tolist())) == 1


def test_locate_and_steps_out_of_range():
    batches = make_batches(packing="none", num_examples=10, batch_size=4)
    assert [batches.locate(step) for step in (0, 2, 3, 8)] == [(0, 0), (0, 2), (1, 0), (2, 2)]
    for step in (-1, 9):
        with pytest.raises(ValueError, match=f"step is {step}; this run has steps 0 to 8"):
            batches.rows(step)
    with pytest.raises(ValueError, match="epoch is 3; this run has epochs 0 to 2"):
        batches.steps_in_epoch(3)
    with pytest.raises(ValueError, match="row_range is"):
        batches.rows(0, (2, 5))


def test_no_examples_and_numbers_below_1_are_errors():
    with pytest.raises(ValueError, match="no example is left to train on"):
        Batches(make_examples([]), seq_length=T, batch_size=4)
    for option in ("batch_size", "epochs"):
        with pytest.raises(ValueError, match=f"{option} is 0; it must be at least 1"):
            make_batches(**{option: 0})


def test_fingerprint_changes_with_whatever_changes_the_order():
    base = make_batches()
    assert base.fingerprint == make_batches().fingerprint
    assert base.fingerprint == make_batches(epochs=9).fingerprint
    changed = [
        make_batches(num_examples=41),
        make_batches(batch_size=8),
        make_batches(seed=6),
        make_batches(shuffle=False),
        make_batches(packing="none"),
        Batches(base.examples, seq_length=T + 1, batch_size=4, seed=5),
    ]
    for name in ("inputs", "targets", "weights"):
        other = make_batches()
        setattr(other.examples, name, getattr(other.examples, name) + 1)
        changed.append(other)
    assert base.fingerprint not in [batches.fingerprint for batches in changed]
    assert len({batches.fingerprint for batches in changed}) == len(changed)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 1), PartitionSpec("data")),
        ((4, 2), PartitionSpec("data", "sequence")),
        ((2, 4), PartitionSpec(None, "sequence")),
        ((4, 2), PartitionSpec(("data", "sequence"))),
        ((1, 8), PartitionSpec()),
    ],
)
def test_placed_arrays_are_the_rows(shape, spec):
    mesh = jax.make_mesh(shape, ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    batches = make_batches(batch_size=8)
    sharding = NamedSharding(mesh, spec)
    placed = batches.place(1, sharding)
    assert isinstance(placed, Batch) and same(placed, batches.rows(1))
    assert all(array.sharding == sharding for array in placed)
    assert [array.dtype for array in placed] == [
        np.int32,
        np.int32,
        np.float32,
        np.int32,
        np.int32,
    ]


def test_only_the_asked_rows_are_filled(monkeypatch):
    batches = make_batches(batch_size=8)
    asked = []
    rows = batches.rows
    monkeypatch.setattr(batches, "rows", lambda step, span: asked.append(span) or rows(step, span))
    mesh = jax.make_mesh((4, 2), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    batches.place(0, NamedSharding(mesh, PartitionSpec("data", "sequence")))
    assert sorted(asked) == [(0, 2), (2, 4), (4, 6), (6, 8)]


def test_describe_names_epoch_step_and_samples():
    batches = make_batches(packing="none", shuffle=False, num_examples=20, batch_size=2)
    assert batches.describe(11) == (
        "step 11 (epoch 1, step 1 of 10 in it) trains on samples[2], samples[3]"
    )
    many = make_batches(packing="none", shuffle=False, num_examples=20, batch_size=10)
    assert many.describe(0).endswith("samples[7] and 2 more")


def test_prefetch_gives_the_steps_in_order():
    assert list(prefetch(lambda step: step * step, range(7), depth=3)) == [
        step * step for step in range(7)
    ]
    assert list(prefetch(lambda step: step, [])) == []
    with pytest.raises(ValueError, match="depth is 0"):
        prefetch(lambda step: step, range(3), depth=0)


def test_prefetch_works_ahead_but_not_further_than_depth():
    made = []
    ready = threading.Event()

    def place(step):
        made.append(step)
        if step == 2:
            ready.set()
        return step

    items = prefetch(place, range(100), depth=2)
    assert next(items) == 0
    assert ready.wait(5)
    time.sleep(0.05)
    assert made == [0, 1, 2]
    items.close()


def test_prefetch_raises_where_the_error_belongs():
    def place(step):
        if step == 2:
            raise RuntimeError("row 7 is broken")
        return step

    items = prefetch(place, range(5))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(RuntimeError, match="row 7 is broken"):
        next(items)
    assert next(items, None) is None


def test_prefetch_closes_its_thread():
    def num_threads():
        return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())

    items = prefetch(lambda step: step, range(1000))
    next(items)
    assert num_threads() == 1
    items.close()
    assert num_threads() == 0
