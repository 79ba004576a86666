"""A pod of two processes of four devices each: it is stopped, fails, loses a process, goes on.

One run goes through all of it, beside one that nothing happens to; what each test says is read
off what the processes left behind.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pods
import pytest
from run_files import assert_same_run, log_lines
from tiny_runs import SAMPLES, TINY_GPT2, tiny_config

from jax_sft.manifest import complete_steps

NUM_STEPS = 6
# The 257 tokens are padded to 260 over four devices, and to 258 over two.
MESH = dict(fsdp=2, tensor=4)
AUTO = "--config.train.resume_from_checkpoint=auto"


def write_config(folder: Path) -> None:
    """Writes the samples and the config of the pods' runs."""
    rows = [{"prompt": prompt, "output": output} for prompt, output in SAMPLES]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(
        folder / "run",
        train=dict(total_steps=NUM_STEPS, eval_interval=2),
        model=dict(config=TINY_GPT2 | dict(embd_pdrop=0.1, n_head=4)),
        data=dict(train="pairs.jsonl", eval_prompts="pods:prompts", metric_fn="pods:act"),
        mesh=MESH,
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


@pytest.fixture(scope="module")
def pod(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pod")
    write_config(folder)
    with pods.opened(folder) as pod:
        yield pod


def run(pod: pods.Pods, run_dir: str, *flags: str, **options) -> list[pods.Ended]:
    where = f"--config.train.checkpoint_dir={pod.folder / run_dir}"
    return pod.run(f"--config={pod.folder / 'config.json'}", where, *flags, **options)


@pytest.fixture(scope="module")
def straight(pod):
    ended = run(pod, "straight")
    assert [process.code for process in ended] == [0, 0], ended
    return pod.folder / "straight"


@pytest.fixture(scope="module")
def killed(pod):
    ended = run(pod, "run", act="3 kill 1 run/checkpoints/3/manifest.json")  # at step 4
    shutil.copytree(pod.folder / "run", pod.folder / "after the kill")
    return ended


@pytest.fixture(scope="module")
def stopped(pod, killed):
    return run(pod, "run", AUTO, act="0 term 1")  # while it gets ready


def codes(ended: list[pods.Ended]) -> list[int]:
    return [process.code for process in ended]


def losses(lines: list[dict]) -> np.ndarray:
    names = ("step", "loss", "grad_norm", "tokens", "trained_tokens")
    return np.array([[line[name] for name in names] for line in lines if "loss" in line])


def test_a_process_that_is_killed_ends_the_others(pod, killed):
    assert killed[1].code == -9
    assert killed[0].code in (1, -6), killed[0].err
    assert complete_steps(pod.folder / "after the kill/checkpoints") == [3]


def test_sigterm_at_one_process_stops_all_at_one_step(stopped):
    """Even where it comes before the first step, and that is not the first of the run."""
    assert codes(stopped) == [75, 75]
    assert "resumed" in stopped[0].out and "at step 3" in stopped[0].out
    assert "saved step 4 of 6" in stopped[0].out


def test_it_goes_on_to_the_bits_of_the_run_that_nothing_stopped(pod, straight, stopped):
    ended = run(pod, "run", AUTO)
    assert codes(ended) == [0, 0]
    assert_same_run(pod.folder / "run", straight)
    for word in ("devices", "resumed", "step", "saved"):
        assert word in ended[0].out and word not in ended[1].out


def test_two_processes_train_as_one_does(pod, straight):
    mesh = ("--config.mesh.fsdp=8", "--config.mesh.tensor=1")
    [ended] = run(pod, "one", *mesh, num_processes=1, num_devices=8)
    assert ended.code == 0, ended.err
    got = losses(log_lines(straight))
    assert len(got) == NUM_STEPS
    np.testing.assert_allclose(got, losses(log_lines(pod.folder / "one")), rtol=1e-5)


@pytest.mark.parametrize(("num_devices", "fsdp", "tensor"), [(4, 2, 2), (16, 4, 4)])
def test_eight_devices_of_two_processes_go_on_as_fewer_or_more_of_one(
    pod, straight, killed, num_devices, fsdp, tensor
):
    run_dir = f"{num_devices} devices"
    shutil.copytree(pod.folder / "after the kill", pod.folder / run_dir)
    mesh = [f"--config.mesh.fsdp={fsdp}", f"--config.mesh.tensor={tensor}"]
    [ended] = run(pod, run_dir, AUTO, *mesh, num_processes=1, num_devices=num_devices)
    assert ended.code == 0, ended.err
    assert "at step 3" in ended.out and f"tensor={tensor} ({num_devices} x" in ended.out
    got = losses(log_lines(pod.folder / run_dir))
    assert len(got) == NUM_STEPS
    np.testing.assert_allclose(got, losses(log_lines(straight)), rtol=1e-5)


def test_other_rows_on_a_host_are_refused(pod, tmp_path):
    rows = (pod.folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(rows[1:]))
    ended = run(pod, "new", own_folders={1: tmp_path})
    assert codes(ended) == [2, 2]
    for process in ended:
        assert process.err.startswith("error: the hash of the training data is ")
        assert "on process 1, but " in process.err and process.err.count("\n") == 1


def test_another_config_on_a_host_is_refused(pod):
    ended = run(pod, "new", own_flags={1: ("--config.train.seed=5",)})
    assert codes(ended) == [2, 2]
    for process in ended:
        assert process.err == (
            "error: train.seed is 5 on process 1, but 1000 on process 0: start all with the same "
            "flags and files\n"
        )


def test_an_exception_at_one_process_ends_all_with_its_text_last(pod):
    ended = run(pod, "new", act="0 raise 1")
    assert codes(ended) == [1, 1]
    assert ended[1].err.startswith("Traceback")
    assert ended[1].err.endswith("\nZeroDivisionError: of process 1 alone,\nin two lines\n")
    said = "ZeroDivisionError: of process 1 alone, in two lines"
    assert ended[0].err == f"process 1 failed, and ends all: {said}\n"


def test_a_mistake_at_one_process_is_no_traceback_at_any(pod, tmp_path):
    ended = run(pod, "new", own_folders={1: tmp_path})
    assert codes(ended) == [2, 2]
    assert ended[1].err.startswith("error: ") and ended[1].err.count("\n") == 1
    assert ended[0].err == f"process 1 failed, and ends all: {ended[1].err}"
