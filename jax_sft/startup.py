"""What a run says of itself before its first step, and the one way to say a line.

In: the config, the model, the batch arithmetic and the data report. Out: lines on standard
output, from the first process alone.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_sft import flops
from jax_sft.config import SFTConfig
from jax_sft.data.report import print_report
from jax_sft.distributed import is_first
from jax_sft.model.causal_lm import CausalLM
from jax_sft.sharding import describe_mesh


def say(what: str, text: str) -> None:
    """Prints a line, once for all processes, with what it is about in a column of its own."""
    if is_first():
        print(f"{what:<11} {text}", flush=True)


def shown(path: Path) -> Path:
    """Returns a path as a person would write it: without the folder that they are in."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def print_start(
    config: SFTConfig,
    model: CausalLM,
    *,
    trained: dict[str, bool],
    num_steps: int,
    steps_per_epoch: int | None,
    data_report: dict[str, Any],
    note: str | None = None,
) -> None:
    """Prints devices, precision, model, batch, steps and the data report.

    Args:
        config: the run's config.
        model: opened; its weights are not needed.
        trained: whether a parameter is trained, by its path.
        num_steps: steps of the whole run.
        steps_per_epoch: steps of its first epoch; None for a stream.
        data_report: what `data.report.run_report` returned.
        note: what is to be said of the eval prompts.
    """
    numerics, train = model.decoder.numerics, config.train
    num_parts = train.batch_size // (train.minibatch_size or train.batch_size)
    say("devices", describe_mesh(model.mesh))
    say(
        "precision",
        f"{numerics.param_dtype.__name__} parameters, "
        f"{'float32 adapters, ' if model.adapters is not None else ''}"
        f"{numerics.dtype.__name__} compute, {config.optimizer.grad_dtype} gradients, "
        f"{config.optimizer.state_dtype} moments; norms, softmax, loss and sums in float32",
    )
    reason = f", since {model.attention_reason}" if model.attention_reason else ""
    say("attention", f"{numerics.attention}{reason}")
    say("model", f"{model.config.model_type}, {model.num_params:,} parameters")
    num_trained = model.count_params(trained.__getitem__)
    if num_trained != model.num_params:
        say("trained", f"{num_trained:,} parameters ({_trained_part(config, model)})")
    say(
        "batch",
        f"{train.batch_size} rows x {train.seq_length} tokens = "
        f"{train.batch_size * train.seq_length:,} tokens a step, "
        f"in {_count(num_parts, 'microbatch', 'microbatches')} "
        f"over {_count(model.mesh.size, 'device', 'devices')}",
    )
    if steps_per_epoch is None:
        say("steps", f"at most {num_steps:,}, or what the stream gives; its first window:")
    else:
        say("steps", f"{num_steps:,} ({steps_per_epoch:,} an epoch)")
    if peak_flops(model) is not None:
        say("mfu", flops.FORMULA)
    if note is not None:
        say("prompts", note)
    if is_first():
        print_report(data_report)
        for name, report in data_report.get("eval", {}).items():
            print_report(report, title=f"eval data {name}".rstrip())


def _trained_part(config: SFTConfig, model: CausalLM) -> str:
    if model.adapters is None:
        return f"model.num_layers_unfrozen={config.model.num_layers_unfrozen}"
    layers = ", ".join(sorted(model.adapters.targets))
    return f"adapters of rank {model.adapters.rank} on {layers}"


def flops_a_step(config: SFTConfig, model: CausalLM, *, trained: dict[str, bool]) -> float:
    """Counts the FLOPs of a step, over all devices together.

    Args:
        config: the run's config.
        model: opened; its weights are not needed.
        trained: whether a parameter is trained, by its path.
    """
    decoder, train = model.decoder.config, config.train

    def count_met(is_meant: Callable[[str], bool]) -> int:
        """Counts parameters; of experts, those that a token meets."""
        num_meant = model.count_params(is_meant)
        if decoder.experts is None:
            return num_meant
        idle = 1 - decoder.experts.num_chosen / decoder.experts.num_experts
        in_experts = model.count_params(lambda path: is_meant(path) and _is_expert(path))
        return round(num_meant - idle * in_experts)

    return flops.train_flops(
        num_params=count_met(lambda path: True),
        num_passed=count_met(lambda path: not path.startswith("frozen_layers")),
        num_trained=count_met(trained.__getitem__),
        num_layers=decoder.num_layers,
        num_passed_layers=decoder.num_layers - model.decoder.num_frozen_layers,
        attention_width=decoder.num_heads * decoder.head_width,
        row_len=train.seq_length,
        num_tokens=train.batch_size * train.seq_length,
    )


def _is_expert(path: str) -> bool:
    """The router is met by every token, an expert by few."""
    return re.search("/experts/(gate|up|down)/", path) is not None


def peak_flops(model: CausalLM) -> float | None:
    """Returns the FLOP/s of all devices together; None where they are not known."""
    peak = flops.peak_flops(model.mesh.devices.flat[0].device_kind)
    return None if peak is None else peak * model.mesh.size


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"
