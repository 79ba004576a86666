"""What some model families' templates do that others do not, each in a template that does it alone.

Expectations are whole texts, worked by hand, with each trained span in ⟪ ⟫.
"""

import copy

import pytest
from chat_templates import tokenizer_of
from small_tokenizers import byte_bpe
from tokenizers import AddedToken

from jax_sft.data.chat import ChatTemplate
from jax_sft.data.conversations import read_chat_prompt, read_conversation
from jax_sft.data.types import BadRow

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
THINKS = "<think>\nEasy.\n</think>\n\nFour."
TAGS = ("<think>", "</think>")


def made(text, *special, eos="<eos>", others=TAGS, **options):
    """A template of this text, on a tokenizer with these tokens."""
    tokenizer = copy.deepcopy(byte_bpe())
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": eos})
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in others])
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer, **options)


def named(name, **options):
    return ChatTemplate(tokenizer_of(name), **options)


def chat(*turns, tools=None):
    """A text behind a user's or a tool's message is an answer, another one is a user's."""
    messages = []
    for turn in turns:
        is_asked = bool(messages) and messages[-1]["role"] in ("user", "tool")
        role = "assistant" if is_asked else "user"
        messages.append({"role": role, "content": turn} if isinstance(turn, str) else turn)
    return {"messages": messages, "tools": tools}


def calls(*numbers, content="", **fields):
    made_calls = [{"function": {"name": "add", "arguments": {"x": str(n)}}} for n in numbers]
    return {"role": "assistant", "content": content, "tool_calls": made_calls, **fields}


def result(text):
    return {"role": "tool", "content": text}


def rendered(template, *turns, tools=None):
    row = template.render(read_conversation(**chat(*turns, tools=tools), origin="row 7"), "row 7")
    shown = [
        "".join(f"⟪{turn.text}⟫" if turn.weight else turn.text for turn in sequence.turns)
        for sequence in row.sequences
    ]
    return row, shown


def prompt(template, *turns, tools=None, **options):
    return "".join(
        template.prompt(
            read_chat_prompt(**chat(*turns, tools=tools), origin="row 7"), "", **options
        )
    )


# Where an answer ends

# A call ends in two tokens, of which the second stops; an answer in another.
GEMMA4 = (
    "{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<|tool_call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}<tool_call|>{% endfor %}"
    "{{ '<|tool_response>' if m.tool_calls else '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|turn>assistant\n{% endif %}"
)
GEMMA4_TOKENS = ("<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>")


@pytest.mark.parametrize("chosen", [(), ("<turn|>", "<|tool_response>")])
def test_calls_end_in_the_last_of_their_tokens(chosen):
    template = made(GEMMA4, *GEMMA4_TOKENS, stop_tokens=chosen)
    _, [shown] = rendered(template, "2+2?", calls(1, 2), result("4"), "Four.")
    call = '<|tool_call>add{{"x": "{}"}}<tool_call|>'
    assert shown == (
        "<|turn>user\n2+2?<turn|>\n<|turn>assistant\n"
        f"⟪{call.format(1)}{call.format(2)}<|tool_response>⟫"
        "<|turn>tool\n4<turn|>\n<|turn>assistant\n⟪Four.<turn|>⟫\n"
    )


def test_chosen_stop_tokens_end_calls_where_the_template_has_them():
    template = named("gpt_oss", stop_tokens=("<|return|>", "<|call|>"))
    _, shown = rendered(template, "2+2?", calls(2))
    assert shown[0].endswith('assistant⟪ to=add<|message|>{"x": "2"}<|call|>⟫')
    template = named("gpt_oss", stop_tokens=("<|return|>",))
    row, shown = rendered(template, "2+2?", calls(2))
    assert shown[0].endswith('assistant⟪ to=add<|message|>{"x": "2"}<|call|>⟫')
    assert row.sequences[0].stops == (None, ""), "none of those that were chosen"


