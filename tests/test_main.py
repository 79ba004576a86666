"""The command line: a mistake is one line on stderr and exit code 2, and never a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import PROMPTS, SAMPLES, tiny_config

from jax_sft import export, generate, main
from jax_sft.command import run_command
from jax_sft.manifest import complete_steps
from jax_sft.model.causal_lm import CausalLM

ROOT = Path(__file__).parent.parent


def command(monkeypatch, module, *argv) -> int | None:
    """Runs a command as the shell would; returns its exit code, None where it just ends."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    try:
        run_command(module.main)
    except SystemExit as exit:
        return exit.code
    return None


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1, error
    return error


@pytest.fixture
def config_file(tmp_path):
    samples = tmp_path / "pairs.jsonl"
    rows = [{"prompt": prompt, "output": output} for prompt, output in SAMPLES]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(
        tmp_path / "run",
        train=dict(total_steps=2),
        data=dict(train=str(samples), eval_prompts=tuple(PROMPTS)),
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    return file


def test_it_trains_exports_and_prompts(config_file, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, main, f"--config={config_file}") is None
    shown = capsys.readouterr()
    assert "error" not in shown.err.lower() and "warning" not in shown.err.lower()
    for words in (
        "devices",
        "precision",
        "attention   xla\n",
        "parameters",
        "batch ",
        "24 read, 24 kept",
        "step 2/2",
    ):
        assert words in shown.out
    last = shown.out.splitlines()[-1]
    assert last.startswith("try it") and f"--model={tmp_path / 'run' / 'hf_model'}" in last
    assert last.endswith("--prompt='1 + 1 ='")

    given = (f"--checkpoint_dir={tmp_path / 'run'}", f"--output={tmp_path / 'exported'}")
    assert command(monkeypatch, export, *given) is None
    exported, final = (
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("exported", "run/hf_model")
    )
    assert exported == final
    capsys.readouterr()
    given = (f"--model={tmp_path / 'exported'}", "--prompt=1 + 1 =", "--max_new_tokens=3")
    assert command(monkeypatch, generate, *given) is None
    answer = CausalLM.from_pretrained(tmp_path / "exported").generate(
        ["1 + 1 ="], max_new_tokens=3, temperature=0.0
    )
    assert capsys.readouterr().out == f"1 + 1 ={answer[0]}\n"
    assert command(monkeypatch, generate, *given, "--top_p=0.999", "--seed=5") is None
    [sampled] = CausalLM.from_pretrained(tmp_path / "exported").generate(
        ["1 + 1 ="], max_new_tokens=3, top_p=0.999, seed=5
    )
    assert capsys.readouterr().out == f"1 + 1 ={sampled}\n" and sampled != answer[0]

    # A step that is not finite: one line as well, but code 1, and what was saved stays.
    resume = ("--config.train.resume_from_checkpoint=auto", "--config.optimizer.kwargs.lr=1e30")
    steps = ("--config.train.total_steps=9", "--config.train.checkpoint_interval=4")
    assert command(monkeypatch, main, f"--config={config_file}", *resume, *steps) == 1
    line = one_line(capsys)
    assert "step 4 was not taken" in line and "pairs.jsonl line" in line
    assert complete_steps(tmp_path / "run" / "checkpoints") == [2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.train.batchsize=4"], ("batchsize", "batch_size")),
        (["--config.train.batch_size=four"], ("four", "int")),
        (["--config.optimizer.name=adamv"], ("adamv", "adamw")),
        (["--config.data.train=gone.jsonl"], ("gone.jsonl",)),
        (["--config.train.batch_size=6"], ("6", "8 devices")),
        (["--config.train.checkpoint_dir=/dev/null/run"], ("/dev/null/run", "cannot be written")),
        (["--batch_size=4"], ("--batch_size", "--config.train.batch_size")),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, words, config_file, monkeypatch, capsys):
    assert command(monkeypatch, main, f"--config={config_file}", *flags) == 2
    line = one_line(capsys)
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize(
    ("module", "argv", "words"),
    [
        (generate, ["--model=gone/for/good", "--prompt=a"], ("gone/for/good", "does not exist")),
        (generate, ["--model=gone"], ("required", "--prompt")),
        (generate, ["--model=gone", "--prompt=a", "--seed=x"], ("--seed", "'x'")),
        (export, ["--checkpoint_dir=gone", "--output=x"], ("gone", "does not exist")),
        (export, ["--checkpoint_dir=gone", "--output=x", "--dtype=int8"], ("'int8'", "float16")),
    ],
)
def test_the_other_commands_do_likewise(module, argv, words, monkeypatch, capsys):
    assert command(monkeypatch, module, *argv) == 2
    line = one_line(capsys)
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_lists_the_keys(argv, monkeypatch, capsys):
    assert command(monkeypatch, main, *argv) is None
    assert "--config.train.batch_size=8" in capsys.readouterr().out


def test_an_error_that_is_not_the_users_keeps_its_traceback(monkeypatch):
    class Command:
        @staticmethod
        def main(argv):
            int("a library's ValueError")

    with pytest.raises(ValueError, match="invalid literal"):
        command(monkeypatch, Command)


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    class Command:
        @staticmethod
        def main(argv):
            raise KeyboardInterrupt

    assert command(monkeypatch, Command) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "jax_sft.main", "--config=gone.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --config file gone.py") and done.stderr.count("\n") == 1


def test_a_reader_that_leaves_is_no_traceback():
    started = subprocess.Popen(
        [sys.executable, "-m", "jax_sft.main", "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.stdout.close()
    assert started.stderr.read() == "standard output was closed\n"
    started.stderr.close()
    assert started.wait() == 141
