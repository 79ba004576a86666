"""Conversations to turns of text, by the tokenizer's own chat template.

What comes in is a Conversation, what goes out is the text that the template renders, cut
into context and answers, each answer with the token that ends it. Stock templates do not
say where an answer lies, so each is found by rendering: bracketed by characters that no
text holds, or, where a template rewrites what it is given, by what stands before it.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from jax_sft.data.types import BadRow, Conversation, Message, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_THINK_END = "</think>"
_PRIVATE_USE = (range(0xE000, 0xF8FF), range(0xF0000, 0xFFFFD))
_PROBE = ("probe", "reply")


@dataclass(frozen=True)
class Rendered:
    """One training sequence of a conversation, as text.

    Attributes:
        turns: context and answers in order; the whole text is their sum.
        stops: for each turn the token that ends it, where it is a trained answer.
        reasons: whether an answer here thinks before it answers.
    """

    turns: tuple[Turn, ...]
    stops: tuple[str | None, ...]
    reasons: bool = False

    @property
    def text(self) -> str:
        """What the template made of the conversation, and a stop token if it lacked one."""
        return "".join(turn.text for turn in self.turns)


class RenderedRow(NamedTuple):
    """The sequences of a row, and what had to be done to get them.

    Attributes:
        sequences: one, or one an answer where the template rewrites earlier turns.
        num_added_stops: answers behind which EOS was put, since the template ends none.
        num_unrendered: trained answers whose reasoning the template leaves out.
    """

    sequences: tuple[Rendered, ...]
    num_added_stops: int = 0
    num_unrendered: int = 0


class _Span(NamedTuple):
    """Where a message lies in a text; stop is the token at its end, if it has one."""

    start: int
    end: int
    stop: str | None


class _Answer(NamedTuple):
    """A conversation up to an answer as its last message, and where the answer lies."""

    text: str
    span: _Span
    adds_stop: bool
    is_unrendered: bool = False


class _Stops(NamedTuple):
    """The tokens that end an answer in the middle of a conversation, and at its end."""

    middle: str | None
    last: str | None


class ChatTemplate:
    """A tokenizer's chat template, and what it puts behind an answer.

    Args:
        tokenizer: its chat_template renders, its special tokens end answers.
        stop_tokens: tokens that end an answer; none finds them in the template.
        add_eos: whether EOS ends the answers of a template that writes no stop token.
        kwargs: what else the template is given, such as enable_thinking.

    Raises:
        ValueError: the tokenizer has no chat template, or a token is none of its own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_tokens: Sequence[str] = (),
        add_eos: bool = True,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "the samples are conversations, but the tokenizer has no chat template: set "
                "tokenizer.chat_template to a Jinja file, or pass [prompt, output, ...] lists"
            )
        self._tokenizer = tokenizer
        self._kwargs = dict(kwargs or {})
        self._chosen = check_stop_tokens(stop_tokens, tokenizer)
        self._eos = tokenizer.eos_token if add_eos else None
        added = tokenizer.added_tokens_decoder.values()
        self._specials = {str(token) for token in added if token.special}
        self._specials |= {*tokenizer.all_special_tokens, *self._chosen}
        # Behind a plain answer any token of its own ends it, also one that is not special.
        names = sorted(self._specials | {str(token) for token in added}, key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, names)) if names else r"(?!)")
        self._stops, self._rewrites = self._probe()
        self._specials |= {stop for stop in self._stops if stop}

    def render(self, conversation: Conversation, origin: str) -> RenderedRow:
        """Renders a conversation, and finds its answers.

            messages     user "Hi", assistant "Hello", user "Bye", assistant "Bye!"
            context      <|user|>Hi<|end|><|assistant|>
            answer       Hello<|end|>
            context      <|user|>Bye<|end|><|assistant|>
            answer       Bye!<|end|>

        Args:
            conversation: at least one of its messages is an assistant's.
            origin: names the row in errors.

        Returns:
            One sequence, or one an answer where the template changes or drops earlier turns.

        Raises:
            BadRow: the template refuses the conversation, or an answer cannot be found in
                what it renders.
        """
        messages = tuple(_stripped(message) for message in conversation.messages)
        row = _Row(messages, conversation.tools, origin)
        num_answers = sum(message.fields["role"] == "assistant" for message in messages)
        found = None
        if num_answers == 1 or not self._rewrites:
            found = self._marked(row) if self._marks_answers(row) else self._bracketed(row)
        if found is None:
            return self._one_by_one(row)
        text, spans, num_added = found
        return RenderedRow((_cut(text, spans, messages),), num_added)

    def prompt(
        self, conversation: Conversation, origin: str, *, reasons: bool = False
    ) -> tuple[str, ...]:
        """What training renders before the answer to a conversation, cut where training cuts.

        Args:
            conversation: ends in a message to answer; what it trains is not looked at.
            origin: names it in errors.
            reasons: whether the answers in training think first: some templates then write
                another text in front of them.

        Returns:
            Pieces of text, context and earlier answers in turn.

        Raises:
            BadRow: the template refuses the conversation.
        """
        _, reply = _PROBE
        content = f"<think>\n{reply}\n{_THINK_END}\n\n{reply}" if reasons else reply
        answer = Message({"role": "assistant", "content": content}, 1.0)
        earlier = (Message(message.fields, 0.0) for message in conversation.messages)
        answered = Conversation((*earlier, answer), conversation.tools)
        turns = self.render(answered, origin).sequences[-1].turns
        last = max(index for index, turn in enumerate(turns) if turn.weight)
        return tuple(turn.text for turn in turns[:last])

    def generation_prompt(self, conversation: Conversation, origin: str) -> str:
        """What the template itself renders for an answer to come, by add_generation_prompt."""
        messages = tuple(_stripped(message) for message in conversation.messages)
        row = _Row(messages, conversation.tools, origin)
        return self._render(row, row.messages, prompts=True)

    @property
    def stops(self) -> list[str]:
        """The tokens that end answers, as far as the template shows them."""
        return sorted({stop for stop in self._stops if stop})

    # -- the template ------------------------------------------------------------------------

    def _render(self, row: _Row, messages: Sequence[Message], *, prompts: bool = False) -> str:
        fields = [message.fields for message in messages]
        return self._render_fields(row, fields, prompts=prompts)

    def _render_fields(
        self, row: _Row, fields: list[dict[str, Any]], *, prompts: bool = False
    ) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                fields,
                tools=None if row.tools is None else list(row.tools),
                add_generation_prompt=prompts,
                tokenize=False,
                **self._kwargs,
            )
        except Exception as error:  # whatever Jinja code may raise
            problem = str(error).strip().split("\n")[0] or type(error).__name__
            raise BadRow(
                f"{row.origin}: the chat template fails on it ({problem}); change the row, or set "
                "tokenizer.chat_template or data.filter",
                reason="template_error",
            ) from error

    def _probe(self) -> tuple[_Stops, bool]:
        """Renders two exchanges: what ends answers, and does the second change the first?"""
        user, reply = _PROBE
        pairs = [("user", user), ("assistant", reply)] * 2
        messages = tuple(
            Message({"role": role, "content": text}, float(role == "assistant"))
            for role, text in pairs
        )
        row = _Row(messages, None, "the chat template")
        try:
            found = self._brackets(row, (1, 3))
            placed = self._placed(row, 1)
        except BadRow:
            return _Stops(None, None), True
        if found is None or placed is None:
            return _Stops(None, None), True
        text, spans = found
        tails = text[spans[1][1] : spans[3][0]], text[spans[3][1] :]
        return self._find_stops(*map(self._lead, tails)), text[: spans[1][0]] != placed[0]

    def _find_stops(self, middle: list[str], last: list[str]) -> _Stops:
        """Tells what ends answers from the tokens behind one in the middle and behind the last.

            Phi-3      <|end|> <|user|>    <|end|> <|endoftext|>   both end in <|end|>
            Cohere2    <|END_RESPONSE|> <|END_OF_TURN_TOKEN|>      the second of two
            GLM-4      <|user|>            nothing                 <|user|>, added at the end

        What follows both is what ends an answer; where nothing does, each ends in the first
        token behind it, and the last, where it has none, in that of the first.
        """
        if self._chosen:
            return _Stops(*(self._first_chosen(tail) for tail in (middle, last)))
        pairs = itertools.takewhile(lambda two: two[0] == two[1], zip(middle, last, strict=False))
        both = [token for token, _ in pairs]
        if both:
            eos = self._tokenizer.eos_token
            stop = eos if eos in both else both[-1]
            return _Stops(stop, stop)
        first = middle[0] if middle else None
        return _Stops(first, last[0] if last else first)

    def _first_chosen(self, tail: list[str]) -> str | None:
        return next((token for token in tail if token in self._chosen), None) or self._chosen[0]

    def _lead(self, tail: str) -> list[str]:
        """The tokens that a text begins with, white space between them passed over."""
        tokens, place = [], 0
        while found := self._token.match(tail, place + _num_spaces(tail[place:])):
            tokens.append(found.group())
            place = found.end()
        return tokens

    def _end(self, text: str, start: int, stop: str | None) -> int | None:
        """Where a stop token ends that, behind white space and other tokens, follows start."""
        place = start
        while found := self._token.match(text, place + _num_spaces(text[place:])):
            if found.group() == stop:
                return found.end()
            place = found.end()
        return None

    # -- an answer in brackets ---------------------------------------------------------------

    def _brackets(
        self, row: _Row, indices: Sequence[int]
    ) -> tuple[str, dict[int, tuple[int, int]]] | None:
        """Renders with the contents of messages in brackets, and takes the brackets off.

        Returns:
            The text, which is the plain one, and where each content lies; None where the
            template changes or repeats a content.
        """
        opening, closing = _unused(row)
        fields = [dict(message.fields) for message in row.messages]
        for index in indices:
            fields[index]["content"] = f"{opening}{fields[index]['content']}{closing}"
        try:
            marked = self._render_fields(row, fields)
        except BadRow:
            self._render(row, row.messages)  # says what is wrong with the row itself
            return None
        places = re.finditer(f"[{opening}{closing}]", marked)
        at = [(found.group(), found.start() - i) for i, found in enumerate(places)]
        if [mark for mark, _ in at] != [opening, closing] * len(indices):
            return None
        text = marked.replace(opening, "").replace(closing, "")
        if text != self._render(row, row.messages):
            return None
        starts, ends = at[0::2], at[1::2]
        return text, {
            index: (start, end)
            for index, (_, start), (_, end) in zip(indices, starts, ends, strict=True)
        }

    def _bracketed(self, row: _Row) -> tuple[str, dict[int, _Span], int] | None:
        """All answers of a row in one rendering; None where that does not find them all."""
        if any(_has_calls(m) or _field_reasoning(m) for m in row.messages):
            return None
        indices = [i for i, m in enumerate(row.messages) if m.fields["role"] == "assistant"]
        indices = sorted({*indices, *(i for i, m in enumerate(row.messages) if m.weight)})
        found = self._brackets(row, indices)
        if found is None:
            return None
        text, contents = found
        spans: dict[int, _Span] = {}
        for index, following in itertools.pairwise([*indices, None]):
            start, end = contents[index]
            limit = len(text) if following is None else contents[following][0]
            is_answer = row.messages[index].fields["role"] == "assistant"
            is_last = index == len(row.messages) - 1
            start = self._with_spaces(text, start)
            if not is_answer:
                spans[index] = _Span(start, end, None)
                continue
            stop = self._stops.last if is_last else self._stops.middle
            stop_end = self._end(text[:limit], end, stop) if stop else None
            if stop_end is None and is_last:
                text, span, adds = self._ended(text, start, end)
                spans[index] = span
                return text, spans, int(adds and row.messages[index].weight > 0)
            if stop_end is None and row.messages[index].weight:
                return None  # as its row's last message it may end
            spans[index] = _Span(start, stop_end or end, stop if stop_end else None)
        return text, spans, 0

    def _ended(self, text: str, start: int, end: int) -> tuple[str, _Span, bool]:
        """Puts behind the last answer the token that ends answers, or EOS."""
        stop = self._stops.last
        rest = text[end:]
        if stop is None and rest.strip():
            return text, _Span(start, end, None), False
        adds_eos = stop is None
        stop = stop or self._eos
        if stop is None:
            return text, _Span(start, end, None), False
        if not rest.strip():
            text = text[: end if adds_eos else len(text)] + stop
            return text, _Span(start, len(text), stop), adds_eos
        text = text[:end] + stop + rest
        return text, _Span(start, end + len(stop), stop), adds_eos

    @staticmethod
    def _with_spaces(text: str, start: int) -> int:
        """Spaces before an answer belong to it: the token " Hello" begins with one."""
        return len(text[:start].rstrip(" "))

    # -- an answer as the last message -------------------------------------------------------

    def _one_by_one(self, row: _Row) -> RenderedRow:
        """Finds each trained answer with its conversation rendered up to it."""
        answers = {
            index: self._answer(row, index)
            for index, message in enumerate(row.messages)
            if message.weight and message.fields["role"] == "assistant"
        }
        if any(m.weight and m.fields["role"] != "assistant" for m in row.messages):
            raise BadRow(
                f"{row.origin}: a message that is no answer is to be trained, but the chat "
                "template rewrites it; take off its train flag",
                reason="answer_not_located",
            )
        if not answers:
            text = self._render(row, row.messages)
            return RenderedRow((Rendered((Turn(text, 0.0),), (None,)),))
        added = sum(answer.adds_stop for answer in answers.values())
        unrendered = sum(answer.is_unrendered for answer in answers.values())
        base = answers[max(answers)].text
        if all(base.startswith(answer.text[: answer.span.end]) for answer in answers.values()):
            spans = {index: answer.span for index, answer in answers.items()}
            sequences = (_cut(base, spans, row.messages),)
        else:
            sequences = tuple(
                _cut(answer.text, {index: answer.span}, row.messages)
                for index, answer in answers.items()
            )
        return RenderedRow(sequences, added, unrendered)

    def _answer(self, row: _Row, index: int) -> _Answer:
        """Renders up to an answer, and finds it by what stands before it."""
        message = row.messages[index]
        up_to = row._replace(messages=row.messages[: index + 1])
        if not _has_calls(message) and not _field_reasoning(message):
            found = self._brackets(up_to, [index])
            if found is not None:
                text, contents = found
                start, end = contents[index]
                return self._closed(text, self._with_spaces(text, start), end)
        text = self._render(row, up_to.messages)
        head = self._head(row, index)
        prompt = self._render_or_none(row, up_to.messages[:-1])
        heads = [prompt, head] if _reasons(message) else [head, prompt]
        for before in heads:
            if before is not None and text.startswith(before):
                before = before[: self._with_spaces(text, len(before))]
                if _holds(text[len(before) :], message):
                    return self._trailed(row, index, text, len(before))
        return self._put_in(row, index, head, prompt)

    def _render_or_none(self, row: _Row, messages: Sequence[Message]) -> str | None:
        try:
            return self._render(row, messages, prompts=True) if messages else None
        except BadRow:
            return None

    def _head(self, row: _Row, index: int) -> str | None:
        """What stands before a plain answer in the place of this one."""
        found = self._placed(row, index)
        return None if found is None else found[0]

    def _placed(self, row: _Row, index: int) -> tuple[str, str] | None:
        """What stands before and behind a plain last answer in the place of this one."""
        opening, closing = _unused(row)
        plain = {"role": "assistant", "content": opening + closing}
        fields = [*(message.fields for message in row.messages[:index]), plain]
        try:
            text = self._render_fields(row, fields)
        except BadRow:
            return None
        before, _, behind = text.partition(opening + closing)
        return (before, behind) if text.count(opening) == 1 == text.count(closing) else None

    def _trailed(self, row: _Row, index: int, text: str, start: int) -> _Answer:
        """Takes the tokens at the very end of a text for those that end its answer."""
        place = len(text.rstrip())
        tail = place
        while (found := self._last_token(text[start:place])) is not None:
            tail = start + found
            place = len(text[:tail].rstrip())
        if place < start:
            tail = place = len(text)
        follower = self._follower(row, index, text) if not self._lead(text[place:]) else None
        if follower is not None:
            text += follower
            return _Answer(text, _Span(start, len(text), follower), adds_stop=False)
        return self._closed(text, start, place)

    def _last_token(self, text: str) -> int | None:
        """Where the special token begins that a text ends in."""
        ends = [token for token in self._specials if text.endswith(token)]
        return len(text) - max(map(len, ends)) if ends else None

    def _follower(self, row: _Row, index: int, text: str) -> str | None:
        """The token that begins what follows an answer, where no token of its own ends it."""
        if index + 1 == len(row.messages):
            return None
        try:
            longer = self._render(row, row.messages[: index + 2])
        except BadRow:
            return None
        lead = self._lead(longer[len(text) :]) if longer.startswith(text) else []
        return lead[0] if lead else None

    def _closed(self, text: str, start: int, end: int) -> _Answer:
        """Ends the last answer of a text in its stop token."""
        lead = self._lead(text[end:])
        stop = self._stops.last if self._stops.last in lead else None
        if stop is None and lead and not self._chosen:
            stop = lead[0]
        if stop is not None:
            stop_end = self._end(text, end, stop)
            return _Answer(text, _Span(start, stop_end, stop), adds_stop=False)
        text, span, adds = self._ended(text, start, end)
        return _Answer(text, span, adds)

    def _put_in(self, row: _Row, index: int, head: str | None, prompt: str | None) -> _Answer:
        """Puts an answer whose reasoning the template drops where a plain answer stands."""
        message = row.messages[index]
        placed = self._placed(row, index)
        full = _with_reasoning(message)
        if placed is None or _has_calls(message):
            raise BadRow(
                f"{row.origin}: the answer {_short(message.fields['content'])} cannot be found in "
                "what the chat template renders; set tokenizer.chat_template to one that keeps it, "
                'or data.on_bad_row="skip"',
                reason="answer_not_located",
            )
        before, behind = placed
        text = before + full + behind
        start = len(before)
        if prompt is not None and len(prompt) > len(before) and text.startswith(prompt):
            start = len(prompt)
        answer = self._closed(text, self._with_spaces(text, start), len(before) + len(full))
        return answer._replace(is_unrendered=True)

    # -- templates with {% generation %} ------------------------------------------------------

    def _marks_answers(self, row: _Row) -> bool:
        template = self._tokenizer.get_chat_template(tools=row.tools)
        return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    def _marked(self, row: _Row) -> tuple[str, dict[int, _Span], int] | None:
        """The answers as the template itself marks them; None where it marks not each once."""
        from transformers.utils.chat_template_utils import render_jinja_template

        text = self._render(row, row.messages)
        [marked], [places] = render_jinja_template(
            conversations=[[message.fields for message in row.messages]],
            tools=None if row.tools is None else list(row.tools),
            chat_template=self._tokenizer.get_chat_template(tools=row.tools),
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **self._kwargs},
        )
        indices = [i for i, m in enumerate(row.messages) if m.fields["role"] == "assistant"]
        is_odd = any(m.weight and m.fields["role"] != "assistant" for m in row.messages)
        if marked != text or len(places) != len(indices) or is_odd:
            return None
        spans: dict[int, _Span] = {}
        for index, (start, end) in zip(indices, places, strict=True):
            stop = self._stops.last if index == len(row.messages) - 1 else self._stops.middle
            inside = [found.end() for found in self._token.finditer(text, start, end)]
            ended = stop is not None and any(text[start:at].endswith(stop) for at in inside)
            if not ended and stop is not None:
                stop_end = self._end(text, end, stop)
                end, ended = stop_end or end, stop_end is not None
            if not ended and row.messages[index].weight:
                if index != len(row.messages) - 1:
                    return None
                text, spans[index], adds = self._ended(text, start, end)
                return text, spans, int(adds)
            spans[index] = _Span(start, end, stop if ended else None)
        return text, spans, 0


