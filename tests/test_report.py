"""The data report adds up, prints what matters and refuses answers that never stop."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from small_tokenizers import packaged_bytes

from jax_sft.data.packing import plan_rows
from jax_sft.data.report import check_stop_tokens, coloured, data_report, print_report
from jax_sft.data.samples import read_samples
from jax_sft.data.tokenization import tokenize_samples
from jax_sft.data.types import Counts, examples_from_parts

SAMPLES = [["ab", "cd"], ["abcdefghij", "k"], ["a", "bcdefghijkl"], ["", "x"]]


def make_report(**options):
    samples = read_samples(SAMPLES)
    examples, counts = tokenize_samples(samples, packaged_bytes(), seq_length=8, **options)
    plan = plan_rows(examples.lengths_N, 8, shuffle=False)
    return data_report(examples, counts, plan=plan, steps_per_epoch=3), examples


def printed(report):
    console = Console(file=io.StringIO(), width=100)
    print_report(report, console=console)
    return console.file.getvalue()


def test_report_by_hand():
    report, _ = make_report()
    # "ab" "cd" EOS: 4 inputs, 3 trained. The second has no answer left within 9 ids. The third
    # keeps 8 inputs, all trained. "x" EOS: 1 input, 1 trained.
    assert report == {
        "rows_read": 4,
        "kept": 3,
        "dropped": {"no_trained_token": 1},
        "truncated": 1,
        "split": 0,
        "untrained_chunks": 0,
        "examples": 3,
        "tokens": 13,
        "trained_tokens": 12,
        "trained_share": 12 / 13,
        "lengths": {"min": 1, "p50": 4, "p90": 8, "p99": 8, "max": 8},
        "retokenized_boundaries": 0,
        "stop_token": "<|endoftext|>",
        "untruncated_answers": 2,
        "answers_without_stop": 0,
        "rows_with_more_stops": 0,
        "rows": 2,
        "packing_efficiency": 13 / 16,
        "steps_per_epoch": 3,
    }
    assert json.loads(json.dumps(report)) == report


def test_quantiles_are_lengths_that_occur():
    lengths = np.arange(1, 201)
    parts = [
        (np.zeros(n, np.int32), np.zeros(n, np.int32), np.ones(n, np.float32)) for n in lengths
    ]
    report = data_report(examples_from_parts(parts), Counts(rows_read=200, kept=200))
    assert report["lengths"] == {"min": 1, "p50": 101, "p90": 181, "p99": 199, "max": 200}
    assert "rows" not in report and "steps_per_epoch" not in report


def test_no_examples_still_make_a_report():
    counts = Counts()
    counts.drop("over_length", 2)
    report = data_report(examples_from_parts([]), counts)
    assert (report["examples"], report["trained_share"], report["lengths"]) == (0, 0.0, {})
    assert "2 (over length)" in printed(report)


def test_printed_report_names_what_matters():
    text = printed(make_report()[0])
    for fact in (
        "4 read, 3 kept",
        "1 (no trained token)",
        "truncated",
        "min 1, p50 4, p90 8, p99 8, max 8",
        "13, 12 trained (92.3%)",
        "81.2% full",
        "steps an epoch",
    ):
        assert fact in text, fact
    assert "split" not in text and "retokenized" not in text


def test_counts_that_do_not_add_up_are_refused():
    _, examples = make_report()
    with pytest.raises(ValueError, match="5 rows were read, but 3 kept and 1 dropped"):
        data_report(examples, Counts(rows_read=5, kept=3, dropped={"filter": 1}))


def test_answers_that_train_no_stop_token_are_refused():
    _, examples = make_report()
    counts = Counts(
        rows_read=3, kept=3, stop_token="</s>", untruncated_answers=3, answers_without_stop=1
    )
    with pytest.raises(ValueError, match="1 of 3 untruncated answers train no stop token '</s>'"):
        data_report(examples, counts)
    check_stop_tokens(Counts(untruncated_answers=3))
    assert make_report(add_eos=False)[0]["stop_token"] is None


def test_colours_show_the_mask_and_hide_no_token():
    _, examples = make_report()
    text = coloured(examples[0])
    assert text.plain == "abcd<|endoftext|>"
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in span.style]
    assert green == ["c", "d", "<|endoftext|>"]
    split = tokenize_samples(read_samples(["é"]), packaged_bytes(), seq_length=8)[0][0]
    assert coloured(split).plain == "Ã©<|endoftext|>"
