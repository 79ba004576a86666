"""One row to its content: a str, a dialogue, messages, token ids, or a row with fields.

What comes in is a row as users write it, what goes out is its turns, its conversation
or its tokens. All rows of a source are of one format, which is found from the first
ones; whatever is wrong with a row is a BadRow of one line that names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jax_sft.data.conversations import (
    is_list,
    is_messages,
    is_sharegpt,
    read_conversation,
)
from jax_sft.data.row_checks import as_filled, as_text, what
from jax_sft.data.row_template import check_references, fill_template, parse_template
from jax_sft.data.token_rows import read_token_row
from jax_sft.data.types import BadRow, Content, Conversation, Turn

_SHAPES = (
    "a str, a list of [prompt, output, prompt, output, ...] strings, a list of messages, or a "
    "row with fields"
)
_NAMES = {
    "text": "text",
    "dialogue": "a dialogue",
    "prompt_output": "a prompt with its output",
    "messages": "a conversation",
    "sharegpt": "a ShareGPT conversation",
    "tokens": "token ids",
}
_MESSAGES_FIELDS = "messages", "conversation", "conversations"


@dataclass(frozen=True)
class RowReader:
    """Takes the content out of a row; the fields matter for rows that have fields.

    Where a row's fields fit several formats, the first of these is meant: tokens
    (input_ids), messages or sharegpt (messages_field, messages, conversation or
    conversations), prompt_output (prompt_field with output_field, or prompt with
    completion), text (text_field). A template decides for itself.

    Attributes:
        text_field: a row's text.
        prompt_field: a row's prompt.
        output_field: a row's output.
        messages_field: a row's messages.
        template: "alpaca", or a text with {field} references.
        train_turns: "all", "last" or "flagged", of a conversation.
        format: of the rows; None until it is found.
    """

    text_field: str = "text"
    prompt_field: str = "prompt"
    output_field: str = "output"
    messages_field: str = "messages"
    template: str | None = None
    train_turns: str = "all"
    format: str | None = None

    def __post_init__(self) -> None:
        if self.template is None:
            return
        parse_template(self.template)
        if self.format not in (None, "text", "prompt_output"):
            raise ValueError(
                f"data.template makes a text or a prompt, not {_NAMES[self.format]}: set "
                "data.template or data.row_format to None"
            )

    def for_rows(self, rows: Sequence[Any], origins: Sequence[str]) -> RowReader:
        """The reader of the format that most of these rows have; fields that are None do not count.

        Raises:
            ValueError: none of them has one.
        """
        rows = [_plain(row) for row in rows]
        if self.template is not None:
            self._check_template(rows, origins)
        if self.format is not None:
            return self._checked()
        for fields_count in (_filled, _present):
            fits = (self._formats_of(row, fields_count)[:1] for row in rows)
            if found := Counter(format for formats in fits for format in formats):
                return replace(self, format=found.most_common(1)[0][0])._checked()
        raise self._unknown(rows[0], origins[0])

    def _checked(self) -> RowReader:
        if self.train_turns == "flagged" and self.format in ("text", "dialogue"):
            raise ValueError(
                f"data.train_turns is 'flagged', but the samples are {self.format} rows, which have"
                " no flags: pass messages with a train flag, or set it to 'all'"
            )
        return self

    def content(self, row: Any, origin: str) -> Content:
        """The turns, conversation or tokens of a row that origin names.

        Raises:
            BadRow: the row is of another format, or something in it is wrong.
        """
        if isinstance(row, BadRow):  # a line that could not be read
            raise row
        row = _plain(row)
        match self.format:
            case "text":
                return self._text(row, origin)
            case "dialogue":
                return self._dialogue(row, origin)
            case "prompt_output":
                return self._prompt_output(row, origin)
            case "messages" | "sharegpt":
                return self._conversation(row, origin)
            case "tokens":
                self._check_fields(row, origin, ("input_ids",))
                return read_token_row(row, origin)
        raise AssertionError(f"no format {self.format}")

    def _text(self, row: Any, origin: str) -> Content:
        if isinstance(row, str):
            return (Turn(as_filled(row, origin, reason="empty_text"), 1.0),)
        if self.template is not None:
            self._check_fields(row, origin, ())
            text = fill_template(self.template, row, origin)
            return (Turn(as_filled(text, origin, reason="empty_text"), 1.0),)
        self._check_fields(row, origin, (self.text_field,))
        where = _field(origin, self.text_field)
        return (Turn(as_filled(row[self.text_field], where, reason="empty_text"), 1.0),)

    def _dialogue(self, row: Any, origin: str) -> Content:
        if isinstance(row, Mapping):
            self._check_fields(row, origin, (self.text_field,))
            row, origin = row[self.text_field], _field(origin, self.text_field)
        if not is_list(row) or is_messages(row):
            raise self._other(row, origin)
        return self._chosen(_turns(row, origin))

    def _chosen(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """The turns of a dialogue, of whose outputs the last alone may be meant."""
        if self.train_turns != "last":
            return turns
        return (*(replace(turn, weight=0.0) for turn in turns[:-1]), turns[-1])

    def _prompt_output(self, row: Any, origin: str) -> Content:
        prompt_field, output_field = self._pair_in(row)
        if self.template is not None:
            self._check_fields(row, origin, (output_field,))
            prompt = fill_template(self.template, row, origin)
            return Turn(prompt, 0.0), _answer(row[output_field], _field(origin, output_field))
        self._check_fields(row, origin, (prompt_field, output_field))
        prompt, output = row[prompt_field], row[output_field]
        if is_messages(prompt) or is_messages(output):
            return self._prompted_conversation(prompt, output, row, origin)
        if is_list(prompt):
            return self._chosen(_turns([*prompt, output], origin))
        asked = as_text(prompt, _field(origin, prompt_field))
        return Turn(asked, 0.0), _answer(output, _field(origin, output_field))

    def _prompted_conversation(
        self, prompt: Any, output: Any, row: Mapping[str, Any], origin: str
    ) -> Conversation:
        """TRL's conversational prompt and completion: the prompt's answers are context."""
        before = list(prompt) if is_list(prompt) else [{"role": "user", "content": prompt}]
        after = list(output) if is_list(output) else [{"role": "assistant", "content": output}]
        return read_conversation(
            [*before, *after],
            origin,
            tools=row.get("tools"),
            train_turns=self.train_turns,
            num_context=len(before),
        )

    def _conversation(self, row: Any, origin: str) -> Conversation:
        tools = system = None
        messages = row
        if isinstance(row, Mapping):
            field = self._messages_field_of(row, _filled) or self.messages_field
            self._check_fields(row, origin, (field,))
            messages, tools, system = row[field], row.get("tools"), row.get("system")
            if not is_list(messages):
                raise BadRow(
                    f"{origin} field {field!r} is {what(messages)}; it must be a list of dicts "
                    "with role and content",
                    reason="wrong_type",
                )
        elif not is_list(row) or len(row) and not is_messages(row):
            raise self._other(row, origin)
        return read_conversation(
            messages, origin, tools=tools, system=system, train_turns=self.train_turns
        )

    def _pair_in(self, row: Any) -> tuple[str, str]:
        """The names of a row's prompt and output."""
        if isinstance(row, Mapping) and {"prompt", "completion"} <= row.keys():
            if row.get(self.prompt_field) is None or row.get(self.output_field) is None:
                if row["completion"] is not None:
                    return "prompt", "completion"
        return self.prompt_field, self.output_field

    def _messages_field_of(self, row: Mapping[str, Any], counts: Any) -> str | None:
        names = dict.fromkeys((self.messages_field, *_MESSAGES_FIELDS))
        return next((name for name in names if counts(row, name)), None)

    def _formats_of(self, row: Any, counts: Any) -> list[str]:
        """The formats that a row fits, in the order in which they are tried."""
        if isinstance(row, str):
            return ["text"]
        if is_messages(row):
            return ["sharegpt" if is_sharegpt(row) else "messages"]
        if is_list(row):
            return ["dialogue"]
        if not isinstance(row, Mapping):
            return []
        if self.template is not None:
            return ["prompt_output" if self.output_field in row else "text"]
        formats = ["tokens"] if counts(row, "input_ids") else []
        if field := self._messages_field_of(row, counts):
            messages = row[field]
            if is_messages(messages) or is_list(messages) and not len(messages):
                formats.append("sharegpt" if is_sharegpt(messages) else "messages")
            elif counts is _present:
                formats.append("messages")
        for pair in ((self.prompt_field, self.output_field), ("prompt", "completion")):
            if counts(row, pair[0]) and counts(row, pair[1]) and "prompt_output" not in formats:
                formats.append("prompt_output")
        return formats + (["text"] if counts(row, self.text_field) else [])

    def _check_fields(self, row: Any, origin: str, fields: tuple[str, ...]) -> None:
        """Whether a row has what its format is read from."""
        if not isinstance(row, Mapping):
            raise self._other(row, origin)
        missing = [field for field in fields if row.get(field) is None]
        if not missing:
            return
        if len(missing) == len(fields) and self._formats_of(row, _filled):
            raise self._other(row, origin)
        if missing[0] in row:
            raise BadRow(
                f"{origin} field {missing[0]!r} is None; leave this sample out, or set "
                f'data.filter, as in "{missing[0]} != None"',
                reason="missing_field",
            )
        raise BadRow(
            f"{origin} has the fields {sorted(map(str, row))}, but not {missing[0]!r}; "
            f"{self._remedy(row)}",
            reason="missing_field",
        )

    def _other(self, row: Any, origin: str) -> BadRow:
        """What is said of a row that is not of the format of the others."""
        formats = self._formats_of(row, _filled)
        if not formats:
            return self._unknown(row, origin)
        return BadRow(
            f"{origin} is {_NAMES[formats[0]]}, but the samples are read as {self.format}; make "
            "all samples the same kind, or set data.row_format",
            reason="other_format",
        )

    def _unknown(self, row: Any, origin: str) -> BadRow:
        if isinstance(row, BadRow):
            return row
        if isinstance(row, Mapping):
            return BadRow(
                f"{origin} has the fields {sorted(map(str, row))}, but neither "
                f"{self.messages_field!r}, nor {self.prompt_field!r} with {self.output_field!r}, "
                f"nor {self.text_field!r}; {self._remedy(row)}",
                reason="missing_field",
            )
        reason = "missing_field" if row is None else "wrong_type"
        return BadRow(f"{origin} is {what(row)}; each sample must be {_SHAPES}", reason=reason)

    def _remedy(self, row: Mapping[str, Any]) -> str:
        if {"role", "content"} <= row.keys():
            return "a message stands alone: a conversation is a list of messages"
        if {"instruction", "output"} <= row.keys():
            return 'set data.template to "alpaca"'
        return (
            "set data.text_field, data.messages_field, data.prompt_field and data.output_field, or "
            "data.template"
        )

    def _check_template(self, rows: Sequence[Any], origins: Sequence[str]) -> None:
        """A reference that no row can fill is the template's fault, not a row's."""
        first = None
        for row, origin in zip(rows, origins, strict=True):
            if isinstance(row, str) or not isinstance(row, Mapping):
                continue
            try:
                check_references(self.template, row, origin)
                return
            except BadRow as error:
                first = first or error
        if first is not None:
            raise first


