"""Every key of the config, once: its default, type, unit and constraint.

What comes in: a value from Python, YAML or JSON, or a flag's text, and the key it is meant for.
What goes out: the value in the key's type, or one line that says what was expected. The config,
the flags' parser and the help text all read these tables.
"""

import difflib
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Key(NamedTuple):
    """What one key holds; None is accepted where it is the default or one of the choices."""

    default: Any
    kind: str  # a name in _KINDS, or choice
    help: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    choices: tuple = ()


def _choice(default: Any, choices: Sequence, help: str) -> Key:
    return Key(default, "choice", help, choices=tuple(choices))


# How a row may hold its text; "dialogue" is a list of [prompt, output, ...].
ROW_FORMATS = ("text", "dialogue", "prompt_output", "messages", "sharegpt", "tokens")

# Names and arguments follow torch.optim where it has the optimizer.
OPTIMIZERS = {
    "adamw": ("lr", "betas", "eps", "weight_decay"),
    "adam": ("lr", "betas", "eps", "weight_decay"),
    "sgd": ("lr", "momentum", "nesterov", "weight_decay"),
    "adafactor": ("lr", "decay_rate", "clipping_threshold", "weight_decay"),
    "lion": ("lr", "betas", "weight_decay"),
    "muon": ("lr", "momentum", "nesterov", "betas", "eps", "weight_decay"),
}
SCHEDULERS = {
    "cosine_annealing": ("T_max", "eta_min"),
    "linear": ("start_factor", "end_factor", "total_iters"),
    "constant": (),
}
OPTIMIZER_KWARGS = {
    "lr": Key(1e-4, "float", "peak learning rate, after the warm-up", 0),
    "betas": Key((0.9, 0.95), "floats", "decay rates of the two moments, each in [0, 1)"),
    "eps": Key(1e-8, "float", "added to the root of the second moment", 0),
    "weight_decay": Key(1e-6, "float", "an L2 gradient for adam and sgd, decoupled elsewhere", 0),
    "momentum": Key(0.0, "float", "of sgd and muon, in [0, 1]", 0, 1),
    "nesterov": Key(False, "bool", "Nesterov's momentum, of sgd and muon"),
    "decay_rate": Key(0.8, "float", "exponent of adafactor's second moment decay", 0, 1),
    "clipping_threshold": Key(
        1.0, "float", "largest root mean square of an adafactor update", above=0
    ),
}
SCHEDULER_KWARGS = {
    "T_max": Key(None, "float", "steps of half a cosine; None: the steps after the warm-up", 1),
    "eta_min": Key(0.0, "float", "learning rate at T_max", 0),
    "start_factor": Key(1.0, "float", "of lr, at the first step after the warm-up", 0),
    "end_factor": Key(0.0, "float", "of lr, after total_iters", 0),
    "total_iters": Key(None, "int", "steps between them; None: the steps after the warm-up", 1),
}
# Each may also be a list, which is then swept.
GEN_KWARGS = {
    "max_new_tokens": Key(40, "int", "most tokens of an output", 1),
    "top_k": Key(0, "int", "sample among the k likeliest tokens; 0: among all", 0),
    "top_p": Key(1.0, "float", "sample among the likeliest tokens of this mass", None, 1, 0),
    "temperature": Key(1.0, "float", "divides the logits; do_sample=False is greedy", above=0),
    "do_sample": Key(True, "bool", "False takes the likeliest token"),
    "repetition_penalty": Key(1.0, "float", "above 1 disfavours tokens seen before", above=0),
}

