"""Law 4: killed anywhere, a run goes on to the bits of the run that nothing stopped.

Parameters, optimizer state, data order, counters, log lines and samples are compared with those
of a straight run made by the same process count and devices; dropout and microbatches are on.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import jax
import numpy as np
import pytest
from run_files import (
    all_samples,
    assert_same_run,
    assert_same_state,
    log_lines,
    newest_state,
)
from tiny_runs import PROMPTS, SAMPLES, TINY_GPT2, tiny_config

import jax_sft
from jax_sft.manifest import complete_steps, read_manifest
from jax_sft.progress import Progress
from jax_sft.train import STOPPED

TESTS = Path(__file__).parent.parent
NUM_STEPS = 7


def config(run_dir, **train):
    sizes = dict(total_steps=NUM_STEPS, minibatch_size=8, batch_size=16, eval_interval=2)
    return tiny_config(
        run_dir,
        train=sizes | train,
        model=dict(config=TINY_GPT2 | dict(embd_pdrop=0.1)),
    )


def lengths(*, outputs, **_):
    return {"length": [len(output) for output in outputs]}


def run(run_dir, *, metric_fn=lengths, resume="auto", **train):
    return jax_sft.train(
        samples=SAMPLES,
        eval_samples=SAMPLES[:5],
        eval_prompts=PROMPTS,
        metric_fn=metric_fn,
        config=config(run_dir, resume_from_checkpoint=resume, **train),
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight")
    run(run_dir, resume=None)
    return run_dir


class Killed(Exception):
    pass


def kill_in_step(monkeypatch, step):
    """Has the run end after a step was sent to the devices and before it was logged."""
    add = Progress.add

    def add_or_end(self, number, metrics):
        if number == step:
            raise Killed
        add(self, number, metrics)

    monkeypatch.setattr(Progress, "add", add_or_end)


def test_the_straight_run_is_what_this_file_says(straight):
    lines = log_lines(straight)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, NUM_STEPS + 1))
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 2, 4, 6, 7]
    assert sorted(all_samples(straight)) == [f"{step:06d}.jsonl" for step in (0, 2, 4, 6, 7)]
    # Without dropout the training loss of step 7 would be another.
    assert {"loss", "tokens", "trained_tokens", "learning_rate"} <= lines[-2].keys()


# Before the first checkpoint; right after one; between two; in the last step.
@pytest.mark.parametrize("step", [2, 4, 5, 7])
def test_a_run_that_raised_goes_on(straight, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_step(patch, step)
        run(tmp_path / "run")
    saved = complete_steps(tmp_path / "run" / "checkpoints")
    assert saved == [number for number in (3, 6) if number < step]
    assert log_lines(tmp_path / "run")[-1]["step"] >= max(saved, default=0)
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)


def test_adapters_go_on_too(tmp_path, monkeypatch):
    peft_config = dict(r=2, lora_dropout=0.2, use_dora=True, target_modules="all-linear")

    def train(run_dir):
        adapted = config(run_dir, resume_from_checkpoint="auto")
        adapted = adapted.evolve(model=dict(peft_config=peft_config))
        return jax_sft.train(samples=SAMPLES, eval_prompts=[], config=adapted)

    trainer = train(tmp_path / "straight")
    assert trainer.model.params["layers"]["mlp"]["up"]["lora_b"].any(), "nothing was trained"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_step(patch, 5)
        train(tmp_path / "run")
    train(tmp_path / "run")
    assert_same_state(tmp_path / "run", tmp_path / "straight")
    files = [
        (tmp_path / name / "hf_model" / path).read_bytes()
        for path in ("model.safetensors", "adapter/adapter_model.safetensors")
        for name in ("run", "straight")
    ]
    assert files[0] == files[1] and files[2] == files[3]


def test_what_is_kept_in_bfloat16_goes_on_too(tmp_path, monkeypatch):
    """The draws that round it are those of the step."""

    def train(run_dir):
        kept = config(run_dir, resume_from_checkpoint="auto").evolve(
            model=dict(param_dtype="bfloat16"), optimizer=dict(state_dtype="bfloat16")
        )
        return jax_sft.train(samples=SAMPLES, eval_prompts=[], config=kept)

    trainer = train(tmp_path / "straight")
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(trainer.model.params)}
    assert dtypes == {"bfloat16"}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_step(patch, 5)
        train(tmp_path / "run")
    train(tmp_path / "run")
    assert_same_state(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("step", [2, 5])
def test_a_stream_goes_on_too(tmp_path, monkeypatch, step):
    rows = [{"prompt": prompt, "output": output} for prompt, output in SAMPLES]

    def train(run_dir):
        streamed = config(run_dir, resume_from_checkpoint="auto", epochs=4, total_steps=99)
        streamed = streamed.evolve(data=dict(streaming=True, look_ahead=2))
        samples = datasets.Dataset.from_list(rows).to_iterable_dataset()
        return jax_sft.train(samples=samples, eval_prompts=PROMPTS, config=streamed)

    trainer = train(tmp_path / "straight")
    assert trainer.num_steps == 6, "24 samples of 12 or 13 tokens, 4 epochs, 16 rows of 16 a step"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_step(patch, step)
        train(tmp_path / "run")
    train(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    trained = [line["trained_tokens"] for line in log_lines(tmp_path / "run") if "loss" in line]
    assert trained[-1] == 4 * sum(len(output) + 1 for _, output in SAMPLES)


def test_sigterm_saves_and_exits_so_that_a_supervisor_starts_it_again(straight, tmp_path, capsys):
    num_calls = 0

    def terminated(*, outputs, **_):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:  # at steps 0, 2 and 4
            os.kill(os.getpid(), signal.SIGTERM)
        return lengths(outputs=outputs)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit:
        run(tmp_path / "run", metric_fn=terminated)
    assert exit.value.code == STOPPED == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert complete_steps(tmp_path / "run" / "checkpoints") == [3, 4]
    assert "saved step 4 of 7" in capsys.readouterr().out
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)


def test_a_killed_process_goes_on_in_another(straight, tmp_path):
    code = f"""
