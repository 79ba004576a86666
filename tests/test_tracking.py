"""Metrics, samples and their cut on resume; TensorBoard and W&B; the console's lines."""

import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jax_sft.console import one_line, progress_line
from jax_sft.tracking import Tracker


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def track(run_dir, **kwargs):
    return Tracker(run_dir, **({"kind": None} | kwargs))


def test_a_line_is_on_disk_at_once_and_in_history(tmp_path):
    tracker = track(tmp_path)
    tracker.log(3, {"loss": np.float32(0.5), "tokens": jnp.int32(7), "metrics/x": True})
    assert lines(tmp_path / "metrics.jsonl") == tracker.history
    assert tracker.history == [{"step": 3, "loss": 0.5, "tokens": 7, "metrics/x": True}]


def test_non_finite_metrics_stay_valid_json(tmp_path):
    tracker = track(tmp_path)
    tracker.log(1, {"loss": float("nan"), "grad_norm": np.inf, "x": jnp.array([1.0, jnp.nan])})
    expected = {"step": 1, "loss": None, "grad_norm": None, "x": [1.0, None]}
    expected["non_finite"] = {"loss": "nan", "grad_norm": "inf"}

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == expected


def test_resume_cuts_what_came_after_the_step(tmp_path):
    tracker = track(tmp_path)
    for step in (10, 20, 30):
        tracker.log(step, {"note": "a\u2028b", "loss": float(step)})
        tracker.table(step, "t", ["output"], [["a"]])
    tracker.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # killed while it wrote
    tracker = track(tmp_path, resume_step=20)
    tracker.log(30, {"note": "a\u2028b", "loss": -1.0})
    losses = ((10, 10.0), (20, 20.0), (30, -1.0))
    expected = [{"step": step, "note": "a\u2028b", "loss": loss} for step, loss in losses]
    assert tracker.history == lines(tmp_path / "metrics.jsonl") == expected
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "000010.jsonl",
        "000020.jsonl",
    ]


def test_a_foreign_line_is_named_on_resume_and_nothing_is_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl line 2 is 'hello'"):
        track(tmp_path, resume_step=5)
    assert path.read_text() == '{"step": 1}\nhello\n{"step": 2}\n'


def test_a_new_run_sets_an_earlier_ones_files_aside(tmp_path):
    for run in range(3):
        tracker = track(tmp_path)
        tracker.log(run, {})
        tracker.table(run, "t", ["output"], [["a"]])
        tracker.close()
    for name, run in (("metrics.1.jsonl", 0), ("metrics.2.jsonl", 1), ("metrics.jsonl", 2)):
        assert lines(tmp_path / name) == [{"step": run}]
    assert (tmp_path / "samples.1" / "000000.jsonl").exists()
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["000002.jsonl"]


def test_a_table_shows_three_rows_and_writes_all(tmp_path, capsys):
    columns = ["prompt", "output", "metrics/x"]
    rows = [[f"p{i}", "[bold] \x1b[31m\n" + "long " * 400, np.float32(i / 3)] for i in range(5)]
    tracker = track(tmp_path)
    tracker.table(7, "samples at step 7", columns, rows)
    tracker.table(7, "more", columns, [["p5", "u\u2028v\ud800", float("nan")]])
    shown = capsys.readouterr().out
    assert "p2" in shown and "p3" not in shown and "0.6667" in shown
    assert "[bold] \\x1b[31m\\n" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert max(map(len, shown.split("\n"))) <= 160
    written = lines(tmp_path / "samples" / "000007.jsonl")
    assert [row["prompt"] for row in written] == [f"p{i}" for i in range(6)]
    assert written[0]["output"] == rows[0][1]
    assert written[5]["output"] == "u\u2028v\ud800"
    assert written[5]["metrics/x"] is None


def test_a_console_without_unicode_does_not_end_the_run(tmp_path, monkeypatch, capfd):
    with open(tmp_path / "console", "w", encoding="ascii") as console:
        monkeypatch.setattr(sys, "stdout", console)
        track(tmp_path).table(1, "t\u00e4", ["output"], [["\u4f60"]])
    assert "\\u4f60" in (tmp_path / "console").read_text("ascii")


