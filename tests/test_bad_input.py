"""What users get wrong: one line each that names the value and the remedy, and nothing lost.

Each mistake is made through `train()`, in a folder that holds an earlier run, and is found
before anything is compiled.
"""

import gzip
import json
import sys
from pathlib import Path

import pytest
from tiny_runs import PROMPTS, SAMPLES, TINY_GPT2, tiny_config
from transformers import AutoTokenizer

import jax_sft
import jax_sft.train
from jax_sft.config import BYTE_TOKENIZER
from jax_sft.data.report import run_report
from jax_sft.inputs import load_inputs

TRAIN = sys.modules["jax_sft.train"]  # the face has the function under this name


@pytest.fixture
def earlier_run(tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "3").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "checkpoints/3/manifest.json"):
        (run_dir / name).write_text("kept")
    return run_dir


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    def fail(*_):
        raise AssertionError("compiled before the mistake was found")

    monkeypatch.setattr(TRAIN, "compile_step", fail)


def refused(run_dir: Path, arguments: dict, sections: dict) -> str:
    """Returns the one line, having checked that the earlier run is as it was."""
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    given = dict(samples=SAMPLES, eval_prompts=PROMPTS) | arguments
    with pytest.raises(ValueError) as error:
        config = tiny_config(run_dir, **sections)
        if config.model.init == "pretrained":
            config.model.config = {}
        jax_sft.train(config=config, **given)
    after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    assert before == after and after
    message = str(error.value)
    assert "\n" not in message and len(message) < 2000  # lists of tensors and long paths
    return message


@pytest.mark.parametrize(
    ("arguments", "sections", "words"),
    [
        (dict(samples=None), {}, ("no samples", "samples=[...]", "data.train")),
        (dict(samples=[]), {}, ("samples", "empty")),
        (dict(samples=[*SAMPLES[:3], ["a", "b", "c"]]), {}, ("samples[3]", "3")),
        (dict(samples=["text", 7]), {}, ("samples[1]", "7")),
        (dict(samples=["text", ["a", "b"]]), {}, ("samples[1]", "a dialogue", "as text")),
        (dict(samples=[["a", "b"], ["a", ""]]), {}, ("samples[1]", "empty")),
        (dict(samples="text"), {}, ("samples", "str", "[")),
        (dict(eval_prompts="1 + 1 ="), {}, ("1 + 1 =",)),
        (dict(eval_prompts=["1" * 30]), {}, ("30", "32", "positions", "max_new_tokens")),
        (dict(eval_prompts=[{"text": "1"}]), {}, ("eval_prompts[0]", '"prompt"')),
        (dict(stop_sequences="Human:"), {}, ("stop_sequences", "Human:", "[")),
        (dict(stop_sequences=[""]), {}, ("stop_sequences", "empty")),
        (dict(metric_fn=["exact"]), {}, ("metric_fn is a list", "pass a function")),
        (dict(metric_fn=None), dict(data=dict(metric_fn="nowhere:f")), ("nowhere", "module")),
        ({}, dict(train=dict(seq_length=64)), ("seq_length", "64", "32 positions")),
        ({}, dict(train=dict(batch_size=6)), ("batch_size", "6", "8 devices", "multiple")),
        ({}, dict(train=dict(minibatch_size=2)), ("minibatch_size", "2", "multiple")),
        ({}, dict(train=dict(minibatch_size=3)), ("minibatch_size", "3", "batch_size 8")),
        ({}, dict(mesh=dict(data=3)), ("data=3", "8 are here")),
        ({}, dict(train=dict(resume_from_checkpoint="nowhere")), ("nowhere", "auto")),
        ({}, dict(train=dict(logging_dir="/dev/null/x")), ("train.logging_dir", "be written")),
        ({}, dict(train=dict(best_metric="min:eval/loss")), ("eval/loss", "eval_samples")),
        ({}, dict(train=dict(best_metric="metrics/x")), ("metrics/x", "metric_fn")),
        ({}, dict(train=dict(best_metric="reward")), ("reward", "metrics/")),
        (
            dict(metric_fn=len),
            dict(
                train=dict(best_metric="max:metrics/x@top_k=1"),
                method=dict(gen_kwargs=dict(top_k=(1, 2), temperature=(0.5,))),
            ),
            (
                "metrics/x@top_k=1'",
                "metrics/x@top_k=1@temperature=0.5 or metrics/x@top_k=2@temperature=0.5",
            ),
        ),
        ({}, dict(model=dict(config=dict(model_type="gpt9"))), ("gpt9",)),
        ({}, dict(model=dict(config=dict(n_layerz=2))), ("n_layerz",)),
        ({}, dict(model=dict(config=dict(n_head=3))), ("3", "16")),
        ({}, dict(model=dict(config=dict(n_head=0))), ("n_head=0", "at least 1")),
        ({}, dict(model=dict(config=dict(n_layer=0))), ("n_layer=0", "at least 1")),
        ({}, dict(model=dict(config=dict(vocab_size=30))), ("30", "tokenizer")),
        ({}, dict(model=dict(num_layers_unfrozen=5)), ("num_layers_unfrozen", "5", "1 layers")),
        ({}, dict(model=dict(peft_config=dict(r=0))), ("peft_config.r", "0", "at least 1")),
        ({}, dict(model=dict(peft_config=dict(r=True))), ("peft_config.r", "True", "at least 1")),
        (
            {},
            dict(model=dict(peft_config=dict(target_modules=["q_proj"]))),
            ("target_modules", "q_proj", "c_attn", "all-linear"),
        ),
        (dict(samples=None), dict(data=dict(train="gone.jsonl")), ("gone.jsonl", "no such file")),
        (dict(samples=[["a" * 40, "b"]]), {}, ("nothing would be trained", "seq_length")),
        (
            dict(samples=[["a" * 40, "b"]]),
            dict(data=dict(over_length="error")),
            ("samples[0]", "over_length"),
        ),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_before_anything_is_compiled(arguments, sections, words, earlier_run):
    message = refused(earlier_run, arguments, sections)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (dict(train=dict(batchsize=4)), ("train.batchsize", "train.batch_size")),
        (dict(trian=dict(batch_size=4)), ("trian", "train")),
        (dict(optimizer=dict(name="adamv")), ("adamv", "adamw", "sgd")),
        (dict(optimizer=dict(name="adam_8bit_bnb")), ("adam_8bit_bnb", "adafactor")),
        (dict(scheduler=dict(name="cosine")), ("cosine", "cosine_annealing")),
        (dict(method=dict(gen_kwargs=dict(topk=3))), ("topk", "top_k")),
        (dict(optimizer=dict(grad_dtype="bfloat16")), ("grad_dtype", "model.dtype", "float32")),
    ],
    ids=str,
)
def test_a_wrong_name_in_the_config_is_one_line(sections, words, earlier_run):
    message = refused(earlier_run, {}, sections)
    assert [word for word in words if word not in message] == [], message


