"""What will be trained, in numbers: the data report.

What comes in are the examples, what became of every row and the plan of the packed rows.
What goes out is a dict for data_report.json, tables for the console, and an error where the
data would teach nothing, or not to stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jax_sft.data.packing import Plan
from jax_sft.data.token_view import printable
from jax_sft.data.types import Counts, Examples, ExampleSet, Source

_QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_MAX_BINS = 24
_PRINTED_BINS = 12
_NUM_LONGEST = 5
_BAR_WIDTH = 40
# Each is reported where there are any, in these words.
NOTES = {
    "truncated": "rows lost tokens to train.seq_length",
    "split": "rows were split into several examples",
    "untrained_chunks": "chunks of split rows train nothing and were left out",
    "partly_dropped": "conversations lost some of their answers to data.over_length",
    "unrolled": "conversations became an example an answer: the template rewrites earlier turns",
    "retokenized_boundaries": "places where the last of the prompt and the first of the answer "
    "would make one token, and were kept apart",
    "answers_without_stop": "whole answers train no stop token",
    "rows_with_more_stops": "rows train a stop token inside an answer, too",
    "added_stops": "answers were given an EOS, since the template writes no stop token",
    "examples_with_reasoning": "examples think before they answer",
    "unrendered_reasoning": "answers have reasoning that the template leaves out",
    "left_out_messages": "messages before answers are left out by the chat template",
    "left_out_tools": "conversations have tools that the chat template leaves out",
}


def run_report(
    train: ExampleSet,
    evals: Mapping[str, ExampleSet],
    *,
    plan: Plan | None = None,
    steps_per_epoch: int | None = None,
) -> dict[str, Any]:
    """A run's whole report: of what is trained, and under "eval" of each held-out set by name.

    Raises:
        ValueError: counts do not add up.
    """
    report = data_report(train, plan=plan, steps_per_epoch=steps_per_epoch)
    if evals:
        report["eval"] = {name: data_report(example_set) for name, example_set in evals.items()}
    return report


def data_report(
    example_set: ExampleSet, *, plan: Plan | None = None, steps_per_epoch: int | None = None
) -> dict[str, Any]:
    """The report of one set of examples, ready for JSON.

    Args:
        example_set: examples, and what became of every row.
        plan: of one epoch, `batches.plan(0)`; adds rows and packing_efficiency.
        steps_per_epoch: `batches.steps_in_epoch(0)`; added where known.

    Returns:
        Row counts that add up (rows_read = kept + the sum of dropped), in all and by source;
        tokens and trained_tokens, of all examples, which is of an epoch; quantiles and
        histograms of both by example; the longest examples, one a row; all other Counts.

    Raises:
        ValueError: the counts do not add up.
    """
    examples, counts, sources = example_set
    _check_counts(counts, sources)
    lengths_N, trained_N = examples.lengths_N, _trained_N(examples)
    num_tokens, num_trained = int(lengths_N.sum()), int(trained_N.sum())
    report: dict[str, Any] = {
        **_fates(counts),
        "sources": [
            {
                "name": source.name,
                "format": source.format,
                "times": source.times,
                **_fates(source.counts),
            }
            for source in sources
        ],
        "problems": {reason: list(shown) for reason, shown in counts.shown.items()},
        "partly_dropped": counts.partly_dropped,
        "untrained_chunks": counts.untrained_chunks,
        "examples": len(examples),
        "tokens": num_tokens,
        "trained_tokens": num_trained,
        "trained_share": num_trained / max(num_tokens, 1),
        "lengths": _quantiles(lengths_N),
        "length_histogram": histogram(lengths_N),
        "trained_lengths": _quantiles(trained_N),
        "trained_histogram": histogram(trained_N),
        "longest": _longest(examples),
        "retokenized_boundaries": counts.retokenized_boundaries,
        "stop_tokens": dict(counts.stop_tokens),
        "untruncated_answers": counts.untruncated_answers,
        "answers_without_stop": counts.answers_without_stop,
        "rows_with_more_stops": counts.rows_with_more_stops,
        "added_stops": counts.added_stops,
        "examples_with_reasoning": counts.examples_with_reasoning,
        "unrendered_reasoning": counts.unrendered_reasoning,
        "left_out_messages": counts.left_out_messages,
        "left_out_tools": counts.left_out_tools,
    }
    if plan is not None:
        report["rows"] = plan.num_rows
        report["packing_efficiency"] = plan.efficiency
    if steps_per_epoch is not None:
        report["steps_per_epoch"] = steps_per_epoch
    return report


def _fates(counts: Counts) -> dict[str, Any]:
    return {
        "rows_read": counts.rows_read,
        "kept": counts.kept,
        "dropped": dict(counts.dropped),
        "truncated": counts.truncated,
        "split": counts.split,
        "unrolled": counts.unrolled,
    }


def _check_counts(counts: Counts, sources: tuple[Source, ...]) -> None:
    for where, part in [("", counts), *((f"{s.name}: ", s.counts) for s in sources)]:
        num_dropped = sum(part.dropped.values())
        if part.rows_read != part.kept + num_dropped:
            raise ValueError(
                f"{where}{part.rows_read} rows were read, but {part.kept} kept and {num_dropped} "
                "dropped; the counts must add up, so pass those that tokenization returned"
            )
    num_read = sum(source.counts.rows_read for source in sources)
    if sources and num_read != counts.rows_read:
        raise ValueError(
            f"{counts.rows_read} rows were read, but {num_read} from the sources together; the "
            "counts must add up, so pass those that tokenization returned"
        )


def _trained_N(examples: Examples) -> np.ndarray:
    """The number of trained tokens of each example, int64."""
    if not len(examples):
        return np.zeros(0, np.int64)
    return np.add.reduceat(examples.weights != 0, examples.offsets[:-1], dtype=np.int64)


def _quantiles(values_N: np.ndarray) -> dict[str, int]:
    """Values that occur, in tokens; nothing where there are no examples."""
    if not len(values_N):
        return {}
    values = np.quantile(values_N, list(_QUANTILES.values()), method="higher")
    return {name: int(value) for name, value in zip(_QUANTILES, values, strict=True)}


def histogram(values_N: np.ndarray) -> dict[str, list[int]]:
    """Counts values in at most 24 bins: of one width up to the 99th percentile, then the tail.

        values 1 to 200, 5000    edges  0 10 20 ... 200 5001
                                 counts  9 10 ...   2

    So a few long examples do not push all others into one bin. Widths are 1, 2 or 5 times a
    power of ten.

    Args:
        values_N: whole numbers, at least 0.

    Returns:
        edges, one more than counts: bin i holds edges[i] <= value < edges[i + 1].
    """
    if not len(values_N):
        return {"edges": [], "counts": []}
    least, largest = int(values_N.min()), int(values_N.max())
    bulk = int(np.quantile(values_N, 0.99, method="higher"))
    widths = (step * 10**power for power in range(19) for step in (1, 2, 5))
    width = next(width for width in widths if bulk // width - least // width + 1 < _MAX_BINS)
    edges = [width * index for index in range(least // width, bulk // width + 2)]
    if largest < edges[-1]:
        edges.pop()
    edges.append(largest + 1)
    counts, _ = np.histogram(values_N, edges)
    return {"edges": edges, "counts": counts.tolist()}


def _longest(examples: Examples) -> list[dict[str, Any]]:
    """The longest examples, the first ones of equal length, and one of each row."""
    lengths_N = examples.lengths_N
    if not len(lengths_N):
        return []
    num_looked_at = min(64, len(lengths_N))  # chunks of one split row are passed over
    least = np.partition(lengths_N, -num_looked_at)[-num_looked_at]
    longer, equal = np.flatnonzero(lengths_N > least), np.flatnonzero(lengths_N == least)
    indices = np.concatenate([longer, equal[:num_looked_at]])
    indices = indices[np.argsort(-lengths_N[indices], kind="stable")]
    tokens: dict[str, int] = {}
    for index in indices.tolist():
        tokens.setdefault(examples[index].origin, int(lengths_N[index]))
    named = list(tokens.items())[:_NUM_LONGEST]
    return [{"origin": origin, "tokens": number} for origin, number in named]


def check_trained(example_set: ExampleSet, *, stop_tokens: Sequence[str] = ()) -> None:
    """Fails if the data would teach nothing, or not to end the answers that are whole.

    Truncated answers have lost their end and are not looked at. An answer whose own text
    holds the stop token trains more than one; those are reported, not refused. Rows that
    came as token ids may have been cut before: of them some, but not all, may lack it.

    Args:
        example_set: what is trained.
        stop_tokens: the texts of the tokens that were looked for, where they were chosen.

    Raises:
        ValueError: no row is trained, an untruncated answer trains no stop token, or stop tokens
            were chosen for rows that are no conversations.
    """
    counts = example_set.counts
    if not counts.kept:
        raise ValueError(
            f"nothing would be trained: {counts.rows_read:,} rows were read, and none was kept"
            f"{counts.dropped_in_words}; see their problems in the data report, and check the "
            "data's fields, train.seq_length, data.filter and data.train_turns"
        )
    for source in example_set.sources:
        _check_stop_tokens(source, stop_tokens)
    _check_chosen(example_set, stop_tokens)


def _check_chosen(example_set: ExampleSet, stop_tokens: Sequence[str]) -> None:
    """Chosen tokens end the answers of conversations, and are looked for in token ids."""
    counts = example_set.counts
    formats = {source.format for source in example_set.sources}
    if not stop_tokens or set(stop_tokens) & set(counts.stop_tokens):
        return
    # A prompt and its output may be messages, whose stop tokens are counted unless truncated.
    is_plain = formats <= {"text", "dialogue"}
    if is_plain or formats <= {"text", "dialogue", "prompt_output"} and counts.untruncated_answers:
        names = ", ".join(source.name for source in example_set.sources)
        raise ValueError(
            f"tokenizer.stop_tokens is {list(stop_tokens)}, but the rows of {names} are no "
            "conversations, and end in EOS as tokenizer.add_eos says: leave it out, or set "
            "data.stop_sequences to texts that end an output"
        )


def _check_stop_tokens(source: Source, stop_tokens: Sequence[str]) -> None:
    counts = source.counts
    num_without, num_answers = counts.answers_without_stop, counts.untruncated_answers
    if not num_without or source.format == "tokens" and num_without < num_answers:
        return
    names = dict.fromkeys([*stop_tokens, *counts.stop_tokens])
    looked_for = f" {' or '.join(map(repr, names))}" if names else ""
    remedy = "set tokenizer.add_eos=True"
    if source.format == "tokens":
        remedy = (
            "end them in one, name theirs in tokenizer.stop_tokens, or set tokenizer.add_eos=False "
            "if they are to have none"
        )
    elif source.format != "text":
        remedy = (
            "the chat template ends them in nothing that is a token of this tokenizer: name a "
            "token in tokenizer.stop_tokens, or choose another tokenizer.chat_template"
        )
    raise ValueError(
        f"{num_without:,} of {num_answers:,} untruncated answers of {source.name} train no stop "
        f"token{looked_for}, so the model would not learn to stop; {remedy}"
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report's lines as (what, value); what is zero and unremarkable is left out."""
    lines = [("rows", f"{report['rows_read']:,} read, {report['kept']:,} kept")]
    for reason, number in report["dropped"].items():
        lines.append(("dropped", f"{number:,} ({_words(reason)})"))
    lines += [
        ("examples", f"{report['examples']:,}"),
        ("lengths", _quantile_line(report["lengths"])),
        ("trained an example", _quantile_line(report["trained_lengths"])),
        (
            "tokens an epoch",
            f"{report['tokens']:,}, {report['trained_tokens']:,} trained "
            f"({report['trained_share']:.1%})",
        ),
        ("stop tokens", _stop_line(report)),
    ]
    if "rows" in report:
        packed = f"{report['rows']:,}, {report['packing_efficiency']:.1%} full"
        lines.append(("packed rows", packed))
    if "steps_per_epoch" in report:
        steps = report["steps_per_epoch"]
        each = round(report["trained_tokens"] / max(steps, 1))
        lines.append(("steps an epoch", f"{steps:,} of about {each:,} trained tokens"))
    for name, meaning in NOTES.items():
        if report[name]:
            lines.append((_words(name), f"{report[name]:,} {meaning}"))
    return lines


