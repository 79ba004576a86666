"""A chat template as a function from messages to text, and where their contents lie in it.

What comes in are messages as dicts, what goes out is what the tokenizer's Jinja template
makes of them. Places are found with marks, characters that stand nowhere in the text:
they are put into messages, rendered, and taken out again.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jax_sft.data.types import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
THINK, THINK_END = "<think>", "</think>"
_PRIVATE_USE = (range(0xE000, 0xF8FF), range(0xF0000, 0xFFFFD))
# What may stand in front of a plain answer: an empty thought, its end alone, a thought's start.
_EMPTY_THOUGHT = re.compile(r"(?:<think>\s*)?</think>\s*\Z")
_OPEN_THOUGHT = re.compile(r"<think>\s*\Z")
_UNTAGGED = r"((?:(?!</?think>).)*)"
# One thought in tags, and an answer behind it that has none.
_TAGGED = re.compile(rf"\s*<think>{_UNTAGGED}</think>{_UNTAGGED}", re.DOTALL)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat(NamedTuple):
    """What a template renders: messages as dicts, and tools; origin names it in errors."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] | None
    origin: str

    def up_to(self, end: int) -> Chat:
        """The chat of the messages in front of one."""
        return self._replace(messages=self.messages[:end])

    def with_last(self, message: Mapping[str, Any]) -> Chat:
        """The chat with another message in the place of the last."""
        return self._replace(messages=(*self.messages[:-1], dict(message)))


