"""Expectations are whole texts, worked by hand, with each trained span in ⟪ ⟫."""

import functools
import re

import pytest
from chat_templates import FAMILIES, PROMPT, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_bpe

from jax_sft.data.chat import ChatTemplate, chat_template, check_stop_tokens
from jax_sft.data.habits import Tokens
from jax_sft.data.types import BadRow, Conversation, Message

TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {}}},)
THOUGHT = "<think>\nEasy.\n</think>\n\n"


@functools.cache
def template_of(name, **options):
    return ChatTemplate(tokenizer_of(name), **options)


def message(role, content="", weight=None, **fields):
    weight = float(role == "assistant") if weight is None else weight
    return Message({"role": role, "content": content, **fields}, weight)


def call(number):
    function = {"name": "add", "arguments": {"x": number}}
    return [{"type": "function", "id": "a1", "function": function}]


def conversation(*messages, tools=None):
    """Messages, where texts stand for user and assistant in turn."""
    roles = ("user", "assistant")
    plain = iter(range(len(messages)))
    return Conversation(
        tuple(
            m if isinstance(m, Message) else message(roles[next(plain) % 2], m) for m in messages
        ),
        tools,
    )


def shown(sequence):
    return "".join(f"⟪{t.text}⟫" if t.weight else t.text for t in sequence.turns)


def rendered(name, *messages, tools=None):
    """The only sequence, shown."""
    [sequence] = template_of(name).render(conversation(*messages, tools=tools), "row 7").sequences
    return shown(sequence)


PLAIN = {
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟪Hey<|im_end|>⟫\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟪Ciao<|im_end|>⟫\n",
    "generation": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟪Hey<|im_end|>⟫\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟪Ciao<|im_end|>⟫\n",
    "llama2": "<s>[INST] Hi [/INST]⟪ Hey </s>⟫<s>[INST] Bye [/INST]⟪ Ciao </s>⟫",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟪Hey<|eot_id|>⟫"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟪Ciao<|eot_id|>⟫",
    "gemma": "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟪Hey<end_of_turn>⟫\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟪Ciao<end_of_turn>⟫\n",
    "phi3": "<|user|>\nHi<|end|>\n<|assistant|>\n⟪Hey<|end|>⟫\n"
    "<|user|>\nBye<|end|>\n<|assistant|>\n⟪Ciao<|end|>⟫\n<|endoftext|>",
    "glm4": "[gMASK]<sop><|user|>\nHi<|assistant|>\n⟪Hey<|user|>⟫\nBye<|assistant|>\n"
    "⟪Ciao<|user|>⟫",
    "cohere2": "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>"
    "⟪Hey<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟫"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Bye<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>"
    "⟪Ciao<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟫",
    "deepseek_r1": "<s><｜User｜>Hi<｜Assistant｜>⟪Hey<｜end▁of▁sentence｜>⟫"
    "<｜User｜>Bye<｜Assistant｜>⟪Ciao<｜end▁of▁sentence｜>⟫",
    "mistral": "<s>[INST] Hi[/INST]⟪ Hey</s>⟫[INST] Bye[/INST]⟪ Ciao</s>⟫",
    "zephyr": "<|user|>\nHi</s>\n<|assistant|>\n⟪Hey</s>⟫\n<|user|>\nBye</s>\n<|assistant|>\n"
    "⟪Ciao</s>⟫\n",
}

# What the last turn of these looks like, another one does not: one sequence an answer.
UNROLLED = {
    "qwen3": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n⟪Hey<|im_end|>⟫\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHey<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n⟪Ciao<|im_end|>⟫\n",
    ),
    "gpt_oss": (
        "<|start|>user<|message|>Hi<|end|><|start|>assistant"
        "<|channel|>final<|message|>⟪Hey<|return|>⟫",
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Hey<|end|>"
        "<|start|>user<|message|>Bye<|end|><|start|>assistant"
        "<|channel|>final<|message|>⟪Ciao<|return|>⟫",
    ),
    "unended": (
        "User: Hi\nAssistant:⟪ Hey<eos>⟫",
        "User: Hi\nAssistant: Hey\nUser: Bye\nAssistant:⟪ Ciao<eos>⟫",
    ),
}


def test_every_family_is_expected():
    assert PLAIN.keys() | UNROLLED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", PLAIN)
