"""One row to its texts: a str, a dialogue, or a table's row by its fields or a template.

What comes in is a row as users write it, what goes out is one text, or the texts of a
dialogue in order. Whatever is wrong with a row is said here, in one line that names it.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

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
_SHAPES = "a str, or a list of [prompt, output, prompt, output, ...] strings"


@dataclass(frozen=True)
class RowReader:
    """Takes the texts out of a row; the fields matter for rows that have fields."""

    text_field: str
    prompt_field: str
    output_field: str
    messages_field: str
    template: str | None

    def texts(self, row: Any, origin: str) -> list[str]:
        """One text, or [prompt, output, ...]; an error names the row by its origin."""
        if isinstance(row, str):
            return [_filled(row, origin)]
        if isinstance(row, Mapping):
            return self._texts_of_fields(row, origin)
        if isinstance(row, list | tuple | np.ndarray):
            return _dialogue(list(row), origin)
        raise ValueError(f"{origin} is {_what(row)}; each sample must be {_SHAPES}")

    def _texts_of_fields(self, row: Mapping[str, Any], origin: str) -> list[str]:
        if self.template is not None:
            prompt = _fill_template(self.template, row, origin)
            if self.output_field in row:
                return _dialogue([prompt, row[self.output_field]], origin)
            return [_filled(prompt, origin)]
        if self.prompt_field in row and self.output_field in row:
            prompt, output = row[self.prompt_field], row[self.output_field]
            earlier = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
            return _dialogue([*earlier, output], origin)
        if self.text_field in row:
            where = f"{origin} field {self.text_field!r}"
            return [_filled(row[self.text_field], where)]
        if self.messages_field in row or {"role", "content"} <= row.keys():
            raise _conversation_error(origin)
        raise ValueError(
            f"{origin} has the fields {sorted(row)}, but neither {self.text_field!r} nor "
            f"{self.prompt_field!r} with {self.output_field!r}; set data.text_field, "
            "data.prompt_field and data.output_field, or data.template"
        )


def _dialogue(texts: list[Any], origin: str) -> list[str]:
    """Checks [prompt, output, ...]; a prompt may be empty, an output may not."""
    if texts and all(isinstance(text, Mapping) for text in texts):
        raise _conversation_error(origin)
    if not texts or len(texts) % 2:
        raise ValueError(
            f"{origin} has {len(texts)} texts; a dialogue is [prompt, output, prompt, output, "
            "...], an even number"
        )
    checks = _text, _filled
    return [checks[i % 2](text, f"{origin}[{i}]") for i, text in enumerate(texts)]


def read_prompt(value: Any, origin: str) -> str | list[str]:
    """Checks a prompt to generate from: a str, or [prompt, output, ..., prompt].

    Raises:
        ValueError: it is neither; origin names it.
    """
    if not isinstance(value, list | tuple):
        return _text(value, origin)
    if len(value) % 2 == 0:
        raise ValueError(
            f"{origin} has {len(value)} texts; it must be [prompt, output, ..., prompt], which "
            "ends in a prompt"
        )
    return [_text(text, f"{origin}[{index}]") for index, text in enumerate(value)]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        remedy = "decode it to a str" if isinstance(value, bytes) else "pass a str"
        raise ValueError(f"{where} is {_what(value)}; {remedy}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds half of a surrogate pair at {error.start}; decode it as UTF-8 again"
        ) from error
    return str(value)


def _filled(value: Any, where: str) -> str:
    text = _text(value, where)
    if not text:
        raise ValueError(
            f"{where} is empty, so there is nothing to train; leave this sample out, or set "
            "data.filter, as in \"output != ''\""
        )
    return text


def _conversation_error(origin: str) -> ValueError:
    return ValueError(
        f"{origin} is a conversation of messages, which cannot be read yet; pass "
        "[prompt, output, prompt, output, ...] lists for now"
    )


def _fill_template(template: str, row: Mapping[str, Any], origin: str) -> str:
    """Plain {field} references only: no attributes, indices or conversions."""
    if template == "alpaca":
        template = _ALPACA_WITH_INPUT if "input" in row and row["input"] else _ALPACA
    pieces = []
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"data.template {template!r} is malformed ({error})") from error
    for literal, field, spec, conversion in parsed:
        pieces.append(literal)
        if field is None:
            continue
        if spec or conversion or field not in row:
            raise ValueError(
                f"data.template refers to {{{field}}}, but {origin} has the fields {sorted(row)}; "
                "write plain {field} references, and {{ }} for braces"
            )
        pieces.append(_text(row[field], f"{origin} field {field!r}"))
    return "".join(pieces)


def _what(value: Any) -> str:
    return "None" if value is None else f"{short(value)} ({type(value).__name__})"


def short(value: Any) -> str:
    """A value's repr, cut to what fits in an error line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
