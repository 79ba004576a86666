"""Examples to batches on the mesh: a pure function of (seed, epoch, step).

What comes in are the examples of a run, what goes out is the batch of any step: as
numpy rows, or as global jax arrays of which each process fills only its own rows.
Because nothing is consumed, resuming is asking for the next step. Batches are prepared
ahead of the device by one thread.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np

from jax_sft.data.packing import Plan, fill_rows, plan_rows
from jax_sft.data.types import Batch, Examples

Item = TypeVar("Item")

_NAMED_SAMPLES = 8  # as many as still read well in one error line


class EndOfStream(Exception):
    """There is no batch for this step: the data has been read as often as the run has epochs."""


class Batches:
    """The batches of a run, addressed by a global step that counts from 0.

    Every example is in exactly one row an epoch. A step is batch_size rows; the last
    step of an epoch is completed with rows of weight 0. Epochs are planned when they
    are first asked for, and one plan is kept.

    Args:
        examples: all of the run's examples, the same on every host.
        seq_length: tokens of a row.
        batch_size: rows of a step over all devices.
        epochs: how often every example is seen.
        seed: decides the order together with the epoch.
        shuffle: a new order every epoch, or the data's own.
        packing: "best_fit" or "none".

    Raises:
        ValueError: there are no examples, or a number is below 1.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        seq_length: int,
        batch_size: int,
        epochs: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        packing: str = "best_fit",
    ) -> None:
        for name, value in (("batch_size", batch_size), ("epochs", epochs)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not len(examples):
            raise ValueError(
                "no example is left to train on; see the dropped rows in the data report, and "
                "raise train.seq_length or pass other samples"
            )
        self.examples = examples
        self.seq_length = seq_length
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed
        self.shuffle = shuffle
        self.packing = packing
        self._planned: tuple[int, Plan] | None = None

    def plan(self, epoch: int) -> Plan:
        """The rows of an epoch."""
        planned = self._planned  # one read: another thread may be planning the next epoch
        if planned is None or planned[0] != epoch:
            plan = plan_rows(
                self.examples.lengths_N,
                self.seq_length,
                packing=self.packing,
                seed=self.seed,
                epoch=epoch,
                shuffle=self.shuffle,
            )
            planned = self._planned = (epoch, plan)
        return planned[1]

    def steps_in_epoch(self, epoch: int) -> int:
        """Steps of one epoch; how many rows there are depends on the lengths alone."""
        if not 0 <= epoch < self.epochs:
            raise ValueError(f"epoch is {epoch}; this run has epochs 0 to {self.epochs - 1}")
        return self._steps_an_epoch

    @property
    def num_steps(self) -> int:
        """Steps of all epochs together."""
        return self.epochs * self._steps_an_epoch

    @property
    def _steps_an_epoch(self) -> int:
        plan = self._planned[1] if self._planned else self.plan(0)
        return -(-plan.num_rows // self.batch_size)

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a global step, and the step within that epoch."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step is {step}; this run has steps 0 to {self.num_steps - 1}")
        return divmod(step, self._steps_an_epoch)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the data and of the options that decide which step sees what.

        The number of epochs is not among them: a run may be resumed with more.
        """
        digest = hashlib.blake2b(digest_size=16)
        options = (self.seq_length, self.batch_size, self.seed, self.shuffle, self.packing)
        digest.update(repr(options).encode())
        examples = self.examples
        for array in (examples.offsets, examples.inputs, examples.targets, examples.weights):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def rows(self, step: int, row_range: tuple[int, int] | None = None) -> Batch:
        """Rows of a step's batch, as numpy.

        Args:
            step: global step.
            row_range: (lo, hi) of the batch's rows; None for all of them.

        Returns:
            A Batch of hi - lo rows.
        """
        lo, hi = (0, self.batch_size) if row_range is None else row_range
        if not 0 <= lo <= hi <= self.batch_size:
            raise ValueError(f"row_range is {(lo, hi)}; a batch has rows 0 to {self.batch_size}")
        epoch, local_step = self.locate(step)
        first = local_step * self.batch_size
        rows = range(first + lo, first + hi)
        return fill_rows(self.plan(epoch), rows, self.examples, self.seq_length)

    def place(self, step: int, sharding: jax.sharding.Sharding) -> Batch:
        """A step's batch as global jax arrays; only this process's rows are filled.

        Args:
            step: global step.
            sharding: of a [batch_size, seq_length] array; it may split both axes.

        Returns:
            A Batch of global arrays.
        """
        shape = self.batch_size, self.seq_length
        return place_rows(functools.partial(self.rows, step), shape, sharding)

    def describe(self, step: int) -> str:
        """Names a step's epoch and samples, for the error that stops a run."""
        epoch, local_step = self.locate(step)
        plan = self.plan(epoch)
        first = local_step * self.batch_size
        members = itertools.chain.from_iterable(
            plan.row(row).tolist() for row in range(first, first + self.batch_size)
        )
        return (
            f"step {step} (epoch {epoch}, step {local_step} of {self._steps_an_epoch} in it) "
            f"trains on {name_samples(self.examples[i].origin for i in members)}"
        )


def name_samples(origins: Iterable[str]) -> str:
    """The first few different names, and how many more there are."""
    names = list(dict.fromkeys(origins))
    more = f" and {len(names) - _NAMED_SAMPLES} more" if len(names) > _NAMED_SAMPLES else ""
    return ", ".join(names[:_NAMED_SAMPLES]) + more


def place_rows(
    rows: Callable[[tuple[int, int]], Batch],
    shape: tuple[int, int],
    sharding: jax.sharding.Sharding,
) -> Batch:
    """Makes global jax arrays of rows, of which each process fills only its own.

    Args:
        rows: (lo, hi) to those rows of the batch, as numpy.
        shape: of the batch, [B, T].
        sharding: of the arrays; it may split both axes.
    """
    filled: dict[tuple[int, int], Batch] = {}

    def shard(field: int, index: tuple[slice, ...]) -> np.ndarray:
        lo, hi, _ = index[0].indices(shape[0])
        if (lo, hi) not in filled:
            filled[lo, hi] = rows((lo, hi))
        return filled[lo, hi][field][:, index[1]]

    return Batch(
        *(
            jax.make_array_from_callback(shape, sharding, lambda index, i=i: shard(i, index))
            for i in range(len(Batch._fields))
        )
    )


def prefetch(
    place: Callable[[int], Item],
    steps: Iterable[int],
    *,
    depth: int = 2,
    waited: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Item]:
    """Yields place(step) for each step, prepared up to depth steps ahead by one thread.

    An exception of place is raised here, at the step that it belongs to; EndOfStream
    ends the iteration. Closing the iterator, or leaving it, waits for the step being
    prepared and starts no other.

    Args:
        place: called in the thread, in order of the steps.
        steps: what place is called with.
        depth: how many are prepared and not yet taken, at least 1.
        waited: told for each item the seconds that it was waited for.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; at least 1 step must be prepared ahead")
    return _prefetch(place, iter(steps), depth, waited)


def _prefetch(
    place: Callable[[int], Item],
    steps: Iterator[int],
    depth: int,
    waited: Callable[[float], None],
) -> Iterator[Item]:
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        ahead: deque[Future[Item]] = deque(
            pool.submit(place, step) for step in itertools.islice(steps, depth)
        )
        while ahead:
            start = time.perf_counter()
            try:
                item = ahead.popleft().result()
            except EndOfStream:
                return
            waited(time.perf_counter() - start)
            ahead.extend(pool.submit(place, step) for step in itertools.islice(steps, 1))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
