"""What the rooms of the data wing hand to each other: Sample, Example, Batch.

A Sample is one row: text in turns, a conversation, or token ids. An Example is one
training sequence of ids, already shifted, and a Batch is rows of packed examples.
Examples lie in a few flat arrays, so that millions of them cost their tokens and no
Python objects. Counts says what became of every row that was read.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_READ_AHEAD = 1000  # rows a slice: one call into an Arrow table, not one a row
NUM_SHOWN = 3  # problems of each kind that a report names


class BadRow(ValueError):
    """What is wrong with one row, in one line that names it.

    Attributes:
        reason: what it is counted as where bad rows are skipped, such as "empty_output".
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple:
        return _bad_row, (str(self), self.reason)


def _bad_row(message: str, reason: str) -> BadRow:
    return BadRow(message, reason=reason)


@dataclass(frozen=True)
class Turn:
    """A piece of text, and the weight of its tokens in the loss: 0 for context."""

    text: str
    weight: float


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        fields: what the chat template sees: role, content (a str), and what else the row
            gives, such as tool_calls or reasoning_content.
        weight: of its tokens in the loss; 0 for context.
    """

    fields: dict[str, Any]
    weight: float


@dataclass(frozen=True)
class Conversation:
    """Messages that a chat template renders, with the tools that it may offer."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None = None


@dataclass(frozen=True, eq=False)
class TokenRow:
    """A row that came as token ids.

    Attributes:
        ids_T: int32.
        targets_T: int32; what each position should have been predicted as: the ids, but
            where labels say otherwise.
        weights_T: float32; of each position as a target.
        is_masked: whether the row said what is trained, by labels or a mask.
    """

    ids_T: np.ndarray
    targets_T: np.ndarray
    weights_T: np.ndarray
    is_masked: bool


Content = tuple[Turn, ...] | Conversation | TokenRow


@dataclass(frozen=True)
class Sample:
    """One row as it was read; origin names it in messages ("a.jsonl line 12")."""

    content: Content
    origin: str


class Samples(Sequence[Sample]):
    """Rows that become Samples when they are read, so that big tables stay on disk.

    Args:
        rows: what is indexed: a list, a `datasets.Dataset` or a `datasets.Column`.
        to_content: (row, its origin) to what it holds; raises BadRow. It can be pickled,
            so that other processes can read rows too.
        name: a row's index to its origin.
        format: what the rows are: "text", "dialogue", "prompt_output", "messages",
            "sharegpt" or "tokens".
        source: what the rows came from, for reports.
        dropped: rows that were left out on the way here, by reason.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        to_content: Callable[[Any, str], Content],
        *,
        name: Callable[[int], str] = "row {}".format,
        format: str = "text",
        source: str = "samples",
        dropped: dict[str, int] | None = None,
    ) -> None:
        self.rows = rows
        self.to_content = to_content
        self.name = name
        self.format = format
        self.source = source
        self.dropped = dict(dropped or {})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        origin = self.name(index)
        return Sample(self.to_content(self.rows[index], origin), origin)

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), _READ_AHEAD):
            for index, row in enumerate(self.rows_in(start, start + _READ_AHEAD), start):
                origin = self.name(index)
                yield Sample(self.to_content(row, origin), origin)

    def rows_in(self, start: int, end: int) -> list[Any]:
        """The rows from start up to end, or to the last one, as they lie in their source."""
        rows = self.rows[start:end]
        if isinstance(rows, dict):  # a slice of a Dataset is a dict of columns
            return [
                dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=False)
            ]
        return list(rows)


@dataclass(frozen=True, eq=False)
class Example:
    """One training sequence: targets_T[t] is what follows inputs_T[t].

        ids            BOS  Hi  there  Hello  EOS     "Hi there" is the prompt
        inputs_T       BOS  Hi  there  Hello
        targets_T      Hi   there  Hello  EOS
        weights_T      0    0   1      1

    inputs_T and targets_T are int32, weights_T float32.
    """

    inputs_T: np.ndarray
    targets_T: np.ndarray
    weights_T: np.ndarray
    tokenizer: PreTrainedTokenizerBase | None = None
    origin: str = ""

    @property
    def ids(self) -> list[int]:
        """The ids before the shift: the first input, then every target."""
        return [*self.inputs_T[:1].tolist(), *self.targets_T.tolist()]

    def text(self) -> str:
        """What the model sees and learns, special tokens included."""
        if self.tokenizer is None:
            raise ValueError("this Example has no tokenizer to decode with; give Examples one")
        return self.tokenizer.decode(self.ids, skip_special_tokens=False)


class Origins(Sequence[str]):
    """Names of examples, each made when it is asked for, as there may be millions.

    Args:
        rows_N: int64, the row that each example came from.
        name: a row's index to its name.
    """

    def __init__(self, rows_N: np.ndarray, name: Callable[[int], str]) -> None:
        self.rows_N, self.name = rows_N, name

    def __len__(self) -> int:
        return len(self.rows_N)

    def __getitem__(self, index: int | slice) -> str | Origins:
        if isinstance(index, slice):
            return Origins(self.rows_N[index], self.name)
        return self.name(int(self.rows_N[index]))

    def take(self, indices_N: np.ndarray) -> Origins:
        """The names of the examples of these indices."""
        return Origins(self.rows_N[indices_N], self.name)


@dataclass(frozen=True)
class _JoinedNames:
    """Names of the rows of several sources, counted through: source k's begin at starts[k]."""

    names: tuple[Callable[[int], str], ...]
    starts: tuple[int, ...]

    def __call__(self, index: int) -> str:
        source = bisect.bisect_right(self.starts, index) - 1
        return self.names[source](index - self.starts[source])


