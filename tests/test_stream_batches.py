"""A stream gives every example once an epoch, in bounded memory, and resumes at any step."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import packaged_bytes

from jax_sft.data.batches import EndOfStream
from jax_sft.data.samples import read_samples
from jax_sft.data.stream_batches import StreamBatches
from jax_sft.data.streams import open_stream
from jax_sft.data.tokenization import Encoding, tokenize_samples

ROWS = [[f"{n}?", "x" * (1 + n * 7 % 11)] for n in range(150)]
SEQ_LENGTH = 16


class Texts:
    """What can be read again and again, but not indexed."""

    def __init__(self, rows, length=None):
        self.rows, self.length, self.num_read = rows, length, 0

    def __iter__(self):
        for row in itertools.islice(self.rows, self.length):
            self.num_read += 1
            yield row


def stream_batches(rows=ROWS, **options):
    options = dict(batch_size=4, seed=3, look_ahead=8) | options
    encoding = Encoding(seq_length=SEQ_LENGTH, over_length="truncate")
    return StreamBatches(open_stream(Texts(rows)), packaged_bytes(), encoding, **options)


def all_batches(batches, first=0):
    found = []
    for step in itertools.count(first):
        try:
            found.append(batches.rows(step))
        except EndOfStream:
            return found


def examples_in(batches):
    """Each example as the bytes of its inputs, targets and weights, row by row."""
    found = []
    for batch in batches:
        for inputs, targets, weights, positions, segments in zip(*batch, strict=True):
            for segment in range(1, segments.max() + 1):
                inside = segments == segment
                assert positions[inside].tolist() == list(range(inside.sum()))
                found.append(tuple(map(bytes, (inputs[inside], targets[inside], weights[inside]))))
    return found


def expected_examples(rows=ROWS):
    examples, _ = tokenize_samples(
        read_samples(rows), packaged_bytes(), Encoding(seq_length=SEQ_LENGTH)
    )
    return sorted((bytes(e.inputs_T), bytes(e.targets_T), bytes(e.weights_T)) for e in examples)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_example_once(packing, shuffle):
    batches = all_batches(stream_batches(packing=packing, shuffle=shuffle))
    assert sorted(examples_in(batches)) == expected_examples()
    assert {batch.inputs_BT.shape for batch in batches} == {(4, SEQ_LENGTH)}
    behind = batches[-1].weights_BT[batches[-1].segment_ids_BT.max(axis=1) == 0]
    assert not behind.any()


def test_epochs_follow_one_another_in_other_orders():
    batches = stream_batches(epochs=2)
    found = examples_in(all_batches(batches))
    half = len(found) // 2
    assert sorted(found[:half]) == sorted(found[half:]) == expected_examples()
    assert found[:half] != found[half:]
    assert batches.counts.kept == 2 * len(ROWS)


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 6), st.booleans())
@settings(deadline=None, max_examples=30)
def test_a_run_resumes_at_any_step(step, look_ahead, batch_size, packs):
    options = dict(
        look_ahead=look_ahead,
        batch_size=batch_size,
        epochs=2,
        packing="best_fit" if packs else "none",
    )
    whole = stream_batches(**options)
    straight = all_batches(whole)
    step = min(step, len(straight) - 1)
    stopped, resumed = stream_batches(**options), stream_batches(**options)
    for done in range(min(step + 2, len(straight))):  # batches are prepared ahead
        stopped.rows(done)
    resumed.seek(stopped.mark(step))
    again = all_batches(resumed, step)
    assert len(again) == len(straight) - step
    for one, other in zip(straight[step:], again, strict=True):
        for field, same in zip(one, other, strict=True):
            np.testing.assert_array_equal(field, same)


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_hosts_fill_their_own_rows_of_the_same_batch(num_hosts):
    whole = all_batches(stream_batches())
    size = 4 // num_hosts
    for host in range(num_hosts):
        mine = stream_batches()
        for step, batch in enumerate(whole):
            part = mine.rows(step, (host * size, (host + 1) * size))
            for field, all_rows in zip(part, batch, strict=True):
                np.testing.assert_array_equal(field, all_rows[host * size : (host + 1) * size])


def test_it_reads_no_further_than_its_window_and_keeps_few():
    source = Texts(["p", "o" * 13] for n in itertools.count())
    source.rows = itertools.repeat(["p", "o" * 13])
    stream = open_stream(source)
    encoding = Encoding(seq_length=SEQ_LENGTH)
    batches = StreamBatches(stream, packaged_bytes(), encoding, batch_size=4, look_ahead=64)
    source.num_read = 0
    batches.rows(0)
    assert source.num_read <= 128, "64 rows of 15 tokens, in blocks of 64"
    for step in range(400):
        batches.rows(step)
    assert len(batches._windows) <= 4


def test_a_wrong_row_stops_the_run_when_it_is_read_or_is_counted():
    rows = [*ROWS[:100], ["p", ""], *ROWS[100:]]
    with pytest.raises(ValueError, match=r"samples\[100\]\[1\] is empty"):
        all_batches(stream_batches(rows))
    encoding = Encoding(seq_length=SEQ_LENGTH, on_bad_row="skip")
    batches = StreamBatches(
        open_stream(Texts(rows)), packaged_bytes(), encoding, batch_size=4, look_ahead=8
    )
    assert sorted(examples_in(all_batches(batches))) == expected_examples()
    assert batches.counts.dropped == {"empty_answer": 1}
    assert batches.counts.rows_read == len(rows)


def test_rows_that_the_filter_leaves_out_are_counted_once():
    rows = [{"prompt": f"{n}?", "output": "x" * 9, "label": n % 3} for n in range(900)]
    encoding = Encoding(seq_length=SEQ_LENGTH)
    stream = open_stream(Texts(rows), filter="label == 1")
    batches = StreamBatches(stream, packaged_bytes(), encoding, batch_size=4, look_ahead=8)
    assert batches.first.counts.dropped["filter"] < 600
    num_steps = len(all_batches(batches))
    assert (batches.counts.rows_read, batches.counts.kept) == (900, 300)
    assert batches.counts.dropped == {"filter": 600}
    again = StreamBatches(stream, packaged_bytes(), encoding, batch_size=4, look_ahead=8)
    middle = batches.mark(num_steps - 1)
    again.seek(middle)
    all_batches(again, first=num_steps - 1)
    assert 0 < again.counts.rows_read < 900


def test_windows_without_an_example_are_passed_over():
    long_prompts = [["p" * 99, "o"]] * 300
    batches = stream_batches([*ROWS[:10], *long_prompts, *ROWS[10:]])
    assert sorted(examples_in(all_batches(batches))) == expected_examples()
    nothing = stream_batches(long_prompts)
    expected = r"no example is left .* first 300 rows of .*dropped: 300 no trained token\)"
    with pytest.raises(ValueError, match=expected):
        _ = nothing.first


def test_a_batch_is_named_by_its_samples():
    batches = stream_batches()
    for step in range(4):
        batch = batches.rows(step)
        num_examples = int(batch.segment_ids_BT.max(axis=1).sum())
        assert batches.describe(step).startswith(f"step {step} trains on samples[")
        assert batches.describe(step).count("samples[") == num_examples
    assert stream_batches([["p", "only"]]).rows(0) is not None


def test_the_fingerprint_is_of_the_data_and_the_options():
    one = stream_batches().fingerprint
    assert one == stream_batches().fingerprint == stream_batches(epochs=5).fingerprint
    others = [dict(batch_size=2), dict(seed=4), dict(shuffle=False), dict(look_ahead=9)]
    prints = {stream_batches(**options).fingerprint for options in others}
    prints.add(stream_batches(ROWS[1:]).fingerprint)
    assert len(prints | {one}) == 6


def test_ids_outside_the_models_vocabulary_stop_the_run_when_they_are_read():
    batches = stream_batches()
    batches.vocab_size = 257
    assert len(all_batches(batches))
    batches = stream_batches()
    batches.vocab_size = 195
    with pytest.raises(ValueError, match="made token id 256, but the model's vocabulary has 195"):
        all_batches(batches)