class _Row(NamedTuple):
    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None
    origin: str


@functools.lru_cache(maxsize=8)
def _template(
    tokenizer: PreTrainedTokenizerBase, source: str, stop_tokens: tuple, add_eos: bool, kwargs: str
) -> ChatTemplate:
    return ChatTemplate(
        tokenizer, stop_tokens=stop_tokens, add_eos=add_eos, kwargs=json.loads(kwargs)
    )


def chat_template(
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_tokens: Sequence[str] = (),
    add_eos: bool = True,
    kwargs: str = "{}",
) -> ChatTemplate:
    """A tokenizer's ChatTemplate, made once; kwargs are JSON."""
    return _template(tokenizer, str(tokenizer.chat_template), tuple(stop_tokens), add_eos, kwargs)


def check_stop_tokens(
    stop_tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...]:
    """Returns the tokens, each of which the tokenizer knows as one.

    Raises:
        ValueError: one of them is not a token by itself.
    """
    for token in stop_tokens:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(
                f"tokenizer.stop_tokens has {token!r}, which the tokenizer splits into {len(ids)} "
                f"tokens; choose a token of its own, such as {tokenizer.eos_token!r}"
            )
    return tuple(stop_tokens)


def _cut(text: str, spans: dict[int, _Span], messages: Sequence[Message]) -> Rendered:
    """A text in turns: each span with its message's weight, context between them."""
    turns: list[Turn] = []
    stops: list[str | None] = []
    place = 0
    for index in sorted(spans):
        start, end, stop = spans[index]
        message = messages[index]
        is_answer = message.weight > 0 and message.fields["role"] == "assistant"
        turns += [Turn(text[place:start], 0.0), Turn(text[start:end], message.weight)]
        stops += [None, (stop or "") if is_answer else None]
        place = end
    if place < len(text):
        turns.append(Turn(text[place:], 0.0))
        stops.append(None)
    reasons = any(messages[index].weight and _reasons(messages[index]) for index in spans)
    return Rendered(tuple(turns), tuple(stops), reasons)


