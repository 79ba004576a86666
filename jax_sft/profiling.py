"""A trace of some steps, for TensorBoard's profile tab.

In: which steps, and the state as each begins. Out: a trace in TensorBoard's folder.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax


@contextlib.contextmanager
def profiled(steps: tuple[int, int] | None, folder: Path) -> Iterator[Callable[[int, Any], None]]:
    """Traces a range of steps.

    Args:
        steps: (first, end), as the log counts steps; `end` is not traced. None for none.
        folder: where the trace goes.

    Yields:
        A function to call before each step with its number and the state that it starts from.
    """
    first, end = steps or (0, 0)
    is_tracing = False

    def begin(step: int, state: Any) -> None:
        nonlocal is_tracing
        if is_tracing and step >= end:
            jax.block_until_ready(state)  # steps run behind the host: the last must be traced
            jax.profiler.stop_trace()
            is_tracing = False
        elif not is_tracing and first <= step < end:
            jax.profiler.start_trace(folder)
            is_tracing = True

    try:
        yield begin
    finally:
        if is_tracing:
            jax.profiler.stop_trace()
