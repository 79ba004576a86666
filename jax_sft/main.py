"""python -m jax_sft.main --config=FILE [--config.section.key=value ...]: trains.

In: flags. Out: a run's folder (see README). A user's mistake ends in one line and exit code 2,
a run stopped by SIGTERM in a checkpoint and exit code 75 (see `interrupt.STOPPED`).
"""

import os
import sys
from collections.abc import Sequence

from jax_sft.command import run_command
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
    if not sys.stderr.isatty():  # `datasets` draws its bars into logs, too
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from jax_sft.train import train  # after the flags are known to be right: it takes seconds

    train(config=config)


if __name__ == "__main__":
    run_command(main)
