"""Chat templates small enough to read, one for each way in which model families write turns.

Structure and special tokens are those of the families; the wording is ours. FAMILIES names
each with its special tokens, other tokens and EOS; `tokenizer_of` puts one on a tokenizer.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

from small_tokenizers import byte_bpe
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

_TOOLS = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
_CALLS = (
    "{% for call in m.tool_calls or [] %}"
    "{{ '\n' if m.content or not loop.first else '' }}"
    "<tool_call>\n{{ call.function | tojson }}\n</tool_call>"
    "{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

CHATML = (
    _TOOLS
    + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    + _CALLS
    + "<|im_end|>\n{% endfor %}"
    + PROMPT
)

# Marks answers, the line break behind their stop token included.
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}" + PROMPT
)

# Thinks; earlier turns lose their reasoning, a last one without any gets an empty block.
QWEN3 = (
    _TOOLS
    + "{% set ns = namespace(last_user=0) %}"
    + "{% for m in messages %}{% if m.role == 'user' %}"
    + "{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}"
    + "{% for m in messages %}"
    + "{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    + "{% else %}"
    + "{% set thought = m.reasoning_content or '' %}{% set answer = m.content %}"
    + "{% if not thought and '</think>' in answer %}"
    + "{% set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    + "{% set answer = answer.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    + "<|im_start|>assistant\n"
    + "{% if loop.index0 > ns.last_user and (loop.last or thought) %}"
    + "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}"
    + "{{ answer }}"
    + _CALLS.replace("m.content", "answer")
    + "<|im_end|>\n{% endif %}{% endfor %}"
    + PROMPT
)

LLAMA2 = (
    "{% set first = messages[0] %}"
    "{% set system = first.content if first.role == 'system' else none %}"
    "{% for m in (messages[1:] if system else messages) %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}"
    "{{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
    "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# Behind the last turn come two tokens, of which the first stops.
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)

# Ends no turn: the next one's first token does.
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}"
    "{% if m.role == 'tool' %}<|observation|>\n{{ m.content }}"
    "{% else %}<|{{ m.role }}|>"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}\n"
    "{{ call.function.arguments | tojson }}{% endfor %}"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Ends an answer in two tokens, of which the second stops.
COHERE2 = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|>"
    "<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>"
    "{% else %}<|USER_TOKEN|>{{ m.content }}{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)

# Drops all reasoning, though its generation prompt begins it.
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1].lstrip('\n') }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)

# The last answer ends otherwise than those before, a call again otherwise.
GPT_OSS = (
    "{% for m in messages %}"
    "{% if m.role != 'assistant' %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>"
    "{% else %}"
    "{% if m.reasoning_content and loop.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>{% endif %}"
    "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "<|start|>assistant to={{ f.name }}<|message|>{{ f.arguments | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

# Has no generation prompt, and no space in front of calls, whose arguments are text; tools
# stand in front of the last user's turn.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}"
    "{% if tools and loop.index > messages | length - 2 %}[TOOLS] {{ tools | length }} {% endif %}"
    "[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS] {{ m.tool_calls[0].function.name + '|' + "
    "m.tool_calls[0].function.arguments }}{{ eos_token }}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)

ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Ends an answer in no token at all.
UNENDED = (
    "{% for m in messages %}{{ m.role | title }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


class Family(NamedTuple):
    """A template, and the tokens that its model's tokenizer knows."""

    template: str
    eos: str
    special: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


_THINK = ("<think>", "</think>")
FAMILIES = {
    "chatml": Family(
        CHATML, "<|im_end|>", ("<|im_start|>",), (*_THINK, "<tool_call>", "</tool_call>")
    ),
    "generation": Family(GENERATION, "<|im_end|>", ("<|im_start|>",)),
    "qwen3": Family(
        QWEN3, "<|im_end|>", ("<|im_start|>",), (*_THINK, "<tool_call>", "</tool_call>")
    ),
    "llama2": Family(LLAMA2, "</s>"),
    "llama3": Family(LLAMA3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "gemma": Family(GEMMA, "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "phi3": Family(PHI3, "<|endoftext|>", ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")),
    "glm4": Family(
        GLM4,
        "<|endoftext|>",
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"),
    ),
    "cohere2": Family(
        COHERE2,
        "<|END_OF_TURN_TOKEN|>",
        ("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>")
        + ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    "deepseek_r1": Family(
        DEEPSEEK_R1, "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"), _THINK
    ),
    "gpt_oss": Family(
        GPT_OSS,
        "<|return|>",
        ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|call|>"),
    ),
    "mistral": Family(
        MISTRAL,
        "</s>",
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    "zephyr": Family(ZEPHYR, "</s>"),
    "unended": Family(UNENDED, "<eos>"),
}


def tokenizer_of(
    name: str, build: Callable[[], PreTrainedTokenizerFast] = byte_bpe
) -> PreTrainedTokenizerFast:
    """A small tokenizer that knows a family's tokens, with its template."""
    family = FAMILIES[name]
    tokenizer = copy.deepcopy(build())
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": family.eos})
    tokens = [AddedToken(token, special=True, normalized=False) for token in family.special]
    tokens += [AddedToken(token, special=False, normalized=False) for token in family.others]
    tokenizer.add_tokens(tokens)
    tokenizer.chat_template = family.template
    return tokenizer