def test_an_answer_runs_from_its_content_through_its_stop_token(name):
    assert rendered(name, "Hi", "Hey", "Bye", "Ciao") == PLAIN[name]


@pytest.mark.parametrize("name", UNROLLED)
def test_answers_that_others_would_change_have_a_sequence_each(name):
    row = template_of(name).render(conversation("Hi", "Hey", "Bye", "Ciao"), "row 7")
    assert tuple(map(shown, row.sequences)) == UNROLLED[name]
    assert row.num_added_stops == (2 if name == "unended" else 0)


def test_answers_that_stay_as_they_were_share_a_sequence():
    messages = [message("user", "2+2?"), message("assistant", tool_calls=call(2))]
    messages += [message("tool", "4"), message("assistant", "Four.")]
    messages += [message("user", "Sure?"), message("assistant", "Yes.")]
    row = template_of("qwen3").render(conversation(*messages), "row 7")
    function = '<tool_call>\n{"name": "add", "arguments": {"x": 2}}\n</tool_call>'
    head = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    tool = "\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"
    think = "<think>\n\n</think>\n\n"
    assert tuple(map(shown, row.sequences)) == (
        f"{head}{think}⟪{function}<|im_end|>⟫\n",
        f"{head}{function}<|im_end|>{tool}{think}⟪Four.<|im_end|>⟫\n",
        f"{head}{function}<|im_end|>{tool}Four.<|im_end|>\n"
        f"<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n{think}⟪Yes.<|im_end|>⟫\n",
    )
    thinking = [message("user", "2+2?"), message("assistant", tool_calls=call(2), reasoning="So.")]
    thinking += [message("tool", "4"), message("assistant", f"{THOUGHT}Four.")]
    assert rendered("qwen3", *thinking) == (
        f"{head}⟪<think>\nSo.\n</think>\n\n{function}<|im_end|>⟫{tool}⟪{THOUGHT}Four.<|im_end|>⟫\n"
    )


def test_tool_calls_are_trained_and_results_are_not():
    messages = [message("user", "2+2?"), message("assistant", tool_calls=call(2))]
    messages += [message("tool", "4"), message("assistant", "Four.")]
    function = '{"name": "add", "arguments": {"x": 2}}'
    head = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    offered = '<|im_start|>system\nTools: [{"type": "function", "function": '
    offered += '{"name": "add", "parameters": {}}}]<|im_end|>\n'
    assert rendered("chatml", *messages, tools=TOOLS) == (
        f"{offered}{head}⟪<tool_call>\n{function}\n</tool_call><|im_end|>⟫\n"
        "<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n⟪Four.<|im_end|>⟫\n"
    )
    spoken = [messages[0], message("assistant", f"{THOUGHT}So:", tool_calls=call(2))]
    assert rendered("chatml", *spoken) == (
        f"{head}⟪{THOUGHT}So:\n<tool_call>\n{function}\n</tool_call><|im_end|>⟫\n"
    )
    assert rendered("glm4", *messages) == (
        '[gMASK]<sop><|user|>\n2+2?<|assistant|>⟪add\n{"x": 2}<|observation|>⟫\n4'
        "<|assistant|>\n⟪Four.<|user|>⟫"
    )
    assert rendered("mistral", *messages) == (
        '<s>[INST] 2+2?[/INST]⟪[TOOL_CALLS] add|{"x": 2}</s>⟫'
        "[TOOL_RESULTS] 4[/TOOL_RESULTS]⟪ Four.</s>⟫"
    )
    assert rendered("gpt_oss", *messages[:3], message("assistant", "Four.")) == (
        '<|start|>user<|message|>2+2?<|end|><|start|>assistant⟪ to=add<|message|>{"x": 2}<|call|>⟫'
        "<|start|>tool<|message|>4<|end|>"
        "<|start|>assistant<|channel|>final<|message|>⟪Four.<|return|>⟫"
    )