class Template:
    """A tokenizer's chat template; dates that it writes are those of the rendering.

    Args:
        tokenizer: its chat_template renders.
        kwargs: what else the template is given, such as enable_thinking or date_string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._kwargs = dict(kwargs)

    def render(self, chat: Chat, *, prompts: bool = False) -> str:
        """Renders a chat; with prompts, and the start of an answer to it.

        Raises:
            BadRow: the template refuses the chat.
        """
        try:
            return self._apply(chat, prompts)
        except Exception as error:  # whatever Jinja code may raise
            as_text = _with_text_arguments(chat)
            if as_text is not None:  # some templates want a call's arguments as JSON
                return self.render(as_text, prompts=prompts)
            problem = str(error).strip().split("\n")[0] or type(error).__name__
            raise BadRow(
                f"{chat.origin}: the chat template fails on it ({problem}); change the row, or set "
                "tokenizer.chat_template or data.filter",
                reason="template_error",
            ) from error

    def _apply(self, chat: Chat, prompts: bool) -> str:
        return self._tokenizer.apply_chat_template(
            list(chat.messages),
            tools=None if chat.tools is None else list(chat.tools),
            add_generation_prompt=prompts,
            tokenize=False,
            **self._kwargs,
        )

    def try_render(self, chat: Chat, *, prompts: bool = False) -> str | None:
        """Renders a chat; None where the template refuses it."""
        try:
            return self.render(chat, prompts=prompts)
        except BadRow:
            return None

    def contents(
        self, chat: Chat, indices: Sequence[int]
    ) -> tuple[str, dict[int, tuple[int, int]]] | None:
        """Finds the contents of messages in the text.

        Returns:
            The text, and where each content begins and ends in it; None where the template
            changes, drops or repeats a content.

        Raises:
            BadRow: the template refuses the chat.
        """
        text = self.render(chat)
        opening, closing = itertools.islice(_unused(chat, text), 2)
        messages = list(chat.messages)
        for index in indices:
            content = f"{opening}{messages[index]['content']}{closing}"
            messages[index] = {**messages[index], "content": content}
        marked = self.try_render(chat._replace(messages=tuple(messages)))
        if marked is None:
            return None
        found = list(re.finditer(f"[{opening}{closing}]", marked))
        if "".join(mark.group() for mark in found) != (opening + closing) * len(indices):
            return None
        if marked.replace(opening, "").replace(closing, "") != text:
            return None
        places = [mark.start() - i for i, mark in enumerate(found)]
        pairs = zip(places[0::2], places[1::2], strict=True)
        return text, dict(zip(indices, pairs, strict=True))

    def around_last(self, chat: Chat) -> tuple[str, str] | None:
        """The text in front of, and behind, a plain answer in the place of the last message."""
        opening, closing = itertools.islice(_unused(chat, ""), 2)
        mark = opening + closing
        text = self.try_render(chat.with_last({"role": "assistant", "content": mark}))
        if text is None or not text.count(opening) == text.count(closing) == text.count(mark) == 1:
            return None
        before, _, behind = text.partition(mark)
        return before, behind

    def keeps_last(self, chat: Chat, text: str) -> tuple[bool, int | None]:
        """Whether the last message's reasoning and answer are rendered, each once, and its calls.

        Returns:
            That, and where its answer ends in text, which renders the chat; None where that
            cannot be told, or tool calls follow it.
        """
        mark = next(_unused(chat, text))
        message, num_marks = _marked(chat.messages[-1], mark)
        marked = self.try_render(chat.with_last(message)) if num_marks else text
        if marked is None or marked.count(mark) != num_marks or not self._keeps_calls(chat, text):
            return False, None
        ends = message["content"].endswith(mark) and not has_calls(message)
        if not ends or marked.replace(mark, "") != text:
            return True, None
        return True, marked.rfind(mark) - (num_marks - 1)

    def _keeps_calls(self, chat: Chat, text: str) -> bool:
        """Whether the name of each call of the last message is rendered, and its arguments."""
        message = chat.messages[-1]
        marks = list(itertools.islice(_unused(chat, text), 2 * len(call_names(message))))
        calls = [
            _marked_call(call, *marks[2 * i : 2 * i + 2])
            for i, call in enumerate(message.get("tool_calls") or ())
        ]
        marked = (
            self.try_render(chat.with_last({**message, "tool_calls": calls})) if calls else text
        )
        if marked is None:  # it looks at the names
            return all(name in text for name in call_names(message))
        used = [mark for mark in marks if mark in json.dumps(calls, ensure_ascii=False)]
        return all(mark in marked or json.dumps(mark)[1:-1] in marked for mark in used)

    def left_out(self, chat: Chat, text: str) -> list[dict[str, Any]]:
        """The messages that are no answers and whose contents are not in text, which renders it."""
        absent = [
            index
            for index, message in enumerate(chat.messages)
            if message["role"] != "assistant" and message["content"].strip() not in text
        ]
        if not absent:
            return []
        # Some that are there are not as they were, such as results of tools as JSON.
        marks = dict(zip(absent, _unused(chat, text), strict=False))
        messages = [
            {**message, "content": message["content"] + marks.get(index, "")}
            for index, message in enumerate(chat.messages)
        ]
        marked = self.try_render(chat._replace(messages=tuple(messages)))
        if marked is None:
            return []
        return [
            chat.messages[index]
            for index, mark in marks.items()
            if mark not in marked and json.dumps(mark)[1:-1] not in marked
        ]

    def marks_answers(self, chat: Chat) -> bool:
        """Whether the template says by {% generation %} what an assistant writes."""
        return _GENERATION.search(self._tokenizer.get_chat_template(tools=chat.tools)) is not None

    def marked_answers(self, chat: Chat, text: str) -> list[tuple[int, int]]:
        """Where {% generation %} blocks begin and end in text, which renders the chat."""
        try:
            marked, places = self._apply_marked(chat)
        except Exception:  # as in render
            as_text = _with_text_arguments(chat)
            return [] if as_text is None else self.marked_answers(as_text, text)
        return places if marked == text else []

    def _apply_marked(self, chat: Chat) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        [marked], [places] = render_jinja_template(
            conversations=[list(chat.messages)],
            tools=None if chat.tools is None else list(chat.tools),
            chat_template=self._tokenizer.get_chat_template(tools=chat.tools),
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **self._kwargs},
        )
        return marked, places


def has_calls(message: Mapping[str, Any]) -> bool:
    """Whether a message calls tools."""
    return bool(message.get("tool_calls"))


def call_names(message: Mapping[str, Any]) -> list[str]:
    """The names of the functions that a message calls."""
    functions = (_function(call) for call in message.get("tool_calls") or ())
    return [str(function.get("name", "")) for function in functions]


def field_reasoning(message: Mapping[str, Any]) -> str:
    """The reasoning of an answer that stands in a field of its own, or ""."""
    if message["role"] != "assistant":
        return ""
    texts = (message.get(name) for name in REASONING_FIELDS)
    return next((text for text in texts if isinstance(text, str) and text.strip()), "")


def reasons(message: Mapping[str, Any]) -> bool:
    """Whether a message is an answer that thinks first, in a field or in its content."""
    is_answer = message["role"] == "assistant"
    return is_answer and bool(field_reasoning(message) or THINK_END in message["content"])


def with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """The answer with its reasoning in its content, in the tags that most models use."""
    plain = {name: value for name, value in message.items() if name not in REASONING_FIELDS}
    reasoning = field_reasoning(message).strip()
    if not reasoning:
        return plain
    content = f"{THINK}\n{reasoning}\n{THINK_END}\n\n{message['content']}"
    return {**plain, "content": content.strip()}


def opens_thought(text: str) -> bool:
    """Whether a text ends in the start of a thought."""
    return _OPEN_THOUGHT.search(text) is not None


def before_thought(before: str) -> str:
    """A text without an empty thought at its end, or the start of one."""
    found = _EMPTY_THOUGHT.search(before)
    if found and (THINK in found.group() or before.count(THINK_END) > before.count(THINK)):
        before = before[: found.start()]
    return _OPEN_THOUGHT.sub("", before)


def in_field(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An answer with its reasoning, in a field or in <think> tags, in a field of this name."""
    plain = {key: value for key, value in message.items() if key not in REASONING_FIELDS}
    tagged = _TAGGED.fullmatch(message["content"])
    reasoning = field_reasoning(message)
    if not reasoning and tagged and tagged.group(1).strip():
        reasoning, plain["content"] = (text.strip() for text in tagged.groups())
    return {**plain, name: reasoning} if reasoning else dict(message)


