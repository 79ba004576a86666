"""What a chat template reads of messages, and conversations put so that it reads them.

What comes in is a Conversation, what goes out is the Chat to render. Templates pass over a role
or a field that they do not know, without a word; what has another place there is put into it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from jax_sft.data import template as messages_of
from jax_sft.data.habits import ASK, REPLY, TOOL
from jax_sft.data.template import Chat, Template
from jax_sft.data.types import Conversation


class Dialect:
    """A template, and where it looks for what.

    Args:
        template: what is probed, each thing when it is first asked for.
    """

    def __init__(self, template: Template) -> None:
        self._template = template

    def chat(self, conversation: Conversation, origin: str) -> Chat:
        """The messages as the template reads them.

            developer          system, where the template writes no developers
            reasoning          reasoning_content, or the field that the template reads
            <think> in text    that field too, where the template has another place for it

        White space at an answer's ends is the template's to write.
        """
        messages = [message.fields for message in conversation.messages]
        if messages[0]["role"] == "developer" and not self._has_developers:
            messages[0] = {**messages[0], "role": "system"}
        messages = tuple(self._answer(m) if m["role"] == "assistant" else m for m in messages)
        return Chat(messages, conversation.tools, origin)

    @functools.cached_property
    def has_tools(self) -> bool:
        """Whether the template writes the tools that there are."""
        chat = Chat(({"role": "user", "content": ASK},), (TOOL,), "the chat template")
        text = self._template.try_render(chat, prompts=True)
        return text is None or text != self._template.try_render(
            chat._replace(tools=None), prompts=True
        )

    def _answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        message = {**message, "content": message["content"].strip()}
        field, takes_tags = self._reasoning_field
        is_meant = messages_of.field_reasoning(message) or not takes_tags
        return messages_of.in_field(message, field) if field and is_meant else message

    @functools.cached_property
    def _has_developers(self) -> bool:
        """Whether the template writes what a developer says."""
        messages = ({"role": "developer", "content": ASK}, {"role": "user", "content": REPLY})
        text = self._template.try_render(Chat(messages, None, "the chat template"))
        return text is not None and ASK in text

    @functools.cached_property
    def _reasoning_field(self) -> tuple[str | None, bool]:
        """The field that reasoning is read from, and whether it may be in the content as well.

        gpt-oss has a channel for it; others put the content, with the tags, behind empty ones.
        """
        ask, answer = {"role": "user", "content": ASK}, {"role": "assistant", "content": REPLY}
        chat = Chat((ask, answer), None, "the chat template")
        for name in messages_of.REASONING_FIELDS:
            in_field = chat.with_last({**answer, name: REPLY})
            text = self._template.try_render(in_field)
            if text is not None and self._template.keeps_last(in_field, text)[0]:
                tagged = messages_of.with_reasoning(in_field.messages[-1])
                other = self._template.try_render(chat.with_last(tagged)) or ""
                before = other.rpartition(tagged["content"])[0]
                has_tags = re.search(rf"<think>\s*{REPLY}", text) is not None
                return name, has_tags and before == messages_of.before_thought(before)
        return None, True
