"""Conversations to turns of text, by the tokenizer's own chat template.

What comes in is a Conversation, what goes out is the text that the template renders, cut
into context and answers, each answer with the token that ends it. Stock templates do not
say where an answer lies. Here it begins with its content, or where it thinks with that,
and it ends in the token that the template writes behind answers.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from jax_sft.data import template as messages_of
from jax_sft.data.dialect import Dialect
from jax_sft.data.habits import ASK, REPLY, Habits, Tokens, before_spaces, find_habits
from jax_sft.data.template import Chat, Template
from jax_sft.data.types import BadRow, Conversation, Message, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendered:
    """One training sequence of a conversation, as text.

    Attributes:
        turns: context and answers in order; the whole text is their sum.
        stops: for each turn the token that ends it, where it is a trained answer; "" where
            none is known.
        reasons: whether a trained answer here thinks before it answers.
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
        sequences: one, or more where the template rewrites answers when others follow; each
            trained answer is trained in one of them.
        num_added_stops: trained answers behind which EOS was put, since the template ends
            none.
        num_unrendered: trained answers whose reasoning the template leaves out, so that it
            was put in front of their text.
        num_left_out: messages that are no answers and that the template leaves out.
        leaves_out_tools: whether it leaves out the tools.
    """

    sequences: tuple[Rendered, ...]
    num_added_stops: int = 0
    num_unrendered: int = 0
    num_left_out: int = 0
    leaves_out_tools: bool = False


class _Span(NamedTuple):
    """Where an answer lies in a text; stop is the token at its end, if it has one."""

    start: int
    end: int
    stop: str | None


class _Answer(NamedTuple):
    """A text that ends in an answer, and where the answer lies in it."""

    text: str
    span: _Span
    adds_stop: bool = False
    is_unrendered: bool = False


class ChatTemplate:
    """A tokenizer's chat template, and where answers begin and end in what it renders.

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
        self._template = Template(tokenizer, kwargs or {})
        self._dialect = Dialect(self._template)
        self._chosen = check_stop_tokens(stop_tokens, tokenizer)
        self._tokens = Tokens(tokenizer, self._chosen)
        self._eos_token = tokenizer.eos_token
        self._added_stop = tokenizer.eos_token if add_eos else None
        self._habits_of: dict[tuple[bool, bool], Habits] = {}

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
            The turns of one sequence, cut at every answer, trained or not; of several where
            the template rewrites answers that others follow.

        Raises:
            BadRow: the template refuses the conversation, or an answer cannot be found in
                what it renders.
        """
        chat = self._dialect.chat(conversation, origin)
        weights = [message.weight for message in conversation.messages]
        num_answers = sum(_is_answer(message) for message in chat.messages)
        found = None
        if num_answers == 1 or not self._habits(chat).rewrites:
            if not any(map(_is_more_than_text, chat.messages)):
                found = self._at_once(chat, weights)
        found = found or self._one_by_one(chat, weights)
        if left_out := self._template.left_out(chat, found.sequences[-1].text):
            found = found._replace(num_left_out=len(left_out))
            found = self._as_prompted(chat, weights) or found
        return found._replace(
            leaves_out_tools=chat.tools is not None and not self._dialect.has_tools
        )

    def prompt(
        self, conversation: Conversation, origin: str, *, reasons: bool = False
    ) -> tuple[str, ...]:
        """What training renders before the answer to a conversation, cut where training cuts.

        Args:
            conversation: ends in a message to answer; which answers it trains changes nothing.
            origin: names it in errors.
            reasons: whether the answers in training think first: where a template has no
                generation prompt that fits both, it writes another text in front of them.

        Returns:
            Pieces of text, context and earlier answers in turn.

        Raises:
            BadRow: the template refuses the conversation.
        """
        content = f"<think>\n{ASK}\n{messages_of.THINK_END}\n\n{REPLY}" if reasons else REPLY
        answer = Message({"role": "assistant", "content": content}, 1.0)
        earlier = (
            Message(message.fields, 0.0) if _is_answer(message.fields) else message
            for message in conversation.messages
        )
        answered = Conversation((*earlier, answer), conversation.tools)
        turns = self.render(answered, origin).sequences[-1].turns
        last = max(index for index, turn in enumerate(turns) if turn.weight)
        return tuple(turn.text for turn in turns[:last])

    def generation_prompt(self, conversation: Conversation, origin: str) -> str:
        """What the template itself renders for an answer to come, by add_generation_prompt."""
        return self._template.render(self._dialect.chat(conversation, origin), prompts=True)

    @property
    def stops(self) -> list[str]:
        """The tokens that end answers, as far as the template shows them."""
        found = itertools.starmap(self._find_habits, itertools.product((False, True), repeat=2))
        return sorted({habits.stop for habits in found if habits.stop is not None})

    def _habits(self, chat: Chat) -> Habits:
        return self._find_habits(chat.tools is not None, chat.messages[0]["role"] == "system")

    def _find_habits(self, has_tools: bool, has_system: bool) -> Habits:
        kind = (has_tools, has_system)
        if kind not in self._habits_of:
            self._habits_of[kind] = find_habits(
                self._template,
                self._tokens,
                self._chosen,
                self._eos_token,
                has_tools=has_tools,
                has_system=has_system,
            )
        return self._habits_of[kind]

    # -- all answers in one rendering --------------------------------------------------------

    def _at_once(self, chat: Chat, weights: Sequence[float]) -> RenderedRow | None:
        """Finds plain answers in the chat as a whole; None where that does not find them all."""
        habits = self._habits(chat)
        answers = [_is_answer(message) for message in chat.messages]
        indices = [i for i, weight in enumerate(weights) if weight or answers[i]]
        found = self._template.contents(chat, indices)
        if found is None:
            return None
        text, contents = found
        starts = self._starts(chat, text, {i: contents[i][0] for i in indices if answers[i]})
        if starts is None:
            return None
        spans: dict[int, _Span] = {}
        num_added = 0
        for index in indices:
            start, end = contents[index]
            if not answers[index]:
                spans[index] = _Span(before_spaces(text, start), end, None)
                continue
            start = starts[index]
            if index == len(weights) - 1:
                text, spans[index], adds_stop, _ = self._closed(text, start, end, habits)
                num_added = int(adds_stop and weights[index] > 0)
                continue
            stop_end = self._tokens.end_of(habits.stop, text, end, habits.closing)
            if stop_end is None:
                return None  # as the last message of its chat it may end
            spans[index] = _Span(start, stop_end, habits.stop)
        return RenderedRow((_cut(chat, text, spans, weights),), num_added)

    def _starts(self, chat: Chat, text: str, contents: Mapping[int, int]) -> dict[int, int] | None:
        """Where plain answers of a text begin, from where their contents do."""
        if self._template.marks_answers(chat):
            places = self._template.marked_answers(chat, text)
            found = {
                index: start
                for index, place in contents.items()
                for start, end in places
                if start <= place <= end
            }
            return found if found.keys() == contents.keys() else None
        # With tools at hand an answer may be a call: then a prompt must not rule that out.
        lead_in = "" if chat.tools is None else self._habits(chat).lead_in
        starts = {index: before_spaces(text, start) for index, start in contents.items()}
        return {
            index: start - len(lead_in) if text.endswith(lead_in, 0, start) else start
            for index, start in starts.items()
        }

    # -- each answer as the last message -----------------------------------------------------

    def _one_by_one(self, chat: Chat, weights: Sequence[float]) -> RenderedRow:
        """Finds each answer in its chat rendered up to it, and joins what can be joined.

        An answer is trained in the last sequence that still has it as it was when nothing
        followed it. Which sequences have it depends only on the messages before their end,
        so that a prompt is cut as training's sequences are.
        """
        if any(w and not _is_answer(m) for m, w in zip(chat.messages, weights, strict=True)):
            raise BadRow(
                f"{chat.origin}: a message that is no answer is to be trained, but the chat "
                "template rewrites it; take off its train flag",
                reason="answer_not_located",
            )
        answers: dict[int, _Answer] = {}
        for index, message in enumerate(chat.messages):
            if not _is_answer(message):
                continue
            try:
                answers[index] = self._answer(chat, index)
            except BadRow:
                if weights[index]:
                    raise
        left = {index for index in answers if weights[index]}
        trained = [answers[index] for index in left]
        sequences: list[Rendered] = []
        while left:
            last = max(left)
            text = answers[last].text
            spans = {
                index: answer.span
                for index, answer in answers.items()
                if index <= last and text.startswith(answer.text[: answer.span.end])
            }
            kept = [weight if i in left else 0.0 for i, weight in enumerate(weights)]
            sequences.append(_cut(chat, text, spans, kept))
            left -= spans.keys()
        if not trained:
            sequences.append(_cut(chat, self._template.render(chat), {}, weights))
        return RenderedRow(
            tuple(reversed(sequences)),
            sum(answer.adds_stop for answer in trained),
            sum(answer.is_unrendered for answer in trained),
        )

    def _answer(self, whole: Chat, index: int) -> _Answer:
        """Renders a chat up to an answer, and finds the answer at its end."""
        chat = whole.up_to(index + 1)
        message = chat.messages[-1]
        plain = None if _is_more_than_text(message) else self._plain(chat)
        if plain is not None:
            return self._ended(whole, chat, *plain)
        found = self._found(whole, chat, self._template.render(chat))
        if found is None and messages_of.reasons(message):
            found = self._with_reasoning(whole, chat)
        if found is None:
            raise BadRow(
                f"{chat.origin}: the chat template leaves out a part of the answer "
                f"{_short(message)}; set tokenizer.chat_template to one that renders it, take "
                'off its train flag, or set data.on_bad_row to "skip"',
                reason="answer_not_located",
            )
        return found

    def _plain(self, chat: Chat) -> tuple[str, int, int] | None:
        """A chat's text, and where its last answer begins and its content ends in it."""
        last = len(chat.messages) - 1
        found = self._template.contents(chat, [last])
        if found is None:
            return None
        text, contents = found
        start, end = contents[last]
        starts = self._starts(chat, text, {last: start})
        return None if starts is None else (text, starts[last], end)

    def _with_reasoning(self, whole: Chat, chat: Chat) -> _Answer | None:
        """Puts in the reasoning that a template drops: in the content, or in the text."""
        full = messages_of.with_reasoning(chat.messages[-1])
        chat = chat.with_last(full)
        text = self._template.try_render(chat)
        found = None if text is None else self._found(whole, chat, text)
        if found is not None:
            return found._replace(is_unrendered=True)
        around = None if messages_of.has_calls(full) else self._template.around_last(chat)
        if around is None:
            return None
        before, behind = around
        before = messages_of.before_thought(before)
        text = before + full["content"] + behind
        start = self._start(chat, text)
        if start is None:
            return None
        end = len(before) + len(full["content"])
        return self._closed(text, start, end, self._habits(chat))._replace(is_unrendered=True)

    def _found(self, whole: Chat, chat: Chat, text: str) -> _Answer | None:
        """The answer at the end of a text, None where parts of it are not there."""
        is_kept, end = self._template.keeps_last(chat, text)
        if not is_kept:
            return None
        content = chat.messages[-1]["content"]
        has_tags = messages_of.THINK in content
        before, tagged, behind = text.rpartition(content) if has_tags else ("", "", text)
        kept = messages_of.before_thought(before)
        text = kept + tagged + behind
        if end is not None:
            end -= len(before) - len(kept)
        start = self._start(chat, text)
        if start is None:
            return None
        if end is None:
            habits = self._habits(chat)
            turn = text.removesuffix(habits.after)
            end = self._tokens.before_last(turn, start)
            unended = turn.removesuffix(habits.ending)
            if habits.ending and unended != turn and habits.stop not in unended[end:]:
                end = len(unended)
        return self._ended(whole, chat, text, start, end)._replace(is_unrendered=kept != before)

    def _plain_in_place(self, chat: Chat) -> tuple[str, int, int] | None:
        """As `_plain`, with a plain answer in the place of the last message."""
        try:
            return self._plain(chat.with_last({"role": "assistant", "content": REPLY}))
        except BadRow:
            return None

    def _start(self, chat: Chat, text: str) -> int | None:
        """Where the last answer of a text begins: where a plain one in its place would.

        One that thinks, or stands behind another text than a plain one, begins before what
        the template writes in front of plain ones alone, such as an empty <think> block.
        """
        plain = self._plain_in_place(chat)
        if plain is None:
            return None
        plain_text, start, _ = plain
        lead_in = self._habits(chat).lead_in
        # In chats with tools, and where the template says it, all answers begin alike.
        is_one_for_all = chat.tools is not None or self._template.marks_answers(chat)
        starts = [start] if is_one_for_all or not messages_of.reasons(chat.messages[-1]) else []
        if not is_one_for_all and plain_text.endswith(lead_in, 0, start):
            start -= len(lead_in)
            is_open = messages_of.opens_thought(plain_text[:start])
            starts.append(start if is_open else len(messages_of.before_thought(plain_text[:start])))
        for place in starts:
            if text.startswith(plain_text[:place]):
                return place
        # Else where the two part, if that is behind the start of the assistant's turn.
        asked = self._template.try_render(chat.up_to(len(chat.messages) - 1))
        place = before_spaces(text, self._tokens.common(text, plain_text[:start]))
        return place if asked is not None and len(asked) < place else None

    # -- each answer behind the prompt that the template writes for it ------------------------

    def _as_prompted(self, chat: Chat, weights: Sequence[float]) -> RenderedRow | None:
        """Puts each trained answer behind the template's own prompt, where that says more.

        Some templates write a system message in front of the last message alone, where that is
        a user's, so that it stands in prompts and in no rendered answer. None where no prompt
        has what is left out.
        """
        trained = [index for index, weight in enumerate(weights) if weight]
        if not all(_is_answer(chat.messages[index]) for index in trained):
            return None
        answers = {index: self._answer(chat, index) for index in trained}
        left_out = {
            index: self._template.left_out(chat.up_to(index + 1), answer.text)
            for index, answer in answers.items()
        }
        prompts = {
            index: self._prompt_before(chat.up_to(index), answers[index])
            for index in trained
            if left_out[index]
        }
        if not any(prompts.values()):
            return None
        sequences = []
        for index, (text, (start, end, stop), *_) in answers.items():
            before = prompts.get(index) or text[:start]
            turns = Turn(before, 0.0), Turn(text[start:end], weights[index])
            reasons = messages_of.reasons(chat.messages[index])
            sequences.append(Rendered(turns, (None, stop or ""), reasons))
        return RenderedRow(
            tuple(sequences),
            sum(answer.adds_stop for answer in answers.values()),
            sum(answer.is_unrendered for answer in answers.values()),
            0 if prompts.get(trained[-1]) else len(left_out[trained[-1]]),
        )

    def _prompt_before(self, asked: Chat, answer: _Answer) -> str | None:
        """The template's own prompt, if it leaves out nothing and leads up to an answer alike."""
        text = self._template.try_render(asked, prompts=True) if asked.messages else None
        last = asked.messages[-1]["content"].strip() if asked.messages else ""
        if not text or not last or self._template.left_out(asked, text):
            return None
        before = answer.text[: answer.span.start]
        return text if before.rpartition(last)[2] == text.rpartition(last)[2] else None

    # -- where an answer ends ----------------------------------------------------------------

    def _closed(
        self, text: str, start: int, end: int, habits: Habits, *, has_calls: bool = False
    ) -> _Answer:
        """Ends the last answer of a text in its stop token, which is added if it has none."""
        rest = text[end:]
        turn = text.removesuffix(habits.after) if rest.endswith(habits.after) else text
        if stops := [stop for stop in self._chosen if stop in turn[end:]]:
            stop = min(stops, key=rest.find)
            return _Answer(text, _Span(start, end + rest.find(stop) + len(stop), stop))
        if habits.ending and turn.startswith(habits.ending, end):
            return _Answer(text, _Span(start, end + len(habits.ending), habits.stop))
        tokens = self._tokens.following(turn, end)
        if tokens and (has_calls or not self._chosen):
            # Tool calls may end otherwise than plain answers, in several tokens of their own.
            stop, stop_end = next((two for two in tokens if two[0] == habits.stop), tokens[-1])
            return _Answer(text, _Span(start, stop_end, None if self._chosen else stop))
        if habits.stop is not None:
            end = end if rest.strip() else len(text)
            text = text[:end] + habits.stop + text[end:]
            return _Answer(text, _Span(start, end + len(habits.stop), habits.stop))
        if self._added_stop is None or rest.strip():
            return _Answer(text, _Span(start, end, None))
        text = text[:end] + self._added_stop
        return _Answer(text, _Span(start, len(text), self._added_stop), adds_stop=True)

    def _ended(self, whole: Chat, chat: Chat, text: str, start: int, end: int) -> _Answer:
        """Ends the last answer of a text, if need be in the token that follows it."""
        habits = self._habits(chat)
        if habits.stop_follows and not self._tokens.at_start(text[end:]):
            follower = self._follower(whole, len(chat.messages), text)
            if follower is not None:
                text += follower
                return _Answer(text, _Span(start, len(text), follower))
        has_calls = messages_of.has_calls(chat.messages[-1])
        return self._closed(text, start, end, habits, has_calls=has_calls)

    def _follower(self, whole: Chat, end: int, text: str) -> str | None:
        """The token that begins what follows the messages of a text."""
        if end == len(whole.messages):
            return None
        longer = self._template.try_render(whole.up_to(end + 1))
        if longer is None or not longer.startswith(text):
            return None
        return next(iter(self._tokens.at_start(longer[len(text) :])), None)


