"""Messages of every dialect become one, with the weights that they and the config give."""

import json
import pickle

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_sft.data.conversations import read_chat_prompt, read_conversation
from jax_sft.data.samples import load_eval_prompts, read_samples
from jax_sft.data.types import BadRow, Conversation, Message

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "U"}
ANSWER = {"role": "assistant", "content": "A"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def shown(conversation):
    """Each message as (role, content, weight)."""
    return [(m.fields["role"], m.fields["content"], m.weight) for m in conversation.messages]


def weights(messages, **options):
    return [m.weight for m in read_conversation(messages, "row 3", **options).messages]


def bad(messages, read=read_conversation, **options):
    with pytest.raises(BadRow) as caught:
        read(messages, "row 3", **options)
    message = str(caught.value)
    assert message.startswith("row 3") and "\n" not in message and len(message) < 300
    return message, caught.value.reason


def one(samples, **options):
    read = read_samples(samples, **options)
    return read.format, read[0].content


def test_the_docstrings_example():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "5", "train": False},
        {"role": "user", "content": "No."},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Thanks."},
    ]
    assert shown(read_conversation(messages, "row")) == [
        ("system", "Be brief.", 0.0),
        ("user", "2+2?", 0.0),
        ("assistant", "5", 0.0),
        ("user", "No.", 0.0),
        ("assistant", "4", 1.0),
    ]
    assert messages[2]["train"] is False, "what callers hand in is left alone"


@pytest.mark.parametrize(
    ("samples", "format"),
    [
        ([[USER, ANSWER]], "messages"),
        ([(USER, ANSWER)], "messages"),
        (np.array([[USER, ANSWER]]), "messages"),
        ([{"messages": [USER, ANSWER]}], "messages"),
        ([{"conversation": [USER, ANSWER], "text": "x"}], "messages"),
        ([{"conversations": [USER, ANSWER], "prompt": "x", "output": "y"}], "messages"),
        ([{"chat": [USER, ANSWER]}], "messages"),
        (datasets.Dataset.from_dict({"messages": [[USER, ANSWER]]}), "messages"),
        (
            [{"conversations": [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]}],
            "sharegpt",
        ),
        ([[{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]], "sharegpt"),
        ([{"prompt": [USER], "completion": [ANSWER]}], "prompt_output"),
        ([{"prompt": "U", "completion": [ANSWER]}], "prompt_output"),
        ([{"prompt": [USER], "output": "A"}], "prompt_output"),
        (
            datasets.Dataset.from_dict({"prompt": [[USER]], "completion": [[ANSWER]]}),
            "prompt_output",
        ),
    ],
)
def test_conversations_of_every_kind(samples, format):
    found, content = one(samples, messages_field="chat" if "chat" in samples[0] else "messages")
    assert found == format
    assert content == Conversation(
        (Message({"role": "user", "content": "U"}, 0.0), Message(ANSWER, 1.0)), None
    )


def test_only_the_completion_of_trls_rows_is_trained():
    row = {"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER, USER]}
    content = one([row | {"tools": [TOOL]}])[1]
    assert [m.weight for m in content.messages] == [0, 0, 0, 0, 1, 0, 1]
    assert content.tools == (TOOL,)
    content = one([row], train_turns="last")[1]
    assert [m.weight for m in content.messages] == [0, 0, 0, 0, 0, 0, 1]
    row["completion"] = [USER]
    with pytest.raises(BadRow, match=r"samples\[0\] has no assistant message to train"):
        one([row])


@pytest.mark.parametrize(
    ("role", "known"),
    [
        ("system", "system"),
        ("developer", "developer"),
        ("human", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("bot", "assistant"),
        ("model", "assistant"),
        ("function_call", "assistant"),
        ("function", "tool"),
        ("ipython", "tool"),
        ("observation", "tool"),
        ("function_response", "tool"),
    ],
)
def test_roles_have_one_name(role, known):
    read = read_conversation([{"role": role, "content": "c"}, USER, ANSWER], "row")
    assert read.messages[0].fields == {"role": known, "content": "c"}


def test_contents_of_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b", "text": None}, "c", ""]
    for content in (parts, tuple(parts), [{"text": "abc"}]):
        messages = [{"role": "user", "content": content}, ANSWER]
        assert read_conversation(messages, "row").messages[0].fields["content"] == "abc"


def test_what_templates_read_is_kept_and_none_is_dropped():
    messages = [
        USER | {"name": "Ann", "tool_calls": None, "reasoning_content": None},
        ANSWER | {"reasoning_content": "hm", "thinking": None, "tool_calls": [], "weight": None},
        {"role": "tool", "content": "1", "tool_call_id": "7", "extra": {"a": None, "b": [1]}},
        ANSWER,
    ]
    fields = [m.fields for m in read_conversation(messages, "row").messages]
    assert fields == [
        USER | {"name": "Ann"},
        ANSWER | {"reasoning_content": "hm"},
        {"role": "tool", "content": "1", "tool_call_id": "7", "extra": {"b": [1]}},
        ANSWER,
    ]


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        [{"name": "f", "arguments": {"x": 1, "other": None}}],
        json.dumps([CALL]),
        [CALL | {"id": None}],
    ],
)
def test_tool_calls_take_openais_form_with_a_dict_of_arguments(calls):
    for content in ({}, {"content": None}, {"content": ""}):
        message = {"role": "assistant", "tool_calls": calls} | content
        read = read_conversation([USER, message], "row").messages[1]
        assert read == Message({"role": "assistant", "content": "", "tool_calls": [CALL]}, 1.0)


def test_arguments_that_are_no_dict_are_kept():
    for arguments in ("text", "[1]", "3", "{"):
        call = {"function": {"name": "f", "arguments": arguments}}
        read = read_conversation([USER, {"role": "assistant", "tool_calls": [call]}], "row")
        assert read.messages[1].fields["tool_calls"] == [call]
    call = {"function": {"name": "f", "arguments": '{"x": null}'}}
    read = read_conversation([USER, {"role": "assistant", "tool_calls": [call]}], "row")
    assert read.messages[1].fields["tool_calls"][0]["function"]["arguments"] == {"x": None}
    old = {"role": "assistant", "content": None, "function_call": {"name": "f"}}
    read = read_conversation([USER, old], "row")
    expected = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert read.messages[1].fields == {"role": "assistant", "content": "", "tool_calls": [expected]}


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        [TOOL["function"]],
        [{**TOOL, "function": {**TOOL["function"], "description": None}}],
    ],
)
def test_tools_are_dicts_or_their_json(tools):
    content = one([{"messages": [USER, ANSWER], "tools": tools}])[1]
    assert content.tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools(tools):
    assert read_conversation([USER, ANSWER], "row", tools=tools).tools is None


