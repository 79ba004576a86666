"""A checkpoint of eight devices, exported in processes that have other numbers of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tiny_runs import SAMPLES, TINY_GPT2, flags_for, tiny_config
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import jax_sft
from jax_sft import export
from jax_sft.config import BYTE_TOKENIZER
from jax_sft.data.tokenizer import load_tokenizer
from jax_sft.model import pretrained
from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.weight_files import WeightFiles

ROOT = Path(__file__).parent.parent
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains bfloat16 weights for a step, over a vocabulary padded from 257 to 258 rows."""
    folder = tmp_path_factory.mktemp("export")
    tokenizer = load_tokenizer(BYTE_TOKENIZER, chat_template=TEMPLATE)
    base = CausalLM.open(None, fields=TINY_GPT2, tokenizer=tokenizer)
    base.init(seed=0)
    base.generation_config.max_new_tokens = 7
    base.save_pretrained(folder / "base", dtype="bfloat16")
    config = tiny_config(
        folder / "run",
        train=dict(total_steps=1, eval_interval=1),
        model=dict(init="pretrained", model_path=str(folder / "base"), config={}),
        tokenizer=dict(tokenizer_path=str(folder / "base")),
        mesh=dict(data=1, fsdp=4, tensor=2),
    )
    trainer = jax_sft.train(samples=SAMPLES, config=config)
    assert trainer.model.params["embed"]["tokens"].shape == (258, 16)
    trainer.save_pretrained(folder / "float32", dtype="float32")
    return folder


def start(run: Path, name: str, num_devices: int, *flags: str) -> subprocess.Popen:
    given = [f"--checkpoint_dir={run / 'run'}", f"--output={run / name}", *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "jax_sft.export", *given],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags_for(num_devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_all(folder: Path) -> dict[str, np.ndarray]:
    files = WeightFiles(folder)
    whole = {name: tuple(map(slice, [0] * 9, s.shape)) for name, s in files.specs.items()}
    return {name: files.read(name, index) for name, index in whole.items()}


def test_on_other_meshes_with_dtypes_kept_or_chosen(run):
    processes = {  # 6 does not divide the width of 16
        name: start(run, name, *args)
        for name, args in {"one": (1,), "six": (6, "--dtype=float32")}.items()
    }
    outputs = {name: process.communicate(timeout=300) for name, process in processes.items()}
    for name, process in processes.items():
        output, error = outputs[name]
        assert process.returncode == 0, error
        assert output.splitlines()[-1] == f"saved step 1 of {run / 'run'} to {run / name}"
    for name, expected, dtype in [
        ("one", run / "run" / "hf_model", "bfloat16"),
        ("six", run / "float32", "float32"),
    ]:
        exported, trained = read_all(run / name), read_all(expected)
        assert {str(values.dtype) for values in exported.values()} == {dtype}
        assert exported["transformer.wte.weight"].shape == (257, 16)
        assert "lm_head.weight" not in exported  # tied
        assert exported.keys() == trained.keys()
        for tensor, values in trained.items():
            assert values.tobytes() == exported[tensor].tobytes(), tensor
        assert json.loads((run / name / "config.json").read_text())["dtype"] == dtype
        assert AutoConfig.from_pretrained(run / name).vocab_size == 257
        assert GenerationConfig.from_pretrained(run / name).max_new_tokens == 7
        tokenizer = AutoTokenizer.from_pretrained(run / name)
        assert (
            tokenizer("a+1").input_ids
            == AutoTokenizer.from_pretrained(BYTE_TOKENIZER)("a+1").input_ids
        )
        assert tokenizer.chat_template == TEMPLATE
        with safe_open(run / name / "model.safetensors", framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}  # transformers asks for it


def test_nothing_is_said_to_be_saved_that_does_not_read_back(run, tmp_path, monkeypatch, capsys):
    write_weights = pretrained.write_weights

    def flip_a_bit(folder, *args, **kwargs):
        write_weights(folder, *args, **kwargs)
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)

    monkeypatch.setattr(pretrained, "write_weights", flip_a_bit)
    with pytest.raises(OSError, match="reads back other than it was written"):
        export.main([f"--checkpoint_dir={run / 'run'}", f"--output={tmp_path}"])
    assert "saved" not in capsys.readouterr().out


def test_a_step_that_is_not_there(run, tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint of step 9 .*complete: .1."):
        export.main([f"--checkpoint_dir={run / 'run'}", f"--output={tmp_path}", "--step=9"])
