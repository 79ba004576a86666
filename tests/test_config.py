"""The config: names, types, evolve, files, flags and what validate refuses."""

import ast
import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sft.config import (
    BYTE_TOKENIZER,
    SFTConfig,
    config_from_flags,
    default_sft_config,
    help_text,
)
from jax_sft.config_keys import KEYS, NAMED_DICTS
from jax_sft.data.samples import read_samples


def refused(call, *args, **kwargs):
    """The one line that a wrong call is refused with."""
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    line = str(error.value)
    assert line and "\n" not in line
    return line


def flags(text):
    return config_from_flags(text.split())


# Defaults


def test_the_defaults_are_trlxs():
    config = default_sft_config()
    config.validate()
    assert (config.train.seq_length, config.train.epochs, config.train.total_steps) == (
        1024,
        100,
        1000,
    )
    assert (config.train.batch_size, config.train.eval_interval, config.train.seed) == (
        8,
        100,
        1000,
    )
    assert config.model.model_path == "gpt2" and config.tokenizer.truncation_side == "right"
    assert config.optimizer.name == "adamw"
    adamw = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-6}
    assert dict(config.optimizer.kwargs.items()) == adamw
    assert dict(config.scheduler.kwargs.items()) == {"T_max": 1e12, "eta_min": 1e-4}
    sampling = {"max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "do_sample": True}
    assert dict(config.method.gen_kwargs.items()) == sampling


def test_every_key_of_the_table_is_an_attribute_with_its_default():
    config = default_sft_config().to_dict()
    assert {section: list(keys) for section, keys in KEYS.items()} == {
        section: list(values) for section, values in config.items()
    }
    as_json = json.loads(json.dumps({s: {k: v.default for k, v in KEYS[s].items()} for s in KEYS}))
    assert config == as_json


def test_the_byte_tokenizer_ships_with_the_package():
    assert (Path(BYTE_TOKENIZER) / "tokenizer.json").is_file()


# Attributes


def test_attributes_are_set_as_in_trlx():
    config = default_sft_config()
    config.train.seq_length = 2048
    config.model.model_path = Path("models") / "neox"
    config.optimizer.kwargs["lr"] = 1e-5
    config.optimizer.kwargs.eps = 1e-6
    config.method.gen_kwargs = dict(max_new_tokens=256)
    assert config.train.seq_length == 2048 and config.model.model_path == "models/neox"
    assert config.optimizer.kwargs.lr == 1e-5 and config.optimizer.kwargs["eps"] == 1e-6
    assert config.method.gen_kwargs.to_dict() == {"max_new_tokens": 256}
    assert default_sft_config().optimizer.kwargs.lr == 1e-4


@pytest.mark.parametrize(
    ("path", "given", "kept"),
    [
        ("train.batch_size", 4.0, 4),
        ("train.batch_size", np.int64(4), 4),
        ("method.z_loss", 1, 1.0),
        ("optimizer.max_grad_norm", np.float32(0.5), 0.5),
        ("optimizer.max_grad_norm", None, None),
        ("train.tags", ["a", "b"], ("a", "b")),
        ("data.stop_sequences", "Human:", ("Human:",)),
        ("train.profile_steps", [10, 12], (10, 12)),
        ("tokenizer.add_eos", "last", "last"),
        ("data.train", ["a.jsonl", ["b.jsonl", 2]], ("a.jsonl", ("b.jsonl", 2.0))),
        ("data.eval_prompts", [[{"role": "user"}]], (({"role": "user"},),)),
        ("data.eval_prompts", [{"messages": []}], ({"messages": ()},)),
        ("data.eval_prompts", [{"prompt": "a", "label": 1}], ({"prompt": "a", "label": 1},)),
        ("model.peft_config", {"r": 8}, {"r": 8}),
        ("model.config", {"rope_scaling": {"factor": 2}}, {"rope_scaling": {"factor": 2}}),
    ],
)
def test_values_are_kept_in_the_keys_type(path, given, kept):
    section, key = path.split(".")
    config = default_sft_config()
    setattr(config[section], key, given)
    value = config[path]
    value = value.to_dict() if hasattr(value, "to_dict") else value
    assert value == kept and type(value) is type(kept)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("train.batch_size", "4", "train.batch_size is '4'; expected an int of at least 1"),
        ("train.batch_size", 0, "is 0; expected an int of at least 1"),
        ("train.batch_size", 2.5, "is 2.5; expected an int"),
        ("train.batch_size", True, "is True; expected an int"),
        ("train.batch_size", None, "is None; expected an int"),
        ("train.minibatch_size", float("nan"), "is nan; expected an int of at least 1, or None"),
        ("method.z_loss", float("inf"), "is inf; expected a finite number"),
        ("method.label_smoothing", 1.5, "at least 0 and at most 1"),
        ("optimizer.max_grad_norm", 0, "is 0; expected a finite number above 0, or None"),
        ("data.shuffle", 1, "is 1; expected true or false"),
        ("data.packing", "bestfit", "is 'bestfit'; expected one of 'best_fit', 'none'"),
        ("tokenizer.add_eos", 1, "is 1; expected one of True, 'last', False"),
        ("train.profile_steps", (5, 5), "0 <= first < end"),
        ("train.profile_steps", 5, "two ints"),
        ("data.stop_sequences", ["a", ""], "a list of non-empty strings"),
        ("data.train", [], "a list of strings or pairs [string, number]"),
        ("data.train", [["a.jsonl", 0]], "a list of strings or pairs [string, number]"),
        ("data.train", [["a.jsonl"]], "a list of strings or pairs [string, number]"),
        ("data.train", {"a": 1}, "a string, or a list"),
        ("data.eval", ["a.jsonl"], "a string, or a dict of strings"),
        ("data.eval", {"easy": 1}, "a string, or a dict of strings"),
        ("data.eval_prompts", [[1]], "of conversations"),
        ("data.eval_prompts", [{"text": "a"}], "or of dicts"),
        ("optimizer.name", "adamw_8bit_bnb", "take adafactor"),
        ("model.config", "gpt2", "is 'gpt2'; expected a dict"),
    ],
)
def test_a_value_of_another_type_is_refused(path, value, expected):
    section, key = path.split(".")
    config = default_sft_config()
    line = refused(setattr, config[section], key, value)
    assert path in line and expected in line
    assert config == default_sft_config()