import os, pathlib, signal, sys, time
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "laws")!r}]
import jax, test_resumed_is_uninterrupted as law
num_calls = 0
def killed(*, outputs, **_):
    global num_calls
    num_calls += 1
    if num_calls == 4:  # at step 6, before its checkpoint
        while not pathlib.Path({str(tmp_path / "run/checkpoints/3/manifest.json")!r}).exists():
            time.sleep(0.01)  # the save goes on behind the steps
        os.kill(os.getpid(), signal.SIGKILL)
    return law.lengths(outputs=outputs)
law.run({str(tmp_path / "run")!r}, metric_fn=killed)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS.parent, capture_output=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert complete_steps(tmp_path / "run" / "checkpoints") == [3]
    assert log_lines(tmp_path / "run")[-1]["step"] == 6
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)


def test_another_runs_folder_goes_on_in_a_new_one(straight, tmp_path):
    early = tmp_path / "early"
    # The schedule is constant, so the shorter run takes the straight run's first steps.
    run(early, total_steps=4)
    before = {path: path.read_bytes() for path in early.rglob("*") if path.is_file()}
    trainer = run(tmp_path / "late", resume=str(early))
    assert_same_state(tmp_path / "late", straight)
    steps = [line["step"] for line in trainer.history if "loss" in line]
    assert steps == [5, 6, 7]
    assert log_lines(tmp_path / "late") == [x for x in log_lines(straight) if x["step"] > 4]
    assert before == {path: path.read_bytes() for path in early.rglob("*") if path.is_file()}

    # And the short run itself goes on when it is given more steps.
    run(early)
    assert_same_state(early, straight)
    assert log_lines(early) == log_lines(straight)


def test_a_finished_run_stays_as_it_is(straight, capsys):
    before = newest_state(straight), log_lines(straight), all_samples(straight)
    trainer = run(straight)
    after = newest_state(straight), log_lines(straight), all_samples(straight)
    assert before[1:] == after[1:]
    assert all(np.array_equal(before[0][name], after[0][name]) for name in before[0])
    assert f"at step {NUM_STEPS}" in capsys.readouterr().out
    assert trainer.generate(["1 + 1 ="], max_new_tokens=2) is not None
    assert [line for line in trainer.history if "loss" in line][-1]["step"] == NUM_STEPS


@pytest.mark.parametrize(
    ("samples", "train", "words"),
    [
        (SAMPLES[1:], {}, "was trained on other data, or in another order"),
        (SAMPLES, {"seed": 5}, "was trained on other data, or in another order"),
        (SAMPLES, {"model": TINY_GPT2 | dict(n_embd=24)}, "of another model or optimizer"),
        (SAMPLES, {"model": TINY_GPT2 | dict(n_layer=2)}, "of another model or optimizer"),
        (SAMPLES, {"optimizer": "lion"}, "of another model or optimizer"),
    ],
)
def test_a_run_of_something_else_is_refused_and_kept(straight, samples, train, words):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    other = {name: train[name] for name in ("seed",) if name in train}
    changed = config(straight, resume_from_checkpoint="auto", **other)
    if "model" in train:
        changed = changed.evolve(model=dict(config=train["model"]))
    if "optimizer" in train:
        changed.optimizer.name = train["optimizer"]
    with pytest.raises(ValueError, match=words) as error:
        jax_sft.train(samples=samples, config=changed)
    assert "\n" not in str(error.value) and str(straight) in str(error.value)
    assert before.keys() == {path: None for path in straight.rglob("*")}.keys()
    files = [path for path in before if path.is_file()]
    assert [before[path] for path in files] == [path.stat().st_mtime_ns for path in files]


def test_a_missing_folder_to_resume_from_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere.* is no folder"):
        run(tmp_path / "run", resume=str(tmp_path / "nowhere"))


def test_without_optimizer_state_a_resume_says_so(tmp_path):
    run(tmp_path / "run", total_steps=1, save_optimizer=False)
    leaves = read_manifest(tmp_path / "run" / "checkpoints", 1)["leaves"]
    assert not [name for name in leaves if name.startswith("opt_state")]
    with pytest.raises(ValueError, match="no optimizer state.*jax_sft.export") as error:
        run(tmp_path / "run", total_steps=2, save_optimizer=False)
    assert "\n" not in str(error.value)