def join_origins(parts: Sequence[Sequence[str]]) -> Sequence[str]:
    """The names of several Examples that are laid end to end."""
    if not all(isinstance(part, Origins) for part in parts):
        return [origin for part in parts for origin in part]
    num_rows = [int(part.rows_N.max(initial=-1)) + 1 for part in parts]
    starts = np.cumsum([0, *num_rows])[: len(parts)]
    rows = [part.rows_N + start for part, start in zip(parts, starts, strict=True)]
    names = tuple(part.name for part in parts)
    return Origins(
        np.concatenate([np.zeros(0, np.int64), *rows]), _JoinedNames(names, tuple(starts.tolist()))
    )


class Examples(Sequence[Example]):
    """Examples end to end in flat arrays; a slice is an Examples on the same memory.

    Args:
        inputs: int32 [tokens], the inputs of all examples.
        targets: int32 [tokens].
        weights: float32 [tokens].
        offsets: int64 [N + 1]; example i is inputs[offsets[i]:offsets[i + 1]].
        tokenizer: what Example.text() decodes with.
        origins: N names for messages.
    """

    def __init__(
        self,
        inputs: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray,
        offsets: np.ndarray,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        origins: Sequence[str] | None = None,
    ) -> None:
        self.inputs, self.targets, self.weights = inputs, targets, weights
        self.offsets = np.asarray(offsets, np.int64)
        self.tokenizer = tokenizer
        self.origins = origins

    @property
    def lengths_N(self) -> np.ndarray:
        """The number of inputs of each example, int64."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self._slice(range(*index.indices(len(self))))
        index = range(len(self))[index]
        span = slice(self.offsets[index], self.offsets[index + 1])
        origin = self.origins[index] if self.origins is not None else f"examples[{index}]"
        return Example(
            self.inputs[span], self.targets[span], self.weights[span], self.tokenizer, origin
        )

    def _slice(self, indices: range) -> Examples:
        if indices.step != 1:
            return self.take(np.array(indices, np.int64))
        origins = None if self.origins is None else self.origins[indices.start : indices.stop]
        offsets = self.offsets[indices.start : max(indices.start, indices.stop) + 1]
        span = slice(offsets[0], offsets[-1])
        flat = self.inputs[span], self.targets[span], self.weights[span]
        return Examples(*flat, offsets - offsets[0], tokenizer=self.tokenizer, origins=origins)

    def take(self, indices_N: np.ndarray) -> Examples:
        """The examples of these indices, in their order; one may be taken several times."""
        lengths_N = self.lengths_N[indices_N]
        offsets = np.concatenate([[0], np.cumsum(lengths_N)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths_N)
        source = np.repeat(self.offsets[indices_N], lengths_N) + within
        origins = self.origins
        if isinstance(origins, Origins):
            origins = origins.take(indices_N)
        elif origins is not None:
            origins = [origins[i] for i in indices_N]
        flat = self.inputs[source], self.targets[source], self.weights[source]
        return Examples(*flat, offsets, tokenizer=self.tokenizer, origins=origins)


def examples_from_parts(
    parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    origins: Sequence[str] | None = None,
) -> Examples:
    """Lays (inputs_T, targets_T, weights_T) triples end to end.

    Returns:
        Examples with one example a triple, in order.
    """
    inputs, targets, weights = zip(*parts, strict=True) if parts else ((), (), ())
    offsets = np.cumsum([0, *map(len, inputs)], dtype=np.int64)
    return Examples(
        np.concatenate([np.zeros(0, np.int32), *inputs], dtype=np.int32),
        np.concatenate([np.zeros(0, np.int32), *targets], dtype=np.int32),
        np.concatenate([np.zeros(0, np.float32), *weights], dtype=np.float32),
        offsets,
        tokenizer=tokenizer,
        origins=origins,
    )


def join_examples(
    blocks: Sequence[Examples],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    origins: Sequence[str] | None = None,
) -> Examples:
    """Lays several Examples end to end."""
    none = examples_from_parts([])
    return Examples(
        np.concatenate([block.inputs for block in [none, *blocks]]),
        np.concatenate([block.targets for block in [none, *blocks]]),
        np.concatenate([block.weights for block in [none, *blocks]]),
        np.cumsum(np.concatenate([[0], *(block.lengths_N for block in blocks)]), dtype=np.int64),
        tokenizer=tokenizer,
        origins=origins,
    )


def check_ids(examples: Examples, *, vocab_size: int) -> None:
    """Checks that every token id is one of a vocabulary.

    Raises:
        ValueError: one is not.
    """
    largest = max(int(ids.max(initial=0)) for ids in (examples.inputs, examples.targets))
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer made token id {largest}, but the model's vocabulary has "
            f"{vocab_size} entries: set tokenizer.tokenizer_path to the model's own"
        )


class Batch(NamedTuple):
    """Rows of packed examples; here one row with two examples and a padded tail.

        inputs_BT       a0 a1 a2 b0 b1  0
        targets_BT      a1 a2 a3 b1 b2  0
        weights_BT       0  1  1  1  1  0    float32, 0 where nothing is learned
        positions_BT     0  1  2  0  1  0    restart in each example
        segment_ids_BT   1  1  1  2  2  0    0 is padding

    int32, except for the weights; numpy arrays, or global jax arrays once placed.
    """

    inputs_BT: Any
    targets_BT: Any
    weights_BT: Any
    positions_BT: Any
    segment_ids_BT: Any


@dataclass
class Counts:
    """What became of every row: rows_read = kept + the sum of dropped, always.

    Attributes:
        rows_read: rows that were looked at.
        kept: those that made an example.
        truncated: kept rows that lost tokens.
        split: kept rows that became several chunks.
        unrolled: kept conversations that became one example an answer, since their
            template rewrites earlier turns.
        dropped: rows that made no example, by reason.
        shown: for each reason, what was wrong with the first few rows.
        partly_dropped: kept conversations that lost some of their answers.
        untrained_chunks: chunks of split rows that train nothing and were left out.
        retokenized_boundaries: places where the prompt's ids are not a prefix of the ids
            of prompt + output.
        stop_tokens: what ends the answers of untruncated rows, token to number.
        untruncated_answers: answers of those rows.
        answers_without_stop: those of them whose stop token is not trained.
        rows_with_more_stops: rows that train a stop token inside an answer too.
        added_stops: answers whose template writes no stop token, so that EOS was added.
        examples_with_reasoning: examples whose answers think before they answer.
        unrendered_reasoning: answers whose reasoning the template leaves out, so that it
            was put where a plain answer stands.
        left_out_messages: messages that are no answers, of conversations whose template
            leaves them out.
        left_out_tools: conversations whose template leaves out their tools.
    """

    rows_read: int = 0
    kept: int = 0
    truncated: int = 0
    split: int = 0
    unrolled: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    shown: dict[str, list[str]] = field(default_factory=dict)
    partly_dropped: int = 0
    untrained_chunks: int = 0
    retokenized_boundaries: int = 0
    stop_tokens: dict[str, int] = field(default_factory=dict)
    untruncated_answers: int = 0
    answers_without_stop: int = 0
    rows_with_more_stops: int = 0
    added_stops: int = 0
    examples_with_reasoning: int = 0
    unrendered_reasoning: int = 0
    left_out_messages: int = 0
    left_out_tools: int = 0

    def drop(self, reason: str, num_rows: int = 1, *, problem: str | None = None) -> None:
        """Counts rows as read and dropped for a reason; remembers the first few problems."""
        self.rows_read += num_rows
        self.dropped[reason] = self.dropped.get(reason, 0) + num_rows
        if problem is not None:
            shown = self.shown.setdefault(reason, [])
            if len(shown) < NUM_SHOWN:
                shown.append(problem)

    @property
    def dropped_in_words(self) -> str:
        """What was dropped, as " (dropped: 3 over length, 1 filter)"; "" where nothing was."""
        reasons = (f"{number:,} {name.replace('_', ' ')}" for name, number in self.dropped.items())
        return f" (dropped: {', '.join(reasons)})" if self.dropped else ""

    def add(self, other: Counts) -> None:
        """Adds what another part of the rows became."""
        for name in vars(self):
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "shown":
                for reason, problems in theirs.items():
                    mine[reason] = [*mine.get(reason, []), *problems][:NUM_SHOWN]
            elif isinstance(mine, dict):
                for key, number in theirs.items():
                    mine[key] = mine.get(key, 0) + number
            else:
                setattr(self, name, mine + theirs)


@dataclass(frozen=True)
class Source:
    """One of the places that examples came from, for the report.

    Attributes:
        name: a file, a hub name, a function or "samples".
        format: what its rows are, one of `config_keys.ROW_FORMATS`.
        times: how often an epoch sees its rows.
        counts: what became of them.
    """

    name: str
    format: str
    times: float
    counts: Counts


class ExampleSet(NamedTuple):
    """Examples, and what became of every row on the way: in all, and by source."""

    examples: Examples
    counts: Counts
    sources: tuple[Source, ...]