def test_kwargs_are_checked_where_they_are_set():
    config = default_sft_config()
    assert "optimizer.kwargs.lr is '1e-4'" in refused(
        config.optimizer.kwargs.__setitem__, "lr", "1e-4"
    )
    assert "two numbers in [0, 1)" in refused(setattr, config.optimizer.kwargs, "betas", (0.9, 1))
    assert "top_p is 0; expected a finite number above 0 and at most 1" in refused(
        setattr, config.method, "gen_kwargs", {"top_p": [0.5, 0]}
    )
    config.method.gen_kwargs = {"temperature": [0.5, 1], "top_k": 5.0}
    assert config.method.gen_kwargs.to_dict() == {"temperature": [0.5, 1.0], "top_k": 5}


# Unknown names


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("train.seq_len", "unknown config key train.seq_len; did you mean train.seq_length?"),
        ("train.lr", "unknown config key train.lr; did you mean optimizer.kwargs.lr?"),
        ("model.batch_size", "unknown config key model.batch_size; did you mean train.batch_size?"),
        ("optimizer.kwargs.beta", "unknown config key optimizer.kwargs.beta; did you mean "
         "optimizer.kwargs.betas?"),
        ("method.gen_kwargs.max_tokens", "unknown config key method.gen_kwargs.max_tokens; did you "
         "mean method.gen_kwargs.max_new_tokens?"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_one_line_with_the_nearest(wrong, line):
    config = default_sft_config()
    *parents, name = wrong.split(".")
    place, nested = config, {name: 1}
    for parent in parents:
        place = place[parent]
    for parent in reversed(parents):
        nested = {parent: nested}
    assert refused(setattr, place, name, 1) == line
    assert refused(config.evolve, **nested) == line
    assert refused(SFTConfig.from_dict, nested) == line
    assert (
        refused(flags, f"--config.{wrong}=1").split("did you mean ")[1].removeprefix("--config.")
        == line.split("did you mean ")[1]
    )


def test_unknown_sections_and_reads():
    config = default_sft_config()
    assert "trian; did you mean train?" in refused(config.evolve, trian={})
    assert "batch_size; did you mean train.batch_size?" in refused(config.evolve, batch_size=4)
    assert "did you mean train.seq_length?" in refused(getattr, config.train, "seq_len")
    assert not hasattr(config.train, "seq_len") and hasattr(config.train, "seq_length")
    with pytest.raises(AttributeError):
        config.nothing  # noqa: B018
    assert "train is 7; expected a dict" in refused(config.evolve, train=7)
    assert "train is 7; expected a dict" in refused(SFTConfig.from_dict, {"train": 7})


def test_update_and_unlock_let_no_unknown_name_in():
    config = default_sft_config()
    assert "did you mean train.seq_length?" in refused(config.update, {"train": {"seq_len": 1}})
    config.unlock()
    assert "did you mean train.seq_length?" in refused(setattr, config.train, "seq_len", 1)


# evolve, copies and dicts


def test_evolve_merges_deep_and_leaves_the_original():
    config = default_sft_config()
    before = copy.deepcopy(config)
    new = config.evolve(train=dict(batch_size=4), optimizer=dict(kwargs=dict(lr=2e-5)))
    assert (new.train.batch_size, new.train.seq_length) == (4, 1024)
    assert new.optimizer.kwargs.to_dict() == config.optimizer.kwargs.to_dict() | {"lr": 2e-5}
    new.optimizer.kwargs.lr = 7.0
    new.train.tags = ["x"]
    assert config == before != new
    deeper = config.evolve(model=dict(config=dict(rope=dict(a=1, b=2))))
    deeper = deeper.evolve(model=dict(config=dict(rope=dict(b=3))))
    assert deeper.model.config.to_dict() == {"rope": {"a": 1, "b": 3}}
    two = config.evolve(train=dict(minibatch_size=2))
    assert two.evolve(train=dict(minibatch_size=None)).train.minibatch_size is None


def test_evolve_takes_over_nothing_that_the_caller_can_change():
    kwargs = {"temperature": [0.5]}
    config = default_sft_config().evolve(method=dict(gen_kwargs=kwargs))
    kwargs["temperature"].append("x")
    assert config.method.gen_kwargs.temperature == (0.5,)


def test_another_name_drops_the_defaults_it_does_not_take_but_no_users_value():
    sgd = default_sft_config().evolve(optimizer=dict(name="sgd", kwargs=dict(momentum=0.9)))
    assert set(sgd.optimizer.kwargs) == {"lr", "weight_decay", "momentum"}
    constant = default_sft_config()
    constant.scheduler.name = "constant"
    constant.validate()
    config = default_sft_config().evolve(optimizer=dict(kwargs=dict(betas=(0.5, 0.5))))
    line = refused(config.evolve, optimizer=dict(name="sgd"))
    assert "optimizer.kwargs.betas is not an argument of optimizer.name sgd" in line


def test_copies_are_equal_and_apart():
    config = default_sft_config().evolve(model=dict(config=dict(a=[1, {"b": 2}])))
    for other in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        SFTConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
    ):
        assert other == config and other is not config
        other.optimizer.kwargs.lr = 1.0
        assert other != config
        assert refused(setattr, other.train, "seq_len", 1)
    kwargs = copy.deepcopy(config.optimizer.kwargs)
    assert kwargs == config.optimizer.kwargs and refused(setattr, kwargs, "lrr", 1)