def _stripped(message: Message) -> Message:
    """White space at the ends of an answer is the template's to write."""
    if message.fields["role"] != "assistant":
        return message
    return Message({**message.fields, "content": message.fields["content"].strip()}, message.weight)


def _unused(row: _Row) -> tuple[str, str]:
    """Two characters that are nowhere in a row."""
    used = set(repr([message.fields for message in row.messages]))
    used |= set(itertools.chain.from_iterable(m.fields["content"] for m in row.messages))
    free = (chr(code) for codes in _PRIVATE_USE for code in codes)
    first, second = itertools.islice((mark for mark in free if mark not in used), 2)
    return first, second


def _num_spaces(text: str) -> int:
    return len(text) - len(text.lstrip())


def _has_calls(message: Message) -> bool:
    return bool(message.fields.get("tool_calls"))


def _field_reasoning(message: Message) -> str:
    """Reasoning that stands in a field of its own."""
    if message.fields["role"] != "assistant":
        return ""
    texts = (message.fields.get(name) for name in REASONING_FIELDS)
    return next((text for text in texts if isinstance(text, str) and text.strip()), "")


def _reasons(message: Message) -> bool:
    is_answer = message.fields["role"] == "assistant"
    return is_answer and bool(_field_reasoning(message) or _THINK_END in message.fields["content"])


def _with_reasoning(message: Message) -> str:
    """An answer with its reasoning in front, in the tags that most models use."""
    reasoning, content = _field_reasoning(message), message.fields["content"]
    return f"<think>\n{reasoning.strip()}\n{_THINK_END}\n\n{content}" if reasoning else content


def _holds(text: str, message: Message) -> bool:
    """Whether an answer's text, its reasoning and its calls are all in a rendering of it."""
    reasoning, _, answer = message.fields["content"].rpartition(_THINK_END)
    pieces = [answer, reasoning.removeprefix("<think>"), _field_reasoning(message)]
    pieces += [_call_name(call) for call in message.fields.get("tool_calls") or ()]
    return all(piece.strip() in text for piece in pieces)


def _call_name(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    return str(function.get("name", ""))


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