def test_fields_that_arrow_fills_with_none_are_gone():
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    other = {"type": "function", "function": {"name": "g", "arguments": {"y": "z"}}}
    rows = [
        {"messages": [USER, call, {"role": "tool", "content": "1"}, ANSWER], "tools": [TOOL]},
        {"messages": [SYSTEM, USER, {"role": "assistant", "content": "B", "tool_calls": [other]}]},
    ]
    table = datasets.Dataset.from_list(rows)
    assert table[0]["messages"][0].keys() >= {"tool_calls"}, "Arrow gives every message all fields"
    assert [s.content for s in read_samples(table)] == [s.content for s in read_samples(rows)]


def test_a_sharegpt_rows_system_column_comes_first():
    turns = [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A", "weight": 0.5}]
    content = one([{"conversations": turns, "system": "S", "tools": ""}])[1]
    assert shown(content) == [("system", "S", 0.0), ("user", "U", 0.0), ("assistant", "A", 0.5)]
    assert len(one([{"conversations": turns, "system": None}])[1].messages) == 2
    with pytest.raises(BadRow, match="has 2 system messages"):
        one([{"conversations": [{"from": "system", "value": "T"}, *turns], "system": "S"}])


@pytest.mark.parametrize(
    ("marks", "all_", "last", "flagged"),
    [
        # of user, assistant, user, assistant
        ([{}, {}, {}, {}], [0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]),
        ([{}, {"train": True}, {}, {}], [0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 0, 0]),
        ([{}, {"train": False}, {}, {}], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]),
        ([{}, {"train": 1}, {}, {"train": 0}], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]),
        ([{}, {"weight": 5}, {}, {"loss_weight": 2}], [0, 5, 0, 2], [0, 0, 0, 2], [0, 5, 0, 2]),
        ([{"train": True}, {}, {"weight": 3.0}, {}], [1, 1, 3, 1], [0, 0, 0, 1], [1, 0, 3, 0]),
        ([{}, {"train": False, "weight": 2}, {}, {}], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]),
        ([{}, {"train": True, "weight": 2}, {}, {}], [0, 2, 0, 1], [0, 0, 0, 1], [0, 2, 0, 0]),
    ],
)
def test_weights(marks, all_, last, flagged):
    messages = [message | mark for message, mark in zip([USER, ANSWER] * 2, marks, strict=True)]
    assert weights(messages) == all_
    assert weights(messages, train_turns="last") == last
    assert weights(messages, train_turns="flagged") == flagged
    [fields, *_] = [m.fields for m in read_conversation(messages, "row").messages]
    assert fields == USER, "templates do not see the marks"


