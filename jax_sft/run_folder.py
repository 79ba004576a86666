"""One run's folder: the names of what is in it, and what an earlier run left there.

In: `config.train.checkpoint_dir` and what to resume from. Out: paths, and the decision to start
anew or to go on. A run that starts anew never writes over an earlier one, which is renamed.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

CONFIG = "config.json"
TOKENIZER = "tokenizer"
DATA_REPORT = "data_report.json"
DATA_PAGE = "data_report.html"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
FINAL = "hf_model"
BEST = "best"


def find_resume_folder(run_dir: Path, asked: str | None) -> Path | None:
    """Returns the run's folder to resume from; None starts anew.

    Args:
        run_dir: the folder that this run writes.
        asked: None, "auto" (go on with run_dir where it holds a run) or a run's folder.

    Raises:
        ValueError: the folder that was asked for does not exist.
    """
    if asked is None:
        return None
    if asked == "auto":
        return run_dir if (run_dir / CHECKPOINTS).is_dir() else None
    if not Path(asked).is_dir():
        raise ValueError(
            f"train.resume_from_checkpoint={asked!r} is no folder: pass a run's folder, or 'auto' "
            "to go on with train.checkpoint_dir"
        )
    return Path(asked)


def check_writable(run_dir: Path) -> None:
    """Raises ValueError unless files can be made in run_dir, which is made if missing."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise ValueError(
            f"train.checkpoint_dir={str(run_dir)!r} cannot be written ({error.strerror}): set it "
            "to a folder that can"
        ) from None


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