def test_eos_ends_answers_behind_a_text_that_closes_them():
    template = made(
        "{% for m in messages %}<|open|>{{ m.role }}<|sep|>{{ m.content }}"
        "<|close|>{{ m.role }}<|sep|><|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|open|>assistant<|sep|>{% endif %}",
        *("<|open|>", "<|sep|>", "<|close|>"),
        eos="<|end|>",
    )
    _, [shown] = rendered(template, "Hi", "Hey", "Bye", "Ciao")
    asked = "<|open|>user<|sep|>{}<|close|>user<|sep|><|end|><|open|>assistant<|sep|>"
    answer = "⟪{}<|close|>assistant<|sep|><|end|>⟫"
    assert shown == (
        asked.format("Hi") + answer.format("Hey") + asked.format("Bye") + answer.format("Ciao")
    )
    assert template.stops == ["<|end|>"]


def test_what_a_template_writes_behind_each_last_turn_is_no_part_of_it():
    template = made(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}Action: {{ c.function.name }}"
        "{{ c.function.arguments | tojson }}{% else %}<eos>{% endfor %}{% endfor %}"
        "<|system|>Act now.<eos>{% if add_generation_prompt %}<|assistant|>{% endif %}",
        *("<|user|>", "<|assistant|>", "<|tool|>", "<|system|>"),
    )
    _, [shown] = rendered(template, "2+2?", calls(2))
    assert shown == (
        '<|user|>2+2?<eos><|assistant|>⟪Action: add{"x": "2"}<eos>⟫<|system|>Act now.<eos>'
    )


def test_the_token_of_the_next_turn_is_not_passed_over():
    template = made(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.role == 'assistant' and loop.last %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        *("<|user|>", "<|assistant|>"),
    )
    _, shown = rendered(template, "Hi", "Hey", "<eos> Bye", "Ciao")
    assert shown == [
        "<|user|>Hi<|assistant|>⟪Hey<eos>⟫",
        "<|user|>Hi<|assistant|>Hey<|user|><eos> Bye<|assistant|>⟪Ciao<eos>⟫",
    ]


def test_a_call_ends_in_the_first_stop_token_behind_it():
    template = made(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.tool_calls %}<call>{{ m.tool_calls[0].function | tojson }}</call><eos>"
        "<|assistant|>{% endif %}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        *("<|user|>", "<|assistant|>", "<|tool|>", "<call>", "</call>"),
    )
    row, [shown] = rendered(template, "2+2?", calls(2))
    assert row.num_unrendered == 0
    call = '{"name": "add", "arguments": {"x": "2"}}'
    assert shown == (f"<|user|>2+2?<eos><|assistant|>⟪<call>{call}</call><eos>⟫<|assistant|><eos>")


# What a template leaves out


def test_a_call_that_is_left_out_is_a_bad_row_though_its_name_is_in_the_text():
    with pytest.raises(BadRow, match="leaves out a part of the answer 'I add.' with calls of add"):
        rendered(named("zephyr"), "2+2?", calls(2, content="I add."))


def test_a_second_call_of_the_same_function_that_is_left_out_is_a_bad_row():
    assert rendered(named("llama3"), "2+2?", calls(1))
    with pytest.raises(BadRow, match="leaves out a part of the answer '' with calls of add, add"):
        rendered(named("llama3"), "2+2?", calls(1, 2))


def test_calls_whose_template_looks_at_their_names_are_found_by_them():
    tokenizer = tokenizer_of("llama3")
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.function.name != 'add' %}"
        "{{ raise_exception('unknown tool') }}{% endif %}{% endfor %}{% endfor %}"
        + tokenizer.chat_template
    )
    _, [shown] = rendered(ChatTemplate(tokenizer), "2+2?", calls(2))
    assert shown.endswith('⟪{"name": "add", "arguments": {"x": "2"}}<|eot_id|>⟫')


# Knows users, assistants and systems alone.
_KNOWN = "{% for m in messages %}{% if m.role in ('user', 'assistant', 'system') %}"


@pytest.mark.parametrize("name", ["zephyr", "chatml"])
def test_a_developer_is_a_system_where_the_template_writes_no_developers(name):
    tokenizer = tokenizer_of(name)
    developer = {"role": "developer", "content": "Be kind."}
    assert "developer" in rendered(ChatTemplate(tokenizer), developer, "Hi", "Hey")[1][0]
    text = tokenizer.chat_template.replace("{% for m in messages %}", _KNOWN)
    tokenizer.chat_template = text.replace(
        "{% endfor %}{% if add", "{% endif %}{% endfor %}{% if add"
    )
    row, [shown] = rendered(ChatTemplate(tokenizer), developer, "Hi", "Hey")
    assert "system" in shown and "Be kind." in shown and row.num_left_out == 0


