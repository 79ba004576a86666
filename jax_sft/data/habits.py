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
_RULE, _ASK_AGAIN = "rule", "more"
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "y"}}, "id": "123456789"}
_SCHEMA = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "f", "parameters": _SCHEMA}}
_THINKING = {"role": "assistant", "content": REPLY, "reasoning_content": ASK}
_CALLING = {"role": "assistant", "content": "", "tool_calls": [_CALL]}


class Habits(NamedTuple):
    """What a template does with plain answers.

    Attributes:
        stop: the token that ends them, None where there is none.
        stop_follows: whether it is the first token of the next message, as with GLM-4.
        rewrites: whether an answer looks different when others follow it.
        lead_in: what the template writes in front of them, but not of answers that think or
            call tools.
        closing: what it writes behind one that others follow, up to the stop token's end.
        ending: what it writes behind one that nothing follows, likewise.
        after: what comes behind that.
    """

    stop: str | None = None
    stop_follows: bool = False
    rewrites: bool = True
    lead_in: str = ""
    closing: str = ""
    ending: str = ""
    after: str = ""


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
        return [token for token, _ in self.following(text, 0)]

    def following(self, text: str, start: int) -> list[tuple[str, int]]:
        """The tokens that follow start, white space passed over, and where each ends."""
        tokens = []
        while found := self._one.match(text, start):
            start = found.end()
            tokens.append((found.group(1), start))
        return tokens

    def end_of(self, token: str | None, text: str, start: int, closing: str = "") -> int | None:
        """Where a token ends that follows start behind nothing, or what stands in closing.

        Args:
            token: looked for.
            text: where.
            start: from where on.
            closing: what stands behind plain answers: a text that is passed over where it is
                there as a whole, and so are its tokens, with white space between them.
        """
        if token and closing.endswith(token) and text.startswith(closing, start):
            return start + len(closing)
        passed = self.at_start(closing)
        for found, end in self.following(text, start):
            if found == token:
                return end
            if found not in passed:
                return None
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
    template: Template,
    tokens: Tokens,
    chosen: Sequence[str],
    eos: str | None,
    *,
    has_tools: bool,
    has_system: bool,
) -> Habits:
    """Renders one exchange and two: what ends answers, and does the second change the first?

    Args:
        template: what is probed.
        tokens: of its tokenizer.
        chosen: the tokens that end answers, if the user has said so.
        eos: of its tokenizer.
        has_tools: whether for chats with tools, for which a tokenizer may have a template
            of its own.
        has_system: whether for chats that begin with a system message, which some templates
            require, and others move.
    """
    system = {"role": "system", "content": _RULE}
    answer = {"role": "assistant", "content": REPLY}
    ask, again = ({"role": "user", "content": text} for text in (ASK, _ASK_AGAIN))
    messages = (*([system] if has_system else []), ask, answer, again, answer)
    second = len(messages) - 1
    first = second - 2
    chat = Chat(messages, (TOOL,) if has_tools else None, "the chat template")
    try:
        alone = template.contents(chat.up_to(first + 1), [first])
        both = template.contents(chat, [first, second])
    except BadRow:
        alone = both = None
    if alone is None:
        return Habits()
    text, places = alone
    start, end = places[first]
    start = before_spaces(text, start)
    lead_in = text[_fork(template, tokens, chat.up_to(first + 1), text[:start]) : start]
    rest, gap, rewrites = text[end:], "", True
    if both is not None:
        longer, places = both
        gap = longer[places[first][1] : places[second][0]].partition(_ASK_AGAIN)[0]
        rewrites = longer[: places[first][1]] != text[:end]
    stop = _stop(gap, rest, tokens, chosen, eos)
    ending = _through(stop, rest)
    return Habits(
        stop,
        stop_follows=bool(tokens.at_start(gap)) and not tokens.at_start(rest),
        rewrites=rewrites,
        lead_in=lead_in,
        closing=_through(stop, gap),
        ending=ending,
        after=rest[len(ending) :] if ending else "",
    )


def _through(stop: str | None, text: str) -> str:
    """A text up to the end of the stop token; "" where it has none."""
    before, found, _ = text.partition(stop) if stop else ("", "", "")
    return before + found if found else ""


def _stop(
    gap: str, rest: str, tokens: Tokens, chosen: Sequence[str], eos: str | None
) -> str | None:
    """Tells what ends answers from the text behind one in the middle and behind the last.

    Phi-3      <|end|> <|user|>    <|end|> <|endoftext|>   both end in <|end|>
    Cohere2    <|END_RESPONSE|> <|END_OF_TURN_TOKEN|>      the second of two
    GLM-4      <|user|>            nothing                 <|user|>, added at the end
    gpt-oss    <|end|>             <|return|>              <|return|>, each as the last
    """
    middle, last = tokens.at_start(gap), tokens.at_start(rest)
    if chosen:
        return min((token for token in chosen if token in rest), key=rest.find, default=chosen[0])
    if eos and eos in gap and eos in rest:
        return eos
    pairs = itertools.takewhile(lambda two: two[0] == two[1], zip(middle, last, strict=False))
    shared = [token for token, _ in pairs]
    return next(iter([*shared[-1:], *last, *middle]), None)


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
        The length of what before has in common with the generation prompt, and with tools at
        hand with what stands before a call; where the template has no generation prompt, with
        what stands before a call and an answer that thinks.
    """
    asked = chat.up_to(len(chat.messages) - 1)
    bare, prompt = (template.try_render(asked, prompts=prompts) for prompts in (False, True))
    others = [_CALLING] if chat.tools is not None else []
    if prompt == bare:
        others = [_CALLING, _THINKING]
    others = [prompt, *(template.try_render(chat.with_last(other)) for other in others)]
    start = len(before)
    for other in others:
        if other is not None and other != bare and other.startswith(bare or ""):
            start = min(start, tokens.common(before, other))
    return before_spaces(before, start)


def before_spaces(text: str, start: int) -> int:
    """Spaces before an answer belong to it: the token " Hello" begins with one."""
    return len(text[:start].rstrip(" "))


def _any_of(tokens: Collection[str]) -> str:
    """A pattern for the longest of some tokens; some tokenizers have white space as tokens."""
    longest_first = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or r"(?!)"
