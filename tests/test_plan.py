"""A plan: its bytes are those of a real state, and the TPU compiler takes the step everywhere."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import tiny_config

from jax_sft import plan, planned_step, topology
from jax_sft.command import run_command
from jax_sft.planned_step import plan_sampler, plan_step
from jax_sft.recipe import batch_structs, make_update, open_model
from jax_sft.sampler import Sampling, compile_sampler, generate_ids
from jax_sft.topology import GIB, has_compiler, parse_topology

ROOT = Path(__file__).parent.parent
EIGHT = parse_topology("v5e:2x4")  # of which the tests have eight CPU devices
TINY = dict(model_type="gpt2", n_layer=1, n_embd=16, n_head=2, n_positions=32, vocab_size=64)
TINY |= dict(bos_token_id=0, eos_token_id=0)


def config_of(fields=TINY, **mesh):
    sizes = dict(data=1, fsdp=1, sequence=1, tensor=1) | mesh
    config = tiny_config("run", model=dict(init="random"), mesh=sizes, train=dict(batch_size=8))
    config.model.config = fields
    return config


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_of(fsdp=-1).to_dict()))
    return file


def bytes_on(device, tree) -> int:
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


def refuse(words):
    def compile_step(*_):
        raise jax.errors.JaxRuntimeError(words)

    return compile_step


def refuse_next(words):
    def programs(*_, **__):
        yield from ()
        raise jax.errors.JaxRuntimeError(words)

    return programs


SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
LLAMA = dict(SIZES, model_type="llama", num_key_value_heads=2, vocab_size=65)
MIXTRAL = dict(LLAMA, model_type="mixtral", num_local_experts=2, vocab_size=64)
BFLOAT16 = dict(model=dict(param_dtype="bfloat16"), optimizer=dict(state_dtype="bfloat16"))
LORA = dict(param_dtype="bfloat16", peft_config=dict(r=2, target_modules="all-linear"))


@pytest.mark.parametrize(
    ("fields", "sizes", "changes"),
    [
        (TINY, dict(fsdp=8), {}),
        (LLAMA, dict(fsdp=2, tensor=4), dict(model=LORA)),
        (MIXTRAL, dict(data=2, fsdp=2, sequence=2), BFLOAT16),
    ],
    ids=["gpt2", "llama, adapters", "mixtral, bfloat16"],
)
def test_bytes_of_the_state_are_those_of_a_real_one(fields, sizes, changes, monkeypatch):
    monkeypatch.setattr(planned_step, "compile_step", refuse("Used 22.50G of 15.75G hbm"))
    config = config_of(fields, **sizes).evolve(**changes)
    step = plan_step(config, EIGHT, jax.devices())
    model = open_model(config, None)
    model.init(0)
    state = make_update(config, model, num_steps=config.train.total_steps).init(model.params)
    batch = jax.tree.map(
        lambda x: jax.device_put(jax.numpy.zeros(x.shape, x.dtype), x.sharding),
        batch_structs(config, model),
    )
    for device in jax.devices():
        real = {
            "parameters": bytes_on(device, state.params),
            "optimizer": bytes_on(device, (state.step, state.opt_state)),
            "batch": bytes_on(device, batch),
        }
        assert {kind: (size, "exact") for kind, size in real.items()} == {
            kind: step.memory[kind] for kind in real
        }


def test_kinds_of_memory_add_up_to_what_the_compiler_says():
    step = plan_step(config_of(fsdp=8), EIGHT, jax.devices())
    assert step.fits and step.compile_seconds > 0 and step.collectives
    assert math.isclose(sum(size for size, _ in step.memory.values()), step.needed)
    assert all(size >= 0 for size, _ in step.memory.values())


TOPOLOGIES = ("v4-8", "v5e:2x2", "v5p-8", "v6e:2x2", "2xv5e:1x1")
GPU_TOPOLOGIES = ("gpu:2xH100-80GB", "gpu:A100-80GB", "gpu:16xB200")


def plan_all(names, folder) -> dict[str, dict]:
    """Plans for each in a process of its own: compilers have threads and handlers."""
    if not has_compiler(parse_topology(names[0])):
        pytest.skip(f"what compiles for {names[0]} is not installed")
    files = {}
    for name in names:
        files[name] = folder / f"{len(files)}.json"
        mesh = dict(data=2) if name.startswith("2x") else dict(fsdp=-1)
        config = config_of(**mesh).evolve(train=dict(batch_size=16))
        files[name].write_text(json.dumps(config.to_dict()))
    code = (
        "import json, sys\n"
        "from jax_sft import plan\n"
        "for name, file in json.loads(sys.argv[1]).items():\n"
        "    prompts = 2 * (name in ('v5e:2x2', 'gpu:2xH100-80GB'))\n"
        "    plan.main([f'--config={file}', f'--topology={name}', '--json',\n"
        "               f'--prompts={prompts}'])\n"
    )
    words = json.dumps({name: str(file) for name, file in files.items()})
    done = subprocess.run(
        [sys.executable, "-c", code, words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(files, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    return plan_all(TOPOLOGIES, tmp_path_factory.mktemp("tpu"))


@pytest.fixture(scope="module")
def gpu_plans(tmp_path_factory):
    return plan_all(GPU_TOPOLOGIES, tmp_path_factory.mktemp("gpu"))


def assert_compiled(name, found, attention):
    asked, step = parse_topology(name), found["step"]
    assert (found["num_chips"], found["is_estimate"]) == (asked.num_chips, False)
    assert step["fits"] and 0 < step["needed_bytes"] < step["usable_bytes"]
    assert step["usable_bytes"] == round(asked.chip.usable_gib * GIB)
    assert bool(step["collectives"]) == (asked.num_chips > 1) and step["compile_seconds"] > 0
    # By the platform that is planned for.
    assert f"bfloat16 compute, {attention} attention" in step["described"]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_step_compiles_for_every_tpu(plans, name):
    assert_compiled(name, plans[name], "splash")


@pytest.mark.parametrize("name", GPU_TOPOLOGIES)
def test_the_step_compiles_for_gpus(gpu_plans, name):
    assert_compiled(name, gpu_plans[name], "cudnn")


def test_the_sampler_compiles_for_a_gpu(gpu_plans):
    found = gpu_plans["gpu:2xH100-80GB"]
    assert found["step"]["bytes"]["optimizer"] < found["sampler"]["decode"] < GIB


def test_slices_send_gradients_to_one_another(plans):
    step = plans["2xv5e:1x1"]["step"]
    assert step["collectives"]["between slices"][1] >= step["bytes"]["parameters"] / 4
    assert "between slices" not in plans["v5e:2x2"]["step"]["collectives"]


def test_the_sampler_compiles_for_a_tpu(plans):
    sampler = plans["v5e:2x2"]["sampler"]
    assert sampler["prompt_len"] == 16 and sampler["max_new_tokens"] == 4
    assert plans["v5e:2x2"]["step"]["bytes"]["optimizer"] < sampler["decode"] < GIB


@pytest.mark.parametrize(
    "words", ["Used 22.50G of 15.75G hbm", "temporaries (22.50G) exceeds available HBM (15.75G)"]
)
def test_a_step_that_the_compiler_refuses_does_not_fit(monkeypatch, words):
    monkeypatch.setattr(planned_step, "compile_step", refuse(f"RESOURCE_EXHAUSTED: {words}."))
    step = plan_step(config_of(fsdp=8), EIGHT, jax.devices())
    assert not step.fits and step.usable == 15.75 * GIB
    assert 22.5 * GIB <= step.needed < 22.51 * GIB


def test_another_error_of_the_compiler_is_not_hidden(monkeypatch):
    monkeypatch.setattr(planned_step, "compile_step", refuse("INTERNAL: a bug"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        plan_step(config_of(fsdp=8), EIGHT, jax.devices())


def test_the_sampler_is_planned_for_the_longest_prompts():
    config = config_of(fsdp=8)
    sampler = plan_sampler(config, EIGHT, jax.devices(), num_prompts=3)
    assert (sampler.prompt_len, sampler.max_new_tokens) == (16, 4)
    state = make_update(config, open_model(config, None), num_steps=6).structs
    assert sampler.decode > planned_step.device_bytes(state)


@pytest.mark.parametrize(("refused", "fit"), [("prefill", True), ("decode", False)])
def test_a_sampler_that_the_compiler_refuses_leaves_the_plan(monkeypatch, capsys, refused, fit):
    def refusing(*args, **options):
        if refused == "decode":
            yield next(compile_sampler(*args, **options))
        raise jax.errors.JaxRuntimeError("Used 38.62G of 15.75G hbm")

    monkeypatch.setattr(planned_step, "compile_sampler", refusing)
    monkeypatch.setattr(plan, "make_devices", lambda _: jax.devices())
    found = plan.plan(config_of(fsdp=8), EIGHT, fit=fit, num_prompts=64)
    plan.print_plan(*found)
    shown = capsys.readouterr().out
    assert "fits: " in shown and "38.62   GiB a chip at least, with the opt" in shown
    assert "state: DOES NOT FIT" in shown and "--prompts=8, or with shorter ones" in shown
    told = plan.as_json(*found)
    assert told["step"]["fits"] and told["sampler"]["refused"] == refused
    assert not told["sampler"]["fits"] and 38 * GIB < told["sampler"][refused] < 39 * GIB
    assert (told["sampler"]["decode"] is None) == (refused == "prefill")


def test_answers_that_leave_prompts_no_room_cost_no_search(monkeypatch):
    monkeypatch.setattr(planned_step, "compile_step", refuse("INTERNAL: too late"))
    monkeypatch.setattr(plan, "make_devices", lambda _: jax.devices())
    config = config_of(fsdp=8).evolve(method=dict(gen_kwargs=dict(max_new_tokens=32)))
    for fit in (False, True):
        with pytest.raises(
            ValueError, match="max_new_tokens=32 leaves prompts no room in the .* 32"
        ):
            plan.plan(config, EIGHT, fit=fit, num_prompts=64)


def test_another_error_of_the_sampler_s_compiler_is_not_hidden(monkeypatch):
    monkeypatch.setattr(planned_step, "compile_sampler", refuse_next("INTERNAL: a bug"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        plan_sampler(config_of(fsdp=8), EIGHT, jax.devices(), num_prompts=3)


def test_fewer_prompts_help_where_a_device_has_several():
    sizes = dict(num_prompts=64, num_rows=64, num_shards=16, prompt_len=9, max_new_tokens=4)
    sizes |= dict(prefill=2.0, decode=None, refused="prefill", usable=1.0, compile_seconds=1.0)
    sampler = planned_step.PlannedSampler(**sizes)
    assert "--prompts=16," in plan._remedy(sampler)
    few = dataclasses.replace(sampler, num_prompts=16, num_rows=16)
    assert "fewer take no less" in plan._remedy(few)


def test_the_planned_sampler_is_the_one_that_runs():
    model = open_model(config_of(fsdp=8), None)
    model.init(0)
    prompts = [[number + 1, 5, 9] for number in range(8)]
    sampling = Sampling(max_new_tokens=4, do_sample=False)
    options = dict(sampling=sampling, stop_ids=[0], num_batch_shards=8)
    with jax.set_mesh(model.mesh):
        expected = generate_ids(model.decoder, model.params, prompts, seed=0, **options)
        prefill, decode = compile_sampler(
            model.decoder, model.param_structs(), num_prompts=8, prompt_len=3, **options
        )
        prompts_BP = np.pad(np.array(prompts, np.int32), ((0, 0), (0, 13)))
        lengths_B, rows_B = np.full(8, 3, np.int32), np.arange(8, dtype=np.int32)
        state = prefill(model.params, prompts_BP, lengths_B)
        state = decode(model.params, rows_B, np.uint32(0), state, lengths_B, np.int32(4))
    assert [[i for i in row if i >= 0] for row in state.answer_BG.tolist()] == expected


def test_gpus_are_estimated_where_nothing_compiles_for_them(config_file, monkeypatch, capsys):
    monkeypatch.setattr(topology, "has_compiler", lambda topology: False)
    words = [f"--config={config_file}", "--topology=gpu:8xH100-80GB"]
    plan.main([*words, "--config.train.batch_size=16"])
    shown = capsys.readouterr().out
    assert "an estimate, by arithmetic alone: nothing was compiled" in shown
    assert "bfloat16 compute" in shown and "fits:" in shown and "of 60.00 GiB" in shown
    plan.main([*words, "--json", "--fit"])
    found = json.loads(capsys.readouterr().out)
    assert found["is_estimate"] and found["step"]["compile_seconds"] is None
    assert found["num_ways"] > 1 and len(found["tried"]) == 1


def test_what_is_far_too_large_is_said_to_be(config_file, monkeypatch, capsys):
    monkeypatch.setattr(topology, "has_compiler", lambda topology: False)
    words = [f"--config={config_file}", "--config.model.config.n_embd=8192"]
    words += ["--config.model.config.n_layer=80", "--config.model.config.vocab_size=128256"]
    plan.main([*words, "--topology=gpu:8xH100-80GB"])
    shown = capsys.readouterr().out
    assert "DOES NOT FIT: needs" in shown and "fits:" not in shown
    plan.main([*words, "--topology=gpu:8xL4-24GB", "--fit"])
    assert "by arithmetic none of" in capsys.readouterr().out


def refused(monkeypatch, capsys, *argv) -> str:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    with pytest.raises(SystemExit) as exit:
        run_command(plan.main)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--topology is missing: name what to plan for, as --topology=v5e:4x4"),
        (["--topology=v9-8"], "--topology=v9-8 is unknown"),
        (["--topology=gpu:8xH100", "--prompts=-1"], "--prompts is -1"),
        (["--topology=gpu:8xH100", "--config.train.batch_size=12"], "does not divide over 8"),
        (["--topology=gpu:8xH100", "--config.mesh.tensor=3"], "mesh data=1"),
        (["--topology=gpu:8xH100", "--fast"], "unknown flag --fast"),
    ],
)
def test_a_mistake_is_one_line(config_file, monkeypatch, capsys, flags, words):
    assert words in refused(monkeypatch, capsys, f"--config={config_file}", *flags)


def test_without_libtpu_it_is_one_line(config_file, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = refused(monkeypatch, capsys, f"--config={config_file}", "--topology=v5e:4x4")
    assert 'pip install "jax[tpu]"' in error