def test_messages_and_tools_that_are_left_out_are_counted():
    tokenizer = tokenizer_of("zephyr")
    text = tokenizer.chat_template.replace("{% for m in messages %}", _KNOWN)
    tokenizer.chat_template = text.replace(
        "{% endfor %}{% if add", "{% endif %}{% endfor %}{% if add"
    )
    row, [shown] = rendered(ChatTemplate(tokenizer), "Hi", "Hey", result("4"), "Ciao", tools=TOOLS)
    assert "4" not in shown and (row.num_left_out, row.leaves_out_tools) == (1, True)
    for name, has_tools in [("chatml", True), ("mistral", True), ("zephyr", False)]:
        row, _ = rendered(named(name), "Hi", "Hey", result('"4"\n'), "Ciao", tools=TOOLS)
        assert (row.num_left_out, row.leaves_out_tools) == (0, not has_tools), name


def test_a_result_that_is_written_as_json_is_not_left_out():
    tokenizer = tokenizer_of("zephyr")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m.content +", "(m.content | tojson if m.role == 'tool' else m.content) +"
    )
    row, [shown] = rendered(ChatTemplate(tokenizer), "Hi", "Hey", result('"4"\n'), "Ciao")
    assert '\n"\\"4\\"\\n"</s>' in shown and row.num_left_out == 0


# Writes the system message in front of the last message, if that is a user's.
NEMO = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[RESULT] {{ m.content }}[/RESULT]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SYSTEM = {"role": "system", "content": "Be kind."}


def test_a_system_message_that_stands_in_prompts_alone_is_trained_behind():
    template = made(NEMO, "[INST]", "[/INST]")
    row, shown = rendered(template, SYSTEM, "Hi", "Hey", "Bye", "Ciao")
    assert shown == [
        "<s>[INST] Be kind.\n\nHi[/INST]⟪ Hey<eos>⟫",
        "<s>[INST] Hi[/INST] Hey<eos>[INST] Be kind.\n\nBye[/INST]⟪ Ciao<eos>⟫",
    ]
    assert row.num_left_out == 0
    assert prompt(template, SYSTEM, "Hi") == "<s>[INST] Be kind.\n\nHi[/INST]"
    assert prompt(template, SYSTEM, "Hi", "Hey", "Bye") == shown[1].partition("⟪")[0]
    row, shown = rendered(template, SYSTEM, "Hi", "Hey", result("4"), "Ciao")
    assert shown[0] == "<s>[INST] Be kind.\n\nHi[/INST]⟪ Hey<eos>⟫"
    assert shown[1] == "<s>[INST] Hi[/INST] Hey<eos>[RESULT] 4[/RESULT]⟪ Ciao<eos>⟫"
    assert row.num_left_out == 1


def test_a_system_message_that_moves_to_the_last_user_unrolls_a_row():
    template = made(
        "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' %}"
        "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {% if m == users[-1] and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        *("[INST]", "[/INST]"),
    )
    _, shown = rendered(template, SYSTEM, "Hi", "Hey", "Bye", "Ciao")
    assert shown == [
        "<s>[INST] Be kind.\n\nHi[/INST]⟪ Hey<eos>⟫",
        "<s>[INST] Hi[/INST] Hey<eos>[INST] Be kind.\n\nBye[/INST]⟪ Ciao<eos>⟫",
    ]
    _, [shown] = rendered(template, "Hi", "Hey", "Bye", "Ciao")
    assert shown == "<s>[INST] Hi[/INST]⟪ Hey<eos>⟫[INST] Bye[/INST]⟪ Ciao<eos>⟫"


