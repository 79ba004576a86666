"""Tokenization of whole sources, in several processes, kept on disk for the next run.

What comes in are Samples, or a function that opens them, what goes out are their examples.
A folder of the cache is named by all that the examples depend on, so that what is found
there is never out of date; what is not found is built by one process at a time, while the
others wait, and a killed build goes on where it stopped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np

from jax_sft.data.fingerprint import (
    code_fingerprint,
    digest_of,
    samples_fingerprint,
    tokenizer_fingerprint,
)
from jax_sft.data.sources import RowNames
from jax_sft.data.token_files import (
    TokenWriter,
    check_arrays,
    map_arrays,
    read_manifest,
    time_of_manifest,
)
from jax_sft.data.token_workers import Block, Task, tokenize_blocks
from jax_sft.data.tokenization import ROWS_A_BLOCK, Encoding, Part
from jax_sft.data.types import (
    Counts,
    Examples,
    ExampleSet,
    Origins,
    Samples,
    Source,
    join_examples,
)
from jax_sft.distributed import is_first

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A single block of fewer tokens is made anew each time: that takes a second or few.
LEAST_KEPT_TOKENS = 1_000_000


def say_once(text: str) -> None:
    """Prints a line, on one process of a run."""
    if is_first():
        print(text, flush=True)


def tokenize_all(
    samples: Samples | Callable[[], Samples],
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    *,
    num_proc: int = 1,
    cache_dir: str | None = None,
    fingerprint: str | None = None,
    say: Callable[[str], None] = say_once,
) -> ExampleSet:
    """Turns a source into examples, or finds them in the cache.

    Args:
        samples: a source, or what opens it, which is called only where it must be read.
        tokenizer: any transformers tokenizer.
        encoding: the options.
        num_proc: processes that tokenize; the examples are the same for any number.
        cache_dir: where tokenized data is kept; None: in the user's cache; "off": nowhere.
        fingerprint: of the rows and of how they are read, as `source_fingerprint` gives it;
            None finds it from the opened samples.
        say: is told in one line where the cache was used or made.

    Returns:
        The examples in the order of the rows, and what became of every row; of one source,
        which an epoch sees once.

    Raises:
        BadRow: a row is wrong, and encoding.on_bad_row is "error".
        ValueError: a bad option, or a row that is too long where that is an error.
    """
    if num_proc < 1:
        raise ValueError(f"data.num_proc is {num_proc}; there must be at least 1")
    root = find_cache_dir(cache_dir)
    job = _Job(samples, tokenizer, encoding, num_proc)
    key = None if root is None else _key(job, fingerprint)
    if root is None or key is None:
        return job.in_memory()
    entry = _Entry(root / key, tokenizer, say)
    try:
        found = entry.find()
        if found is None:
            if small := job.if_small():
                return small
            return entry.wait_or_build(job)
    except _CannotKeep as error:
        say(f"{'tokens':<11} not kept for later runs: {error}")
        return job.in_memory()
    return found


def find_cache_dir(cache_dir: str | None) -> Path | None:
    """The folder that `data.cache_dir` means; None for none."""
    if cache_dir == "off":
        return None
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the XDG specification has it
        base = Path("~/.cache").expanduser()
    return base / "jax_sft"


def _key(job: _Job, fingerprint: str | None) -> str | None:
    """Names an entry by all that its examples depend on; None where that cannot be told."""
    parts = [
        samples_fingerprint(job.opened()) if fingerprint is None else fingerprint,
        tokenizer_fingerprint(job.tokenizer),
    ]
    if None in parts:
        return None
    return digest_of(*parts, repr(asdict(job.encoding)), code_fingerprint())


def _about(found: ExampleSet) -> str:
    [source] = found.sources
    return f"{len(found.examples):,} examples of {source.name}"


class _CannotKeep(Exception):
    """The cache's folder does not take what is written to it."""