def _quantile_line(quantiles: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in quantiles.items()) or "none"


def _stop_line(report: dict[str, Any]) -> str:
    """Which tokens end the whole answers."""
    ends = [f"{token!r} ends {number:,}" for token, number in report["stop_tokens"].items()]
    if not ends:
        return "none"
    return f"{', '.join(ends)} of {report['untruncated_answers']:,} whole answers"


def print_report(
    report: dict[str, Any], *, title: str = "data", console: Console | None = None
) -> None:
    """Prints a report: its facts, sources, lengths, longest examples and dropped rows.

    Args:
        report: what `run_report` or `data_report` returned; eval sets have reports of their own.
        title: what stands above it.
        console: where to; None is standard output.
    """
    console = console or Console()

    def text(value: str) -> Text:  # Text, since a file may be called [bold]
        return Text(printable(value, console))

    table = Table(title=text(title), show_header=False, title_justify="left", min_width=40)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts(report):
        table.add_row(text(name), text(value))
    console.print(table)
    if len(report["sources"]) > 1:
        for source in report["sources"]:
            console.print(text(f"{source['name']}, {source['format']}"))
            _print_indented(text(_source_line(source)), console)
    if report["examples"]:
        console.print(Text("tokens an example"))
        _print_indented(_bars(report["length_histogram"], console), console)
        console.print(Text("the longest"))
    for row in report["longest"]:
        _print_indented(text(f"{row['tokens']:,} tokens: {row['origin']}"), console)
    for reason, problems in report["problems"].items():
        console.print(Text(f"dropped ({_words(reason)}), the first ones"))
        for problem in problems:
            _print_indented(text(problem), console)


