"""SIGTERM, which clusters send before they take a machine back, as something to ask for.

In: the signal. Out: an event that the run looks at between steps, so that it ends in a
checkpoint, and the exit code that tells a supervisor to start it again.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done, and no fault of the run


@contextlib.contextmanager
def sigterm_asks_to_stop() -> Iterator[threading.Event]:
    """Turns SIGTERM into an event, for as long as the context is open."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals reach the main thread alone
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