@pytest.mark.parametrize(
    ("name", "answer", "num_unrendered"),
    [
        ("chatml", f"{THOUGHT}Four.<|im_end|>", 0),
        ("qwen3", f"{THOUGHT}Four.<|im_end|>", 0),
        ("deepseek_r1", f"{THOUGHT}Four.<｜end▁of▁sentence｜>", 1),
        ("llama2", f" {THOUGHT}Four. </s>", 0),
        ("gemma", f"{THOUGHT}Four.<end_of_turn>", 0),
        ("glm4", f"\n{THOUGHT}Four.<|user|>", 0),
    ],
)
def test_reasoning_in_the_content_is_trained(name, answer, num_unrendered):
    row = template_of(name).render(conversation("2+2?", f"{THOUGHT}Four."), "row 7")
    [sequence] = row.sequences
    assert [turn.text for turn in sequence.turns if turn.weight] == [answer]
    assert sequence.reasons and row.num_unrendered == num_unrendered


@pytest.mark.parametrize(
    ("name", "answer", "num_unrendered"),
    [
        ("qwen3", f"{THOUGHT}Four.<|im_end|>", 0),
        ("chatml", f"{THOUGHT}Four.<|im_end|>", 1),
        ("deepseek_r1", f"{THOUGHT}Four.<｜end▁of▁sentence｜>", 1),
        (
            "gpt_oss",
            "<|channel|>analysis<|message|>Easy.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Four.<|return|>",
            0,
        ),
    ],
)
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_a_field_is_trained(name, answer, num_unrendered, field):
    reply = message("assistant", "Four.", **{field: "Easy."})
    row = template_of(name).render(conversation(message("user", "2+2?"), reply), "row 7")
    [sequence] = row.sequences
    assert [turn.text for turn in sequence.turns if turn.weight] == [answer]
    assert sequence.reasons and row.num_unrendered == num_unrendered


def test_an_answer_that_thinks_begins_with_that_behind_a_prompt_that_rules_it_out():
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"
    row = ChatTemplate(tokenizer).render(conversation("2+2?", f"{THOUGHT}Four."), "row 7")
    assert shown(row.sequences[0]) == (
        f"<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟪{THOUGHT}Four.<|im_end|>⟫\n"
    )
    assert row.num_unrendered == 0


def test_with_tools_at_hand_a_prompt_does_not_rule_calls_out():
    asked = conversation("2+2?", tools=TOOLS)
    called = [message("user", "2+2?"), message("assistant", tool_calls=call(2))]
    thought = message("assistant", "Four.", reasoning="So.")
    for answered in (called, ["2+2?", "Four."], [called[0], thought]):
        row = template_of("gpt_oss").render(conversation(*answered, tools=TOOLS), "row 7")
        before, answer = (turn.text for turn in row.sequences[0].turns)
        assert (before,) == template_of("gpt_oss").prompt(asked, "row 7")
        assert before == "<|start|>user<|message|>2+2?<|end|><|start|>assistant"
        assert answer.endswith(("<|call|>", "Four.<|return|>"))


def test_tools_in_front_of_the_last_user_alone_unroll_a_row():
    chat = conversation("Hi", "Hey", "Bye", "Ciao", tools=TOOLS)
    row = template_of("mistral").render(chat, "row 7")
    assert tuple(map(shown, row.sequences)) == (
        "<s>[TOOLS] 1 [INST] Hi[/INST]⟪ Hey</s>⟫",
        "<s>[INST] Hi[/INST] Hey</s>[TOOLS] 1 [INST] Bye[/INST]⟪ Ciao</s>⟫",
    )


def rendered_by(change, name="chatml", *messages):
    tokenizer = tokenizer_of(name)
    tokenizer.chat_template = change(tokenizer.chat_template)
    row = ChatTemplate(tokenizer).render(conversation(*messages), "row 7")
    return tuple(map(shown, row.sequences))


def test_without_a_generation_prompt_an_answer_begins_behind_its_role():
    turns = rendered_by(
        lambda text: text.removesuffix(PROMPT), "chatml", "Hi", "Hey", "Bye", "Ciao"
    )
    assert turns == (PLAIN["chatml"],)


def test_content_that_the_template_changes_is_found():
    change = "m.content | capitalize"
    turns = rendered_by(lambda text: text.replace("m.content", change), "zephyr", "hi", "hey")
    assert turns == ("<|user|>\nHi</s>\n<|assistant|>\n⟪Hey</s>⟫\n",)


def test_of_several_tokens_behind_answers_eos_ends_them():
    turns = rendered_by(
        lambda text: text.replace("eos_token }}", "eos_token }}<s>"), "zephyr", "a", "b"
    )
    assert turns == ("<|user|>\na</s><s>\n<|assistant|>\n⟪b</s>⟫<s>\n",)


