"""Samples to Examples: the only place that decides which tokens are trained.

What comes in are rows, what goes out are shifted ids with weights. Weights follow from
the position of a token's turn, never from a token's id. A prompt for evaluation goes
through the same encoder, so that its ids are the exact prefix that training masked; the
way back, from sampled ids to text, is here too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from jax_sft.data.chat import ChatTemplate, chat_template, check_stop_tokens
from jax_sft.data.encoding import decode_continuations, encode_dialogues, own_bos_ids
from jax_sft.data.tokenizer import token_id
from jax_sft.data.types import (
    BadRow,
    Content,
    Conversation,
    Counts,
    Examples,
    Samples,
    TokenRow,
    Turn,
    examples_from_parts,
    join_examples,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AddEos = bool | Literal["last"]
Shifted = tuple[np.ndarray, np.ndarray, np.ndarray]

ROWS_A_BLOCK = 2000  # fast tokenizers spread one call's texts over the cores
_CHARACTERS_A_CALL = 4_000_000  # of which each takes a tokenizer 100 to 200 bytes


@dataclass(frozen=True)
class Encoding:
    """All that decides the ids and masks of rows, beside the tokenizer.

    Attributes:
        seq_length: the most inputs an example may have, in tokens.
        truncation_side: the side that "truncate" cuts off; a BOS stays in front.
        add_bos: None as the tokenizer itself does, True or False. A chat template owns
            its special tokens: conversations get none but its own.
        add_eos: True after every output, "last" after the last one only, or False; for
            conversations, whether EOS ends the answers of a template that ends none.
        over_length: what happens to longer samples: "truncate", "split" into chunks that
            train every target once, "drop" or "error".
        stop_tokens: tokens that end an answer of a conversation; none finds them in the
            chat template.
        template_kwargs: what else the chat template is given, as JSON.
        on_bad_row: "error", or "skip", which counts them.
    """

    seq_length: int
    truncation_side: str = "right"
    add_bos: bool | None = None
    add_eos: AddEos = True
    over_length: str = "truncate"
    stop_tokens: tuple[str, ...] = ()
    template_kwargs: str = "{}"
    on_bad_row: str = "error"

    def __post_init__(self) -> None:
        _check_choice("truncation_side", self.truncation_side, ("left", "right"))
        _check_choice("add_eos", self.add_eos, (True, "last", False))
        choices = ("truncate", "split", "drop", "error")
        _check_choice("over_length", self.over_length, choices)
        _check_choice("on_bad_row", self.on_bad_row, ("error", "skip"))
        if self.seq_length < 1:
            raise ValueError(
                f"seq_length is {self.seq_length}; an example needs at least 1 input token"
            )


class Part(NamedTuple):
    """The examples of a block of rows, end to end, and what became of the rows.

    Attributes:
        inputs: int32 [tokens].
        targets: int32 [tokens].
        weights: float32 [tokens].
        lengths: int64 [N], inputs of each example.
        rows: int64 [N], the row within the block that each example came from.
        counts: of the block's rows.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    counts: Counts

    @property
    def examples(self) -> Examples:
        """The arrays as Examples, which have no names and no tokenizer."""
        offsets = np.cumsum([0, *self.lengths], dtype=np.int64)
        return Examples(self.inputs, self.targets, self.weights, offsets)


