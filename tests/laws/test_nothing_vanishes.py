"""Law 10, the data's half: every row, and every trained token, is kept or counted."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import packaged_bytes

from jax_sft.data.batches import Batches
from jax_sft.data.packing import plan_rows
from jax_sft.data.report import data_report
from jax_sft.data.samples import read_samples
from jax_sft.data.tokenization import Encoding, tokenize_samples
from jax_sft.data.types import ExampleSet

ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.text("abc", max_size=14),
            "output": st.text("xyz", min_size=1, max_size=14),
            "label": st.integers(0, 2),
        }
    ),
    min_size=1,
    max_size=20,
)
OPTIONS = st.fixed_dictionaries(
    {
        "seq_length": st.integers(1, 12),
        "over_length": st.sampled_from(["truncate", "split", "drop"]),
        "truncation_side": st.sampled_from(["left", "right"]),
        "add_bos": st.sampled_from([None, True]),
        "add_eos": st.sampled_from([True, "last", False]),
    }
)


@given(ROWS, OPTIONS)
@settings(deadline=None, max_examples=80)
def test_rows_read_are_kept_or_dropped_for_a_counted_reason(rows, options):
    wanted = [row for row in rows if row["label"] != 1]
    if not wanted:
        return
    samples = read_samples(rows, filter="label != 1")
    examples, counts = tokenize_samples(samples, packaged_bytes(), Encoding(**options))
    lengths = examples.lengths_N
    plan = plan_rows(lengths, options["seq_length"])
    report = data_report(ExampleSet(examples, counts, ()), plan=plan)
    assert report["rows_read"] == len(rows)
    assert report["kept"] + sum(report["dropped"].values()) == len(rows)
    dropped = {reason: number for reason, number in report["dropped"].items() if number}
    assert dropped.pop("filter", 0) == len(rows) - len(wanted)
    assert set(dropped) <= {"no_trained_token", "over_length"}
    origins = [example.origin for example in examples]
    assert len(set(origins)) == report["kept"]
    # Every kept row is whole, truncated or split, and the three are told apart.
    num_ids = [
        len(row["prompt"] + row["output"])
        + bool(options["add_bos"])
        + (options["add_eos"] is not False)
        for row in rows
    ]
    whole = {f"samples[{i}]" for i, n in enumerate(num_ids) if n - 1 <= options["seq_length"]}
    assert report["truncated"] + report["split"] == len(set(origins) - whole)
    assert all(example.weights_T.any() for example in examples)


@given(ROWS, st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_split_loses_no_trained_token(rows, seq_length):
    samples = read_samples(rows)
    whole, _ = tokenize_samples(samples, packaged_bytes(), Encoding(seq_length=100))
    split, _ = tokenize_samples(
        samples, packaged_bytes(), Encoding(seq_length=seq_length, over_length="split")
    )

    def trained_pairs(examples):
        is_trained = examples.weights > 0
        return sorted(zip(examples.inputs[is_trained], examples.targets[is_trained], strict=True))

    assert trained_pairs(split) == trained_pairs(whole)


@given(ROWS, st.integers(1, 5), st.sampled_from(["best_fit", "none"]))
@settings(deadline=None, max_examples=60)
def test_an_epoch_trains_every_trained_token_once(rows, batch_size, packing):
    examples, _ = tokenize_samples(read_samples(rows), packaged_bytes(), Encoding(seq_length=32))
    batches = Batches(examples, seq_length=32, batch_size=batch_size, packing=packing)
    all_rows = [batches.rows(step) for step in range(batches.num_steps)]
    targets = np.concatenate([batch.targets_BT[batch.weights_BT > 0] for batch in all_rows])
    expected = examples.targets[examples.weights > 0]
    assert sorted(targets.tolist()) == sorted(expected.tolist())