def test_white_space_that_is_a_token_ends_nothing():
    tokenizer = tokenizer_of("unended")
    tokenizer.add_tokens(["\n", "  "])
    template = ChatTemplate(tokenizer)
    assert template.stops == []
    [sequence] = template.render(conversation("Hi", "Hey"), "row 7").sequences
    assert shown(sequence) == "User: Hi\nAssistant:⟪ Hey<eos>⟫"


def test_reasoning_that_its_answer_repeats_is_not_taken_for_rendered():
    row = template_of("deepseek_r1").render(
        conversation("2+2?", "<think>\n4\n</think>\n\nIt is 4."), "row 7"
    )
    [_, answer] = row.sequences[0].turns
    assert answer.text == "<think>\n4\n</think>\n\nIt is 4.<｜end▁of▁sentence｜>"
    assert row.num_unrendered == 1


def test_weights_choose_what_is_trained_and_not_where_it_is_cut():
    chosen = conversation(
        message("user", "Hi"),
        message("assistant", "Hey", 0.0),
        message("user", "Bye"),
        message("assistant", "Ciao", 0.5),
    )
    [sequence] = template_of("phi3").render(chosen, "row 7").sequences
    assert [(turn.text, turn.weight) for turn in sequence.turns] == [
        ("<|user|>\nHi<|end|>\n<|assistant|>\n", 0.0),
        ("Hey<|end|>", 0.0),
        ("\n<|user|>\nBye<|end|>\n<|assistant|>\n", 0.0),
        ("Ciao<|end|>", 0.5),
        ("\n<|endoftext|>", 0.0),
    ]
    assert sequence.stops == (None, None, None, "<|end|>", None)


def test_a_user_message_can_be_trained_where_nothing_is_rewritten():
    asked = message("user", "Hi", 1.0), message("assistant", "Hey", 0.0)
    assert rendered("zephyr", *asked) == "<|user|>\n⟪Hi⟫</s>\n<|assistant|>\nHey</s>\n"
    asked = message("user", "Hi", 1.0), message("assistant", "Hey"), message("user", "Bye")
    with pytest.raises(BadRow, match="^row 7: a message that is no answer is to be trained") as bad:
        template_of("qwen3").render(conversation(*asked, message("assistant", "Ciao")), "row 7")
    assert bad.value.reason == "answer_not_located"


def test_white_space_around_answers_is_the_templates():
    assert (
        rendered("zephyr", " Hi ", "\n Hey \n") == "<|user|>\n Hi </s>\n<|assistant|>\n⟪Hey</s>⟫\n"
    )


def test_tokens_in_contents_end_nothing():
    text = "a</s> b {{ x }} {% y %} \ue000\ue001 é漢🙂</s>"
    assert rendered("zephyr", text, text) == (
        f"<|user|>\n{text}</s>\n<|assistant|>\n⟪{text}</s>⟫\n"
    )