# A part of a config, any keys, as a user may set them.
numbers = st.floats(1e-9, 10.0)
parts = st.fixed_dictionaries(
    {},
    optional={
        "train": st.fixed_dictionaries(
            {},
            optional={
                "batch_size": st.integers(1, 99),
                "tags": st.lists(st.text(min_size=1)),
                "best_metric": st.none() | st.text(),
                "profile_steps": st.none() | st.tuples(st.integers(0, 5), st.integers(6, 9)),
            },
        ),
        "optimizer": st.fixed_dictionaries(
            {}, optional={"kwargs": st.fixed_dictionaries({"lr": numbers, "eps": numbers})}
        ),
        "model": st.fixed_dictionaries(
            {},
            optional={
                "config": st.dictionaries(
                    st.from_regex("[a-z_]+", fullmatch=True).filter(lambda name: len(name) < 9),
                    st.none() | st.booleans() | numbers | st.text() | st.lists(numbers),
                )
            },
        ),
        "data": st.fixed_dictionaries(
            {}, optional={"eval_prompts": st.none() | st.lists(st.text(min_size=1), min_size=1)}
        ),
    },
)


@settings(deadline=None, max_examples=40)
@given(parts)
def test_any_config_comes_back_from_its_json(part):
    config = default_sft_config()
    for section, keys in part.items():
        for key, value in keys.items():
            setattr(config[section], key, value)
    assert SFTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# Flags


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("train.batch_size=4", 4),
        ("train.total_steps=2e3", 2000),
        ("train.minibatch_size=2", 2),
        ("train.minibatch_size=none", None),
        ("optimizer.max_grad_norm=1e-4", 1e-4),
        ("optimizer.max_grad_norm=1", 1.0),
        ("data.shuffle=False", False),
        ("data.shuffle=true", True),
        ("tokenizer.add_bos=None", None),
        ("tokenizer.add_eos=last", "last"),
        ("tokenizer.add_eos=false", False),
        ("train.tracker=None", None),
        ("train.run_name=None", None),
        ("train.run_name=7", "7"),
        ("model.remat=none", "none"),
        ("data.filter=label == 1", "label == 1"),
        ("data.template=a=b", "a=b"),
        ("train.tags=a,b", ("a", "b")),
        ("data.stop_sequences=['a,b','c']", ("a,b", "c")),
        ("data.stop_sequences=", ()),
        ("train.profile_steps=3,5", (3, 5)),
        ("data.eval_prompts=prompts.json", "prompts.json"),
        ("data.train=a.jsonl,b.jsonl", "a.jsonl,b.jsonl"),
        ("data.train=[['a.jsonl', 0.5], 'b.jsonl']", (("a.jsonl", 0.5), "b.jsonl")),
        ("data.eval_prompts=['a', 'b']", ("a", "b")),
        ("mesh.fsdp=-1", -1),
        ("optimizer.kwargs.lr=1e-5", 1e-5),
        ("optimizer.kwargs.betas=0.9,0.99", (0.9, 0.99)),
        ("scheduler.kwargs.T_max=None", None),
        ("method.gen_kwargs.max_new_tokens=2e2", 200),
        ("method.gen_kwargs.temperature=[0.5, 1]", (0.5, 1.0)),
        ("method.gen_kwargs.do_sample=false", False),
        ("model.config.n_layer=2", 2),
        ("model.config.layer_norm_epsilon=1e-5", 1e-5),
        ("model.config.activation_function=no", "no"),
        ("model.config.flag=true", True),
    ],
)
def test_flags_are_parsed_in_the_keys_type(flag, value):
    path = flag.partition("=")[0]
    for argv in ([f"--config.{flag}"], [f"--config.{path}", flag.partition("=")[2]]):
        got = config_from_flags(argv)[path]
        assert got == value and type(got) is type(value)