KEYS: dict[str, dict[str, Key]] = {
    "train": {
        "seq_length": Key(1024, "int", "tokens in a row, and most inputs of an example", 1),
        "epochs": Key(100, "int", "most passes over the data", 1),
        "total_steps": Key(1000, "int", "most optimizer steps; the smaller of the two ends it", 1),
        "batch_size": Key(8, "int", "rows in an optimizer step, over all devices", 1),
        "minibatch_size": Key(
            None, "int", "rows in a microbatch, divides batch_size; None: all", 1
        ),
        "eval_interval": Key(100, "int", "steps between evaluations", 1),
        "checkpoint_interval": Key(500, "int", "steps between checkpoints", 1),
        "checkpoint_dir": Key("ckpts", "str", "the run's folder; everything is written there"),
        "save_best": Key(True, "bool", "keep the best weights by best_metric, if one is named"),
        "save_optimizer": Key(True, "bool", "checkpoints hold optimizer state, as resuming needs"),
        "resume_from_checkpoint": Key(None, "str", "a run's folder, or 'auto': checkpoint_dir's"),
        "seed": Key(
            1000, "int", "of data order, initial weights, dropout and sampling", 0, 2**32 - 1
        ),
        "tracker": _choice("tensorboard", ("tensorboard", "wandb", None), "beside metrics.jsonl"),
        "logging_dir": Key(None, "str", "TensorBoard's folder; None: checkpoint_dir/tensorboard"),
        "project_name": Key("jax_sft", "str", "W&B's project"),
        "run_name": Key(None, "str", "W&B's run; None: W&B chooses"),
        "entity_name": Key(None, "str", "W&B's entity; None: the user's own"),
        "group_name": Key(None, "str", "W&B's group"),
        "tags": Key((), "strings", "W&B's tags"),
        "log_interval": Key(10, "int", "steps between logged metrics", 1),
        "keep_checkpoints": Key(3, "int", "newest checkpoints kept on disk", 1),
        "best_metric": Key(None, "str", "max:metrics/x or min:eval/loss; losses default to min"),
        "profile_steps": Key(None, "pair", "(first, end): steps traced for the profiler"),
    },
    "model": {
        "model_path": Key("gpt2", "str", "a transformers folder, or a hub name"),
        "num_layers_unfrozen": Key(-1, "int", "top layers that train; -1: everything", -1),
        "peft_config": Key(None, "dict", "PEFT's LoRA config; None: full fine-tuning"),
        "init": _choice("pretrained", ("pretrained", "random"), "where the weights come from"),
        "config": Key({}, "dict", "transformers config fields; all of them for init='random'"),
        "dtype": _choice("auto", ("auto", "float32", "bfloat16"), "compute; auto: float32 on CPU"),
        "param_dtype": _choice(
            "auto", ("auto", "float32", "bfloat16"), "weights; auto: float32; see docs/memory.md"
        ),
        "remat": _choice(
            "dots",
            ("dots", "none", "offload", "minimal", "full"),
            "kept for the backward pass: docs/memory.md",
        ),
        "attention": _choice(
            "auto", ("auto", "xla", "splash", "cudnn"), "attention backend; auto: by platform"
        ),
    },
    "tokenizer": {
        "tokenizer_path": Key(None, "str", "a folder or a hub name; None: model.model_path"),
        "truncation_side": _choice("right", ("right", "left"), "the end that is cut off"),
        "add_bos": Key(None, "bool", "BOS before a sample; None: as the tokenizer itself does"),
        "add_eos": _choice(True, (True, "last", False), "EOS after every output, or the last"),
        "chat_template": Key(None, "str", "Jinja, or a file of it; None: the tokenizer's own"),
        "chat_template_kwargs": Key({}, "dict", "what else the template is given"),
        "stop_tokens": Key((), "strings", "tokens that end an answer; none: found by themselves"),
    },
    "optimizer": {
        "name": _choice("adamw", tuple(OPTIMIZERS), "see optimizer.kwargs"),
        "kwargs": Key(
            {name: OPTIMIZER_KWARGS[name].default for name in OPTIMIZERS["adamw"]},
            "dict",
            "arguments of the optimizer; those left out have torch.optim's defaults",
        ),
        "state_dtype": _choice("float32", ("float32", "bfloat16"), "moments; see docs/memory.md"),
        "grad_dtype": _choice("float32", ("float32", "bfloat16"), "gradients; see docs/memory.md"),
        "max_grad_norm": Key(
            None, "float", "clips the gradients' global norm; None: no clipping", above=0
        ),
    },
    "scheduler": {
        "name": _choice("cosine_annealing", tuple(SCHEDULERS), "see scheduler.kwargs"),
        "kwargs": Key({"T_max": 1e12, "eta_min": 1e-4}, "dict", "arguments of the schedule"),
        "warmup_steps": Key(0, "int", "steps of linear rise from 0 to lr, before the schedule", 0),
    },
    "method": {
        "name": _choice("sftconfig", ("sftconfig",), "trlX's name for supervised fine-tuning"),
        "gen_kwargs": Key(
            {k: GEN_KWARGS[k].default for k in ("max_new_tokens", "top_k", "top_p", "do_sample")},
            "dict",
            "how evaluation samples; a list is swept",
        ),
        "router_aux_loss": Key(0.0, "float", "weight of the experts' imbalance in the loss", 0),
        "z_loss": Key(0.0, "float", "weight of the squared log normaliser in the loss", 0),
        "label_smoothing": Key(0.0, "float", "share of a target spread evenly, in [0, 1]", 0, 1),
    },
    "data": {
        "train": Key(
            None,
            "mixture",
            "a file, hub name, module:function; or several",
        ),
        "eval": Key(None, "sources", "likewise, held out, for eval/loss; or {name: source}"),
        "split": Key("train", "str", "of a hub dataset"),
        "eval_split": Key(None, "str", "of a hub dataset that data.eval names; None: data.split"),
        "format": _choice(
            None, (None, "json", "jsonl", "csv", "parquet", "text"), "None: by the file's name"
        ),
        "row_format": _choice(None, (None, *ROW_FORMATS), "None: by a row's fields"),
        "text_field": Key("text", "str", "a row's whole text, where there is no prompt"),
        "prompt_field": Key("prompt", "str", "a row's prompt, which is not trained"),
        "output_field": Key("output", "str", "a row's output, which is trained"),
        "messages_field": Key("messages", "str", "a row's conversation"),
        "template": Key(None, "str", "'alpaca', or a prompt such as 'Q: {question}\\nA: '"),
        "filter": Key(None, "str", "keeps the rows where it is true, as 'label == 1'"),
        "train_turns": _choice(
            "all", ("all", "last", "flagged"), "which answers of a conversation are trained"
        ),
        "on_bad_row": _choice("error", ("error", "skip"), "skip: leave them out and count them"),
        "packing": _choice("best_fit", ("best_fit", "none"), "none: one example a row"),
        "over_length": _choice(
            "truncate", ("truncate", "split", "drop", "error"), "examples beyond seq_length"
        ),
        "shuffle": Key(True, "bool", "a new order each epoch, from train.seed"),
        "max_samples": Key(None, "int", "most samples read; None: all", 1),
        "num_proc": Key(1, "int", "processes that read and tokenize", 1),
        "cache_dir": Key(
            None, "str", "keeps tokenized data; None: in the user's cache; 'off': nowhere"
        ),
        "streaming": Key(False, "bool", "read while training, in bounded memory"),
        "look_ahead": Key(256, "int", "rows of seq_length that a stream is packed within", 1),
        "eval_prompts": Key(None, "prompts", "a list, a file or module:function"),
        "metric_fn": Key(None, "str", "module:function(samples, prompts, outputs, **metadata)"),
        "stop_sequences": Key((), "strings", "strings that end an output"),
    },
    "mesh": {
        "data": Key(1, "int", "devices that hold copies of the weights; -1: those left", -1),
        "fsdp": Key(-1, "int", "devices that share weights and rows; -1: those left", -1),
        "sequence": Key(1, "int", "devices that share a row's tokens; -1: those left", -1),
        "tensor": Key(1, "int", "devices that share heads and MLP; -1: those left", -1),
    },
}