class _Job:
    """What is to be tokenized, and how; samples are opened once, where they must be."""

    def __init__(
        self,
        samples: Samples | Callable[[], Samples],
        tokenizer: PreTrainedTokenizerBase,
        encoding: Encoding,
        num_proc: int,
    ) -> None:
        self.tokenizer, self.encoding, self.num_proc = tokenizer, encoding, num_proc
        self._samples = samples
        self._first: Part | None = None

    def opened(self) -> Samples:
        if not isinstance(self._samples, Samples):
            self._samples = self._samples()
        return self._samples

    def parts(self, first_block: int = 0) -> Iterator[Part]:
        """The Parts of all blocks of rows from this one on."""
        samples = self.opened()
        starts = range(first_block * ROWS_A_BLOCK, len(samples), ROWS_A_BLOCK)
        if self._first is not None and not first_block:
            yield self._first
            starts = starts[1:]
        task = Task(samples.to_content, self.tokenizer, self.encoding)
        blocks = (self._block(start) for start in starts)
        num_proc = min(self.num_proc, len(starts))
        with closing(tokenize_blocks(blocks, task, num_proc=max(num_proc, 1))) as parts:
            yield from parts

    def in_memory(self) -> ExampleSet:
        """Tokenizes everything, keeping nothing."""
        counts, blocks, rows = self.dropped(), [], [np.zeros(0, np.int64)]
        with closing(self.parts()) as parts:
            for index, part in enumerate(parts):
                blocks.append(part.examples)
                rows.append(part.rows + index * ROWS_A_BLOCK)
                counts.add(part.counts)
        samples = self.opened()
        origins = Origins(np.concatenate(rows), samples.name)
        examples = join_examples(blocks, tokenizer=self.tokenizer, origins=origins)
        source = Source(samples.source, samples.format, 1.0, counts)
        return ExampleSet(examples, counts, (source,))

    def if_small(self) -> ExampleSet | None:
        """The examples, where there are too few to keep."""
        samples = self.opened()
        if len(samples) > ROWS_A_BLOCK:
            return None
        [self._first] = self.parts() if len(samples) else [None]
        if self._first is not None and len(self._first.inputs) >= LEAST_KEPT_TOKENS:
            return None
        return self.in_memory()

    def dropped(self) -> Counts:
        """Counts of the rows that were left out before."""
        counts = Counts()
        for reason, num_rows in self.opened().dropped.items():
            counts.drop(reason, num_rows)
        return counts

    def _block(self, start: int) -> Block:
        samples = self.opened()
        rows = samples.rows_in(start, start + ROWS_A_BLOCK)
        return Block(rows, [samples.name(start + index) for index in range(len(rows))])


class _Entry:
    """One folder of the cache, whole or not there at all."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
    ) -> None:
        self.folder, self.tokenizer, self._say = folder, tokenizer, say

    def say(self, text: str) -> None:
        self._say(f"{'tokens':<11} {text}")

    def find(self) -> ExampleSet | None:
        """The entry's examples, on disk; None where it is not there or is damaged."""
        try:
            body = read_manifest(self.folder)
            check_arrays(self.folder, body)
            found = self._mapped(body)
        except OSError:
            return None
        except ValueError as error:
            self.say(f"{error}: made anew")
            return None
        self.say(f"{_about(found)} from the cache, {self.folder}")
        return found

    def wait_or_build(self, job: _Job) -> ExampleSet:
        """Builds the entry, where no other process does; else waits for that one."""
        while True:
            seen = self._manifest_time()
            with self._lock():
                if self._manifest_time() == seen:
                    return self._build(job)
            # Read without the lock, as all who waited do.
            if found := self.find():
                return found

    def _manifest_time(self) -> int | None:
        with suppress(OSError):
            return time_of_manifest(self.folder)
        return None

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Waits as long as it takes; a process that ends gives the lock back, however it ends."""
        with _writing():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(f"{self.folder}.lock")
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                self.say(f"waiting for another process that makes {self.folder}")
                lock.acquire(poll_interval=0.5)
        try:
            yield
        finally:
            lock.release()

    def _build(self, job: _Job) -> ExampleSet:
        """Tokenizes everything, block by block onto the disk.

        An interrupted build stays for the next one; after an error nothing does.
        """
        partial = Path(f"{self.folder}.partial")
        try:
            self._write(job, partial)
            with _writing():
                # Whoever has mapped a damaged entry keeps what they have.
                shutil.rmtree(self.folder, ignore_errors=True)
                partial.rename(self.folder)
                found = self._mapped(read_manifest(self.folder))
        except (ValueError, _CannotKeep):
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.say(f"{_about(found)} tokenized, kept in {self.folder}")
        return found

    def _write(self, job: _Job, folder: Path) -> None:
        samples = job.opened()
        name = samples.name
        if not isinstance(name, RowNames):
            raise _CannotKeep(f"rows named by a {type(name).__name__}")
        about = {
            "source": samples.source,
            "format": samples.format,
            "dropped": samples.dropped,
            "name": [name.before, name.after, name.step, name.files],
        }
        with _writing():
            writer = TokenWriter(folder)
        with closing(writer), closing(job.parts(writer.num_blocks)) as parts:
            for part in parts:
                with _writing():
                    writer.append(part, writer.num_blocks * ROWS_A_BLOCK)
            with _writing():
                writer.finish(about, name.numbers)

    def _mapped(self, body: dict[str, Any]) -> ExampleSet:
        arrays, numbers = map_arrays(self.folder, body)
        about = body["about"]
        before, after, step, files = about["name"]
        name = RowNames(before, after, numbers, step, tuple(files))
        examples = Examples(
            arrays["inputs"],
            arrays["targets"],
            arrays["weights"],
            arrays["offsets"],
            tokenizer=self.tokenizer,
            origins=Origins(arrays["rows"], name),
        )
        counts = Counts()
        for reason, num_rows in about["dropped"].items():
            counts.drop(reason, num_rows)
        counts.add(Counts(**body["counts"]))
        source = Source(about["source"], about["format"], 1.0, counts)
        return ExampleSet(examples, counts, (source,))


@contextmanager
def _writing() -> Iterator[None]:
    """Turns what a disk refuses into _CannotKeep."""
    try:
        yield
    except OSError as error:
        raise _CannotKeep(str(error)) from error
