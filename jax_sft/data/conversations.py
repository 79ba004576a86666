"""Message dicts, as OpenAI's or ShareGPT's, to a Conversation whose messages have weights.

What comes in is a row's list of messages, what goes out is what a chat template
renders and which messages are trained. Roles have many names in the wild and one here;
what a template would fail on, or drop, is a BadRow that names the message.

    {"role": "system", "content": "Be brief."}                 weight 0
    {"role": "user", "content": "2+2?"}                        weight 0
    {"role": "assistant", "content": "5", "train": false}      weight 0
    {"role": "user", "content": "No."}                         weight 0
    {"role": "assistant", "content": "4"}                      weight 1
    {"role": "user", "content": "Thanks."}                     left out: nothing follows it
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_sft.data.row_checks import as_text, short, what
from jax_sft.data.types import BadRow, Conversation, Message

# Each name of a role to its one name; the later ones are ShareGPT's and other tools'.
_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # the call, written out as text
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_SYSTEM_ROLES = "system", "developer"
_FLAGS = "train", "loss_weight", "weight"


def is_messages(value: Any) -> bool:
    """Whether a value is a list of dicts, which messages are, going by the first."""
    return is_list(value) and len(value) > 0 and isinstance(value[0], Mapping)


def is_list(value: Any) -> bool:
    """Whether a value is a list in any of its guises, and no str."""
    return isinstance(value, list | tuple | np.ndarray)


def is_sharegpt(messages: Sequence[Any]) -> bool:
    """Whether messages say from and value for role and content."""
    first = messages[0] if is_messages(messages) else {}
    return first.get("from") is not None and first.get("role") is None


def read_conversation(
    messages: Any,
    origin: str,
    *,
    tools: Any = None,
    system: Any = None,
    train_turns: str = "all",
    num_context: int = 0,
) -> Conversation:
    """Reads messages that end in answers.

    Trailing messages that are neither an answer nor trained are left out: nothing is
    predicted behind them.

    Args:
        messages: dicts with role and content (or from and value), and what else a
            template reads. `train` (a bool), `loss_weight` or `weight` say what one of
            them weighs in the loss. Fields that are None are taken as not there, for
            `datasets` gives every message the fields of all.
        origin: what errors name.
        tools: dicts, or the JSON text of a list of them.
        system: the text of a system turn to put first; None or "" for none.
        train_turns: "all": each answer, by its own weight where it has one, and whatever
            else has one; "last": the last answer alone; "flagged": what has a weight.
        num_context: messages at the front that are context, whatever they say.

    Raises:
        BadRow: a message is wrong, or there is no answer.
    """
    read = _read_messages(messages, origin, system=system)
    num_context += bool(system)
    answers = [i for i, (fields, _) in enumerate(read) if fields["role"] == "assistant"]
    if not answers or answers[-1] < num_context:
        raise BadRow(
            f"{origin} has no assistant message to train on; leave this sample out, or check the "
            "roles",
            reason="no_answer",
        )
    weights = []
    for index, (fields, own) in enumerate(read):
        is_answer = fields["role"] == "assistant"
        default = float(is_answer and train_turns != "flagged")
        if index < num_context or train_turns == "last" and index != answers[-1]:
            weights.append(0.0)
        else:
            weights.append(default if own is None else own)
    end = 1 + max(i for i, weight in enumerate(weights) if weight > 0 or i == answers[-1])
    return Conversation(
        tuple(Message(read[i][0], weights[i]) for i in range(end)), _read_tools(tools, origin)
    )


def read_chat_prompt(messages: Any, origin: str, *, tools: Any = None) -> Conversation:
    """Reads messages that the model is to answer: all of them context.

    Raises:
        BadRow: a message is wrong, or the last is an answer already.
    """
    read = _read_messages(messages, origin, system=None)
    if read[-1][0]["role"] not in ("user", "tool"):
        raise BadRow(
            f"{origin} ends in a message of the role {read[-1][0]['role']!r}; a prompt ends in a "
            "user or tool message: leave the answer out, or keep it under a key of its own",
            reason="answered_prompt",
        )
    return Conversation(
        tuple(Message(fields, 0.0) for fields, _ in read), _read_tools(tools, origin)
    )


def _read_messages(
    messages: Any, origin: str, *, system: Any
) -> list[tuple[dict[str, Any], float | None]]:
    """Each message's fields, and the weight that it gives itself."""
    if not is_list(messages):
        raise BadRow(
            f"{origin} has {what(messages)} for messages; pass a list of dicts with role and "
            "content",
            reason="missing_field" if messages is None else "wrong_type",
        )
    read = [_read_message(m, f"{origin} messages[{i}]") for i, m in enumerate(messages)]
    if system:
        text = as_text(system, f"{origin} field 'system'")
        read.insert(0, ({"role": "system", "content": text}, None))
    if not read:
        raise BadRow(f"{origin} has no messages; leave this sample out", reason="no_answer")
    systems = [i for i, (fields, _) in enumerate(read) if fields["role"] in _SYSTEM_ROLES]
    if len(systems) > 1:
        raise BadRow(
            f"{origin} has {len(systems)} system messages; templates take one: join them",
            reason="several_system_turns",
        )
    if systems and systems[0]:
        raise BadRow(
            f"{origin} messages[{systems[0]}] is a system message behind others; put it first",
            reason="system_not_first",
        )
    return read


