"""What a run says while it goes: console, metrics.jsonl, samples, TensorBoard or W&B.

What comes in: scalars and tables of samples, by step. What goes out: a JSON object a log line,
a JSON object a sample, a progress line, and the events of the tracker that was asked for. JSON
has no NaN: such a value is null there, and `non_finite` beside it says which it was. On resume
everything after the checkpoint's step is cut, so no step appears twice.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_sft.console import TABLE_ROWS, one_line, print_table, progress_line


class Tracker:
    """Writes one run's metrics and samples.

    Attributes:
        history: one dict a log line, as metrics.jsonl holds them, from step 0 on.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        *,
        kind: str | None = "tensorboard",
        logging_dir: str | None = None,
        project_name: str = "jax_sft",
        run_name: str | None = None,
        entity_name: str | None = None,
        group_name: str | None = None,
        tags: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
        is_writer: bool = True,
    ) -> None:
        """Opens the files of a new run, or those of a run that goes on.

        Args:
            run_dir: the run's folder. A new run sets an earlier run's files aside, numbered.
            kind: "tensorboard", "wandb" or None, beside the JSON files.
            logging_dir: TensorBoard's folder; None: run_dir/tensorboard.
            project_name: W&B's project, as are the next four.
            run_name: the run's name; None: W&B chooses.
            entity_name: the team; None: the user's own.
            group_name: the group of runs.
            tags: words to find the run by.
            config: shown beside the run in W&B.
            resume_step: the step that the run goes on from; None: a new run.
            is_writer: False on all processes but the first: they keep `history` alone.

        Raises:
            ValueError: an unknown kind, W&B not installed, or a metrics.jsonl that is not ours.
        """
        if kind not in ("tensorboard", "wandb", None):
            raise ValueError(f"tracker is {kind!r}; expected tensorboard, wandb or None")
        self.history: list[dict[str, Any]] = []
        self._is_writer = is_writer
        self._samples_dir = Path(run_dir) / "samples"
        self._sampled_steps: set[int] = set()
        self._events: _TensorBoard | _WandB | None = None
        self._metrics_path = Path(run_dir) / "metrics.jsonl"
        events_dir = Path(logging_dir) if logging_dir else Path(run_dir) / "tensorboard"
        if resume_step is not None:
            self.history = _read_history(self._metrics_path, resume_step)
        if not is_writer:
            return
        self._samples_dir.parent.mkdir(parents=True, exist_ok=True)
        wandb = _import_wandb() if kind == "wandb" else None
        if resume_step is None:
            for path in (self._metrics_path, self._samples_dir, events_dir):
                _set_aside(path)
        else:
            _rewrite(self._metrics_path, self.history)
            _remove_samples(self._samples_dir, after=resume_step)
        if kind == "tensorboard":
            self._events = _TensorBoard(events_dir, resume_step)
        elif wandb is not None:
            self._events = _WandB(
                wandb,
                Path(run_dir),
                resume_step,
                project=project_name,
                name=run_name,
                entity=entity_name,
                group=group_name,
                tags=list(tags),
                config=dict(config or {}),
            )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes a line of metrics.jsonl, at once, and the tracker's events.

        Args:
            step: the optimizer steps made so far.
            metrics: name to scalar; numpy's and jax's are taken too.
        """
        values = {name: _plain(value) for name, value in metrics.items()}
        line = {"step": int(step), **_finite(values)}
        self.history.append(line)
        if self._is_writer:
            with open(self._metrics_path, "a", **_UTF8) as file:
                file.write(_json(line))
        if self._events is not None:
            self._events.log(step, values)

    def progress(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """Prints the line that says how the run goes; what is not in the metrics is left out.

        Args:
            step: the optimizer steps made so far.
            total: the steps of the run.
            metrics: as `log` takes them; `seconds_left` overrides step_seconds x steps left.
        """
        if self._is_writer:
            values = {name: _plain(value) for name, value in metrics.items()}
            print(progress_line(step, total, values), flush=True)

    def table(
        self, step: int, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """Prints the first rows and writes them all to samples/<step>.jsonl.

        Args:
            step: the optimizer steps made so far; several tables of a step share its file.
            title: what stands above the table.
            columns: the columns' names.
            rows: a value a column; text is shortened on the console alone.
        """
        if not self._is_writer:
            return
        rows = [[_plain(cell) for cell in row] for row in rows]
        self._samples_dir.mkdir(parents=True, exist_ok=True)
        mode = "a" if step in self._sampled_steps else "w"
        self._sampled_steps.add(step)
        with open(self._samples_dir / f"{step:06d}.jsonl", mode, **_UTF8) as file:
            for row in rows:
                file.write(_json(_finite(dict(zip(columns, row, strict=True)))))
        print_table(title, columns, rows)
        if self._events is not None:
            self._events.table(step, title, columns, rows)

    def close(self) -> None:
        """Writes what is still buffered; further calls do nothing."""
        if self._events is not None:
            self._events.close()
        self._events = None


# A model may write half of a surrogate pair; as \udc80 it is still valid JSON.
_UTF8 = {"encoding": "utf-8", "errors": "backslashreplace"}


def _plain(value: Any) -> Any:
    """Numpy's and jax's scalars and arrays as Python's numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with null for NaN and infinities, which are named under `non_finite`."""
    odd = {name: str(value) for name, value in values.items() if _is_non_finite(value)}
    kept = {name: _null_within(value) for name, value in values.items()}
    return kept | ({"non_finite": odd} if odd else {})


