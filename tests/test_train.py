"""The run as a whole: what train() measures, logs, writes and returns, and how it ends."""

import json
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import (
    PROMPTS,
    SAMPLES,
    TINY_GPT2,
    is_time,
    tiny_config,
)
from transformers import AutoTokenizer

import jax_sft
from jax_sft.checkpoint import Checkpoints
from jax_sft.config import BYTE_TOKENIZER
from jax_sft.data.batches import Batches
from jax_sft.manifest import complete_steps
from jax_sft.run_folder import held, read_config


def scores(samples, prompts, outputs, **metadata):
    """Every kind of value that a metric may be."""
    assert samples == [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    assert metadata == {"answer": [" 2", " 3"]}
    return {
        "ints": [1, 2],
        "bools": [True, False],
        "numpy": np.array([1.0, 3.0], np.float32),
        "jax": jnp.array([4, 6]),
        "one": np.float32(0.5),
    }


def lines_of(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("ran")
    config = tiny_config(
        run_dir,
        train=dict(eval_interval=2, total_steps=5, best_metric="min:eval/loss"),
        method=dict(gen_kwargs=dict(max_new_tokens=(2, 3), top_k=(1,))),
    )
    given = config.to_dict()
    trainer = jax_sft.train(
        samples=SAMPLES,
        eval_samples=SAMPLES[:3],
        eval_prompts=[
            {"prompt": prompt, "answer": answer}
            for prompt, answer in zip(PROMPTS, (" 2", " 3"), strict=True)
        ],
        metric_fn=scores,
        config=config,
    )
    assert config.to_dict() == given, "the caller's config was changed"
    return trainer


def test_it_evaluates_first_at_each_interval_and_last(ran):
    assert [line["step"] for line in ran.history if "eval/loss" in line] == [0, 2, 4, 5]
    names = sorted(path.name for path in (ran.run_dir / "samples").iterdir())
    assert names == ["000000.jsonl", "000002.jsonl", "000004.jsonl", "000005.jsonl"]


def test_logged_names_are_these(ran):
    steps = [line for line in ran.history if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert set(steps[0]) == {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "trained_tokens",
        "tokens_per_second",
        "trained_tokens_per_second",
        "step_seconds",
        "data_wait_share",
    }
    swept = [f"@max_new_tokens={number}@top_k=1" for number in (2, 3)]
    names = [
        f"metrics/{name}{s}" for name in ("ints", "bools", "numpy", "jax", "one") for s in swept
    ]
    evaluation = next(line for line in ran.history if "eval/loss" in line)
    assert set(evaluation) == {
        "step", "eval/loss", "eval/perplexity", "time/generate", "time/metric", *names
    }  # fmt: skip
    assert ran.history == lines_of(ran.run_dir)


@pytest.mark.parametrize(
    ("name", "mean"), [("ints", 1.5), ("bools", 0.5), ("numpy", 2.0), ("jax", 5.0), ("one", 0.5)]
)
def test_metrics_are_means_whatever_they_are_made_of(ran, name, mean):
    evaluation = next(line for line in ran.history if "eval/loss" in line)
    assert evaluation[f"metrics/{name}@max_new_tokens=2@top_k=1"] == mean


def test_tokens_are_counted_from_the_start(ran):
    last = [line for line in ran.history if "tokens" in line][-1]
    report = json.loads((ran.run_dir / "data_report.json").read_text())
    # Three steps an epoch: a whole epoch and two thirds of the next.
    assert report["tokens"] < last["tokens"] < 2 * report["tokens"]
    assert last["trained_tokens"] / last["tokens"] == pytest.approx(
        report["trained_share"], rel=0.05
    )


def test_the_folder_holds_what_a_run_leaves(ran):
    names = {path.name for path in ran.run_dir.iterdir()}
    assert names == {
        "config.json", "data_report.json", "data_report.html", "metrics.jsonl", "samples",
        "checkpoints", "hf_model", "best", "tokenizer",
    }  # fmt: skip
    assert complete_steps(ran.run_dir / "checkpoints") == [3, 5]
    written = json.loads((ran.run_dir / "config.json").read_text())
    assert written == ran.config.to_dict()


def test_the_best_is_that_of_the_metric_and_its_direction(ran):
    losses = {line["step"]: line["eval/loss"] for line in ran.history if "eval/loss" in line}
    assert min(losses, key=losses.get) == 5, "the model learns"
    card = (ran.run_dir / "best" / "README.md").read_text()
    assert f"{losses[5]:.4g}" in card
    best, final = (
        (ran.run_dir / name / "model.safetensors").read_bytes() for name in ("best", "hf_model")
    )
    assert best == final


def test_the_saved_model_answers_as_the_trainer_does(ran, tmp_path):
    ran.save_pretrained(tmp_path / "copy")
    reloaded = jax_sft.CausalLM.from_pretrained(tmp_path / "copy")
    prompts = ["7 + 1 =", "1 + 1 ="]
    greedy = dict(max_new_tokens=3, do_sample=False)
    assert reloaded.generate(prompts, **greedy) == ran.generate(prompts, **greedy)
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").decode([104]) == "h"


def test_evaluating_afterwards_gives_the_last_values(ran):
    last = ran.history[-1]
    again = ran.evaluate()
    assert {k: v for k, v in again.items() if not is_time(k)} == {
        k: v for k, v in last.items() if not is_time(k) and k != "step"
    }


def test_a_new_run_sets_the_earlier_one_aside(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", train=dict(total_steps=1))
    first = jax_sft.train(samples=SAMPLES, eval_prompts=[], config=config)
    kept = lines_of(first.run_dir)
    second = jax_sft.train(samples=SAMPLES[:8], eval_prompts=[], config=config)
    assert lines_of(tmp_path / "run.1") == kept
    assert complete_steps(tmp_path / "run.1" / "checkpoints") == [1]
    assert second.data_report["kept"] == 8
    assert f"now {tmp_path / 'run.1'}" in capsys.readouterr().out


def test_a_run_in_the_current_folder_leaves_the_earlier_one_whole(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    for seed in (1, 2):
        config = tiny_config(".", train=dict(total_steps=1, seed=seed))
        jax_sft.train(samples=SAMPLES, eval_prompts=[], config=config)
    for folder, seed in (("run.1", 1), ("run", 2)):
        assert read_config(tmp_path / folder)["train"]["seed"] == seed
        assert len(lines_of(tmp_path / folder)) == 1
        assert complete_steps(tmp_path / folder / "checkpoints") == [1]


def test_nan_is_never_the_best(tmp_path):
    values = iter([float("nan"), 0.5, float("nan")])
    trainer = jax_sft.train(
        samples=SAMPLES,
        eval_prompts=PROMPTS,
        metric_fn=lambda **_: {"x": next(values)},
        config=tiny_config(tmp_path / "run", train=dict(best_metric="max:metrics/x")),
    )
    card = (trainer.run_dir / "best" / "README.md").read_text()
    assert "metrics/x | 0.5" in card


# ---- trlX's two usage examples, with only the import changed and a model that is at hand


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    tokenizer = AutoTokenizer.from_pretrained(BYTE_TOKENIZER)
    model = jax_sft.CausalLM.open(None, fields=TINY_GPT2, tokenizer=tokenizer)
    model.init(0)
    model.save_pretrained(folder)
    return folder


def test_trlx_example_with_attributes_set(tiny_folder, tmp_path):
    def metric_fn(samples, **kwargs):
        assert len(samples) == 64
        return {"sentiments": [len(sample) for sample in samples]}

    config = jax_sft.default_sft_config()
    config.model.model_path = tiny_folder
    config.train.seq_length = 32
    config.train.total_steps = 2
    config.train.checkpoint_dir = tmp_path / "run"
    config.train.tracker = None
    config.method.gen_kwargs.max_new_tokens = 4
    trainer = jax_sft.train(
        samples=["I like it", "I do not mind it"] * 8,
        eval_prompts=["I don't know much"] * 64,
        metric_fn=metric_fn,
        config=config,
    )
    trainer.save_pretrained(tmp_path / "sft_model")
    assert (tmp_path / "sft_model" / "model.safetensors").is_file()
    assert trainer.history[-1]["metrics/sentiments"] >= len("I don't know much")
    assert trainer.num_steps == 2, "total_steps comes before 100 epochs"


def test_trlx_example_with_evolve_and_a_column(tiny_folder, tmp_path):
    config = jax_sft.default_sft_config().evolve(
        train=dict(
            seq_length=32,
            total_steps=10,
            epochs=2,
            checkpoint_dir=str(tmp_path / "run"),
            tracker=None,
        ),
        method=dict(gen_kwargs=dict(max_new_tokens=2, do_sample=False)),
    )
    given = config.to_dict()
    rows = datasets.Dataset.from_dict({"dialogue": SAMPLES})
    trainer = jax_sft.train(
        str(tiny_folder),
        samples=rows["dialogue"],
        eval_prompts=PROMPTS,
        config=config,
        stop_sequences=["="],
    )
    assert config.to_dict() == given
    assert trainer.config.model.model_path == str(tiny_folder)
    assert trainer.inputs.tokenizer.name_or_path == str(tiny_folder), "it follows the model"
    # Three examples fill a row: one step of eight rows an epoch, two epochs before ten steps.
    assert trainer.num_steps == 2 == trainer.history[-1]["step"]
    assert all("=" not in output for output in trainer.generate(["1"], max_new_tokens=4))


@pytest.mark.parametrize("name", ["reward_fn", "rewards", "prompts", "dataset"])
def test_other_methods_than_sft_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is .*SFT only.*eval_prompts"):
        jax_sft.train(samples=SAMPLES, **{name: [1.0]})


# ---- how a run ends that does not end well


def fail_in_the_loader(monkeypatch):
    place = Batches.place

    def failing(self, step, sharding):
        if step == 2:
            raise OSError("the disk is gone")
        return place(self, step, sharding)

    monkeypatch.setattr(Batches, "place", failing)
    return {}


def fail_in_the_metric(monkeypatch):
    calls = []

    def metric_fn(**_):
        calls.append(1)
        if len(calls) == 2:  # after step 3
            raise OSError("the disk is gone")
        return {"x": 1}

    return {"metric_fn": metric_fn}


@pytest.mark.parametrize(
    ("fail", "saved"), [(fail_in_the_loader, [2]), (fail_in_the_metric, [2, 3])]
)
def test_an_exception_ends_the_run_with_files_flushed_and_threads_closed(
    fail, saved, tmp_path, monkeypatch
):
    before = {thread.name for thread in threading.enumerate()}
    config = tiny_config(tmp_path / "run", train=dict(tracker="tensorboard", checkpoint_interval=2))
    with pytest.raises(OSError, match="the disk is gone"):
        jax_sft.train(samples=SAMPLES, eval_prompts=PROMPTS, config=config, **fail(monkeypatch))
    assert complete_steps(tmp_path / "run" / "checkpoints") == saved
    assert [line["step"] for line in lines_of(tmp_path / "run") if "loss" in line][:2] == [1, 2]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    left = {thread.name for thread in threading.enumerate()} - before
    assert not {name for name in left if "prefetch" in name or "checkpoint" in name}
    assert not {name for name in left if "EventLogger" in name or "tensorboard" in name.lower()}


def test_a_metric_that_fails_where_a_stream_ends_loses_no_step(tmp_path, monkeypatch):
    file = tmp_path / "texts.txt"
    file.write_text("some text\n" * 40)
    config = tiny_config(
        tmp_path / "run",
        train=dict(epochs=1, total_steps=500, eval_interval=400, checkpoint_interval=400),
        data=dict(train=str(file), streaming=True),
    )
    metric_fn = fail_in_the_metric(monkeypatch)["metric_fn"]
    with pytest.raises(OSError, match="the disk is gone"):
        jax_sft.train(eval_prompts=PROMPTS, metric_fn=metric_fn, config=config)
    [step] = complete_steps(tmp_path / "run" / "checkpoints")
    assert 1 <= step < 400


def test_ctrl_c_says_what_is_saved(tmp_path, capsys):
    def metric_fn(**_):
        if complete_steps(tmp_path / "run" / "checkpoints"):
            raise KeyboardInterrupt
        return {}

    config = tiny_config(tmp_path / "run", train=dict(checkpoint_interval=2, eval_interval=4))
    with pytest.raises(KeyboardInterrupt):
        jax_sft.train(samples=SAMPLES, eval_prompts=PROMPTS, metric_fn=metric_fn, config=config)
    newest = complete_steps(tmp_path / "run" / "checkpoints")[-1]
    assert f"step {newest} is saved in" in capsys.readouterr().out.splitlines()[-1]


def test_a_run_folder_in_use_is_refused_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text("{}")
    link = tmp_path / "link"
    link.symlink_to(run_dir)
    with held(run_dir):
        for name in (run_dir, link):
            with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on "):
                jax_sft.train(samples=SAMPLES, config=tiny_config(name))
    assert [path.name for path in run_dir.iterdir()] == ["config.json"]
    locks = set(Path(tempfile.gettempdir()).glob("jax_sft.*.lock"))
    with held(run_dir), held(tmp_path):
        assert set(Path(tempfile.gettempdir()).glob("jax_sft.*.lock")) > locks
    assert set(Path(tempfile.gettempdir()).glob("jax_sft.*.lock")) <= locks
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with held(run_dir):
        pass


def test_a_finished_run_that_goes_on_elsewhere_can_be_resumed_there(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", train=dict(total_steps=2))
    jax_sft.train(samples=SAMPLES, eval_prompts=[], config=config)
    again = dict(checkpoint_dir=tmp_path / "run2", resume_from_checkpoint=tmp_path / "run")
    jax_sft.train(samples=SAMPLES, eval_prompts=[], config=config.evolve(train=again))
    assert complete_steps(tmp_path / "run2" / "checkpoints") == [2]
    capsys.readouterr()
    more = again | dict(resume_from_checkpoint="auto", total_steps=3)
    jax_sft.train(samples=SAMPLES, eval_prompts=[], config=config.evolve(train=more))
    assert "run2 at step 2" in capsys.readouterr().out


def test_auto_says_that_there_is_nothing_to_resume(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", train=dict(total_steps=1, save_optimizer=False))
    jax_sft.train(samples=SAMPLES, eval_prompts=[], config=config)
    assert "run/checkpoints (to export)" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    config = config.evolve(train=dict(resume_from_checkpoint="auto"))
    jax_sft.train(samples=SAMPLES, eval_prompts=[], config=config)
    assert "has no checkpoint: the run starts anew" in capsys.readouterr().out


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_renamed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="wandb is not installed"):
        jax_sft.train(samples=SAMPLES, config=tiny_config(run_dir, train=dict(tracker="wandb")))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_step_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path):
    good = tiny_config(tmp_path / "run", train=dict(total_steps=3))
    jax_sft.train(samples=SAMPLES, eval_prompts=[], config=good)
    files = [path for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    # Step 4 is still taken, with a finite gradient; step 5 sees what it left.
    bad = good.evolve(
        train=dict(total_steps=8, checkpoint_interval=5, resume_from_checkpoint="auto"),
        optimizer=dict(kwargs=dict(lr=1e30)),
    )
    with pytest.raises(FloatingPointError) as error:
        jax_sft.train(samples=SAMPLES, eval_prompts=[], config=bad)
    message = str(error.value)
    assert "\n" not in message
    assert "step 5 " in message and "epoch 1" in message and "samples[" in message
    assert complete_steps(tmp_path / "run" / "checkpoints") == [3]
    assert before == {path: path.read_bytes() for path in files}
    assert not [line for line in lines_of(tmp_path / "run") if line["step"] > 4]
    state = Checkpoints.open_for_reading(tmp_path / "run").latest()
    assert state == 3


def test_fewer_steps_than_the_checkpoint_has_are_refused(ran):
    files = [path for path in ran.run_dir.rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    config = ran.config.evolve(
        train=dict(total_steps=3, best_metric=None, resume_from_checkpoint="auto")
    )
    with pytest.raises(ValueError) as error:
        jax_sft.train(samples=SAMPLES, eval_prompts=[], config=config)
    message = str(error.value)
    assert "\n" not in message
    for words in ("at step 5", "train.total_steps=3", "at least 5", "jax_sft.export"):
        assert words in message
    assert before == {path: path.stat().st_mtime_ns for path in files}


def test_a_metric_that_does_not_take_what_it_is_given_is_found_before_training(tmp_path):
    with pytest.raises(ValueError, match="metric_fn 'score' is called with samples, prompts, out"):

        def score(outputs):
            return {"x": 1}

        jax_sft.train(
            samples=SAMPLES, eval_prompts=PROMPTS, metric_fn=score, config=tiny_config(tmp_path)
        )


def test_a_metric_of_the_wrong_length_is_found_before_training(tmp_path):
    with pytest.raises(ValueError, match="'x' of shape \\[3\\].*each of the 2 samples") as error:
        jax_sft.train(
            samples=SAMPLES,
            eval_prompts=PROMPTS,
            metric_fn=lambda **_: {"x": [1, 2, 3]},
            config=tiny_config(tmp_path / "run"),
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_profile_steps_traces_them(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    config = tiny_config(tmp_path / "run", train=dict(total_steps=3, profile_steps=(2, 3)))
    jax_sft.train(samples=SAMPLES, eval_prompts=[], config=config)
    assert calls == [tmp_path / "run" / "tensorboard", "stop"]