@functools.lru_cache(maxsize=8)
def _cached(
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
    return _cached(tokenizer, str(tokenizer.chat_template), tuple(stop_tokens), add_eos, kwargs)


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


def _cut(chat: Chat, text: str, spans: Mapping[int, _Span], weights: Sequence[float]) -> Rendered:
    """A text in turns: each span with its message's weight, context between them."""
    turns: list[Turn] = []
    stops: list[str | None] = []
    place = 0
    for index in sorted(spans):
        start, end, stop = spans[index]
        is_trained_answer = weights[index] > 0 and _is_answer(chat.messages[index])
        turns += [Turn(text[place:start], 0.0), Turn(text[start:end], weights[index])]
        stops += [None, (stop or "") if is_trained_answer else None]
        place = end
    if place < len(text):
        turns.append(Turn(text[place:], 0.0))
        stops.append(None)
    reasons = any(weights[index] and messages_of.reasons(chat.messages[index]) for index in spans)
    return Rendered(tuple(turns), tuple(stops), reasons)


def _is_answer(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant"


def _is_more_than_text(message: Mapping[str, Any]) -> bool:
    return messages_of.has_calls(message) or messages_of.reasons(message)


def _short(message: Mapping[str, Any]) -> str:
    shown = repr(message["content"])
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    calls = ", ".join(messages_of.call_names(message))
    return f"{shown} with calls of {calls}" if calls else shown
