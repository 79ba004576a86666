"""What a run measures of itself: each step's metrics one step late, speed, tokens, time left.

In: each step's `StepMetrics`, still on the devices. Out: log lines, and a FloatingPointError
that names the batch of a step that did not go well. Looking one step late keeps the devices
busy; whoever saves or evaluates calls `flush` first, so that nothing bad is saved over good.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from jax_sft.tracking import Tracker
from jax_sft.train_step import StepMetrics


class Progress:
    """Logs a run's steps.

    Attributes:
        num_steps: steps of the whole run.
        num_tokens: tokens so far, padding not counted.
        num_trained: trained tokens so far.
    """

    def __init__(
        self,
        tracker: Tracker,
        *,
        num_steps: int,
        log_interval: int,
        describe: Callable[[int], str],
        flops_a_step: float,
        peak_flops: float | None,
        num_tokens: int = 0,
        num_trained: int = 0,
    ) -> None:
        """Starts the clock.

        Args:
            tracker: where lines go.
            num_steps: steps of the whole run.
            log_interval: steps between lines; the first and last step have one too.
            describe: names a step's batch, for the error.
            flops_a_step: of all devices together.
            peak_flops: FLOP/s of all devices together; None where unknown, then no mfu.
            num_tokens: tokens before this start, when a run goes on.
            num_trained: trained tokens before this start.
        """
        self.num_tokens, self.num_trained = num_tokens, num_trained
        self.num_steps = num_steps
        self._tracker, self._log_interval = tracker, log_interval
        self._describe = describe
        self._flops_a_step, self._peak_flops = flops_a_step, peak_flops
        self._pending: tuple[int, StepMetrics] | None = None
        self._is_first = True
        self._start_interval()

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Takes the metrics of a step just sent to the devices, and logs the one before it.

        Args:
            step: updates made when this step is done, from 1.
            metrics: on the devices.

        Raises:
            FloatingPointError: the step before did not update the state.
        """
        previous, self._pending = self._pending, (step, metrics)
        if previous is not None:
            self._take(*previous)

    def add_wait(self, seconds: float) -> None:
        """Takes the time for which a step waited for its batch."""
        self._interval_waited += seconds

    def flush(self) -> None:
        """Waits for the newest step and logs it; raises as `add` does."""
        previous, self._pending = self._pending, None
        if previous is not None:
            self._take(*previous)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes what happens inside, such as an evaluation, out of the step times."""
        start = time.perf_counter()
        yield
        self._started += time.perf_counter() - start

    def _take(self, step: int, metrics: StepMetrics) -> None:
        metrics = jax.device_get(metrics)
        if not metrics.ok:
            raise FloatingPointError(
                f"step {step} was not taken: loss {metrics.loss}, gradient norm "
                f"{metrics.grad_norm}, {metrics.num_trained} trained tokens; "
                f"{self._describe(step - 1)}; look at these samples, lower optimizer.kwargs.lr "
                "or set optimizer.max_grad_norm"
            )
        self.num_tokens += int(metrics.num_tokens)
        self.num_trained += int(metrics.num_trained)
        self._interval_steps += 1
        self._interval_tokens += int(metrics.num_tokens)
        self._interval_trained += int(metrics.num_trained)
        if step % self._log_interval == 0 or step in (1, self.num_steps):
            self._log(step, metrics)
            self._start_interval()

    def _log(self, step: int, metrics: StepMetrics) -> None:
        seconds = max(time.perf_counter() - self._started, 1e-9)
        line = {
            "loss": metrics.loss,
            "learning_rate": metrics.learning_rate,
            "grad_norm": metrics.grad_norm,
            "tokens": self.num_tokens,
            "trained_tokens": self.num_trained,
            "tokens_per_second": self._interval_tokens / seconds,
            "trained_tokens_per_second": self._interval_trained / seconds,
            "step_seconds": seconds / self._interval_steps,
        }
        line["data_wait_share"] = self._interval_waited / seconds
        if self._peak_flops is not None:
            flops = self._flops_a_step * self._interval_steps
            line["mfu"] = flops / seconds / self._peak_flops
        self._tracker.log(step, line)
        # The first step warms up: what it takes says little about the time left.
        shown = line | {"seconds_left": math.inf} if self._is_first else line
        self._is_first = False
        self._tracker.progress(step, self.num_steps, shown)

    def _start_interval(self) -> None:
        self._started = time.perf_counter()
        self._interval_steps = self._interval_tokens = self._interval_trained = 0
        self._interval_waited = 0.0