def _read_message(message: Any, where: str) -> tuple[dict[str, Any], float | None]:
    if not isinstance(message, Mapping):
        raise BadRow(
            f"{where} is {what(message)}; a message is a dict with role and content",
            reason="missing_field" if message is None else "wrong_type",
        )
    given = {key: value for key, value in message.items() if value is not None}
    role = given.pop("role", given.pop("from", None))
    content = given.pop("content", given.pop("value", None))
    fields: dict[str, Any] = {"role": _role(role, where)}
    weight = _own_weight(given, where)
    call = given.pop("function_call", None)  # OpenAI's older way
    calls = _read_calls(given.pop("tool_calls", None if call is None else [call]), where)
    if content is None and not calls and fields["role"] != "assistant":
        raise BadRow(f"{where} has no content; give it a str", reason="missing_field")
    fields["content"] = "" if content is None else _content(content, where)
    if fields["role"] == "assistant" and not fields["content"].strip() and not calls:
        raise BadRow(
            f"{where} is an empty assistant message; leave this sample out, or write the answer",
            reason="empty_answer",
        )
    if calls:
        fields["tool_calls"] = calls
    return fields | _clean(given, where), weight


def _role(role: Any, where: str) -> str:
    if role is None:
        raise BadRow(f"{where} has no role; write role and content", reason="missing_field")
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise BadRow(
            f"{where} has the role {short(role)}; known are {', '.join(_ROLES)}",
            reason="unknown_role",
        )
    return _ROLES[role.lower()]


def _content(content: Any, where: str) -> str:
    """A text, or a list of parts that are texts, joined."""
    if not is_list(content):
        return as_text(content, f"{where} content")
    return "".join(_part(part, f"{where} content[{i}]") for i, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return as_text(part, where)
    if not isinstance(part, Mapping):
        raise BadRow(
            f"{where} is {what(part)}; a part is a str or a dict with type and text",
            reason="wrong_type",
        )
    if part.get("type", "text") != "text":
        raise BadRow(
            f"{where} is a part of the type {short(part['type'])}; only text is trained: leave "
            "this sample out",
            reason="other_than_text",
        )
    text = part.get("text")
    return as_text(part.get("value") if text is None else text, f"{where} text")


def _own_weight(given: dict[str, Any], where: str) -> float | None:
    """Takes train, loss_weight and weight out of a message's fields; None: it has none."""
    flags = {name: given.pop(name) for name in _FLAGS if name in given}
    for name, value in flags.items():
        if not isinstance(value, bool | int | float) or not 0 <= value < math.inf:
            raise BadRow(
                f"{where} has {name} {what(value)}; it must be a bool or a number from 0 up",
                reason="wrong_type",
            )
    if not flags:
        return None
    if not flags.pop("train", True):
        return 0.0
    return float(flags.get("loss_weight", flags.get("weight", 1.0)))


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as {"type": "function", "function": {"name", "arguments"}}.

    Arguments become a dict where they are the JSON text of one: transformers' templates
    take dicts, and write a str as a quoted str.
    """
    calls = _parsed(calls)
    if calls is None or calls == "":
        return []
    if not is_list(calls) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRow(
            f"{where} has tool_calls {what(calls)}; pass a list of dicts", reason="wrong_type"
        )
    return [_read_call(call, f"{where} tool_calls[{i}]") for i, call in enumerate(calls)]


def _read_call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    call = _clean(call, where)
    if "function" not in call:  # without the outer dict
        call = {"type": "function", "function": call}
    function = call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(
            f"{where} is {short(call)}; a call has a function with name and arguments",
            reason="wrong_type",
        )
    arguments = function.get("arguments", {})
    parsed = _parsed(arguments)
    function["arguments"] = parsed if isinstance(parsed, dict) else arguments
    return call


def _read_tools(tools: Any, origin: str) -> tuple[Any, ...] | None:
    """Definitions of tools as {"type": "function", "function": {...}}; None for none."""
    tools = _parsed(tools)
    if tools is None or tools == "":
        return None
    read = [_parsed(tool) for tool in tools] if is_list(tools) else [None]
    if not all(isinstance(tool, Mapping) for tool in read):
        raise BadRow(
            f"{origin} has tools {what(tools)}; pass a list of dicts, or its JSON text",
            reason="wrong_type",
        )
    cleaned = [_clean(tool, f"{origin} tools[{i}]") for i, tool in enumerate(read)]
    return (
        tuple(
            tool if "function" in tool or "name" not in tool else _as_function(tool)
            for tool in cleaned
        )
        or None
    )


def _as_function(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": tool}


def _parsed(value: Any) -> Any:
    """What a JSON text holds; any other value, or text, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _clean(value: Any, where: str) -> Any:
    """A copy in plain dicts and lists, without None values, every text checked."""
    if isinstance(value, str):
        return as_text(value, where)
    if isinstance(value, Mapping):
        return {
            as_text(key, where): _clean(part, f"{where} {key}")
            for key, part in value.items()
            if part is not None
        }
    if is_list(value):
        return [_clean(part, where) for part in value]
    return value