def _plain(row: Any) -> Any:
    return row.tolist() if isinstance(row, np.ndarray) else row


def _filled(row: Mapping[str, Any], field: str) -> bool:
    return row.get(field) is not None


def _present(row: Mapping[str, Any], field: str) -> bool:
    return field in row


def _field(origin: str, field: str) -> str:
    return f"{origin} field {field!r}"


def _answer(text: Any, where: str) -> Turn:
    return Turn(as_filled(text, where, reason="empty_answer"), 1.0)


def _turns(texts: Sequence[Any], origin: str) -> tuple[Turn, ...]:
    """Checks [prompt, output, ...]; a prompt may be empty, an output may not."""
    if not len(texts) or len(texts) % 2:
        raise BadRow(
            f"{origin} has {len(texts)} texts; a dialogue is [prompt, output, prompt, output, "
            "...], an even number",
            reason="uneven_dialogue",
        )
    turns = []
    for index, text in enumerate(texts):
        where = f"{origin}[{index}]"
        if index % 2:
            turns.append(_answer(text, where))
        else:
            turns.append(Turn(as_text(text, where), 0.0))
    return tuple(turns)


def read_prompt(value: Any, origin: str) -> str | list[str]:
    """Checks a prompt to generate from: a str, or [prompt, output, ..., prompt].

    Raises:
        BadRow: it is neither; origin names it.
    """
    if not is_list(value):
        return as_text(value, origin)
    if len(value) % 2 == 0:
        raise BadRow(
            f"{origin} has {len(value)} texts; it must be [prompt, output, ..., prompt], which "
            "ends in a prompt",
            reason="uneven_dialogue",
        )
    return [as_text(text, f"{origin}[{index}]") for index, text in enumerate(value)]
