"""Progress: one step late, nothing lost, and the batch of a bad step named."""

import numpy as np
import pytest

from jax_sft import progress as progress_module
from jax_sft.progress import Progress
from jax_sft.tracking import Tracker
from jax_sft.train_step import StepMetrics


def metrics(loss=1.0, *, num_tokens=10, num_trained=4, ok=True):
    return StepMetrics(
        loss=np.float32(loss),
        grad_norm=np.float32(0.5),
        learning_rate=np.float32(0.1),
        num_tokens=np.int32(num_tokens),
        num_trained=np.int32(num_trained),
        ok=np.bool_(ok),
    )


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def make(tmp_path, **kwargs):
    given = dict(num_steps=8, log_interval=2, flops_a_step=50.0, peak_flops=None)
    tracker = Tracker(tmp_path, kind=None)
    return Progress(tracker, describe="batch {}".format, **(given | kwargs)), tracker


def test_a_step_is_logged_when_the_next_one_is_sent(tmp_path, clock):
    progress, tracker = make(tmp_path, log_interval=1)
    progress.add(1, metrics(3.0))
    assert tracker.history == []
    progress.add(2, metrics(2.0))
    assert [line["loss"] for line in tracker.history] == [3.0]
    progress.flush()
    progress.flush()
    assert [line["loss"] for line in tracker.history] == [3.0, 2.0]


def test_speed_is_of_the_interval_and_tokens_of_the_run(tmp_path, clock):
    progress, tracker = make(tmp_path, num_tokens=1000, num_trained=100, peak_flops=100.0)
    for step in range(1, 6):
        clock.now += 2.0
        progress.add(step, metrics())
    progress.flush()
    assert [line["step"] for line in tracker.history] == [1, 2, 4]
    last = tracker.history[-1]
    assert last["tokens"] == 1040 and last["trained_tokens"] == 116
    # Steps 3 and 4 in four seconds: 20 tokens, 8 of them trained, 100 of 400 possible FLOPs.
    assert last["tokens_per_second"] == 5.0 and last["trained_tokens_per_second"] == 2.0
    assert last["step_seconds"] == 2.0 and last["mfu"] == 0.25


def test_pauses_do_not_count(tmp_path, clock):
    progress, tracker = make(tmp_path, log_interval=1)
    with progress.paused():
        clock.now += 100.0
    clock.now += 1.0
    progress.add(1, metrics())
    progress.flush()
    assert tracker.history[0]["step_seconds"] == 1.0


def test_time_left_is_not_told_from_the_first_step(tmp_path, clock, capsys):
    progress, _ = make(tmp_path, log_interval=1)
    for step in (1, 2):
        clock.now += 3.0
        progress.add(step, metrics())
        progress.flush()
    first, second = capsys.readouterr().out.splitlines()
    assert "left" not in first and second.endswith("18s left")


@pytest.mark.parametrize("look", [lambda p: p.add(4, metrics()), lambda p: p.flush()])
def test_a_bad_step_raises_and_names_its_batch(tmp_path, look):
    progress, tracker = make(tmp_path)
    progress.add(3, metrics(float("nan"), ok=False))
    with pytest.raises(FloatingPointError) as error:
        look(progress)
    message = str(error.value)
    assert "step 3 was not taken: loss nan" in message and "\n" not in message
    assert "batch 2" in message, "batches count from 0"
    assert tracker.history == [] and progress.num_tokens == 0
