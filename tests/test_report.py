"""The data report adds up, prints what matters within 80 columns, and refuses what would not stop.

Its numbers are worked out by hand, for examples that are lists of weights.
"""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from jax_sft.data.packing import plan_rows
from jax_sft.data.report import (
    NOTES,
    check_trained,
    data_report,
    facts,
    histogram,
    print_report,
    run_report,
)
from jax_sft.data.types import Counts, ExampleSet, Source, examples_from_parts


def example_set(*weights, counts=None, sources=(), origins=None):
    """Examples with these weights, and ids 0; each is a row that was kept."""
    parts = [
        (np.zeros(len(w), np.int32), np.zeros(len(w), np.int32), np.array(w, np.float32))
        for w in weights
    ]
    if counts is None:
        counts = Counts(rows_read=len(parts), kept=len(parts))
    return ExampleSet(examples_from_parts(parts, origins=origins), counts, tuple(sources))


def two_sources():
    pairs = Counts(rows_read=4, kept=2, truncated=1, stop_tokens={"</s>": 1}, untruncated_answers=1)
    pairs.dropped = {"empty_output": 2}
    pairs.shown = {"empty_output": ["pairs.jsonl line 3: its output is empty"]}
    chats = Counts(rows_read=1, kept=1, unrolled=1, stop_tokens={"</s>": 1}, untruncated_answers=1)
    both = Counts()
    both.add(pairs)
    both.add(chats)
    sources = [
        Source("pairs.jsonl", "prompt_output", 1.0, pairs),
        Source("chats.jsonl", "messages", 2.0, chats),
    ]
    origins = ["pairs.jsonl line 1", "pairs.jsonl line 2", "chats.jsonl line 1"]
    weights = [0, 0, 1, 1], [0, 0.5, 1, 1, 1, 1, 1, 1], [0, 1]
    return example_set(*weights, counts=both, sources=sources, origins=origins)


def printed(report, *, width=80, encoding="utf-8", **options):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_report(report, console=Console(file=file, width=width, **options))
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def test_report_by_hand():
    given = two_sources()
    plan = plan_rows(given.examples.lengths_N, 8, shuffle=False)
    report = data_report(given, plan=plan, steps_per_epoch=1)
    # Lengths 4, 8 and 2; trained 2, 7 and 1. Packed as 8 and 4 + 2.
    assert report == {
        "rows_read": 5,
        "kept": 3,
        "dropped": {"empty_output": 2},
        "truncated": 1,
        "split": 0,
        "unrolled": 1,
        "sources": [
            {
                "name": "pairs.jsonl",
                "format": "prompt_output",
                "times": 1.0,
                "rows_read": 4,
                "kept": 2,
                "dropped": {"empty_output": 2},
                "truncated": 1,
                "split": 0,
                "unrolled": 0,
            },
            {
                "name": "chats.jsonl",
                "format": "messages",
                "times": 2.0,
                "rows_read": 1,
                "kept": 1,
                "dropped": {},
                "truncated": 0,
                "split": 0,
                "unrolled": 1,
            },
        ],
        "problems": {"empty_output": ["pairs.jsonl line 3: its output is empty"]},
        "partly_dropped": 0,
        "untrained_chunks": 0,
        "examples": 3,
        "tokens": 14,
        "trained_tokens": 10,
        "trained_share": 10 / 14,
        "lengths": {"min": 2, "p50": 4, "p90": 8, "p99": 8, "max": 8},
        "length_histogram": {"edges": list(range(2, 10)), "counts": [1, 0, 1, 0, 0, 0, 1]},
        "trained_lengths": {"min": 1, "p50": 2, "p90": 7, "p99": 7, "max": 7},
        "trained_histogram": {"edges": list(range(1, 9)), "counts": [1, 1, 0, 0, 0, 0, 1]},
        "longest": [
            {"origin": "pairs.jsonl line 2", "tokens": 8},
            {"origin": "pairs.jsonl line 1", "tokens": 4},
            {"origin": "chats.jsonl line 1", "tokens": 2},
        ],
        "retokenized_boundaries": 0,
        "stop_tokens": {"</s>": 2},
        "untruncated_answers": 2,
        "answers_without_stop": 0,
        "rows_with_more_stops": 0,
        "added_stops": 0,
        "examples_with_reasoning": 0,
        "unrendered_reasoning": 0,
        "left_out_messages": 0,
        "left_out_tools": 0,
        "rows": 2,
        "packing_efficiency": 14 / 16,
        "steps_per_epoch": 1,
    }
    assert json.loads(json.dumps(report)) == report
    assert set(NOTES) <= set(report)


