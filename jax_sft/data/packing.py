"""Lengths to rows: which examples share a row, and the rows filled with tokens.

What comes in are the lengths of all examples, what goes out is a Plan that names the
examples of every row, the same on every host for the same seed and epoch. Filling
touches only the rows that are asked for. numpy only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jax_sft.data.types import Batch, Examples

# Rows that unshuffled data may be reordered within: fewer keep the order better, more
# waste less, since about one row a window stays partly empty.
_ROWS_A_WINDOW = 256


@dataclass(frozen=True, eq=False)
class Plan:
    """The examples of each row: row r holds examples_N[row_starts[r]:row_starts[r + 1]].

    examples_N (int64) names every example once; row_starts (int64) has num_rows + 1
    offsets; num_tokens is what the rows hold together, of num_rows * row_len.
    """

    examples_N: np.ndarray
    row_starts: np.ndarray
    num_tokens: int
    row_len: int

    @property
    def num_rows(self) -> int:
        """How many rows hold the examples."""
        return len(self.row_starts) - 1

    @property
    def efficiency(self) -> float:
        """The share of the rows' tokens that is not padding, from 0 to 1."""
        return self.num_tokens / max(self.num_rows * self.row_len, 1)

    def row(self, index: int) -> np.ndarray:
        """The examples of one row; a row beyond the last one has none."""
        if index >= self.num_rows:
            return self.examples_N[:0]
        return self.examples_N[self.row_starts[index] : self.row_starts[index + 1]]


def plan_rows(
    lengths_N: np.ndarray,
    row_len: int,
    *,
    packing: str = "best_fit",
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
) -> Plan:
    """Places every example in exactly one row of at most row_len tokens.

        lengths 5 3 4 2, row_len 8   best_fit   rows (5, 3) (4, 2)
                                     none       rows (5) (3) (4) (2)

    "best_fit" is best-fit decreasing (Johnson 1973). Which lengths meet in a row depends
    on the lengths alone, so every epoch has the same number of rows; which examples of
    equal length take the places, and the order of the rows, follow the seed and epoch.

    Args:
        lengths_N: tokens of each example, from 1 to row_len.
        row_len: tokens of a row.
        packing: "best_fit", or "none" for one example a row.
        seed: of the run.
        epoch: counts from 0.
        shuffle: False keeps the data's order: exactly with "none", within windows of
            about 256 rows with "best_fit", rows in the order of their first example.

    Raises:
        ValueError: an unknown packing, or a length outside 1..row_len.
    """
    lengths_N = np.asarray(lengths_N)
    if packing not in ("best_fit", "none"):
        raise ValueError(f"data.packing is {packing!r}; choose one of 'best_fit', 'none'")
    wrong = np.flatnonzero((lengths_N < 1) | (lengths_N > row_len))
    if len(wrong):
        raise ValueError(
            f"example {wrong[0]} has {lengths_N[wrong[0]]} tokens, rows have {row_len}; every "
            "example needs 1 to that many, so tokenize with the same seq_length"
        )
    rng = np.random.default_rng([seed, epoch])
    num_tokens = int(lengths_N.sum(dtype=np.int64))
    num_examples = len(lengths_N)
    if packing == "none":
        order = rng.permutation(num_examples) if shuffle else np.arange(num_examples)
        return Plan(order, np.arange(num_examples + 1), num_tokens, row_len)
    if not shuffle:
        return _plan_in_order(lengths_N, row_len, num_tokens)
    order_N, row_N, slot_N, num_rows = _best_fit(lengths_N, row_len, rng)
    rank_R = rng.permutation(num_rows)
    sizes_R = np.empty(num_rows, np.int64)
    sizes_R[rank_R] = np.bincount(row_N, minlength=num_rows)
    row_starts = np.concatenate([[0], np.cumsum(sizes_R)])
    examples_N = np.empty(num_examples, np.int64)
    examples_N[row_starts[rank_R][row_N] + slot_N] = order_N
    return Plan(examples_N, row_starts, num_tokens, row_len)


def _plan_in_order(lengths_N: np.ndarray, row_len: int, num_tokens: int) -> Plan:
    """Best fit within successive windows; rows in the order of their first example."""
    ends_N = np.cumsum(lengths_N, dtype=np.int64)
    window_N = (ends_N - 1) // (_ROWS_A_WINDOW * row_len)
    starts = np.concatenate([np.flatnonzero(np.diff(window_N, prepend=-1)), [len(lengths_N)]])
    row_of_N = np.empty(len(lengths_N), np.int64)
    num_rows = 0
    for lo, hi in itertools.pairwise(starts.tolist()):
        order, rows, _, num_new = _best_fit(lengths_N[lo:hi], row_len, None)
        firsts = np.full(num_new, hi - lo)
        np.minimum.at(firsts, rows, order)
        rank = np.empty(num_new, np.int64)
        rank[np.argsort(firsts)] = np.arange(num_new)
        row_of_N[lo + order] = num_rows + rank[rows]
        num_rows += num_new
    examples_N = np.argsort(row_of_N, kind="stable")
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(row_of_N, minlength=num_rows))])
    return Plan(examples_N, row_starts.astype(np.int64), num_tokens, row_len)


