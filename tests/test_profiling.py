"""Which steps are traced."""

import jax
import pytest

from jax_sft.profiling import profiled


@pytest.mark.parametrize(
    ("steps", "made", "traced"),
    [
        ((2, 4), range(1, 6), [2, 3]),
        ((0, 2), range(1, 4), [1]),
        ((2, 9), range(1, 4), [2, 3]),  # the run ends first
        ((2, 5), range(4, 8), [4]),  # the run goes on from the middle
        ((2, 3), range(4, 8), []),
        (None, range(1, 4), []),
    ],
)
def test_steps_are_traced_from_first_to_before_end(steps, made, traced, tmp_path, monkeypatch):
    is_on, seen = False, []

    def turn(on):
        nonlocal is_on
        assert is_on != on
        is_on = on

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: turn(True))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: turn(False))
    with profiled(steps, tmp_path) as begin:
        for step in made:
            begin(step, ())
            seen += [step] if is_on else []
    assert seen == traced and not is_on


def test_a_trace_is_written(tmp_path):
    with profiled((1, 2), tmp_path) as begin:
        begin(1, ())
        jax.block_until_ready(jax.numpy.arange(3) + 1)
        begin(2, ())
    assert list(tmp_path.rglob("*.xplane.pb"))