def test_quantiles_are_lengths_that_occur():
    report = data_report(example_set(*([1] * length for length in range(1, 201))))
    assert report["lengths"] == {"min": 1, "p50": 101, "p90": 181, "p99": 199, "max": 200}
    assert report["trained_lengths"] == report["lengths"]
    assert "rows" not in report and "steps_per_epoch" not in report


def test_a_few_long_examples_do_not_flatten_the_histogram():
    held = histogram(np.array([*range(1, 201), 5000]))
    assert held["edges"] == [*range(0, 201, 10), 5001]
    assert held["counts"] == [9, *[10] * 19, 2]


@pytest.mark.parametrize("largest", [0, 1, 19, 23, 24, 512, 1024, 8191, 10**6])
@pytest.mark.parametrize("tail", [0, 1, 10**7])
@pytest.mark.parametrize("least", [0, 77])
def test_a_histogram_counts_every_value_once(least, largest, tail):
    values = least + np.array([*np.linspace(0, largest, 500).astype(int), largest + tail])
    held = histogram(values)
    assert sum(held["counts"]) == len(values) and len(held["counts"]) <= 24
    assert held["edges"][0] <= values.min() and held["edges"][-1] == values.max() + 1
    assert (np.diff(held["edges"]) > 0).all() and held["counts"][0] and held["counts"][-1]


def test_the_longest_are_the_first_of_equal_length_and_one_of_a_row():
    lengths = [3, 9, 9, 9, 5, 9, 1, 4, 2]
    origins = ["a", "big", "big", "big", "b", "c", "d", "e", "f"]
    report = data_report(example_set(*([1] * n for n in lengths), origins=origins))
    named = [(row["origin"], row["tokens"]) for row in report["longest"]]
    assert named == [("big", 9), ("c", 9), ("b", 5), ("e", 4), ("a", 3)]


def test_no_examples_still_make_a_report():
    counts = Counts()
    counts.drop("over_length", 2)
    report = data_report(example_set(counts=counts))
    assert (report["examples"], report["trained_share"], report["lengths"]) == (0, 0.0, {})
    assert report["length_histogram"] == {"edges": [], "counts": []} and report["longest"] == []
    assert "2 (over length)" in printed(report)
    with pytest.raises(ValueError, match=r"2 rows were read, and none was kept.*2 over length"):
        check_trained(ExampleSet(examples_from_parts([]), counts, ()))


def test_printed_report_names_what_matters():
    report = data_report(two_sources(), steps_per_epoch=5)
    text = " ".join(printed(report).replace("│", " ").split())
    for fact in (
        "5 read, 3 kept",
        "2 (empty output)",
        "1 rows lost tokens to train.seq_length",
        "min 2, p50 4, p90 8, p99 8, max 8",
        "14, 10 trained (71.4%)",
        "'</s>' ends 2 of 2 whole answers",
        "5 of about 2 trained tokens",
        "pairs.jsonl, prompt_output 4 read, 2 kept, 1 truncated, 2 dropped (empty output)",
        "chats.jsonl, messages 1 read, 1 kept, 1 unrolled; seen 2 times an epoch",
        "8 tokens: pairs.jsonl line 2",
        "pairs.jsonl line 3: its output is empty",
    ):
        assert fact in text, fact
    assert "split" not in text and "retokenized" not in text


def test_what_counts_tell_is_said_where_there_is_any():
    report = data_report(two_sources()) | dict.fromkeys(NOTES, 7)
    said = dict(facts(report))
    assert [name for name in NOTES if not said[name.replace("_", " ")].startswith("7 ")] == []


def test_eval_sets_are_reported_by_name():
    held_out = example_set([1, 1, 1])
    report = run_report(two_sources(), {"": held_out, "law": held_out}, steps_per_epoch=5)
    assert list(report["eval"]) == ["", "law"]
    assert report["eval"]["law"] == data_report(held_out)
    assert "eval" not in run_report(two_sources(), {})


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_lines_keep_to_80_columns_in_any_encoding(encoding):
    given = two_sources()
    name = "some/" + "very-long-" * 12 + "näme [red] \x1b[31m\n"
    counts = Counts(rows_read=1, dropped={"bad": 1}, shown={"bad": [f"{name} is bad " * 5]})
    both = Counts()
    for part in (*(source.counts for source in given.sources), counts):
        both.add(part)
    given = given._replace(
        counts=both, sources=(*given.sources, Source(name, "messages", 0.5, counts))
    )
    text = printed(data_report(given, steps_per_epoch=10**9), encoding=encoding)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text and "[red]" in text.replace("\n", "").replace(" ", "")
    assert "#" in text or encoding == "utf-8"
    assert "█" in text or encoding != "utf-8"


