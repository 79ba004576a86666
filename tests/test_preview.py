"""The preview shows what would be trained, and that without a device; a mistake is one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_tokenizers import packaged_bytes
from tiny_runs import PROMPTS, SAMPLES, tiny_config

from jax_sft import preview
from jax_sft.command import run_command

ROOT = Path(__file__).parent.parent


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config_file(tmp_path):
    rows = [{"prompt": prompt, "output": output} for prompt, output in SAMPLES]
    config = tiny_config(
        tmp_path / "run",
        data=dict(
            train=write_rows(tmp_path / "pairs.jsonl", rows),
            eval={"held": write_rows(tmp_path / "held.jsonl", rows[:2])},
            eval_prompts=tuple(PROMPTS),
        ),
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    return file


def command(monkeypatch, tmp_path, *argv):
    """Runs the command in a folder of the test; returns its exit code, None where it just ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["preview", *map(str, argv)])
    try:
        run_command(preview.main)
    except SystemExit as exit:
        return exit.code
    return None


def test_as_a_process_without_any_device(config_file, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jax_sft.preview", f"--config={config_file}", "--examples=2"],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)}
        | {"PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )
    assert (done.returncode, done.stderr) == (0, "")
    ids = " ".join(map(str, packaged_bytes()("1 + 1 =")["input_ids"]))
    for words in (
        "24 read, 24 kept",
        "eval data held",
        "pairs.jsonl line 1 (9 tokens, 3 trained)",
        "0 + 1 =⟦ 1<|endoftext|>⟧",
        "eval prompts: 2 of 2",
        f"1 + 1 =\n{ids}\n",
    ):
        assert words in done.stdout, words
    [_, drawn] = re.findall(
        r"^.*pairs.jsonl line (\d+) \(\d+ tokens, \d trained", done.stdout, re.M
    )
    assert 12 < int(drawn) <= 24
    assert f"{int(drawn) - 1} + 1 =⟦ {drawn}<|endoftext|>⟧" in done.stdout
    assert "\x1b" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    assert {path.name for path in (tmp_path / "preview").iterdir()} == {
        "data_report.json",
        "data_report.html",
    }
    report = json.loads((tmp_path / "preview" / "data_report.json").read_text())
    assert report["kept"] == 24 and report["eval"]["held"]["kept"] == 2
    page = (tmp_path / "preview" / "data_report.html").read_text()
    assert f"pairs.jsonl line {drawn}" in page and "Held out: held" in page
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("row", ["4", "pairs.jsonl line 5", "line 5"])
def test_one_row_with_its_ids(row, config_file, tmp_path, monkeypatch, capsys):
    flags = [f"--config={config_file}", "--row", row, "--ids", "--output", tmp_path / "here"]
    assert command(monkeypatch, tmp_path, *flags) is None
    shown = capsys.readouterr().out
    [*context, space, five, eos] = packaged_bytes()("4 + 1 = 5<|endoftext|>")["input_ids"]
    assert "4 + 1 =⟦ 5<|endoftext|>⟧" in shown and "line 6" not in shown
    assert f"{' '.join(map(str, context))} ⟦{space} {five} {eos}⟧" in shown
    assert (tmp_path / "here" / "data_report.html").exists()


def test_data_that_would_not_stop_is_shown_before_it_is_refused(
    config_file, tmp_path, monkeypatch, capsys
):
    from jax_sft import inputs

    def without_stops(*args, **kwargs):
        loaded = load_inputs(*args, **kwargs)
        loaded.train.sources[0].counts.answers_without_stop = 7
        return loaded

    load_inputs = inputs.load_inputs
    monkeypatch.setattr(inputs, "load_inputs", without_stops)
    assert command(monkeypatch, tmp_path, f"--config={config_file}") == 2
    shown = capsys.readouterr()
    assert "24 kept" in shown.out and "0 + 1 =⟦ 1" in shown.out and "written:" in shown.out
    assert shown.err.startswith("error: 7 of 24 untruncated answers of ")
    assert shown.err.count("\n") == 1
    assert "Training would stop here." in (tmp_path / "preview" / "data_report.html").read_text()


def test_of_a_stream_the_first_rows_are_shown(config_file, tmp_path, monkeypatch, capsys):
    streaming = ("--config.data.streaming=true", "--config.data.look_ahead=4")
    assert command(monkeypatch, tmp_path, f"--config={config_file}", *streaming) is None
    shown = capsys.readouterr().out
    assert "the first that is read of a stream" in shown and "0 + 1 =⟦ 1" in shown
    assert "steps an epoch" not in shown


def test_data_that_trains_nothing_is_shown_too(config_file, tmp_path, monkeypatch, capsys):
    short = ("--config.train.seq_length=2", "--config.data.eval=None")
    assert command(monkeypatch, tmp_path, f"--config={config_file}", *short) == 2
    shown = capsys.readouterr()
    assert "24 (no trained token)" in shown.out
    assert "nothing would be trained: 24 rows were read, and none was kept" in shown.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.train.batchsize=4"], ("batchsize", "batch_size")),
        (["--config.data.train=gone.jsonl"], ("gone.jsonl",)),
        (["--examples=-1"], ("--examples", "-1")),
        (["--examples=x"], ("--examples", "x")),
        (["--row=line 99"], ("line 99", "pairs.jsonl line 1")),
        (["--row=24"], ("24", "24 examples")),
        (["--output=/dev/null/x"], ("/dev/null/x", "cannot be made")),
        (["--output=."], ("holds a run",)),
        (["--idss"], ("--idss",)),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_exit_code_2(
    flags, words, config_file, tmp_path, monkeypatch, capsys
):
    assert command(monkeypatch, tmp_path, f"--config={config_file}", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert [word for word in words if word not in error] == [], error


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_lists_its_flags_and_the_keys(argv, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, tmp_path, *argv) is None
    shown = capsys.readouterr().out
    assert "--row=ROW" in shown and "--config.train.batch_size=8" in shown