def tokenize_samples(
    samples: Samples, tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> tuple[Examples, Counts]:
    """Turns samples into shifted, weighted examples of at most seq_length inputs.

        turns        "Hi" (prompt)   " there" (output)
        ids          BOS Hi          there EOS
        inputs_T     BOS Hi there
        targets_T    Hi there EOS
        weights_T    0   1    1

    Args:
        samples: as `read_samples` gives them.
        tokenizer: any transformers tokenizer; it may have no pad token.
        encoding: the options.

    Returns:
        The examples in the order of the samples, and what became of every sample.

    Raises:
        ValueError: a bad row, or with over_length "error" a sample that is too long.
    """
    counts = Counts()
    for reason, num_rows in samples.dropped.items():
        counts.drop(reason, num_rows)
    blocks: list[Examples] = []
    origins: list[str] = []
    for start in range(0, len(samples), ROWS_A_BLOCK):
        rows = samples.rows_in(start, start + ROWS_A_BLOCK)
        names = [samples.name(start + i) for i in range(len(rows))]
        part = tokenize_rows(rows, names, samples.to_content, tokenizer, encoding)
        blocks.append(part.examples)
        origins += [names[row] for row in part.rows]
        counts.add(part.counts)
    return join_examples(blocks, tokenizer=tokenizer, origins=origins), counts


def tokenize_rows(
    rows: Sequence[Any],
    origins: Sequence[str],
    to_content: Callable[[Any, str], Content],
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
) -> Part:
    """Turns a block of rows into examples; which other rows there are changes nothing.

    Args:
        rows: as they lie in their source.
        origins: a name for each.
        to_content: (row, origin) to what it holds.
        tokenizer: any transformers tokenizer.
        encoding: the options.

    Raises:
        BadRow: a row is wrong, and encoding.on_bad_row is "error".
        ValueError: a bad option, or a row that is too long where that is an error.
    """
    block = _Block(tokenizer, encoding)
    for row, origin in enumerate(origins):
        try:
            block.read(row, to_content(rows[row], origin), origin)
        except BadRow as error:
            if encoding.on_bad_row == "error":
                raise
            block.counts.drop(error.reason, problem=str(error))
    return block.finish()


class _Sequence(NamedTuple):
    """A training sequence before it is cut to length.

    Attributes:
        row: within the block.
        turns: its texts.
        ends: for each turn, whether EOS is put behind it.
        stops: for each turn, the token that should end it, where it is a trained answer.
    """

    row: int
    turns: tuple[Turn, ...]
    ends: list[bool]
    stops: Sequence[str | None]


class _Ids(NamedTuple):
    """A training sequence in ids, not yet shifted.

    Attributes:
        ids: int32.
        targets: int32, what each position is as a target.
        weights: float32, of each position as a target.
        num_bos: leading ids that truncation keeps.
        stops: the token that should end each trained answer, "" where none is known.
    """

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    num_bos: int
    stops: list[str]


class _Block:
    """Reads a block's rows, encodes their texts together, and cuts them to length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> None:
        self.counts = Counts()
        self._tokenizer, self._encoding = tokenizer, encoding
        self._bos_ids = _bos_ids(tokenizer, encoding.add_bos)
        self._origins: dict[int, str] = {}
        self._text: list[_Sequence] = []
        self._chat: list[_Sequence] = []
        self._ids: dict[int, list[_Ids]] = {}
        self._stop_ids: dict[str, int] = {}

    def read(self, row: int, content: Content, origin: str) -> None:
        """Takes in a row; a BadRow leaves no trace of it."""
        if isinstance(content, TokenRow):
            self._check_ids(content, origin)
            self._ids[row] = [self._of_tokens(content)]
        elif isinstance(content, Conversation):
            rendered = _chat_template(self._tokenizer, self._encoding).render(content, origin)
            self.counts.unrolled += len(rendered.sequences) > 1
            self.counts.added_stops += rendered.num_added_stops
            self.counts.unrendered_reasoning += rendered.num_unrendered
            self.counts.left_out_messages += rendered.num_left_out
            self.counts.left_out_tools += rendered.leaves_out_tools
            for sequence in rendered.sequences:
                self.counts.examples_with_reasoning += sequence.reasons
                ends = [False] * len(sequence.turns)
                self._chat.append(_Sequence(row, sequence.turns, ends, sequence.stops))
        else:
            eos = self._tokenizer.eos_token
            if self._encoding.add_eos:
                _eos_id(self._tokenizer, self._encoding.add_eos)
            ends = _ends(content, self._encoding.add_eos)
            stops = [eos if end else None for end in ends]
            self._text.append(_Sequence(row, content, ends, stops))
        self._origins[row] = origin

    def finish(self) -> Part:
        """Encodes and cuts everything that was read."""
        self._encode(self._text, self._bos_ids)
        self._encode(self._chat, [])
        shifted: list[Shifted] = []
        rows: list[int] = []
        for row in sorted(self._ids):
            fitted = [self._fit(sequence, row) for sequence in self._ids[row]]
            self._count(self._ids[row], fitted)
            for one in fitted:
                shifted += one.parts
                rows += [row] * len(one.parts)
        examples = examples_from_parts(shifted)
        return Part(
            examples.inputs,
            examples.targets,
            examples.weights,
            examples.lengths_N,
            np.array(rows, np.int64),
            self.counts,
        )

    def _encode(self, sequences: list[_Sequence], bos_ids: list[int]) -> None:
        """Encodes sequences some at a time, since a tokenizer takes many bytes a character."""
        waiting, num_characters = [], 0
        for sequence in sequences:
            waiting.append(sequence)
            num_characters += sum(len(turn.text) for turn in sequence.turns)
            if num_characters > _CHARACTERS_A_CALL:
                self._encode_together(waiting, bos_ids)
                waiting, num_characters = [], 0
        self._encode_together(waiting, bos_ids)

    def _encode_together(self, sequences: list[_Sequence], bos_ids: list[int]) -> None:
        dialogues = encode_dialogues(
            [[turn.text for turn in sequence.turns] for sequence in sequences],
            self._tokenizer,
            ends=[sequence.ends for sequence in sequences],
            bos_ids=bos_ids,
            eos_id=self._tokenizer.eos_token_id,
        )
        for sequence, dialogue in zip(sequences, dialogues, strict=True):
            pieces = [dialogue.bos_ids, *dialogue.pieces]
            ids = np.fromiter(itertools.chain.from_iterable(pieces), np.int32)
            turn_weights = [0.0, *(turn.weight for turn in sequence.turns)]
            weights = np.repeat(np.float32(turn_weights), [len(piece) for piece in pieces])
            stops = [stop for stop in sequence.stops if stop is not None]
            self.counts.retokenized_boundaries += dialogue.retokenized
            # A chat template writes its BOS itself.
            is_bos = len(ids) and ids[0] == self._tokenizer.bos_token_id and not weights[0]
            num_bos = len(dialogue.bos_ids) or int(is_bos)
            self._ids.setdefault(sequence.row, []).append(_Ids(ids, ids, weights, num_bos, stops))

    def _check_ids(self, row: TokenRow, origin: str) -> None:
        largest, size = int(max(row.ids_T.max(), row.targets_T.max())), len(self._tokenizer)
        if largest >= size:
            raise BadRow(
                f"{origin} has the token id {largest}, but the tokenizer has {size} tokens; set "
                "tokenizer.tokenizer_path to the one that made the ids",
                reason="unknown_token",
            )

    def _of_tokens(self, row: TokenRow) -> _Ids:
        """Ids that came as ids; each run of trained ones is an answer, if any are masked."""
        stops: list[str] = []
        if row.is_masked and self._encoding.add_eos:
            trained = row.weights_T > 0
            ends = np.flatnonzero(trained & ~np.append(trained[1:], False))
            known = self._known_stops()
            stops = [known.get(int(row.targets_T[end]), "") for end in ends if end > 0]
        return _Ids(row.ids_T, row.targets_T, row.weights_T, 0, stops)

    def _known_stops(self) -> dict[int, str]:
        """The tokens that may end an answer, by their ids."""
        chosen = check_stop_tokens(self._encoding.stop_tokens, self._tokenizer)
        tokens = [*chosen, *([self._tokenizer.eos_token] if self._tokenizer.eos_token else [])]
        if self._tokenizer.chat_template:
            tokens += _chat_template(self._tokenizer, self._encoding).stops
        return {self._stop_id(token): token for token in tokens}

    def _fit(self, sequence: _Ids, row: int) -> _Fitted:
        encoding = self._encoding
        return _fit(
            sequence,
            seq_length=encoding.seq_length,
            truncation_side=encoding.truncation_side,
            over_length=encoding.over_length,
            origin=self._origins[row],
        )

    def _count(self, sequences: list[_Ids], fitted: list[_Fitted]) -> None:
        """Counts a row's fate, and looks for its stop tokens in what will be trained."""
        counts = self.counts
        fates = [one.fate for one in fitted if one.parts]
        if not fates:
            counts.drop(fitted[0].fate)
            return
        counts.rows_read += 1
        counts.kept += 1
        counts.truncated += "truncated" in fates
        counts.split += "split" in fates
        counts.partly_dropped += len(fates) < len(fitted)
        counts.untrained_chunks += sum(one.num_untrained for one in fitted if one.parts)
        for sequence, one in zip(sequences, fitted, strict=True):
            if one.parts and one.fate != "truncated" and sequence.stops:
                self._count_stops(sequence, one)

    def _stop_id(self, token: str) -> int:
        if token not in self._stop_ids:
            self._stop_ids[token] = token_id(token, self._tokenizer)
        return self._stop_ids[token]

    def _count_stops(self, sequence: _Ids, fitted: _Fitted) -> None:
        expected = [stop for stop in sequence.stops if stop]
        ids = [self._stop_id(stop) for stop in set(expected)]
        num_stops = sum(
            int(np.count_nonzero(np.isin(targets, ids) & (weights > 0)))
            for _, targets, weights in fitted.parts
        )
        num_answers, counts = len(sequence.stops), self.counts
        counts.untruncated_answers += num_answers
        counts.answers_without_stop += max(num_answers - min(num_stops, len(expected)), 0)
        counts.rows_with_more_stops += num_stops > num_answers
        for stop in expected:
            counts.stop_tokens[stop] = counts.stop_tokens.get(stop, 0) + 1


class _Fitted(NamedTuple):
    """What a sequence became: fate is "kept", "truncated", "split" or a reason to drop."""

    parts: list[Shifted]
    fate: str
    num_untrained: int = 0


def _chat_template(tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> ChatTemplate:
    return chat_template(
        tokenizer,
        stop_tokens=encoding.stop_tokens,
        add_eos=encoding.add_eos is not False,
        kwargs=encoding.template_kwargs,
    )


def _bos_ids(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None) -> list[int]:
    own = [] if add_bos is False else own_bos_ids(tokenizer)
    if not add_bos or own:
        return own
    if tokenizer.bos_token_id is None:
        raise ValueError(
            "tokenizer.add_bos is True, but the tokenizer has no BOS token; set its bos_token, or "
            "leave add_bos at None"
        )
    return [tokenizer.bos_token_id]


def _eos_id(tokenizer: PreTrainedTokenizerBase, add_eos: AddEos) -> int | None:
    _check_choice("add_eos", add_eos, (True, "last", False))
    if add_eos is False:
        return None
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer.add_eos is {add_eos!r}, but the tokenizer has no EOS token; set its "
            "eos_token, or set add_eos to False"
        )
    return tokenizer.eos_token_id


def _ends(turns: Sequence[Turn], add_eos: AddEos) -> list[bool]:
    """Where EOS follows: after every trained turn, or after the last of them."""
    ends = [add_eos is not False and turn.weight > 0 for turn in turns]
    if add_eos == "last":
        ends[:-1] = [False] * (len(ends) - 1)
    return ends


def _fit(
    sequence: _Ids,
    *,
    seq_length: int,
    truncation_side: str,
    over_length: str,
    origin: str,
) -> _Fitted:
    """Shifts, and brings what is longer than seq_length to length."""
    ids, targets, weights, num_bos, _ = sequence
    fate, length = "kept", len(ids) - 1
    if length > seq_length:
        if over_length == "error":
            raise ValueError(
                f"{origin} has {length} input tokens, more than seq_length {seq_length}; raise "
                'train.seq_length, or set data.over_length to "truncate", "split" or "drop"'
            )
        if over_length == "drop":
            return _Fitted([], "over_length")
        fate = "split" if over_length == "split" else "truncated"
    if fate == "truncated" and truncation_side == "right":
        ids, targets, weights = (array[: seq_length + 1] for array in (ids, targets, weights))
    elif fate == "truncated":
        num_tail = max(seq_length + 1 - num_bos, 1)
        cut = len(ids) - num_tail
        weights = np.concatenate([weights[:num_bos], np.float32([0]), weights[cut + 1 :]])
        ids, targets = (np.concatenate([a[:num_bos], a[cut:]]) for a in (ids, targets))
    inputs, targets, weights = ids[:-1], targets[1:], weights[1:]
    chunks = [
        tuple(array[lo : lo + seq_length] for array in (inputs, targets, weights))
        for lo in range(0, len(inputs), seq_length)
    ]
    parts = [chunk for chunk in chunks if chunk[2].any()]
    if not parts:
        return _Fitted([], "no_trained_token")
    return _Fitted(parts, fate, len(chunks) - len(parts))


def prompt_ids(
    prompt: str | Sequence[str] | Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_bos: bool | None = None,
    add_eos: AddEos = True,
) -> list[int]:
    """The ids that training put before the answer to this prompt.

    Args:
        prompt: text, or [prompt, output, ..., prompt] texts, or a conversation that ends in
            a message to answer.
        tokenizer: the tokenizer of the training run.
        add_bos: as in `Encoding`.
        add_eos: as in `Encoding`: it decides what ends the outputs inside a longer prompt.

    Raises:
        ValueError: the prompt does not end in a prompt, or has no token at all.
    """
    encoding = Encoding(seq_length=1, add_bos=add_bos, add_eos=add_eos)
    return encode_prompt(prompt, tokenizer, encoding)[0]


def encode_prompt(
    prompt: str | Sequence[str] | Conversation,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    *,
    reasons: bool = False,
) -> tuple[list[int], str]:
    """The ids and the text that training put before the answer to this prompt.

    Args:
        prompt: as for `prompt_ids`.
        tokenizer: the tokenizer of the training run.
        encoding: of the training run.
        reasons: whether the answers of conversations think before they answer.

    Raises:
        ValueError: the prompt does not end in a prompt, or has no token at all.
    """
    if isinstance(prompt, Conversation):
        texts = _chat_template(tokenizer, encoding).prompt(prompt, "the prompt", reasons=reasons)
        ends, bos_ids = [False] * len(texts), []
    else:
        texts = _prompt_texts(prompt)
        ends = [encoding.add_eos is True and index % 2 == 1 for index in range(len(texts))]
        bos_ids = _bos_ids(tokenizer, encoding.add_bos)
    [dialogue] = encode_dialogues(
        [texts],
        tokenizer,
        ends=[ends],
        bos_ids=bos_ids,
        eos_id=_eos_id(tokenizer, encoding.add_eos) if any(ends) else None,
    )
    ids = [*dialogue.bos_ids, *itertools.chain.from_iterable(dialogue.pieces)]
    if not ids:
        raise ValueError(
            f"prompt {texts[-1]!r} has no tokens and the tokenizer adds no BOS; pass some text, "
            "or set tokenizer.add_bos=True"
        )
    return ids, "".join(texts)


def _prompt_texts(prompt: str | Sequence[str]) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"prompt holds {text!r}; pass a str, or a list of str")
    if len(texts) % 2 == 0:
        raise ValueError(
            f"prompt has {len(texts)} texts; pass [prompt, output, ..., prompt], which ends in a "
            "prompt and so has an odd number"
        )
    return texts


