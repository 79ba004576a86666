"""`config.data.template`: a row's fields put into a text, such as Alpaca's prompt.

What comes in is a template with {field} references and a row, what goes out is the
text; "alpaca" stands for the two prompts of that data set.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from jax_sft.data.row_checks import as_text
from jax_sft.data.types import BadRow

# Stanford Alpaca (Taori et al. 2023), its training prompts.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def parse_template(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    """The pieces of a template, as string.Formatter gives them.

    Raises:
        ValueError: its braces do not match.
    """
    try:
        return list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"data.template {template!r} is malformed ({error})") from error


def check_references(template: str, row: Mapping[str, Any], origin: str) -> None:
    """Raises BadRow unless all are plain {field} references to fields of the row."""
    for _, field, spec, conversion in parse_template(_chosen(template, row)):
        if field is not None and (spec or conversion or field not in row):
            raise BadRow(
                f"data.template refers to {{{field}}}, but {origin} has the fields "
                f"{sorted(map(str, row))}; write plain {field} references, and {{ }} for braces",
                reason="missing_field",
            )


def fill_template(template: str, row: Mapping[str, Any], origin: str) -> str:
    """The template with the row's texts in it; no attributes, indices or conversions.

    Raises:
        BadRow: the row has not what the template refers to.
    """
    check_references(template, row, origin)
    pieces = []
    for literal, field, _, _ in parse_template(_chosen(template, row)):
        pieces.append(literal)
        if field is not None:
            pieces.append(as_text(row[field], f"{origin} field {field!r}"))
    return "".join(pieces)


def _chosen(template: str, row: Mapping[str, Any]) -> str:
    if template != "alpaca":
        return template
    return _ALPACA_WITH_INPUT if row.get("input") else _ALPACA