@pytest.mark.parametrize("num_bins", [1, 2, 11, 12, 13, 20, 23, 24])
def test_bars_hold_every_example(num_bins):
    lengths = [length for length in range(1, num_bins) for _ in range(length)] or [0]
    report = data_report(example_set([1])) | {"length_histogram": histogram(np.array(lengths))}
    lines = printed(report).partition("tokens an example\n")[2].partition("the longest")[0]
    rows = [line.split() for line in lines.splitlines()]
    assert sum(int(row[1]) for row in rows) == len(lengths) and len(rows) <= 12
    assert rows[0][0].startswith(str(min(lengths))) and rows[-1][0].endswith(str(num_bins - 1))
    assert max(len(row[2]) for row in rows if len(row) > 2) == 40


def test_counts_that_do_not_add_up_are_refused():
    given = two_sources()
    wrong = Counts(rows_read=5, kept=3, dropped={"filter": 1})
    with pytest.raises(ValueError, match="5 rows were read, but 3 kept and 1 dropped"):
        data_report(given._replace(counts=wrong))
    source = Source("a.csv", "text", 1.0, wrong)
    with pytest.raises(ValueError, match=r"a\.csv: 5 rows were read, but 3 kept"):
        data_report(given._replace(sources=(source,)))
    with pytest.raises(ValueError, match="5 rows were read, but 4 from the sources together"):
        data_report(given._replace(sources=given.sources[:1]))


def check(format="prompt_output", chosen=(), **counts):
    counts = Counts(rows_read=3, kept=3, **counts)
    source = Source("a.jsonl", format, 1.0, counts)
    check_trained(ExampleSet(examples_from_parts([]), counts, (source,)), stop_tokens=chosen)


def test_stop_tokens_for_what_is_no_conversation_are_refused():
    stops = dict(stop_tokens={"</s>": 3}, untruncated_answers=3)
    for format in ("text", "dialogue", "prompt_output"):
        with pytest.raises(ValueError) as error:
            check(format, ["zzz"], **stops)
        message = str(error.value)
        assert "\n" not in message and "a.jsonl" in message
        assert "tokenizer.stop_tokens is ['zzz'], but" in message
        assert "data.stop_sequences" in message
    with pytest.raises(ValueError, match="tokenizer.stop_tokens is"):
        check("text", ["zzz"])
    check("prompt_output", ["zzz"])  # conversations, perhaps, all of them truncated
    check("prompt_output", ["</s>"], **stops)
    check("messages", ["zzz"], **stops)
    check("tokens", ["zzz"], **stops)


def test_answers_that_train_no_stop_token_are_refused():
    stops = dict(stop_tokens={"</s>": 3}, untruncated_answers=3)
    check(**stops)
    expected = "1 of 3 untruncated answers of a.jsonl train no stop token '</s>'"
    with pytest.raises(ValueError, match=expected):
        check(**stops, answers_without_stop=1)
    counts = Counts(rows_read=3, kept=3, **stops, answers_without_stop=1)
    examples = examples_from_parts([])
    sources = (Source("a", "text", 1.0, Counts()), Source("b", "text", 1.0, counts))
    with pytest.raises(
        ValueError, match=r"'<end>' or '</s>', so .*tokenizer\.add_eos=True"
    ) as error:
        check_trained(ExampleSet(examples, counts, sources), stop_tokens=("<end>",))
    assert "\n" not in str(error.value)
    with pytest.raises(
        ValueError, match="no stop token, so .* ends them in nothing that is a token"
    ):
        check("messages", untruncated_answers=3, answers_without_stop=3)
    check("tokens", **stops, answers_without_stop=2)
    with pytest.raises(ValueError, match="3 of 3 untruncated answers.*; end them in one, name"):
        check("tokens", untruncated_answers=3, answers_without_stop=3)
    with pytest.raises(ValueError, match="nothing would be trained: 0 rows"):
        check_trained(ExampleSet(examples, Counts(), ()))