def test_context_counts_from_behind_the_system_column():
    messages = [USER, ANSWER, USER, ANSWER]
    assert weights(messages, system="S", num_context=2) == [0, 0, 0, 0, 1]


def test_what_follows_the_last_answer_is_left_out_unless_it_is_trained():
    assert len(weights([USER, ANSWER, USER, USER])) == 2
    assert weights([USER, ANSWER, USER | {"train": True}, USER]) == [0, 1, 1]
    assert weights([USER, ANSWER | {"train": True}, USER, ANSWER], train_turns="flagged") == [
        *(0, 1, 0, 0)
    ]


@pytest.mark.parametrize(
    ("messages", "problem", "reason"),
    [
        ([], "has no messages", "no_answer"),
        (None, "has None for messages; pass a list", "missing_field"),
        ("text", "has 'text' (str) for messages; pass a list", "wrong_type"),
        ([USER], "has no assistant message to train on", "no_answer"),
        ([USER, "text"], "messages[1] is 'text' (str); a message is a dict", "wrong_type"),
        ([USER, None], "messages[1] is None; a message is a dict", "missing_field"),
        ([{"content": "a"}, ANSWER], "messages[0] has no role; write role and", "missing_field"),
        (
            [USER, {"role": "boss", "content": "a"}],
            "messages[1] has the role 'boss'; known are system, developer, user, assistant, tool,",
            "unknown_role",
        ),
        ([{"role": 3, "content": "a"}], "messages[0] has the role 3; known", "unknown_role"),
        ([{"role": "user"}, ANSWER], "messages[0] has no content; give it a str", "missing_field"),
        ([{"role": "user", "content": 3}], "messages[0] content is 3 (int); pass", "wrong_type"),
        ([{"role": "user", "content": {}}], "messages[0] content is {} (dict)", "wrong_type"),
        ([{"role": "user", "content": "\ud83d"}], "content holds half of a surrogate", "not_text"),
        ([USER | {"name": "\ud83d"}], "messages[0] name holds half of a surrogate", "not_text"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER],
            "messages[0] content[0] is a part of the type 'image'; only text is trained",
            "other_than_text",
        ),
        ([{"role": "user", "content": [3]}], "messages[0] content[0] is 3 (int)", "wrong_type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "[0] text is None", "missing_field"),
        ([USER, {"role": "assistant", "content": ""}], "messages[1] is an empty", "empty_answer"),
        ([USER, {"role": "assistant", "content": " \n"}], "is an empty assistant", "empty_answer"),
        ([USER, {"role": "assistant"}, USER, ANSWER], "messages[1] is an empty", "empty_answer"),
        ([SYSTEM, SYSTEM, USER, ANSWER], "has 2 system messages", "several_system_turns"),
        ([SYSTEM, {"role": "developer", "content": "D"}, ANSWER], "has 2", "several_system_turns"),
        ([USER, SYSTEM, ANSWER], "messages[1] is a system message behind", "system_not_first"),
        ([USER, ANSWER | {"train": "yes"}], "messages[1] has train 'yes' (str); it", "wrong_type"),
        ([USER, ANSWER | {"weight": -1}], "messages[1] has weight -1 (int); it must", "wrong_type"),
        ([USER, ANSWER | {"loss_weight": float("nan")}], "has loss_weight nan", "wrong_type"),
        ([USER, {"role": "assistant", "tool_calls": 3}], "has tool_calls 3 (int)", "wrong_type"),
        ([USER, {"role": "assistant", "tool_calls": [{}]}], "tool_calls[0] is {", "wrong_type"),
        ([USER, {"role": "assistant", "tool_calls": ["f"]}], "pass a list of dicts", "wrong_type"),
    ],
)
def test_wrong_messages_are_named(messages, problem, reason):
    message, found = bad(messages)
    assert problem in message and found == reason


