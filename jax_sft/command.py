"""How a command ends: well, in one line for a user's mistake, or in a traceback for ours.

In: a command's main. Out: the exit code, and what stands on standard error.
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path


def run_command(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command's main on the command line.

    What this package says of the user's input is one line and exit code 2, and of a step that
    was not finite one line and exit code 1. Any other exception, also a ValueError that a
    library or the user's metric_fn raised, keeps its traceback: only that says where it arose.
    """
    try:
        main(sys.argv[1:])
    except (ValueError, FloatingPointError) as error:
        if not _is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # as shells have it: 128 + SIGINT


def _is_ours(error: Exception) -> bool:
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(Path(__file__).parent)