def test_flags_of_a_dict_add_up():
    whole = "--config.model.config={model_type: gpt2, n_layer: 2, eps: 1e-5}"
    config = config_from_flags([whole, "--config.model.config.n_head=4"])
    expected = {"model_type": "gpt2", "n_layer": 2, "eps": 1e-5, "n_head": 4}
    assert config.model.config.to_dict() == expected
    config = flags("--config.optimizer.kwargs.lr=1 --config.optimizer.kwargs.lr=2")
    assert config.optimizer.kwargs.lr == 2.0


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--config.train.seq_len=1", "did you mean --config.train.seq_length?"),
        ("--config.trian.seq_length=1", "did you mean --config.train.seq_length?"),
        ("--config.train.batch_size.x=1", "did you mean --config.train.batch_size?"),
        ("--config.train=1", "--config.train is a section"),
        (
            "--train.seq_length=1",
            "unknown flag --train.seq_length; did you mean --config.train.seq_l",
        ),
        ("--batch_size=1", "did you mean --config.train.batch_size?"),
        ("--cofnig=a.py", "did you mean --config?"),
        ("train.seq_length=1", "unexpected argument 'train.seq_length=1'"),
        ("--config.train.seq_length", "--config.train.seq_length has no value"),
        ("--config.data.shuffle --config=a.py", "--config.data.shuffle has no value"),
        ("--config=a.py --config=b.py", "--config is given twice, as a.py and b.py"),
        ("--config.train.seq_length=long", "train.seq_length is 'long'; expected an int"),
        ("--config.train.seq_length=None", "train.seq_length is 'None'; expected an int"),
        ("--config.data.shuffle=yes", "data.shuffle is 'yes'; expected true or false"),
        ("--config.optimizer.name=adam_8bit_bnb", "'adam_8bit_bnb'; expected one of 'adamw'"),
        ("--config.optimizer.kwargs.lr=fast", "optimizer.kwargs.lr is 'fast'"),
        ("--config.optimizer.kwargs=3", "optimizer.kwargs is 3; expected a dict"),
        ("--config=no.toml", "--config is 'no.toml'; expected a file that ends in .py"),
    ],
)
def test_a_wrong_flag_is_one_line(argv, line):
    assert line in refused(flags, argv)


