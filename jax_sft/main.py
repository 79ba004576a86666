"""python -m jax_sft.main --config=FILE [--config.section.key=value ...]: trains.

In: flags. Out: a run's folder (see README). A user's mistake ends in one line and exit code 2,
a run stopped by SIGTERM in a checkpoint and exit code 75 (see `interrupt.STOPPED`).
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from jax_sft.config import config_from_flags, help_text


def main(argv: Sequence[str]) -> None:
    """Trains as the flags say.

    Raises:
        ValueError: the flags, the config or the data are not as they must be.
    """
    if not argv or {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{help_text()}")
        return
    config = config_from_flags(argv)
    config.validate()
    from jax_sft.train import train  # after the flags are known to be right: it takes seconds

    train(config=config)


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


if __name__ == "__main__":
    run_command(main)
