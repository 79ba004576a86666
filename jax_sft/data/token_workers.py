"""Tokenization in several processes, in the order of the rows.

What comes in are blocks of rows, what goes out are their Parts, as `tokenize_rows` makes
them in this process. The workers are new Python processes that import this file and nothing
of the user's: no fork of a process that runs JAX's threads, and no `__main__` imported anew.
They live on their standard input: when this process ends, however it ends, so do they.
"""

from __future__ import annotations

import collections
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from jax_sft.data.tokenization import Encoding, Part, tokenize_rows
from jax_sft.data.types import Content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCKS_A_WORKER = 2  # underway at once: one that it works on, one that waits


class Task(NamedTuple):
    """What `tokenize_rows` is given, but for the rows."""

    to_content: Callable[[Any, str], Content]
    tokenizer: PreTrainedTokenizerBase
    encoding: Encoding


class Block(NamedTuple):
    """Some rows, as they lie in their source, and a name for each."""

    rows: Sequence[Any]
    origins: Sequence[str]


def tokenize_blocks(blocks: Iterable[Block], task: Task, *, num_proc: int = 1) -> Iterator[Part]:
    """Tokenizes blocks; the Parts come in their order.

    Args:
        blocks: read as they are needed, a few ahead.
        task: what is done with their rows.
        num_proc: processes to start; 1 does it in this one.

    Raises:
        BadRow: as `tokenize_rows`, for the first block that has one.
        ValueError: the rows or the tokenizer cannot be sent to another process.
        RuntimeError: a process ended by itself.
    """
    if num_proc == 1:
        for rows, origins in blocks:
            yield tokenize_rows(rows, origins, *task)
        return
    setup = _pickled(tuple(task), "the tokenizer")
    workers: list[_Worker] = []
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def run(data: bytes) -> Part:
        worker = idle.get()
        try:
            return worker.ask(data)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(num_proc)
    underway: collections.deque[Future[Part]] = collections.deque()
    try:
        for _ in range(num_proc):
            workers.append(_Worker(setup, num_proc))
            idle.put(workers[-1])
        for block in blocks:
            underway.append(pool.submit(run, _pickled(tuple(block), "the rows")))
            if len(underway) == _BLOCKS_A_WORKER * num_proc:
                yield underway.popleft().result()
        while underway:
            yield underway.popleft().result()
    finally:
        for worker in workers:
            worker.kill()
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


def _pickled(value: object, what: str) -> bytes:
    """A message for a worker: bytes in a pickle, so that whatever is in them, its end is found."""
    try:
        return _dumps(_dumps(value))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{what} cannot be sent to other processes ({error}); set data.num_proc to 1"
        ) from error


def _dumps(value: object) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


class _Worker:
    """A process that answers one block at a time.

    Args:
        setup: a Task, pickled.
        num_proc: how many of them there are, which share the cores.
    """

    def __init__(self, setup: bytes, num_proc: int) -> None:
        num_threads = max((os.cpu_count() or 1) // num_proc, 1)
        environ = {
            "TOKENIZERS_PARALLELISM": "true" if num_threads > 1 else "false",
            "RAYON_NUM_THREADS": str(num_threads),
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # this process has given them
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "JAX_PLATFORMS": "cpu",  # should anything import it, no device is taken
        }
        # In a session of its own: a Ctrl-C in the terminal is this process's to handle.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jax_sft.data.token_workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
            start_new_session=True,
        )
        self._setup: bytes | None = setup

    def ask(self, data: bytes) -> Part:
        """Sends a pickled block and waits for its Part, or raises what was raised over it."""
        try:
            for message in (self._setup, data):
                if message is not None:
                    self._process.stdin.write(message)
            self._setup = None
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"a process that tokenized ended by itself (exit code {self._process.wait()}); if "
                "memory was short, set data.num_proc to a smaller number"
            ) from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def kill(self) -> None:
        """Ends it at once; who waits for an answer gets an error."""
        self._process.kill()

    def close(self) -> None:
        """Waits for its end."""
        self._process.wait()
        self._process.stdout.close()
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # what was not yet sent


def main() -> None:
    """Answers blocks from standard input until it ends."""
    source = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints is no answer
    try:
        _answer(source, answers)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        os._exit(0)  # the other process is gone


def _answer(source: IO[bytes], answers: IO[bytes]) -> None:
    task: tuple | Exception = _loaded(pickle.load(source), "the tokenizer")
    while True:
        block = _loaded(pickle.load(source), "the rows")
        try:
            for message in (task, block):
                if isinstance(message, Exception):
                    raise message
            answer: Any = tokenize_rows(*block, *task)
        except Exception as error:  # whatever it is, the other process raises it
            answer = error
        sys.stdout.flush()  # a process that is not needed any more is killed
        answers.write(_as_answer(answer))
        answers.flush()


def _loaded(data: bytes, what: str) -> tuple | Exception:
    try:
        return pickle.loads(data)
    except Exception as error:  # what a class makes of being made anew
        return ValueError(
            f"{what} cannot be read in another process ({error}); set data.num_proc to 1"
        )


def _as_answer(answer: Any) -> bytes:
    if not isinstance(answer, Exception):
        return _dumps(answer)
    try:
        data = _dumps(answer)
        pickle.loads(data)
    except Exception:  # exceptions that are not made again by their arguments
        return _dumps(RuntimeError(f"{type(answer).__name__}: {answer}"))
    return data


if __name__ == "__main__":
    main()