# The free-form dicts whose names are known: their table, and who takes which name.
NAMED_DICTS: dict[str, tuple[dict[str, Key], Mapping[str, tuple] | None]] = {
    "optimizer.kwargs": (OPTIMIZER_KWARGS, OPTIMIZERS),
    "scheduler.kwargs": (SCHEDULER_KWARGS, SCHEDULERS),
    "method.gen_kwargs": (GEN_KWARGS, None),
}
_PATHS = [f"{section}.{key}" for section, keys in KEYS.items() for key in keys] + [
    f"{path}.{name}" for path, (table, _) in NAMED_DICTS.items() for name in table
]


class UnknownKeyError(ValueError, AttributeError):
    """A name that the config does not have, with the nearest that it has."""


def unknown_key(path: str, known: Iterable[str], *, flag: str = "") -> UnknownKeyError:
    """The error for a dotted path that the config does not have.

    Args:
        path: the dotted path as the user wrote it.
        known: the names that its last name could have been; none where its section is unknown.
        flag: what stands before a path on the command line, for a flag's error.

    Returns:
        The error, to be raised, with the nearest known path.
    """
    parent, dot, name = path.rpartition(".")
    beside = [f"{parent}{dot}{other}" for other in known] or _PATHS
    same_name = [other for other in _PATHS if other.rpartition(".")[2] == name]
    nearest = same_name or difflib.get_close_matches(path, beside, 1, cutoff=0.0)
    kind = "flag" if flag else "config key"
    return UnknownKeyError(f"unknown {kind} {flag}{path}; did you mean {flag}{nearest[0]}?")


