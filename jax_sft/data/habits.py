"""What a chat template does around plain answers: where they begin, and what ends them.

What comes in is a Template, what goes out are its Habits, found by rendering one made-up
exchange and two. Stock templates state neither, and no rule by name would hold for the
next one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jax_sft.data.template import Chat, Template
from jax_sft.data.types import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASK, REPLY = "probe", "7"  # a digit: templates may change the case of letters
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "y"}}, "id": "123456789"}
_SCHEMA = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}}
_TOOL = {"type": "function", "function": {"name": "f", "description": "f", "parameters": _SCHEMA}}
_OTHER_ANSWERS = (
    {"role": "assistant", "content": REPLY, "reasoning_content": ASK},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
)


class Habits(NamedTuple):
    """What a template does with plain answers.

    Attributes:
        stop: the token that ends them, None where there is none.
        stop_follows: whether it is the first token of the next message, as with GLM-4.
        rewrites: whether an answer looks different when others follow it.
        lead_in: what the template writes in front of them, but not of answers that think or
            call tools.
    """

    stop: str | None
    stop_follows: bool
    rewrites: bool
    lead_in: str


class Tokens:
    """A tokenizer's own tokens, such as <|im_end|>, as they stand in text.

    Args:
        tokenizer: its added tokens count behind an answer, its special ones anywhere.
        others: more special ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, others: Sequence[str] = ()) -> None:
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special}
        self._special = {*special, *tokenizer.all_special_tokens, *others}
        # Behind a plain answer any token of its own ends it, also one that is not special.
        self._one = re.compile(rf"\s*({_any_of({*self._special, *map(str, added)})})")
        self._last = re.compile(rf"(?:\s|{_any_of(self._special)})*\Z")

    def at_start(self, text: str) -> list[str]:
        """The tokens that a text begins with, white space between them passed over."""
        tokens, place = [], 0
        while found := self._one.match(text, place):
            tokens.append(found.group(1))
            place = found.end()
        return tokens

    def end_of(self, token: str | None, text: str, start: int) -> int | None:
        """Where a token ends that, behind white space and other tokens, follows start."""
        while token and (found := self._one.match(text, start)):
            start = found.end()
            if found.group(1) == token:
                return start
        return None

    def before_last(self, text: str, start: int) -> int:
        """Where the special tokens at a text's very end begin, at start or behind it."""
        return start + self._last.search(text[start:]).start()

    def common(self, text: str, other: str) -> int:
        """How many characters two texts begin with alike, the last word or token whole.

        "<|start|>assistant to=f" and "<|start|>assistants" share "<|start|>" alone.
        """
        pairs = zip(text, other, strict=False)
        length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        for whole in (text, other):
            for token in self._one.finditer(whole):
                if token.start(1) < length < token.end(1):
                    length = token.start(1)
        while length and any(
            length < len(whole) and whole[length - 1 : length + 1].isalnum()
            for whole in (text, other)
        ):
            length -= 1
        return length


def find_habits(
    template: Template, tokens: Tokens, chosen: Sequence[str], eos: str | None, *, has_tools: bool
) -> Habits:
    """Renders one exchange and two: what ends answers, and does the second change the first?

    Args:
        template: what is probed.
        tokens: of its tokenizer.
        chosen: the tokens that end answers, if the user has said so.
        eos: of its tokenizer.
        has_tools: whether for chats with tools, for which a tokenizer may have a template
            of its own.
    """
    exchange = ({"role": "user", "content": ASK}, {"role": "assistant", "content": REPLY})
    chat = Chat(exchange * 2, (_TOOL,) if has_tools else None, "the chat template")
    try:
        alone = template.contents(chat.up_to(2), [1])
        both = template.contents(chat, [1, 3])
    except BadRow:
        alone = both = None
    if alone is None:
        return Habits(None, False, True, "")
    text, places = alone
    start, end = places[1]
    start = before_spaces(text, start)
    lead_in = text[_fork(template, tokens, chat.up_to(2), text[:start]) : start]
    last = tokens.at_start(text[end:])
    if both is None:
        return Habits(_stop([], last, chosen, eos), False, True, lead_in)
    longer, places = both
    middle = tokens.at_start(longer[places[1][1] : places[3][0]])
    rewrites = longer[: places[1][1]] != text[:end]
    stop = _stop(middle, last, chosen, eos)
    return Habits(stop, bool(middle) and not last, rewrites, lead_in)


def _stop(middle: list[str], last: list[str], chosen: Sequence[str], eos: str | None) -> str | None:
    """Tells what ends answers from the tokens behind one in the middle and behind the last.

    Phi-3      <|end|> <|user|>    <|end|> <|endoftext|>   both end in <|end|>
    Cohere2    <|END_RESPONSE|> <|END_OF_TURN_TOKEN|>      the second of two
    GLM-4      <|user|>            nothing                 <|user|>, added at the end
    gpt-oss    <|end|>             <|return|>              <|return|>, each as the last
    """
    if chosen:
        return next((token for token in last if token in chosen), chosen[0])
    pairs = itertools.takewhile(lambda two: two[0] == two[1], zip(middle, last, strict=False))
    shared = [token for token, _ in pairs]
    if shared:
        return eos if eos in shared else shared[-1]
    return next(iter([*last, *middle]), None)


def _fork(template: Template, tokens: Tokens, chat: Chat, before: str) -> int:
    """Where what may stand in front of an answer parts: there those that think begin.

        Qwen3       <|im_start|>assistant\\n | <think>\\n\\n</think>\\n\\n
        gpt-oss     <|start|>assistant | <|channel|>final<|message|>

    Args:
        template: what is probed.
        tokens: of its tokenizer.
        chat: ends in a plain answer.
        before: what the template writes in front of that answer.

    Returns:
        The length of what before has in common with the generation prompt; where the
        template has none, with what stands before an answer that thinks, and a tool call.
    """
    asked = chat.up_to(len(chat.messages) - 1)
    bare, prompt = (template.try_render(asked, prompts=prompts) for prompts in (False, True))
    others = [prompt]
    if prompt == bare:
        others = [template.try_render(chat.with_last(other)) for other in _OTHER_ANSWERS]
    start = len(before)
    for other in others:
        if other is not None and other.startswith(bare or ""):
            start = min(start, tokens.common(before, other))
    return before_spaces(before, start)


def before_spaces(text: str, start: int) -> int:
    """Spaces before an answer belong to it: the token " Hello" begins with one."""
    return len(text[:start].rstrip(" "))


def _any_of(tokens: Collection[str]) -> str:
    """A pattern for the longest of some tokens; some tokenizers have white space as tokens."""
    longest_first = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or r"(?!)"