def _null_within(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _null_within(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_null_within(item) for item in value]
    return None if _is_non_finite(value) else value


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def _read_history(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The lines up to a step; a last line that a killed process left torn is dropped."""
    if not path.exists():
        return []
    # By "\n" alone: splitlines() would also split at U+2028 within a string.
    lines = path.read_text(**_UTF8).removesuffix("\n").split("\n")
    history = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if entry["step"] <= last_step:
                history.append(entry)
        except (json.JSONDecodeError, KeyError, TypeError):
            if number < len(lines):
                raise ValueError(
                    f"{path} line {number} is {line[:40]!r}; expected a JSON object with a step; "
                    "move the file away to resume without it"
                ) from None
    return history


def _rewrite(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the file at once, so that a kill leaves the old one or the new one."""
    draft = path.with_suffix(".jsonl.tmp")
    draft.write_text("".join(map(_json, history)), **_UTF8)
    os.replace(draft, path)


def _remove_samples(folder: Path, *, after: int) -> None:
    for file in folder.glob("*.jsonl"):
        if file.stem.isdigit() and int(file.stem) > after:
            file.unlink()


def _set_aside(path: Path) -> None:
    """Renames what an earlier run left to the first free of name.1, name.2, ..."""
    is_empty = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if is_empty:
        return
    number = 1
    while (other := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    shutil.move(path, other)


class _TensorBoard:
    """Event files, without TensorFlow."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from tensorboardX import SummaryWriter  # only here: its import takes a while

        purge_step = None if resume_step is None else resume_step + 1
        # The suffix keeps a run apart from the one it goes on from: names count whole seconds.
        self._writer = SummaryWriter(
            str(folder),
            purge_step=purge_step,
            flush_secs=10,
            filename_suffix="" if resume_step is None else f".from{resume_step}",
        )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, float(value), step)

    def table(self, step: int, title: str, columns: Sequence[str], rows: Sequence) -> None:
        lines = [columns, ["---"] * len(columns), *rows[:TABLE_ROWS]]
        marked = "\n".join(
            " | ".join(one_line(x).replace("|", "\\|") for x in line) for line in lines
        )
        self._writer.add_text(title, marked, step)

    def close(self) -> None:
        self._writer.close()


def check_tracker(kind: str | None) -> None:
    """Raises ValueError where a tracker's package is not installed."""
    if kind == "wandb":
        _import_wandb()


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError(
            "train.tracker is 'wandb' but wandb is not installed; "
            'pip install "jax_sft[wandb]", or take tensorboard'
        ) from None
    return wandb


class _WandB:
    """A W&B run, whose id is kept in the run's folder so that it goes on after a resume."""

    def __init__(self, wandb: Any, run_dir: Path, resume_step: int | None, **identity: Any) -> None:
        self._wandb = wandb
        id_file = run_dir / "wandb_run_id"
        goes_on = resume_step is not None and id_file.exists()
        old = {"id": id_file.read_text().strip(), "resume": "allow"} if goes_on else {}
        self._run = wandb.init(dir=str(run_dir), **identity, **old)
        id_file.write_text(self._run.id)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=step)

    def table(self, step: int, title: str, columns: Sequence[str], rows: Sequence) -> None:
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({title: table}, step=step)

    def close(self) -> None:
        self._run.finish()