def shortened(value: Any) -> str:
    """The value as an error shows it, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain(value: Any) -> Any:
    """A copy in plain Python; lists become tuples, so a config read back from JSON is equal."""
    if isinstance(value, ConfigDict | Mapping):
        return {name: plain(item) for name, item in value.items()}
    if hasattr(value, "tolist"):  # numpy and jax scalars and arrays
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def jsonable(value: Any) -> Any:
    """The inverse of `plain`: what json.dump writes and json.load gives back."""
    if isinstance(value, ConfigDict | Mapping):
        return {name: jsonable(item) for name, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, tuple) else value


def _as_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError
    return int(value)


def _as_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _instance(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError
    return value


def _as_strings(value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else _instance(value, tuple)
    if not all(isinstance(item, str) and item for item in items):
        raise ValueError
    return items


def _as_pair(value: Any) -> tuple[int, int]:
    first, end = (_as_int(item) for item in _instance(value, tuple))
    if not 0 <= first < end:
        raise ValueError
    return first, end


def _as_floats(value: Any) -> tuple[float, float]:
    first, second = (_as_float(item) for item in _instance(value, tuple))
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ValueError
    return first, second


def _as_prompts(value: Any) -> str | tuple:
    for item in () if isinstance(value, str) else _instance(value, tuple):
        prompt = item
        if isinstance(item, dict):
            prompt = item["messages"] if "messages" in item else item["prompt"]
        if not isinstance(prompt, str):
            for message in _instance(prompt, tuple):
                _instance(message, dict | str)
    return value


def _as_mixture(value: Any) -> str | tuple[str | tuple[str, float], ...]:
    if isinstance(value, str):
        return value
    items = []
    for item in _instance(value, tuple):
        if not isinstance(item, str):
            source, share = item
            item = _instance(source, str), _as_float(share)
            if item[1] <= 0:
                raise ValueError
        items.append(item)
    if not items:
        raise ValueError
    return tuple(items)


def _as_sources(value: Any) -> str | dict[str, str]:
    if isinstance(value, str):
        return value
    named = _instance(value, dict)
    if not named or not all(isinstance(source, str) for source in named.values()):
        raise ValueError
    return named


class _Kind(NamedTuple):
    name: str
    convert: Callable[[Any], Any]


_KINDS = {
    "int": _Kind("an int", _as_int),
    "float": _Kind("a finite number", _as_float),
    "bool": _Kind("true or false", lambda value: _instance(value, bool)),
    "str": _Kind("a string", lambda value: _instance(value, str)),
    "strings": _Kind("a list of non-empty strings", _as_strings),
    "pair": _Kind("two ints (first, end) with 0 <= first < end", _as_pair),
    "floats": _Kind("two numbers in [0, 1)", _as_floats),
    "dict": _Kind("a dict", lambda value: _instance(value, dict)),
    "prompts": _Kind(
        "a string, or a list of strings, of conversations or of dicts",
        _as_prompts,
    ),
    "mixture": _Kind("a string, or a list of strings or pairs [string, number]", _as_mixture),
    "sources": _Kind("a string, or a dict of strings", _as_sources),
}


def expected(key: Key) -> str:
    """The values that a key takes, in words."""
    if key.choices:
        return f"one of {', '.join(repr(choice) for choice in key.choices)}"
    words = _KINDS[key.kind].name
    if key.above is not None:
        words += f" above {key.above}"
    if key.least is not None:
        words += f" of at least {key.least}"
    if key.most is not None:
        words += f" and at most {key.most}"
    return f"{words}, or None" if key.default is None else words


def checked(path: str, key: Key, value: Any) -> Any:
    """The value in the key's type; a ValueError names the path, the value and what is expected."""
    value = plain(value)
    if value is None and key.default is None:
        return None
    error = ValueError(
        f"{path} is {shortened(value)}; expected {expected(key)}{_advice(path, value)}"
    )
    if key.choices:
        if any(type(value) is type(choice) and value == choice for choice in key.choices):
            return value
        raise error
    try:
        value = _KINDS[key.kind].convert(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise error from None
    limits = (
        (key.least, operator.ge),
        (key.most, operator.le),
        (key.above, operator.gt),
    )
    if not all(limit is None or holds(value, limit) for limit, holds in limits):
        raise error
    return value


def _advice(path: str, value: Any) -> str:
    if path == "optimizer.name" and "8bit" in str(value):
        return " (for less optimizer memory take adafactor, or optimizer.state_dtype=bfloat16)"
    return ""