def prompt_difference(
    prompt: Conversation, text: str, tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> str | None:
    """What the template's own generation prompt is, where it differs from training's text."""
    own = _chat_template(tokenizer, encoding).generation_prompt(prompt, "the prompt")
    return None if own == text else own


def decode_outputs(
    outputs_ids: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_sequences: Sequence[str] = (),
) -> list[str]:
    """Turns sampled ids into text that continues the prompt's.

    Special tokens are skipped, the text ends before the earliest stop sequence, and
    white space at its end is taken off. Ids are decoded behind a known text, so that
    the space of a first "▁word" survives; whole texts are cut, never bytes.

    Args:
        outputs_ids: one sequence of ids an output; they are left as they are.
        tokenizer: the tokenizer of the prompts.
        stop_sequences: non-empty strings.

    Returns:
        One str an output.

    Raises:
        ValueError: stop_sequences is a str or holds an empty string.
    """
    check_stop_sequences(stop_sequences)
    outputs = []
    for text in decode_continuations(outputs_ids, tokenizer):
        ends = [end for stop in stop_sequences if (end := text.find(stop)) >= 0]
        outputs.append(text[: min(ends, default=len(text))].rstrip())
    return outputs


def check_stop_sequences(stop_sequences: Sequence[str]) -> None:
    """Raises ValueError unless stop_sequences is a sequence of non-empty strings."""
    if isinstance(stop_sequences, str):
        raise ValueError(
            f"stop_sequences is the str {stop_sequences!r}; pass a list: [{stop_sequences!r}]"
        )
    if not isinstance(stop_sequences, Sequence):
        raise ValueError(f"stop_sequences is {stop_sequences!r}; pass a list of str")
    for index, stop in enumerate(stop_sequences):
        if not isinstance(stop, str) or not stop:
            raise ValueError(
                f"stop_sequences[{index}] is {stop!r}; every stop sequence must be a non-empty str"
            )


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} is {value!r}; choose one of {listed}")