def _marked(message: Mapping[str, Any], mark: str) -> tuple[dict[str, Any], int]:
    """An answer with a mark behind its reasoning and one behind the rest, if there are any."""
    marked = dict(message)
    for name in REASONING_FIELDS:
        if isinstance(message.get(name), str) and message[name].strip():
            marked[name] = message[name].rstrip() + mark
    thought, think_end, answer = message["content"].rpartition(THINK_END)
    pieces = [thought.rstrip(), thought[len(thought.rstrip()) :] + think_end, answer]
    has_thought = bool(thought.replace(THINK, "").strip())
    pieces[0] += mark * has_thought
    pieces[2] += mark * bool(answer.strip())
    marked["content"] = "".join(pieces)
    num_marks = has_thought + bool(answer.strip()) + bool(field_reasoning(message))
    return marked, num_marks


def _marked_call(call: Any, name_mark: str, value_mark: str) -> dict[str, Any]:
    """A call with a mark behind its name, and one behind each of its arguments that is a text."""
    function = dict(_function(call))
    function["name"] = f"{function.get('name', '')}{name_mark}"
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        function["arguments"] = arguments + value_mark
    elif isinstance(arguments, Mapping):
        function["arguments"] = {
            key: value + value_mark if isinstance(value, str) else value
            for key, value in arguments.items()
        }
    return {**call, "function": function} if "function" in call else function


def _unused(chat: Chat, text: str) -> Iterator[str]:
    """Characters that are neither in a chat's contents nor in what renders it."""
    used = "".join([text, *(message["content"] for message in chat.messages)])
    codes = itertools.chain.from_iterable(_PRIVATE_USE)
    return (mark for mark in map(chr, codes) if mark not in used)


def _function(call: Any) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    return function if isinstance(function, Mapping) else {}


def _with_text_arguments(chat: Chat) -> Chat | None:
    """The chat with the arguments of its calls as JSON text; None where they are that."""

    def as_text(call: Any) -> Any:
        function = dict(_function(call))
        if isinstance(function.get("arguments"), Mapping):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": function} if "function" in call else function

    messages = tuple(
        {**message, "tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if has_calls(message)
        else message
        for message in chat.messages
    )
    return None if messages == chat.messages else chat._replace(messages=messages)