def test_malformed_jsonl_names_the_line(tmp_path, earlier_run):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "output": "b"}\n{"prompt": "a", "output": \n')
    message = refused(earlier_run, dict(samples=None), dict(data=dict(train=str(file))))
    assert f"{file}" in message and "line 2" in message


def lines_of(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


PAIR = {"prompt": "a", "output": "b"}
IDS = {"input_ids": [97, 256], "labels": [-100, 256]}
BAD_FILES = {  # name, content and what the one line holds, loaded and streamed
    "missing.jsonl": (lines_of(PAIR, {"prompt": "a"}), "line 2", "'output'", "data."),
    "null.jsonl": (lines_of(PAIR, PAIR | {"output": None}), "line 2", "'output' is None", "filter"),
    "type.jsonl": (lines_of(PAIR, PAIR | {"output": 7}), "line 2 field 'output'", "7 (int)", "str"),
    "kind.jsonl": (lines_of(PAIR, ["a", "b"]), "line 2 is a dialogue", "same kind"),
    "number.jsonl": (lines_of(PAIR, 4), "line 2 is 4 (int)", "must be a str"),
    "blank.jsonl": (b"\n \n", "is empty", "at least one"),
    "latin.jsonl": (lines_of(PAIR) + b'{"prompt": "\xe9"}', "line 2: not UTF-8", "convert"),
    "latin.csv": (b"text\na\n\xe9\n", "line 3: not UTF-8", "convert"),
    "latin.txt.gz": (gzip.compress(b"a\n\xe9\n"), "line 2: not UTF-8", "convert"),
    "twice.txt.gz": (gzip.compress(gzip.compress(b"a")), "line 1", "once more"),
    "plain.txt.gz": (b"a", "no whole gzip file", "make it again"),
    "columns.csv": (b"text,text\na,b\n", "two columns are named 'text'", "rename"),
    "cells.csv": (b"prompt,output\na,b,c\n", "line 2: 3 cells, but 2 columns", "quote"),
    "semicolons.csv": (b"prompt;output\na;b\n", "separated by ';'", "commas"),
    "keys.jsonl": (b'{"text": "a", "text": "b"}\n', "line 1", "'text' twice", "rename"),
    "deep.jsonl": (b'{"text": ' + b"[" * 9999 + b"\n", "line 1", "nested too deep", "flatten"),
    "digits.jsonl": (b'{"n": ' + b"9" * 5000 + b"}\n", "line 1", "digits", "as a text"),
    "nan.jsonl": (b'{"text": "a"}\n{"text": NaN}\n', "line 2", "'text'", "is "),
    "huge.jsonl": (lines_of({"text": "a" * 5_000_001}), "line 1", "5,000,001 char", "split it"),
    "labels.jsonl": (lines_of(IDS, IDS | {"labels": [256]}), "line 2", "2 input_ids", "1 labels"),
    "negative.jsonl": (lines_of(IDS, {"input_ids": [-1, 256]}), "line 2 input_ids has -1", "0 to"),
    "beyond.jsonl": (lines_of(IDS, {"input_ids": [999, 256]}), "line 2", "999", "tokenizer_path"),
    "half.jsonl": (lines_of(IDS, {"input_ids": [1.5, 256]}), "line 2 input_ids has 1.5", "ints"),
    "chat.jsonl": (lines_of({"messages": [{"role": "critic"}]}), "line 1 messages[0]", "critic"),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_it(name, streaming, tmp_path, earlier_run):
    content, *words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    data = dict(train=str(tmp_path / name), streaming=streaming)
    message = refused(earlier_run, dict(samples=None), dict(data=data))
    assert [word for word in (name, *words) if word not in message] == [], message


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_bad_rows_are_skipped_and_counted(streaming, tmp_path):
    bad = [{"prompt": "a"}, PAIR | {"output": ""}, PAIR | {"output": 7}, ["a"], "text", 4, None]
    (tmp_path / "a.jsonl").write_bytes(lines_of(PAIR, *bad, PAIR))
    config = tiny_config(tmp_path / "run").evolve(
        data=dict(
            train=str(tmp_path / "a.jsonl"),
            on_bad_row="skip",
            streaming=streaming,
            eval_prompts=[],
        )
    )
    train = load_inputs(config, tokenizer=AutoTokenizer.from_pretrained(BYTE_TOKENIZER)).train
    report = run_report(train, {})
    assert (report["rows_read"], report["kept"]) == (9, 2)
    fates = {"missing_field": 2, "empty_answer": 1, "wrong_type": 2, "other_format": 2}
    assert report["dropped"] == fates
    shown = " ".join(sum(report["problems"].values(), []))
    assert [line for line in range(2, 9) if f"a.jsonl line {line}" not in shown] == []


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize("num_before", [1, 3000], ids=["at the start", "far into the file"])
def test_lines_that_cannot_be_read_are_skipped_and_counted(streaming, num_before, tmp_path):
    """A fault in a line is that row's, wherever it stands; the rows around it are kept."""
    broken = [b'{"text": "\xff"}', b'{"text": "a', b'{"text": "a", "text": "b"}']
    lines = [b'{"text": "good"}'] * num_before + broken + [b'{"text": "last"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "a.txt").write_bytes(b"good\n" * num_before + b"\xff\n\nlast\n")
    fates = {
        "a.jsonl": ({"not_utf8": 1, "malformed_json": 1, "unreadable_json": 1}, num_before + 4),
        "a.txt": ({"not_utf8": 1}, num_before + 3),
    }
    for name, (dropped, last_line) in fates.items():
        config = tiny_config(tmp_path / "run").evolve(
            data=dict(
                train=str(tmp_path / name),
                on_bad_row="skip",
                streaming=streaming,
                look_ahead=10_000,
                eval_prompts=[],
            )
        )
        train = load_inputs(config, tokenizer=AutoTokenizer.from_pretrained(BYTE_TOKENIZER)).train
        assert train.counts.kept == num_before + 1
        assert {k: n for k, n in train.counts.dropped.items() if k != "blank_line"} == dropped
        assert train.examples[num_before].text().startswith("last")
        assert train.examples[num_before].origin == f"{name} line {last_line}"
        shown = " ".join(sum(train.counts.shown.values(), []))
        assert f"{name} line {num_before + 1}: not UTF-8 text" in shown


def test_a_chat_template_that_is_no_file(earlier_run):
    tokenizer = dict(tokenizer_path=BYTE_TOKENIZER, chat_template="nowhere.jinja")
    message = refused(earlier_run, {}, dict(tokenizer=tokenizer))
    assert "tokenizer.chat_template 'nowhere.jinja' has no braces" in message


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_folder_that_cannot_be_written_is_found_first(place, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="train.checkpoint_dir=.*cannot be written") as error:
        jax_sft.train(samples=[], config=tiny_config(tmp_path / place))
    assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(BYTE_TOKENIZER)
    model = jax_sft.CausalLM.open(None, fields=TINY_GPT2, tokenizer=tokenizer)
    model.init(0)
    model.save_pretrained(folder)
    return folder


def truncate(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-100])


def pickled(weights: Path) -> None:
    weights.rename(weights.with_name("pytorch_model.bin"))


def of_another_width(weights: Path) -> None:
    config = weights.with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"n_embd": 24}))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (truncate, ("model.safetensors", "no whole safetensors file")),
        (Path.unlink, ("no weights", "model.safetensors")),
        (pickled, ("pytorch_model.bin", "convert it")),
        (of_another_width, ("16", "24")),
        (lambda weights: weights.with_name("config.json").unlink(), ("config.json",)),
    ],
    ids=["truncated", "gone", "pickled", "other width", "no config"],
)
def test_a_model_folder_that_is_none(harm, words, model_folder, tmp_path, earlier_run):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    harm(folder / "model.safetensors")
    message = refused(
        earlier_run,
        dict(model_path=str(folder)),
        dict(model=dict(init="pretrained"), tokenizer=dict(tokenizer_path=None)),
    )
    assert [word for word in words if word not in message] == [], message


def test_a_hub_name_without_a_network_says_what_to_pass(earlier_run):
    message = refused(
        earlier_run,
        dict(model_path="nobody/nothing"),
        dict(model=dict(init="pretrained"), tokenizer=dict(tokenizer_path=None)),
    )
    assert "nobody/nothing" in message and "folder" in message
