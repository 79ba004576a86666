"""A stream to batches: rows are read, tokenized and packed while the model trains.

What comes in is a stream that can be read from any row on, what goes out are the same
batches as `Batches` gives, in bounded memory. The stream is cut into windows of about
look_ahead packed rows; examples share rows within a window, and rows follow one another
through windows and epochs. A window is a pure function of where it begins, so that a
run resumes at a window's mark.

    window 0            window 1            window 2
    row 0  row 1  row 2 row 3  row 4        row 5 ...
    step 0        step 1       step 2 ...               two rows a step
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jax_sft.data.batches import EndOfStream, name_samples, place_rows
from jax_sft.data.packing import Plan, fill_rows, plan_rows
from jax_sft.data.streams import Stream
from jax_sft.data.tokenization import Encoding, tokenize_rows
from jax_sft.data.types import Batch, Counts, Examples, check_ids, join_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_A_BLOCK = 64  # rows tokenized at once: a window is at most so many longer than asked for
_STEPS_KEPT = 8  # a step that went wrong is named late, and batches are prepared early


class Mark(NamedTuple):
    """Where a window begins.

    Attributes:
        row: packed rows before it, since the start of the run.
        epoch: passes over the stream before it.
        window: windows before it in its epoch.
        source_row: rows of the stream before it in its epoch.
    """

    row: int = 0
    epoch: int = 0
    window: int = 0
    source_row: int = 0


class Window(NamedTuple):
    """Examples that may share rows.

    Attributes:
        mark: where it begins.
        examples: of its rows, in the stream's order.
        plan: which of them share a row.
        counts: what became of its rows.
        is_last: whether the stream ended in it.
        next_source_row: where the next window begins, if the stream goes on.
    """

    mark: Mark
    examples: Examples
    plan: Plan
    counts: Counts
    is_last: bool
    next_source_row: int

    @property
    def end(self) -> int:
        """The number of packed rows up to its end, since the start of the run."""
        return self.mark.row + self.plan.num_rows


class StreamBatches:
    """The batches of a run over a stream, to be asked for in order.

    Args:
        stream: what is read, from its start again in every epoch.
        tokenizer: of the model.
        encoding: the options; rows are as long as its seq_length.
        batch_size: rows of a step over all devices.
        epochs: how often the stream is read.
        seed: decides the order within windows.
        shuffle: a new order within every window, or the stream's own.
        packing: "best_fit" or "none".
        look_ahead: rows of seq_length that a window holds, about.
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: PreTrainedTokenizerBase,
        encoding: Encoding,
        *,
        batch_size: int,
        epochs: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        packing: str = "best_fit",
        look_ahead: int = 256,
    ) -> None:
        self.stream, self.tokenizer, self.encoding = stream, tokenizer, encoding
        self.seq_length, self.batch_size, self.epochs = encoding.seq_length, batch_size, epochs
        self.seed, self.shuffle, self.packing = seed, shuffle, packing
        self.look_ahead = look_ahead
        self.counts = Counts()
        self.vocab_size: int | None = None  # of the model, once it is known
        self._lock = threading.Lock()  # steps are prepared in a thread, and named in another
        self._windows: list[Window] = []
        self._rows: Iterator[tuple[int, Any]] | None = None
        self._left_out: Counter[str] = Counter()  # since the last window was read
        self._next: Mark | None = Mark()

    @functools.cached_property
    def first(self) -> Window:
        """The first window, read by itself: what is known of the stream before training.

        Raises:
            ValueError: the stream has no example to train on.
        """
        left_out: Counter[str] = Counter()
        window = self._read(Mark(), self.stream.rows_from(0, left_out), left_out)
        if not len(window.examples):
            raise ValueError(
                f"no example is left to train on in the first {window.counts.rows_read:,} rows of "
                f"{self.stream.source}{window.counts.dropped_in_words}; stream other data, or see "
                "train.seq_length and data.train_turns"
            )
        return window

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the stream's beginning and of the options that decide the batches."""
        digest = hashlib.blake2b(digest_size=16)
        options = (self.batch_size, self.seed, self.shuffle, self.packing, self.look_ahead)
        said = (self.stream.source, self.encoding, options)
        digest.update((repr(said) + self.stream.options).encode())
        examples = self.first.examples
        for array in (examples.offsets, examples.inputs, examples.targets, examples.weights):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def seek(self, mark: list[int]) -> None:
        """Goes on from what `mark` gave, of this run or of the one that it resumes."""
        with self._lock:
            self._windows, self._rows, self._next = [], None, Mark(*mark)

    def mark(self, step: int) -> list[int]:
        """Where to go on for the batches from a step on; one of the last few steps."""
        with self._lock:
            row = step * self.batch_size
            marks = [window.mark for window in self._windows if window.mark.row <= row]
            return list(marks[-1] if marks else Mark())

    def rows(self, step: int, row_range: tuple[int, int] | None = None) -> Batch:
        """Rows of a step's batch, as numpy; behind the stream's end rows have weight 0.

        Raises:
            EndOfStream: the stream ended before this step.
            ValueError: a row of the stream is wrong.
        """
        lo, hi = (0, self.batch_size) if row_range is None else row_range
        first = step * self.batch_size
        with self._lock:
            windows = self._windows_over(first, first + self.batch_size)
        parts = []
        for window in windows:
            start, end = max(first + lo, window.mark.row), min(first + hi, window.end)
            inside = range(start - window.mark.row, max(start, end) - window.mark.row)
            parts.append(fill_rows(window.plan, inside, window.examples, self.seq_length))
        num_missing = hi - lo - sum(len(part.inputs_BT) for part in parts)
        if num_missing:
            window = windows[-1]
            beyond = [window.plan.num_rows] * num_missing
            parts.append(fill_rows(window.plan, beyond, window.examples, self.seq_length))
        return Batch(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))

    def place(self, step: int, sharding: jax.sharding.Sharding) -> Batch:
        """A step's batch as global jax arrays; only this process's rows are filled."""
        shape = self.batch_size, self.seq_length
        return place_rows(functools.partial(self.rows, step), shape, sharding)

    def describe(self, step: int) -> str:
        """Names a step's samples, for the error that stops a run."""
        first = step * self.batch_size
        with self._lock:
            windows = list(self._windows)
        rows = range(first, first + self.batch_size)
        names = [
            window.examples[i].origin
            for window in windows
            for row in rows
            if window.mark.row <= row < window.end
            for i in window.plan.row(row - window.mark.row)
        ]
        return f"step {step} trains on {name_samples(names)}"

    def _windows_over(self, first: int, end: int) -> list[Window]:
        """The windows that hold the rows from first up to end, read as far as needed."""
        while (not self._windows or self._windows[-1].end < end) and self._next is not None:
            self._append_window()
        kept = first - _STEPS_KEPT * self.batch_size
        self._windows = [window for window in self._windows if window.end > kept]
        found = [w for w in self._windows if w.end > first and w.mark.row < end]
        if not found:
            raise EndOfStream
        return found

    def _append_window(self) -> None:
        mark = self._next
        if self._rows is None:
            self._rows = iter(self.stream.rows_from(mark.source_row, self._left_out))
        window = self._read(mark, self._rows, self._left_out)
        self.counts.add(window.counts)
        if len(window.examples):
            self._windows.append(window)
        row = mark.row + window.plan.num_rows
        if not window.is_last:
            self._next = Mark(row, mark.epoch, mark.window + 1, window.next_source_row)
        else:
            self._rows = None
            is_over = mark.epoch + 1 >= self.epochs
            self._next = None if is_over else Mark(row, mark.epoch + 1, 0, 0)

    def _read(self, mark: Mark, rows: Iterator[tuple[int, Any]], left_out: Counter[str]) -> Window:
        """Reads on until the window is full or the stream has ended; empties what was left out."""
        blocks: list[Examples] = []
        origins: list[str] = []
        counts = Counts()
        num_tokens, next_source_row, is_last = 0, mark.source_row, False
        while num_tokens < self.look_ahead * self.seq_length and not is_last:
            block = list(itertools.islice(rows, _ROWS_A_BLOCK))
            is_last = len(block) < _ROWS_A_BLOCK
            if not block:
                break
            names = [self.stream.name(index) for index, _ in block]
            values = [row for _, row in block]
            part = tokenize_rows(
                values, names, self.stream.to_content, self.tokenizer, self.encoding
            )
            blocks.append(part.examples)
            origins += [names[row] for row in part.rows]
            counts.add(part.counts)
            num_tokens += int(part.lengths.sum())
            next_source_row = block[-1][0] + 1
        for reason, number in left_out.items():
            counts.drop(reason, number)
        left_out.clear()
        examples = join_examples(blocks, tokenizer=self.tokenizer, origins=origins)
        if self.vocab_size is not None and len(examples):
            check_ids(examples, vocab_size=self.vocab_size)
        plan = plan_rows(
            examples.lengths_N,
            self.seq_length,
            packing=self.packing,
            seed=self.seed,
            epoch=(mark.epoch << 32) + mark.window,  # each window has an order of its own
            shuffle=self.shuffle,
        )
        return Window(mark, examples, plan, counts, is_last, next_source_row)
