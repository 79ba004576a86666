"""What will be trained, in numbers: the data report, and an example in colour.

What comes in are the examples, their counts and the plan of their rows, what goes out
is a dict for data_report.json, a table for the console, and an error where answers
would not teach the model to stop.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jax_sft.data.packing import Plan
from jax_sft.data.types import Counts, Example, Examples

_QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def data_report(
    examples: Examples,
    counts: Counts,
    *,
    plan: Plan | None = None,
    steps_per_epoch: int | None = None,
) -> dict[str, Any]:
    """The data report, ready for JSON.

    Args:
        examples: what `tokenize_samples` returned.
        counts: what it returned beside them.
        plan: of one epoch, `batches.plan(0)`; adds rows and packing_efficiency.
        steps_per_epoch: `batches.steps_in_epoch(0)`; added where known.

    Returns:
        Row counts that add up (rows_read = kept + the sum of dropped), tokens (inputs of
        all examples), trained_tokens, their share, quantiles of the examples' lengths.

    Raises:
        ValueError: the counts do not add up, or an answer trains no stop token.
    """
    num_dropped = sum(counts.dropped.values())
    if counts.rows_read != counts.kept + num_dropped:
        raise ValueError(
            f"{counts.rows_read} rows were read, but {counts.kept} kept and {num_dropped} dropped; "
            "the counts must add up, so pass those that tokenize_samples returned"
        )
    check_stop_tokens(counts)
    num_tokens = int(examples.lengths_N.sum())
    num_trained = int(np.count_nonzero(examples.weights))
    report: dict[str, Any] = {
        "rows_read": counts.rows_read,
        "kept": counts.kept,
        "dropped": dict(counts.dropped),
        "truncated": counts.truncated,
        "split": counts.split,
        "untrained_chunks": counts.untrained_chunks,
        "examples": len(examples),
        "tokens": num_tokens,
        "trained_tokens": num_trained,
        "trained_share": num_trained / max(num_tokens, 1),
        "lengths": _quantiles(examples.lengths_N),
        "retokenized_boundaries": counts.retokenized_boundaries,
        "stop_token": counts.stop_token,
        "untruncated_answers": counts.untruncated_answers,
        "answers_without_stop": counts.answers_without_stop,
        "rows_with_more_stops": counts.rows_with_more_stops,
    }
    if plan is not None:
        report["rows"] = plan.num_rows
        report["packing_efficiency"] = plan.efficiency
    if steps_per_epoch is not None:
        report["steps_per_epoch"] = steps_per_epoch
    return report


def _quantiles(lengths_N: np.ndarray) -> dict[str, int]:
    """Lengths that occur, in tokens; nothing where there are no examples."""
    if not len(lengths_N):
        return {}
    values = np.quantile(lengths_N, list(_QUANTILES.values()), method="higher")
    return {name: int(value) for name, value in zip(_QUANTILES, values, strict=True)}


def check_stop_tokens(counts: Counts) -> None:
    """Fails if the model would not learn to end the answers that are whole.

    Truncated answers have lost their end and are not looked at. An answer whose own text
    holds the stop token trains more than one; those are reported, not refused.

    Raises:
        ValueError: an untruncated answer trains no stop token.
    """
    if counts.answers_without_stop:
        raise ValueError(
            f"{counts.answers_without_stop} of {counts.untruncated_answers} untruncated answers "
            f"train no stop token {counts.stop_token!r}, so the model would not learn to stop; set "
            "tokenizer.add_eos=True, or False if this is intended"
        )


def print_report(
    report: dict[str, Any], *, title: str = "data", console: Console | None = None
) -> None:
    """Prints a data report as a table of one fact a line.

    Args:
        report: what `data_report` returned.
        title: what stands above it.
        console: where to; None is standard output.
    """
    table = Table(title=title, show_header=False, title_justify="left", min_width=40)
    for name, value in _facts(report):
        table.add_row(name, value)
    (console or Console()).print(table)


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the printed report; what is zero and unremarkable is left out."""
    facts = [("rows", f"{report['rows_read']:,} read, {report['kept']:,} kept")]
    for reason, number in report["dropped"].items():
        facts.append(("dropped", f"{number:,} ({reason.replace('_', ' ')})"))
    for name in ("truncated", "split", "untrained_chunks", "rows_with_more_stops"):
        if report[name]:
            facts.append((name.replace("_", " "), f"{report[name]:,}"))
    if report["retokenized_boundaries"]:
        number = report["retokenized_boundaries"]
        facts.append(("retokenized boundaries", f"{number:,} (prompt and output would merge)"))
    lengths = ", ".join(f"{name} {value:,}" for name, value in report["lengths"].items())
    facts.append(("examples", f"{report['examples']:,}"))
    facts.append(("lengths", lengths or "none"))
    share = f"{report['trained_share']:.1%}"
    trained = f"{report['tokens']:,}, {report['trained_tokens']:,} trained ({share})"
    facts.append(("tokens", trained))
    stop = report["stop_token"]
    answers = f"{stop!r} in {report['untruncated_answers']:,} whole answers" if stop else "none"
    facts.append(("stop token", answers))
    if "rows" in report:
        packed = f"{report['rows']:,}, {report['packing_efficiency']:.1%} full"
        facts.append(("packed rows", packed))
    if "steps_per_epoch" in report:
        facts.append(("steps an epoch", f"{report['steps_per_epoch']:,}"))
    return facts


def coloured(example: Example) -> Text:
    """An example's tokens, the trained ones green and marked by position, not by id.

    Each token is shown as its text; special tokens and bytes that are no character of
    their own appear as the tokenizer names them.
    """
    if example.tokenizer is None:
        raise ValueError("this Example has no tokenizer to show tokens with; give Examples one")
    trained = [False, *(example.weights_T > 0).tolist()]
    text = Text()
    for index, (token_id, is_trained) in enumerate(zip(example.ids, trained, strict=True)):
        shown = example.tokenizer.decode([token_id])
        if not shown or "\ufffd" in shown:
            shown = example.tokenizer.convert_ids_to_tokens(token_id)
        shade = ("green" if is_trained else "bright_black") + (" underline" if index % 2 else "")
        text.append(shown, style=shade)
    return text