def test_wrong_tools_and_system_are_named():
    message, reason = bad([USER, ANSWER], tools="f(x)")
    assert "row 3 has tools 'f(x)' (str); pass a list of dicts, or its JSON" in message
    assert reason == "wrong_type" == bad([USER, ANSWER], tools=[3])[1]
    assert "row 3 field 'system' is 3 (int)" in bad([USER, ANSWER], system=3)[0]


def test_a_row_with_wrong_messages_is_named_by_its_origin():
    samples = read_samples([[USER, ANSWER], [USER], "text", ["p", "o"], {"messages": [USER]}])
    for index, (problem, reason) in enumerate(
        [
            ("samples[1] has no assistant message", "no_answer"),
            ("samples[2] is text, but the samples are read as messages", "other_format"),
            ("samples[3] is a dialogue, but the samples are read as messages", "other_format"),
            ("samples[4] has no assistant message", "no_answer"),
        ],
        1,
    ):
        with pytest.raises(BadRow) as caught:
            samples[index]
        assert problem in str(caught.value) and caught.value.reason == reason


def test_the_reader_of_rows_can_be_sent_to_another_process():
    samples = read_samples([[USER, ANSWER]], train_turns="last")
    to_content, name = pickle.loads(pickle.dumps((samples.to_content, samples.name)))
    assert to_content(samples.rows[0], name(0)) == samples[0].content


@given(
    st.lists(st.sampled_from(["user", "assistant", "tool"]), max_size=8),
    st.lists(st.sampled_from([None, 0, 0.5, 1, True, False]), min_size=8, max_size=8),
    st.sampled_from(["all", "last", "flagged"]),
)
def test_weights_are_those_of_the_obvious_reference(roles, own, train_turns):
    messages = [{"role": role, "content": str(i), "weight": own[i]} for i, role in enumerate(roles)]
    if "assistant" not in roles:
        assert bad(messages, train_turns=train_turns)[1] == "no_answer"
        return
    last = max(i for i, role in enumerate(roles) if role == "assistant")
    expected = []
    for index, role in enumerate(roles):
        weight = {"all": role == "assistant", "last": index == last, "flagged": False}[train_turns]
        if own[index] is not None and (train_turns != "last" or index == last):
            weight = own[index]
        expected.append(float(weight))
    while len(expected) > last + 1 and not expected[-1]:
        expected.pop()
    assert weights(messages, train_turns=train_turns) == expected


def test_prompts_to_generate_from_may_be_conversations():
    chat = Conversation((Message(SYSTEM, 0.0), Message(USER, 0.0)), None)
    assert read_chat_prompt([SYSTEM, USER], "row") == chat
    with_tools = Conversation(chat.messages, (TOOL,))
    for prompts, metadata in [
        ([[SYSTEM, USER]], {}),
        ([{"prompt": [SYSTEM, USER], "answer": 3}], {"answer": [3]}),
        ([{"messages": [SYSTEM, USER], "answer": 3}], {"answer": [3]}),
        (datasets.Dataset.from_list([{"messages": [SYSTEM, USER], "tools": None}]), {}),
    ]:
        assert load_eval_prompts(prompts) == ([chat], metadata)
    rows = [{"messages": [SYSTEM, USER], "tools": [TOOL]}]
    assert load_eval_prompts(rows) == ([with_tools], {})
    assert load_eval_prompts([{"prompt": "a", "tools": 1}]) == (["a"], {"tools": [1]})


def test_prompts_that_are_answered_already_are_errors():
    message, reason = bad([USER, ANSWER], read_chat_prompt)
    assert "row 3 ends in a message of the role 'assistant'; a prompt ends in a user" in message
    assert reason == "answered_prompt"
    assert "has no messages" in bad([], read_chat_prompt)[0]
    for prompts in ([[USER, ANSWER]], [{"messages": [USER, ANSWER]}]):
        with pytest.raises(ValueError, match=r"eval_prompts\[0\] ends in a message"):
            load_eval_prompts(prompts)


def test_roles_may_be_in_capitals():
    messages = [{"role": "User", "content": "a"}, {"role": "ASSISTANT", "content": "b"}]
    assert shown(read_conversation(messages, "row")) == [
        ("user", "a", 0.0),
        ("assistant", "b", 1.0),
    ]
