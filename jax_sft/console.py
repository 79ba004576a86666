"""What a run prints while it goes: the progress line and the table of samples.

What comes in: a step's metrics, or rows of samples. What goes out: one line, or a rich table, on
standard output. On a pipe there are no control characters and lines keep to a width, so that
logs stay readable.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

TABLE_ROWS = 3
_CELL_LEN = 240
_PIPE_WIDTH = 160


def progress_line(step: int, total: int, metrics: Mapping[str, Any]) -> str:
    """One line on how the run goes.

    step 120/1200  loss 1.2340  lr 4.0e-03  grad 0.52  12,345 trained tok/s (23,456 total)  ...

    Args:
        step: the optimizer steps made so far.
        total: the steps of the run.
        metrics: name to number; what is not there is left out.

    Returns:
        The line, without a newline.
    """
    parts = [f"step {step:>{len(str(total))}}/{total}"]
    formats = {
        "loss": "loss {:.4f}",
        "learning_rate": "lr {:.1e}",
        "grad_norm": "grad {:.3g}",
        "trained_tokens_per_second": "{:,.0f} trained tok/s",
        "tokens_per_second": "({:,.0f} total)",
        "mfu": "mfu {:.1%}",
        "step_seconds": "{:.3g} s/step",
    }
    if "trained_tokens_per_second" not in metrics:
        formats["tokens_per_second"] = "{:,.0f} tok/s"
    for name, text in formats.items():
        if name in metrics and metrics[name] is not None:
            joint = " " if text.startswith("(") else "  "
            parts.append(joint + text.format(metrics[name]))
    for name, value in metrics.items():
        if name.startswith(("eval/", "metrics/")) and isinstance(value, int | float):
            parts.append(f"  {name} {value:.4g}")
    seconds = metrics["seconds_left"] if "seconds_left" in metrics else None
    if seconds is None and "step_seconds" in metrics:
        seconds = (total - step) * metrics["step_seconds"]
    if seconds is not None and math.isfinite(seconds):
        parts.append(f"  {_duration(seconds)} left")
    return "".join(parts)


def _duration(seconds: float) -> str:
    """Two units at most: 8s, 1m20s, 2h05m, 3d04h."""
    whole = max(0, round(seconds))
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{smaller}"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def one_line(value: Any) -> str:
    """A value as text on one line: control characters escaped, the middle of long text cut."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    if len(text) > _CELL_LEN:
        text = f"{text[: _CELL_LEN // 2]} ... {text[-_CELL_LEN // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints the first rows as a rich table; to a pipe as plain text of a fixed width.

    Args:
        title: what stands above it.
        columns: the columns' names.
        rows: a value a column; long text is shortened.
    """
    console = Console(file=sys.stdout)
    encoding = console.encoding or "utf-8"
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=_PIPE_WIDTH, color_system=None)

    def text(value: Any) -> Text:  # Text, since a model may write [bold] and mean it
        return Text(one_line(value).encode(encoding, "backslashreplace").decode(encoding))

    table = Table(title=text(title), show_lines=True, title_justify="left")
    for column in columns:
        table.add_column(text(column), overflow="fold")
    for row in rows[:TABLE_ROWS]:
        table.add_row(*(text(value) for value in row))
    console.print(table)
    sys.stdout.flush()