def _best_fit(
    lengths_N: np.ndarray, row_len: int, rng: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Best-fit decreasing, all examples of one length at a time.

    Returns:
        The examples, longest first; the row of each, and its slot within the row, in the
        same order (all int32); the number of rows.
    """
    order_N = np.arange(len(lengths_N), dtype=np.int32)
    if rng is not None:
        order_N = rng.permutation(order_N)
    # Radix sort takes 16 bits; longer lengths sort by merging.
    keys_N = lengths_N[order_N].astype(np.uint16 if row_len < 2**16 else np.int64)
    order_N = order_N[np.argsort(keys_N, kind="stable")[::-1]]
    counts = np.bincount(keys_N)
    row_N, slot_N = np.empty_like(order_N), np.empty_like(order_N)
    stacks = _Stacks()
    num_rows = num_placed = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = num_placed + int(counts[length])
        while num_placed < end:
            left = end - num_placed
            room = stacks.least_room(length) or row_len
            num_each = room // length
            if room == row_len:
                num_new = -(-left // num_each)
                rows = np.arange(num_rows, num_rows + num_new, dtype=np.int32)
                used = np.zeros(num_new, np.int32)
                num_rows += num_new
            else:
                rows, used = stacks.pop(room, -(-left // num_each))
            num_taken = min(left, len(rows) * num_each)
            span = slice(num_placed, num_placed + num_taken)
            row_N[span] = np.repeat(rows, num_each)[:num_taken]
            slots = used[:, None] + np.arange(num_each, dtype=np.int32)
            slot_N[span] = slots.reshape(-1)[:num_taken]
            num_placed += num_taken
            # The last of these rows may have taken fewer than the others.
            num_last = num_taken - (len(rows) - 1) * num_each
            stacks.push(room - num_each * length, rows[:-1], used[:-1] + num_each)
            stacks.push(room - num_last * length, rows[-1:], used[-1:] + num_last)
    return order_N, row_N, slot_N, num_rows


class _Stacks:
    """Rows in stacks by the room they have left, in blocks of (rows, slots used).

    Bit r of `occupied` is set where stack r holds a row, so that the least sufficient
    room is one operation away.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.occupied = 0

    def least_room(self, length: int) -> int:
        """The least room of at least this length that a row has, 0 if none has."""
        fitting = self.occupied >> length
        return length + (fitting & -fitting).bit_length() - 1 if fitting else 0

    def pop(self, room: int, num_wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """Takes up to num_wanted rows, those of one block at most."""
        rows, used = self.blocks[room].pop()
        if len(rows) > num_wanted:
            self.blocks[room].append((rows[num_wanted:], used[num_wanted:]))
        if not self.blocks[room]:
            self.occupied &= ~(1 << room)
        return rows[:num_wanted], used[:num_wanted]

    def push(self, room: int, rows: np.ndarray, used: np.ndarray) -> None:
        """Puts rows back; full rows and no rows are let go."""
        if room and len(rows):
            self.blocks.setdefault(room, []).append((rows, used))
            self.occupied |= 1 << room


def fill_rows(plan: Plan, rows: Sequence[int], examples: Examples, row_len: int) -> Batch:
    """Fills the asked rows of a plan with tokens; nothing else is read.

    Args:
        plan: of the lengths of these examples.
        rows: row indices; one at or beyond plan.num_rows gives padding of weight 0.
        examples: what plan.examples_N indexes.
        row_len: T, at least the plan's.

    Returns:
        A numpy Batch of len(rows) rows.
    """
    members = [plan.row(row) for row in rows]
    examples_E = np.concatenate([np.zeros(0, np.int64), *members]).astype(np.int64)
    num_examples_B = [len(row) for row in members]
    starts_E = examples.offsets[examples_E]
    lengths_E = examples.offsets[examples_E + 1] - starts_E
    ends_E = np.cumsum(lengths_E)
    num_tokens = int(lengths_E.sum())
    positions = np.arange(num_tokens) - np.repeat(ends_E - lengths_E, lengths_E)
    source = np.repeat(starts_E, lengths_E) + positions
    # The tokens of a row lie end to end: its first token's place, then counting on.
    row_E = np.repeat(np.arange(len(members)), num_examples_B)
    tokens_B = np.bincount(row_E, weights=lengths_E, minlength=len(members)).astype(np.int64)
    row = np.repeat(np.arange(len(members)), tokens_B)
    column = np.arange(num_tokens) - np.repeat(np.cumsum(tokens_B) - tokens_B, tokens_B)
    first_E = np.cumsum(num_examples_B) - num_examples_B
    segment_E = np.arange(len(examples_E)) - first_E[row_E] + 1

    def lay_out(values: np.ndarray, dtype: type) -> np.ndarray:
        rows_BT = np.zeros((len(members), row_len), dtype)
        rows_BT[row, column] = values
        return rows_BT

    return Batch(
        inputs_BT=lay_out(examples.inputs[source], np.int32),
        targets_BT=lay_out(examples.targets[source], np.int32),
        weights_BT=lay_out(examples.weights[source], np.float32),
        positions_BT=lay_out(positions, np.int32),
        segment_ids_BT=lay_out(np.repeat(segment_E, lengths_E), np.int32),
    )