def test_a_template_that_asks_for_a_system_message_shows_its_habits_with_one():
    tokenizer = tokenizer_of("qwen3")
    plain = ChatTemplate(tokenizer)
    asks = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = asks + tokenizer.chat_template
    asking = ChatTemplate(tokenizer)
    for answer in ("Four.", THINKS):
        assert (
            rendered(asking, SYSTEM, "2+2?", answer)[1]
            == rendered(plain, SYSTEM, "2+2?", answer)[1]
        )
    assert asking.stops == ["<|im_end|>"]
    with pytest.raises(BadRow, match="no system"):
        rendered(asking, "2+2?", "Four.")


# Reasoning


def no_thoughts(plain, asked):
    """Drops reasoning; in front of answers there is a text that says so."""
    return (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
        "{% else %}<|assistant|>" + plain + "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>" + asked + "{% endif %}"
    )


@pytest.mark.parametrize(
    ("plain", "asked", "before"),
    [
        ("<think></think>", "", ""),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n", ""),
        ("</think>", "</think>", ""),
        ("</think>", "<think>", ""),
        ("<think>\n", "<think>\n", "<think>\n"),
    ],
)
@pytest.mark.parametrize("in_field", [True, False])
def test_reasoning_that_is_put_in_stands_behind_no_other(plain, asked, before, in_field):
    template = made(no_thoughts(plain, asked), "<|user|>", "<|assistant|>")
    fields = {"content": "Four.", "reasoning_content": "Easy."} if in_field else {"content": THINKS}
    row, [shown] = rendered(template, "2+2?", {"role": "assistant", **fields})
    assert shown == f"<|user|>2+2?<|assistant|>{before}⟪{THINKS.removeprefix(before)}<eos>⟫"
    assert row.num_unrendered == 1
    assert prompt(template, "2+2?", reasons=True) == shown.partition("⟪")[0]
    _, [shown] = rendered(template, "2+2?", "Four.")
    assert shown == f"<|user|>2+2?<|assistant|>{plain}⟪Four.<eos>⟫"


def test_reasoning_in_tags_goes_where_the_template_writes_reasoning():
    template = named("gpt_oss")
    _, in_tags = rendered(template, "2+2?", THINKS)
    thinking = {"role": "assistant", "content": "Four.", "thinking": "Easy."}
    assert in_tags == rendered(template, "2+2?", thinking)[1]
    assert in_tags[0].endswith(
        "<|start|>assistant⟪<|channel|>analysis<|message|>Easy.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Four.<|return|>⟫"
    )


@pytest.mark.parametrize(
    "content", ["<think>\n<think>\n</think>\n\na", "<think>\n\n</think>\n\na", "a</think>b"]
)
def test_other_uses_of_the_tags_stay_in_the_content(content):
    _, [shown] = rendered(named("gpt_oss"), "Hi", content)
    assert shown.endswith(f"assistant⟪<|channel|>final<|message|>{content}<|return|>⟫")


# Calls


def test_calls_that_stand_behind_another_text_begin_where_the_two_part():
    template = made(
        "{% for m in messages %}{{ m.role | title }}\n{% if m.tool_calls %}"
        "<TOOLCALL>{{ m.tool_calls[0].function | tojson }}"
        "{% else %}{% if m.role == 'assistant' %}<think>\n{% endif %}{{ m.content }}{% endif %}"
        "{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant\n<think>\n{% endif %}",
    )
    _, shown = rendered(template, "2+2?", calls(2), result("4"), "Four.", tools=TOOLS)
    assert shown == [
        'User\n2+2?<eos>\nAssistant\n⟪<TOOLCALL>{"name": "add", "arguments": {"x": "2"}}<eos>⟫\n'
        "Tool\n4<eos>\nAssistant\n⟪<think>\nFour.<eos>⟫\n"
    ]
    assert prompt(template, "2+2?", tools=TOOLS) == "User\n2+2?<eos>\nAssistant\n"


def test_a_template_that_marks_answers_may_take_arguments_as_text():
    template = made(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ 'call ' + c.function.name + "
        "c.function.arguments }}{% endfor %}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        *("<|user|>", "<|assistant|>", "<|tool|>"),
    )
    _, [shown] = rendered(template, "2+2?", calls(2), result("4"), "Four.")
    assert shown == (
        '<|user|>2+2?<|assistant|>⟪call add{"x": "2"}<eos>⟫<|tool|>4<|assistant|>⟪Four.<eos>⟫'
    )