def _print_indented(text: Text, console: Console) -> None:
    console.print(Padding.indent(text, 2))


def _source_line(source: dict[str, Any]) -> str:
    parts = [f"{source['rows_read']:,} read", f"{source['kept']:,} kept"]
    parts += [
        f"{source[name]:,} {name}" for name in ("truncated", "split", "unrolled") if source[name]
    ]
    parts += [
        f"{number:,} dropped ({_words(reason)})" for reason, number in source["dropped"].items()
    ]
    times = "" if source["times"] == 1 else f"; seen {source['times']:g} times an epoch"
    return ", ".join(parts) + times


def bin_names(edges: list[int]) -> list[str]:
    """What each bin holds: "0-9", or "7" where it holds one value."""
    return [
        f"{low:,}" if high == low + 1 else f"{low:,}-{high - 1:,}"
        for low, high in zip(edges, edges[1:], strict=False)
    ]


def _bars(held: dict[str, list[int]], console: Console) -> Text:
    """A bar a line; the longest is 40 wide, and what is not 0 has at least a thin one."""
    edges, counts = held["edges"], held["counts"]
    if len(counts) > _PRINTED_BINS:  # two bins a line, but the last ones always end at max
        counts = [sum(counts[index : index + 2]) for index in range(0, len(counts), 2)]
        edges = [*edges[:-1:2], edges[-1]]
    names, most = bin_names(edges), max(counts)
    name_width, count_width = max(map(len, names)), len(f"{most:,}")
    lines = []
    for name, count in zip(names, counts, strict=True):
        bar = _bar(count / most, console)
        lines.append(f"{name:>{name_width}}  {count:>{count_width},}  {bar}".rstrip())
    return Text("\n".join(lines))


def _bar(share: float, console: Console) -> str:
    if console.options.ascii_only:
        return "#" * max(round(share * _BAR_WIDTH), share > 0)
    eighths = max(round(share * _BAR_WIDTH * 8), share > 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
