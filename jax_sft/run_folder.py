"""One run's folder: the names of what is in it, and what an earlier run left there.

In: `config.train.checkpoint_dir` and what to resume from. Out: paths, and the decision to start
anew or to go on. A run that starts anew never writes over an earlier one, which is renamed.
"""

import contextlib
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_sft.distributed import is_first, world
from jax_sft.manifest import complete_steps
from jax_sft.together import check_same, from_first

CONFIG = "config.json"
TOKENIZER = "tokenizer"
DATA_REPORT = "data_report.json"
DATA_PAGE = "data_report.html"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
FINAL = "hf_model"
BEST = "best"

_SHARED_SECONDS = 30  # for a network's file system to show what another host wrote


def find_resume_folder(run_dir: Path, asked: str | None) -> str | None:
    """Returns the run's folder to resume from; None starts anew.

    Args:
        run_dir: the folder that this run writes.
        asked: None, "auto" (go on with run_dir where it holds a complete checkpoint) or a run's
            folder.

    Raises:
        ValueError: the folder that was asked for does not exist.
    """
    if asked is None:
        return None
    if asked == "auto":
        return str(run_dir) if complete_steps(run_dir / CHECKPOINTS) else None
    if not Path(asked).is_dir():
        raise ValueError(
            f"train.resume_from_checkpoint={asked!r} is no folder: pass a run's folder, or 'auto' "
            "to go on with train.checkpoint_dir"
        )
    return asked


def check_writable(folder: Path, *, key: str = "train.checkpoint_dir") -> None:
    """Raises ValueError unless files can be made in a folder, which is made if missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{key}={str(folder)!r} cannot be written ({error.strerror}): set it "
            "to a folder that can"
        ) from None


def check_shared(run_dir: Path) -> None:
    """Checks that this path is one folder for all processes of the run.

    Raises:
        ValueError: it is not.
    """
    if world() is None:
        return
    token = from_first(lambda: tempfile.mkstemp(prefix=".shared.", dir=run_dir)[1])
    path = run_dir / Path(token).name
    last = time.monotonic() + _SHARED_SECONDS
    while not path.exists() and time.monotonic() < last:
        time.sleep(0.1)
    seen = "the same" if path.exists() else "another folder"
    try:
        check_same(
            {f"train.checkpoint_dir={str(run_dir)!r}": seen},
            remedy="set it to a folder that all hosts share",
        )
    finally:
        if is_first():
            path.unlink()


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keeps a run's folder for this process, of those on this machine.

    The lock is a file among the machine's temporary ones: a renamed folder would take it along,
    and a mounted bucket may have none. It goes with the process, however that ends. Without a
    place for temporary files there is none.

    Raises:
        ValueError: another process holds the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows has none
        yield
        return
    name = hashlib.blake2b(os.fsencode(run_dir), digest_size=8).hexdigest()
    path = Path(tempfile.gettempdir()) / f"jax_sft.{os.getuid()}.{name}.lock"
    with contextlib.ExitStack() as opened:
        while True:
            try:
                file = opened.enter_context(path.open("a+"))
            except OSError:
                break
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read() or "another run"
                raise ValueError(
                    f"train.checkpoint_dir={str(run_dir)!r} is in use by {holder}: wait for it, "
                    "end it, or set another folder"
                ) from None
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                opened.callback(path.unlink, missing_ok=True)
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                break  # else who held it has just removed it
        yield


def set_aside(run_dir: Path) -> Path | None:
    """Renames a folder that holds a run to the first free of name.1, name.2, ...

    Args:
        run_dir: a resolved path: after the rename, "." would mean the renamed folder.

    Returns:
        The new name, or None where there was no run.
    """
    if not (run_dir / CONFIG).is_file():
        return None
    number = 1
    while (other := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    try:
        return run_dir.rename(other)
    except OSError as error:
        raise ValueError(
            f"{run_dir} holds an earlier run, and cannot be renamed to {other} "
            f"({error.strerror}): set train.checkpoint_dir to another folder"
        ) from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, replacing it at once."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)


def read_config(run_dir: Path) -> dict[str, Any]:
    """Returns what a run's config.json holds.

    Raises:
        ValueError: there is none, or it is not JSON.
    """
    path = run_dir / CONFIG
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}): pass a run's folder, which holds "
            f"{CONFIG} and {CHECKPOINTS}/"
        ) from None
