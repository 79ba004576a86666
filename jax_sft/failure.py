"""One process's failure ends them all: soon, each with its reason as its log's last line.

In: the text and the exit code of what went wrong here, or elsewhere. Out: this process's end.
Without it the others would wait in a collective for the heartbeat time-out, and be aborted.
Process 0 goes last, since the store through which they tell one another is its. A process
that was killed tells nothing: the others fail at their next exchange, or at the time-out.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from jax_sft.distributed import World, world
from jax_sft.together import wait_for_all

_KEY = "jax_sft/failure"
_POLL_SECONDS = 1.0
FINISH_SECONDS = 60  # for what is being written when another process fails
_LEAVE_SECONDS = 5  # for the others to read why
_ECHO_SECONDS = 3  # for the process that failed to say so

_duties: list[Callable[[], None]] = []
_is_ending = threading.Lock()
_is_done = threading.Event()


def watch() -> None:
    """Ends this process once another one has failed; does nothing where it is alone."""
    here = world()
    if here is not None:
        threading.Thread(target=_watch, args=(here,), name="failure", daemon=True).start()


@contextlib.contextmanager
def finishing(duty: Callable[[], None]) -> Iterator[None]:
    """Has a process that another one's failure ends call `duty` first, in a thread of its own."""
    _duties.append(duty)
    try:
        yield
    finally:
        _duties.remove(duty)


def leave() -> None:
    """Parts from the others after all went well, once all of them are as far.

    `jax.distributed.shutdown` alone would give up on whoever writes for more than 5 minutes.
    """
    if world() is None:
        return
    wait_for_all()
    _is_done.set()
    import jax

    jax.distributed.shutdown()


def end(code: int, text: str, *, is_echo: bool = False) -> NoReturn:
    """Tells the others why this process fails, prints it last of all, and exits.

    Args:
        code: exit code, for this process and for those that it ends.
        text: one line, or a traceback.
        is_echo: whether it may be another's failure that was met here, as an exchange that broke
            off. Then that one's reason is given, if it gives one soon.
    """
    here = world()
    assert here is not None, "there is nobody to tell"
    if is_echo:
        _is_done.wait(_ECHO_SECONDS)  # the watch ends this process as soon as there is a reason
    _is_ending.acquire()  # never given back: the first reason is the one
    failure = {"process": here.process_id, "code": code, "text": in_one_line(text)}
    with contextlib.suppress(RuntimeError):  # another was first, or process 0 is gone
        here.client.key_value_set(_KEY, json.dumps(failure))
    _exit(here, code, text)


def in_one_line(text: str) -> str:
    """What a traceback says behind its last frame: the error, on one line; a line as it is."""
    lines = text.strip().splitlines()
    frames = [i for i, line in enumerate(lines) if line.startswith('  File "')]
    behind = itertools.dropwhile(
        lambda line: line.startswith("    "), lines[frames[-1] + 1 :] if frames else lines[-1:]
    )
    return " ".join(" ".join(behind).split())


def _watch(here: World) -> None:
    while not _is_done.wait(_POLL_SECONDS):
        failure = _read(here)
        if failure is not None and failure["process"] != here.process_id:
            _is_ending.acquire()
            with contextlib.suppress(RuntimeError):
                here.client.key_value_set(f"{_KEY}/read/{here.process_id}", "")
            _finish()
            _exit(here, failure["code"], _reason(failure))


def _read(here: World) -> dict | None:
    try:
        return json.loads(here.client.key_value_try_get(_KEY))
    except RuntimeError:  # nobody has set it, or process 0 is gone
        return None


def _reason(failure: dict) -> str:
    return f"process {failure['process']} failed, and ends all: {failure['text']}"


def _finish() -> None:
    """Calls what is to be done before the end, at once, within the time."""
    threads = [threading.Thread(target=duty, daemon=True) for duty in _duties]
    last = time.monotonic() + FINISH_SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, last - time.monotonic()))


def _exit(here: World, code: int, text: str) -> NoReturn:
    """Exits without Python's and JAX's own endings, which would wait for the others."""
    sys.stdout.flush()
    with contextlib.suppress(RuntimeError):
        here.client.key_value_set(f"{_KEY}/left/{here.process_id}", "")
        if here.process_id == 0:
            _wait_for_others(here)
    print(text, file=sys.stderr, flush=True)
    os._exit(code)


def _wait_for_others(here: World) -> None:
    """Waits for the others to leave: long for those that are known to be at it."""
    start = time.monotonic()
    while (waited := time.monotonic() - start) < _LEAVE_SECONDS + FINISH_SECONDS:
        left, have_read = (_who(here, did) for did in ("left", "read"))
        if len(left) == here.num_processes or waited > _LEAVE_SECONDS and have_read <= left:
            return
        time.sleep(0.1)


def _who(here: World, did: str) -> set[str]:
    """The numbers of the processes that have said that they did something."""
    return {key.rpartition("/")[2] for key, _ in here.client.key_value_dir_get(f"{_KEY}/{did}/")}