# Files


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_runs_config_json_loads_back_equal(tmp_path):
    config = default_sft_config()
    config.optimizer.kwargs = dict(lr=1)
    config.data.eval_prompts = [{"prompt": "a", "ids": [1, 2]}]
    file = write(tmp_path / "config.json", json.dumps(config.to_dict()))
    assert config_from_flags([f"--config={file}"]) == config
    assert config_from_flags(["--config", file, "--config.train.epochs=3"]).train.epochs == 3


def test_a_part_in_yaml_or_json_is_evolved_over_the_defaults(tmp_path):
    text = "optimizer:\n  kwargs: {lr: 1e-5}\ndata:\n  split: no\n  stop_sequences: ['1:30']\n"
    expected = default_sft_config().evolve(
        optimizer=dict(kwargs=dict(lr=1e-5)), data=dict(split="no", stop_sequences=["1:30"])
    )
    assert config_from_flags(["--config", write(tmp_path / "a.yml", text)]) == expected
    as_json = (
        '{"optimizer": {"kwargs": {"lr": 1e-5}}, "data": {"split": "no", "stop_sequences": "1:30"}}'
    )
    assert config_from_flags(["--config", write(tmp_path / "a.json", as_json)]) == expected
    assert config_from_flags(["--config", write(tmp_path / "b.yaml", "")]) == default_sft_config()


def test_a_python_file_gives_its_config(tmp_path, monkeypatch):
    text = (
        "from jax_sft.config import default_sft_config\n"
        "def get_config():\n    return default_sft_config().evolve(train=dict(epochs=2))\n"
    )
    write(tmp_path / "run.py", text)
    monkeypatch.chdir(tmp_path)
    assert config_from_flags(["--config=run.py"]).train.epochs == 2
    assert config_from_flags([f"--config={tmp_path}/run.py"]).train.epochs == 2


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.py", "x = 1\n", "a.py defines no get_config()"),
        ("a.py", "x = 1\ndef f(:\n", "a.py line 2: "),
        ("a.py", "def get_config():\n    x = 1\n    return y\n", "a.py line 3: NameError: name"),
        ("a.py", "def f():\n    1 / 0\ndef get_config():\n    f()\n", "a.py line 2: ZeroDiv"),
        ("a.py", "import nowhere\n", "a.py line 1: ModuleNotFoundError"),
        ("a.py", "def get_config():\n    return {}\n", "returned {}; expected an SFTConfig"),
        ("a.py", "def get_config(size):\n    return {}\n", "a.py: TypeError: get_config() missing"),
        ("a.py", "from jax_sft.config import default_sft_config as d\n\n"
         "def get_config():\n    return d().evolve(train=dict(seq_len=1))\n",
         "a.py line 4: unknown config key train.seq_len; did you mean train.seq_length?"),
        ("a.yaml", "train:\n  epochs: [1\n", "a.yaml line 3: "),
        ("a.yaml", "train:\n  epochs: 1\ntrain:\n  seed: 1\n", "key 'train' is given twice"),
        ("a.yaml", "- 1\n", "a.yaml holds [1]; expected sections of keys"),
        ("a.yaml", "train:\n  epoch: 1\n", "a.yaml: unknown config key train.epoch; did you mean "),
        ("a.yaml", "train:\n", "a.yaml: config section train is None; expected a dict"),
        ("a.yaml", "1: 2\n", "a.yaml: unknown config key 1"),
        ("a.yaml", "x: \x00\n", "a.yaml"),
        ("a.yaml", "train:\n  ? [1]\n  : 2\n", "a.yaml line 2: a key is a list or a dict"),
        ("a.json", '{"train":' * 9999, "a.json is nested too deep; expected sections"),
        ("a.json", '{"train":\n {"epochs": }}', "a.json line 2: "),
        ("a.json", '{"train": {"epochs": 1, "epochs": 2}}', "key 'epochs' is given twice"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_one_line_with_its_place(tmp_path, name, text, line):
    file = write(tmp_path / name, text)
    assert line in refused(config_from_flags, [f"--config={file}"])


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    file = tmp_path / "a.yaml"
    file.symlink_to("/proc/self/mem")
    line = refused(config_from_flags, [f"--config={file}"])
    assert "a.yaml cannot be read (Input/output error); see to its rights" in line


def test_a_missing_file_names_the_one_beside_it(tmp_path):
    write(tmp_path / "gpt2.py", "")
    line = refused(config_from_flags, [f"--config={tmp_path}/gtp2.py"])
    assert f"did you mean {tmp_path}/gpt2.py?" in line


# validate


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("train.minibatch_size=3", "train.minibatch_size 3 does not divide train.batch_size 8"),
        ("mesh.data=-1", "expected at most one -1"),
        ("mesh.tensor=0", "mesh.tensor is 0"),
        ("mesh.data=3 mesh.fsdp=1", "8 rows does not divide over mesh.data x mesh.fsdp = 3"),
        ("mesh.sequence=3", "train.seq_length 1024 is not a multiple of mesh.sequence 3"),
        ("model.init=random", "model.config names no model_type"),
        ("model.peft_config.r=0", "peft_config.r=0 must be a whole number, at least 1"),
        (
            "model.peft_config.peft_type=PREFIX_TUNING",
            "peft_config.peft_type='PREFIX_TUNING' is not",
        ),
        ("model.peft_config.rank=8", "peft_config.rank=8 is not built"),
        ("model.peft_config.r=8 model.num_layers_unfrozen=1", "set one of them"),
        ("scheduler.name=linear", "scheduler.kwargs has no start_factor, which linear needs"),
        ("scheduler.kwargs.T_max=1000 optimizer.kwargs.lr=1e-5", "so the learning rate would rise"),
        ("scheduler.kwargs.T_max=None optimizer.kwargs.lr=1e-5", "eta_min 0.0001 is above"),
        ("train.best_metric=most:x", "train.best_metric is 'most:x'"),
        ("train.best_metric=max:", "train.best_metric is 'max:'"),
    ],
)
def test_validate_refuses_in_one_line(argv, line):
    config = config_from_flags([f"--config.{flag}" for flag in argv.split()])
    assert line in refused(config.validate)


