"""How a command ends: well, in one line for a user's mistake, or in a traceback for ours.

In: a command's main. Out: the exit code, and what stands on standard error. Where the run has
several processes, they end together: all of them well, or all with the code of the first to fail.
"""

import argparse
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from jax_sft import failure
from jax_sft.distributed import UNREACHABLE, Unreachable, initialize, world
from jax_sft.interrupt import STOPPED
from jax_sft.together import OtherProcessFailed


class Parser(argparse.ArgumentParser):
    """A command's own flags; a mistake in them is a user's like any other, in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError, for `run_command`."""
        raise ValueError(message)


def join_processes() -> None:
    """Joins the other processes of the run, and has them end together from here on.

    Raises:
        ValueError, Unreachable: as `distributed.initialize`.
    """
    initialize()
    failure.watch()


def run_command(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command's main on the command line.

    What this package says of the user's input is one line and exit code 2, and of a step that
    was not finite one line and exit code 1; processes that do not find one another end in one
    line and `interrupt.STOPPED`; a reader of the output that has left, as `head` does, in one line
    and what shells have for SIGPIPE. Any other exception, also a ValueError that a library or the
    user's metric_fn raised, keeps its traceback: only that says where it arose.
    """
    try:
        code = _run(main)
        failure.leave()
    except BaseException as error:
        code, line = _verdict(error)
        if isinstance(error, Unreachable):  # what is half joined would wait once more at its end
            print(line, file=sys.stderr, flush=True)
            os._exit(code)
        if world() is not None:
            text = traceback.format_exc().rstrip() if line is None else line
            failure.end(code, text, is_echo=_is_echo(error))
        if line is None:
            raise
        print(line, file=sys.stderr)
    if code:
        sys.exit(code)


def _run(main: Callable[[Sequence[str]], None]) -> int:
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except SystemExit as exit:
        if exit.code != STOPPED:
            raise
        return STOPPED
    return 0


def _verdict(error: BaseException) -> tuple[int, str | None]:
    """Returns the exit code, and the line to print; None for a traceback."""
    if isinstance(error, Unreachable):
        return UNREACHABLE, f"error: {error}"
    if isinstance(error, OtherProcessFailed):
        return 1, str(error)
    if isinstance(error, ValueError | FloatingPointError) and _is_ours(error):
        return 2 if isinstance(error, ValueError) else 1, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"  # as shells have it: 128 + SIGINT
    if isinstance(error, BrokenPipeError) and _is_output_closed():
        return 141, "standard output was closed"  # 128 + SIGPIPE
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code, None
    return 1, None


def _is_output_closed() -> bool:
    """Whether nobody reads what is printed; then what is left of it goes nowhere, in silence."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are told without being asked for
    is_closed = bool(poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_closed


def _is_ours(error: Exception) -> bool:
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(Path(__file__).parent)


def _is_echo(error: BaseException | None) -> bool:
    """Whether it is, or came of, what an exchange with a process that has failed raises."""
    import jax

    while error is not None:
        if isinstance(error, OtherProcessFailed | jax.errors.JaxRuntimeError):
            return True
        error = error.__cause__ or error.__context__
    return False
