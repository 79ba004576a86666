"""What the rooms of the data wing hand to each other: Sample, Example, Batch.

A Sample is text in turns, an Example is one training sequence of token ids, already
shifted, and a Batch is rows of packed examples. Examples lie in a few flat arrays, so
that millions of them cost their tokens and no Python objects. Counts says what became
of every row that was read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_READ_AHEAD = 1000  # rows a slice: one call into an Arrow table, not one a row


@dataclass(frozen=True)
class Turn:
    """A piece of text; trained turns are the ones that the model learns to write."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Sample:
    """One row in turns; origin names it in messages ("samples[3]", "a.jsonl line 12")."""

    turns: tuple[Turn, ...]
    origin: str


class Samples(Sequence[Sample]):
    """Rows that become Samples when they are read, so that big tables stay on disk.

    Args:
        rows: what is indexed: a list, a `datasets.Dataset` or a `datasets.Column`.
        to_sample: (row, its index in rows) to the Sample.
        dropped: rows that were left out on the way here, by reason.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        to_sample: Callable[[Any, int], Sample],
        *,
        dropped: dict[str, int] | None = None,
    ) -> None:
        self.rows = rows
        self.to_sample = to_sample
        self.dropped = dict(dropped or {})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self.to_sample(self.rows[index], index)

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), _READ_AHEAD):
            rows = self.rows[start : start + _READ_AHEAD]
            if isinstance(rows, dict):  # a slice of a Dataset is a dict of columns
                rows = [
                    dict(zip(rows, values, strict=True))
                    for values in zip(*rows.values(), strict=False)
                ]
            for index, row in enumerate(rows, start):
                yield self.to_sample(row, index)


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
        origins = None if self.origins is None else [self.origins[i] for i in indices]
        if indices.step == 1:
            offsets = self.offsets[indices.start : max(indices.start, indices.stop) + 1]
            span = slice(offsets[0], offsets[-1])
            flat = self.inputs[span], self.targets[span], self.weights[span]
            return Examples(*flat, offsets - offsets[0], tokenizer=self.tokenizer, origins=origins)
        parts = [self[i] for i in indices]
        return examples_from_parts(
            [(part.inputs_T, part.targets_T, part.weights_T) for part in parts],
            tokenizer=self.tokenizer,
            origins=origins,
        )


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

    truncated and split count kept rows, untrained_chunks the chunks of split rows that
    were left out because they train nothing. retokenized_boundaries counts the places
    where the prompt's ids are not a prefix of the ids of prompt + output. The answers
    of rows that were not truncated are checked for their stop token: none or several.
    """

    rows_read: int = 0
    kept: int = 0
    truncated: int = 0
    split: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    untrained_chunks: int = 0
    retokenized_boundaries: int = 0
    stop_token: str | None = None
    untruncated_answers: int = 0
    answers_without_stop: int = 0
    rows_with_more_stops: int = 0

    def drop(self, reason: str, num_rows: int = 1) -> None:
        """Counts rows as read and dropped for a reason."""
        self.rows_read += num_rows
        self.dropped[reason] = self.dropped.get(reason, 0) + num_rows