def test_a_table_row_of_another_length_is_refused(tmp_path):
    with pytest.raises(ValueError):
        track(tmp_path).table(1, "t", ["a", "b"], [["x"]])


def test_other_processes_write_and_print_nothing(tmp_path, capsys):
    tracker = Tracker(tmp_path / "run", is_writer=False)
    tracker.log(1, {"loss": 1.0})
    tracker.progress(1, 2, {"loss": 1.0})
    tracker.table(1, "t", ["a"], [["x"]])
    tracker.close()
    assert tracker.history == [{"step": 1, "loss": 1.0}]
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_progress_line():
    metrics = {
        "loss": 1.234,
        "learning_rate": 4e-3,
        "grad_norm": 0.5199,
        "trained_tokens_per_second": 12345.4,
        "tokens_per_second": 23456.0,
        "step_seconds": 0.123,
        "seconds_left": 80.2,
        "metrics/exact": 0.25,
    }
    assert progress_line(120, 1200, metrics) == (
        "step  120/1200  loss 1.2340  lr 4.0e-03  grad 0.52  12,345 trained tok/s (23,456 total)"
        "  0.123 s/step  metrics/exact 0.25  1m20s left"
    )


@pytest.mark.parametrize(
    ("step_seconds", "text"),
    [(0.05, "5s"), (0.6, "1m00s"), (100.0, "2h46m"), (1000.0, "1d03h"), (0.0, "0s")],
)
def test_time_left_comes_from_the_steps_left(step_seconds, text):
    assert progress_line(0, 100, {"step_seconds": step_seconds}).endswith(f"  {text} left")


def test_progress_takes_device_scalars_and_nan(tmp_path, capsys):
    track(tmp_path).progress(1, 10, {"loss": jnp.float32(jnp.nan), "tokens_per_second": 5.0})
    assert capsys.readouterr().out == "step  1/10  loss nan  5 tok/s\n"


def test_one_line_cuts_the_middle():
    assert one_line("a" * 300 + "end") == "a" * 120 + " ... " + "a" * 117 + "end"


def test_tensorboard_events_and_purge(tmp_path):
    for resume_step in (None, 1):
        tracker = Tracker(tmp_path, resume_step=resume_step)
        tracker.log(2, {"loss": 0.25, "note": "text is for the JSON alone"})
        tracker.table(2, "samples", ["output"], [["a|b"]])
        tracker.close()
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for file in sorted((tmp_path / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:  # length (8 bytes), its checksum (4), the event, its checksum (4)
            size = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    scalars = [(e.step, v.simple_value) for e in events for v in e.summary.value if v.tag == "loss"]
    assert scalars == [(2, 0.25), (2, 0.25)]
    assert not any(v.tag == "note" for e in events for v in e.summary.value)
    starts = [e.step for e in events if e.session_log.status == 1]
    assert 2 in starts  # what the first run wrote at step 2 is void


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "abc"

        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    fake = types.ModuleType("wandb")
    fake.init = lambda **kwargs: calls.append(kwargs) or Run()
    fake.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = Tracker(tmp_path, kind="wandb", project_name="p", tags=("a",), config={"x": 1})
    tracker.log(1, {"loss": 2.0})
    tracker.table(1, "samples", ["output"], [["hi"]])
    tracker.close()
    tracker.close()
    identity = {"project": "p", "name": None, "entity": None, "group": None, "tags": ["a"]}
    assert calls == [
        {"dir": str(tmp_path), "config": {"x": 1}} | identity,
        (1, {"loss": 2.0}),
        (1, {"samples": (["output"], [["hi"]])}),
        "finish",
    ]
    Tracker(tmp_path, kind="wandb", resume_step=1).close()
    assert calls[4]["id"] == "abc" and calls[4]["resume"] == "allow"


def test_a_missing_wandb_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r'pip install "jax_sft\[wandb\]"'):
        Tracker(tmp_path, kind="wandb")
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}]  # and set nothing aside


def test_an_unknown_tracker_is_named(tmp_path):
    with pytest.raises(ValueError, match="tracker is 'mlflow'; expected tensorboard"):
        track(tmp_path, kind="mlflow")