@pytest.mark.parametrize(
    "argv",
    [
        "train.minibatch_size=4",
        "mesh.data=-1 mesh.fsdp=2",
        "mesh.data=2 mesh.fsdp=4",
        "model.init=random model.config.model_type=gpt2",
        "scheduler.name=linear scheduler.kwargs.start_factor=1 scheduler.kwargs.end_factor=0",
        "optimizer.kwargs.lr=1e-5",
        "train.best_metric=min:eval/loss",
        "train.best_metric=metrics/exact@temperature=0.5",
    ],
)
def test_validate_lets_right_configs_through(argv):
    config_from_flags([f"--config.{flag}" for flag in argv.split()]).validate()


def test_validate_wants_a_learning_rate():
    config = default_sft_config()
    config.optimizer.kwargs = dict(eps=1e-8)
    assert "optimizer.kwargs has no lr" in refused(config.validate)


def test_help_has_every_key_and_argument_once():
    lines = help_text().split("\n")
    for section, keys in KEYS.items():
        for key in keys:
            assert sum(line.startswith(f"  --config.{section}.{key}=") for line in lines) == 1
    for table, _ in NAMED_DICTS.values():
        for name in table:
            assert sum(line.startswith(f"        .{name}: ") for line in lines) == 1
    assert max(map(len, lines)) <= 120


# The configs that ship


CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_shipped_config_is_valid_and_its_docstring_has_the_command(file):
    config_from_flags([f"--config={file}"]).validate()
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    assert f"python -m jax_sft.main --config=configs/{file.name}" in docstring


def shipped(name):
    return config_from_flags([f"--config={Path(__file__).parent.parent}/configs/{name}"])


def test_gpt2_is_trlxs_sft_sentiments():
    config = shipped("gpt2.py")
    assert config.data.train is None and config.data.filter == "label == 1"
    assert config.data.eval_prompts == ("I don't know much about Hungarian underground",) * 64
    same = default_sft_config().evolve(
        data=dict(filter="label == 1", eval_prompts=config.data.eval_prompts),
        train=dict(checkpoint_dir=config.train.checkpoint_dir),
    )
    assert config == same


def test_alpaca_gpt2_is_trlxs_sft_alpaca_and_prompts_as_it_trains():
    config = shipped("alpaca_gpt2.py")
    train = config.train
    assert (train.total_steps, train.batch_size, train.seq_length) == (2400, 4, 1024)
    assert config.optimizer.kwargs.lr == 2e-5 and config.data.train is None
    assert config.method.gen_kwargs.max_new_tokens == 256
    instruction = config.data.eval_prompts[0].split("### Instruction:\n")[1].split("\n\n")[0]
    row = {"instruction": instruction, "input": "", "output": "x"}
    fields = {"template": config.data.template, "output_field": config.data.output_field}
    (sample,) = read_samples([row], **fields)
    assert config.data.eval_prompts[0] == sample.content[0].text