# What training has in front of plain answers, behind the template's own prompt.
LEAD_INS = {
    "qwen3": "<think>\n\n</think>\n\n",
    "glm4": "\n",
    "cohere2": "<|START_RESPONSE|>",
    "gpt_oss": "<|channel|>final<|message|>",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_templates_own_prompt_is_trainings_but_for_what_is_listed(name):
    asked, template = conversation("Hi", "Hey", "Bye"), template_of(name)
    own = template.generation_prompt(asked, "row 7").removesuffix("<think>\n")  # of DeepSeek R1
    assert "".join(template.prompt(asked, "row 7")) == own + LEAD_INS.get(name, "")
    assert "".join(template.prompt(asked, "row 7", reasons=True)) == own


def test_stop_tokens_that_the_template_shows():
    stops = {name: template_of(name).stops for name in FAMILIES}
    assert stops == {
        **dict.fromkeys(["chatml", "generation", "qwen3"], ["<|im_end|>"]),
        **dict.fromkeys(["llama2", "mistral", "zephyr"], ["</s>"]),
        "llama3": ["<|eot_id|>"],
        "gemma": ["<end_of_turn>"],
        "phi3": ["<|end|>"],
        "glm4": ["<|user|>"],
        "cohere2": ["<|END_OF_TURN_TOKEN|>"],
        "deepseek_r1": ["<｜end▁of▁sentence｜>"],
        "gpt_oss": ["<|return|>"],
        "unended": [],
    }


def test_chosen_stop_tokens_end_answers():
    template = template_of("phi3", stop_tokens=("<|endoftext|>",))
    [sequence] = template.render(conversation("Hi", "Hey"), "row 7").sequences
    assert shown(sequence) == "<|user|>\nHi<|end|>\n<|assistant|>\n⟪Hey<|end|>\n<|endoftext|>⟫"
    template = template_of("unended", stop_tokens=("<s>",))
    [sequence] = template.render(conversation("Hi", "Hey"), "row 7").sequences
    assert shown(sequence) == "User: Hi\nAssistant:⟪ Hey\n<s>⟫"


def test_without_add_eos_an_unended_answer_has_no_stop():
    row = template_of("unended", add_eos=False).render(conversation("Hi", "Hey"), "row 7")
    assert shown(row.sequences[0]) == "User: Hi\nAssistant:⟪ Hey⟫\n"
    assert row.sequences[0].stops == (None, "", None) and row.num_added_stops == 0


def test_generation_blocks_are_transformers_mask_up_to_the_stop_token():
    tokenizer = tokenizer_of("generation")
    chat = conversation("Hi", "Hey", "Bye", "Ciao")
    given = tokenizer.apply_chat_template(
        [m.fields for m in chat.messages],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = given["input_ids"]
    masked = "".join(
        tokenizer.decode([id_]) for id_, m in zip(ids, given["assistant_masks"], strict=True) if m
    )
    [sequence] = ChatTemplate(tokenizer).render(chat, "row 7").sequences
    assert masked == "".join(turn.text + "\n" for turn in sequence.turns if turn.weight)


def test_a_generation_block_says_where_an_answer_begins():
    tokenizer = tokenizer_of("generation")
    before = "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    assert before in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(before, f"{before}Well: ")
    template = ChatTemplate(tokenizer)
    for answer in ("Hey", f"{THOUGHT}Hey"):
        [sequence] = template.render(conversation("Hi", answer), "row 7").sequences
        assert sequence.turns[1].text == f"Well: {answer}<|im_end|>"


@pytest.mark.parametrize(
    ("name", "messages", "reason", "text"),
    [
        ("gemma", ["system"], "template_error", r"fails on it \(no system role\); change the row"),
        ("llama2", ["user", "user"], "template_error", r"fails on it \(roles must alternate\)"),
    ],
)
def test_what_a_template_refuses_is_a_bad_row(name, messages, reason, text):
    refused = [message(role, "x") for role in messages]
    with pytest.raises(BadRow, match=f"^row 7: the chat template {text}") as bad:
        template_of(name).render(conversation(*refused, message("assistant", "y")), "row 7")
    assert bad.value.reason == reason and "\n" not in str(bad.value)


@pytest.mark.parametrize("content", ["", "So:"])
def test_calls_that_a_template_leaves_out_are_a_bad_row(content):
    asked = message("user", "2+2?"), message("assistant", content, tool_calls=call(2))
    with pytest.raises(BadRow) as bad:
        template_of("phi3").render(conversation(*asked), "row 7")
    assert bad.value.reason == "answer_not_located"
    assert str(bad.value) == (
        f"row 7: the chat template leaves out a part of the answer {content!r} with calls of add; "
        "set tokenizer.chat_template to one that renders it, take off its train flag, or set "
        'data.on_bad_row to "skip"'
    )
    context = message("assistant", content, 0.0, tool_calls=call(2))
    assert rendered("phi3", asked[0], context, message("assistant", "4")).endswith(
        "⟪4<|end|>⟫\n<|endoftext|>"
    )


def test_content_beside_calls_that_a_template_leaves_out_is_a_bad_row():
    asked = message("user", "2+2?"), message("assistant", "So:", tool_calls=call(2))
    with pytest.raises(BadRow, match="leaves out a part of the answer 'So:' with calls of add"):
        template_of("llama3").render(conversation(*asked), "row 7")
    with pytest.raises(BadRow, match=r"'x{56}\.\.\. with calls"):
        long = message("assistant", "x" * 99, tool_calls=call(2))
        template_of("llama3").render(conversation(asked[0], long), "row 7")


def test_what_a_tokenizer_lacks_is_an_error():
    with pytest.raises(ValueError, match="has no chat template: set tokenizer.chat_template"):
        ChatTemplate(byte_bpe())
    with pytest.raises(ValueError, match=r"has '<\|x\|>', which the tokenizer splits into 5"):
        check_stop_tokens(["<|x|>"], tokenizer_of("chatml"))
    assert check_stop_tokens(["<|im_end|>"], tokenizer_of("chatml")) == ("<|im_end|>",)


def test_chat_templates_are_made_once():
    tokenizer = tokenizer_of("chatml")
    assert chat_template(tokenizer) is chat_template(tokenizer)
    assert chat_template(tokenizer) is not chat_template(tokenizer, add_eos=False)
    tokenizer.chat_template = FAMILIES["zephyr"].template
    assert chat_template(tokenizer).stops == ["<|im_end|>"]
    assert (
        chat_template(tokenizer).generation_prompt(conversation("Hi"), "x").startswith("<|user|>")
    )


def test_kwargs_reach_the_template():
    tokenizer = tokenizer_of("zephyr")
    tokenizer.chat_template = "{{ greeting }}" + tokenizer.chat_template
    template = chat_template(tokenizer, kwargs='{"greeting": "Hello. "}')
    [sequence] = template.render(conversation("Hi", "Hey"), "row 7").sequences
    assert sequence.turns[0].text == "Hello. <|user|>\nHi</s>\n<|assistant|>\n"
    assert sequence.text == "Hello. <|user|>\nHi</s>\n<|assistant|>\nHey</s>\n"


def test_what_two_texts_share_ends_between_words_and_tokens():
    tokens = Tokens(tokenizer_of("gpt_oss"))
    assert tokens.common("a<|end|>b", "a<|end|>c") == len("a<|end|>")
    assert tokens.common("a<|end|>b", "a<|channel|>b") == 1
    assert tokens.common("assistant to=f", "assistants") == 0
    assert tokens.common("assistant", "assistant to=f") == len("assistant")


PIECES = st.sampled_from(
    [
        "Hi",
        "a",
        " ",
        "  ",
        "\n",
        ".",
        "<eos>",
        "</s>",
        "<|im_end|>",
        "<|end|>",
        "{{ x }}",
        "é",
        "🙂",
    ]
    + ["\ue000", "<think>", "[/INST]", "user"]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=6).map("".join).filter(str.strip)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS, st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=3)


@pytest.mark.parametrize("name", [*PLAIN, *UNROLLED])
@given(pairs=PAIRS)
@settings(deadline=None, max_examples=60)
def test_random_conversations_are_what_rendering_turn_by_turn_gives(name, pairs):
    """The slow, obvious way: behind the prompt, up to the last stop token of the turn alone."""
    template, tokenizer = template_of(name), tokenizer_of(name)
    stop = (template.stops or ["<eos>"])[0]
    messages, expected = [], []
    for user, answer, weight in pairs:
        prompt = [*messages, message("user", user)]
        messages = [*prompt, message("assistant", answer, weight)]
        if not weight:
            continue
        text = tokenizer.apply_chat_template(
            [
                {**m.fields, "content": m.fields["content"].strip()}
                if m.fields["role"] == "assistant"
                else m.fields
                for m in messages
            ],
            tokenize=False,
        )
        if name in ("glm4", "unended"):
            text = text.rstrip("\n") + stop if name == "unended" else text + stop
        if name == "phi3":
            text = text.removesuffix("<|endoftext|>")
        before = "".join(template.prompt(Conversation(tuple(prompt)), "x"))
        assert text.startswith(before)
        expected.append((text[len(before) : text.rindex(stop) + len(stop)], weight, before))
    row = template.render(Conversation(tuple(messages)), "row 7")
    found = [
        (turn.text, turn.weight, "".join(t.text for t in sequence.turns[:index]))
        for sequence in row.sequences
        for index, turn in enumerate(sequence.turns)
        if turn.weight
    ]
    assert found == expected
    for sequence in row.sequences:
        for turn, end in zip(sequence.turns, sequence.stops, strict=True):
            assert turn.text.endswith(end or "") and (end is not None) == (turn.weight > 0)
    assert all(re.search(r"\S", text) for text, _, _ in found)
