"""python -m jax_sft.plan --config=FILE --topology=v5e:4x4 [--config.section.key=value ...]: plans.

In: the flags of a training run, and devices that need not be here. Out: whether the run fits
them and by how much, memory a device by kind, FLOPs, what a step takes and sends. The very train
step and sampler are compiled, on any Linux machine: for TPUs by libtpu, for GPUs by JAX's plugin
for CUDA, without which they are estimated. Nothing is run, no weights and no data are read.

  --topology=NAME     v5e:4x4, v4-8, 2xv5e-16 (two slices), gpu:8xH100-80GB
  --fit               searches mesh, microbatch and remat for the fastest that fits, and prints
                      the flags; train.batch_size stays
  --prompts=64        prompts of an evaluation, for the sampler; 0 leaves it out
  --json              one JSON object in the place of the table
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from jax_sft.command import Parser, run_command
from jax_sft.config import SFTConfig, config_from_flags, help_text
from jax_sft.topology import (
    GIB,
    Topology,
    as_if_here,
    make_devices,
    parse_topology,
    prepare_environment,
)

if TYPE_CHECKING:
    from jax_sft.fit import Fit
    from jax_sft.planned_step import PlannedSampler, PlannedStep

MFUS = (0.4, 0.5, 0.6)
_NAMES = {"loss": "logits and loss", "working": "a layer at a time"}


def main(argv: Sequence[str]) -> None:
    """Plans the run that the flags ask for.

    Raises:
        ValueError: the flags or the config are not as they must be, or libtpu is missing.
    """
    if not argv or {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{help_text('python -m jax_sft.plan')}")
        return
    flags, others = _parse(argv)
    topology = parse_topology(flags.topology)
    config = config_from_flags(others)
    config.validate()
    prepare_environment(topology)  # before anything imports JAX
    found = plan(config, topology, fit=flags.fit, num_prompts=flags.prompts)
    if flags.json:
        print(json.dumps(as_json(*found)))
    else:
        print_plan(*found)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own flags, and the words that are the config's."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--topology")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--prompts", type=int, default=64)
    flags, others = parser.parse_known_args(argv)
    if flags.topology is None:
        raise ValueError("--topology is missing: name what to plan for, as --topology=v5e:4x4")
    if flags.prompts < 0:
        raise ValueError(f"--prompts is {flags.prompts}; it must be at least 0")
    return flags, others


def plan(
    config: SFTConfig, topology: Topology, *, fit: bool, num_prompts: int
) -> "tuple[Topology, Fit, float, PlannedSampler | None]":
    """Plans a run.

    Args:
        config: validated.
        topology: where it is to run.
        fit: whether to search for the fastest split that fits, and not to take the config's.
        num_prompts: of an evaluation; 0 plans no sampler.

    Returns:
        The topology, what was found, the seconds that it took, and the sampler.
    """
    # After the flags are known to be right and the environment is set: these import JAX.
    from jax_sft.estimate import Estimator
    from jax_sft.fit import Fit, evolved, search
    from jax_sft.planned_step import find_sampling, open_planned, plan_sampler, plan_step

    start = time.perf_counter()
    devices = make_devices(topology)
    alone = Topology(topology.name, topology.chip, topology.platform, (1,))
    one = config.evolve(mesh=dict(data=1, fsdp=1, sequence=1, tensor=1))
    model = open_planned(one, alone, None)
    if num_prompts and devices is not None:
        find_sampling(config, model)  # a mistake in it is to cost no search
    # The compiler uses one core for most of its work.
    with as_if_here(topology), ThreadPoolExecutor() as pool:
        sampler = None
        if num_prompts and devices is not None and not fit:
            sampler = pool.submit(plan_sampler, config, topology, devices, num_prompts=num_prompts)
        if fit:
            estimator = Estimator(config, model)
            found = search(
                config,
                topology,
                estimator,
                plan=lambda config: plan_step(config, topology, devices, estimator=estimator),
            )
        else:
            step = plan_step(config, topology, devices)
            found = Fit(step if step.fits else None, 1, [step])
        if num_prompts and devices is not None and fit and found.step is not None:
            config = evolved(config, found.step.split)
            sampler = pool.submit(plan_sampler, config, topology, devices, num_prompts=num_prompts)
        planned = None if sampler is None or found.step is None else sampler.result()
    return topology, found, time.perf_counter() - start, planned


def print_plan(
    topology: Topology, found: "Fit", seconds: float, sampler: "PlannedSampler | None"
) -> None:
    """Prints a plan: the step that fits, or the last that did not."""
    from jax_sft.fit import flags

    if not found.tried:
        _say("fits", f"nothing: by arithmetic none of {found.num_ways} ways to split the run does")
        return
    step = found.step or found.tried[-1]
    _say("topology", topology.describe())
    _print_what(step)
    _print_memory(step, topology)
    _print_time(step, topology)
    if step.collectives:
        _print_collectives(step)
    if sampler is not None:
        _print_sampler(sampler)
    print()
    if found.num_ways > 1:
        compiled = [step for step in found.tried if step.compile_seconds is not None]
        _say(
            "searched",
            f"{found.num_ways} ways, {len(found.tried)} planned "
            f"({len(compiled)} compiled, {sum(s.compile_seconds for s in compiled):.0f} s)",
        )
        _say("flags" if found.step else "last tried", " ".join(flags(step.split)))
    _say("planned", f"in {seconds:.0f} s")


def _say(what: str, text: str) -> None:
    print(f"{what:<18} {text}")


def _print_what(step: "PlannedStep") -> None:
    split = step.split
    num_ways = split.data * split.fsdp
    _say("model", step.described)
    _say("mesh", " ".join(f"{axis}={size}" for axis, size in split.mesh.items()))
    _say(
        "batch",
        f"{step.num_tokens:,} tokens a step; at a time {split.minibatch_size} rows, "
        f"{split.minibatch_size // num_ways} a chip; remat {split.remat}",
    )
    if step.compile_seconds is None:
        _say("how", "an estimate, by arithmetic alone: nothing was compiled")
    else:
        _say("how", f"the train step, compiled in {step.compile_seconds:.1f} s")


def _print_memory(step: "PlannedStep", topology: Topology) -> None:
    _say("\nmemory a chip", " GiB")
    for kind, (size, known) in step.memory.items():
        _say(_NAMES.get(kind, kind), f"{size / GIB:5.2f}   {known}")
    usable, chip = step.usable / GIB, topology.chip
    share = f"{usable:.2f} GiB that a program may have of {chip.memory_gib:g}"
    if step.fits:
        free = usable - step.needed / GIB
        verdict = f"fits: {free:.2f} GiB ({free / usable:.0%}) are free"
    else:
        least = "" if step.compile_seconds is None else "at least "
        verdict = f"DOES NOT FIT: needs {least}{step.needed / GIB - usable:.2f} GiB more"
    _say("all", f"{step.needed / GIB:5.2f}   of {share}")
    _say("", verdict)


def _print_time(step: "PlannedStep", topology: Topology) -> None:
    from jax_sft import flops

    peak = flops.peak_flops(topology.chip.kind)
    _say("\nFLOPs a step", f" {step.num_flops:.3g}: {flops.FORMULA}")
    for mfu in MFUS:
        seconds = step.num_flops / (mfu * peak * topology.num_chips)
        rate = step.num_tokens / seconds
        a_chip = f"{rate / topology.num_chips:,.0f} a chip"
        _say(f"at {mfu:.0%} MFU", f"{seconds:.3g} s a step, {rate:,.0f} tokens/s, {a_chip}")
    if step.network_seconds is not None:
        _say("the network", f"takes at least {step.network_seconds:.3g} s a step")


def _print_collectives(step: "PlannedStep") -> None:
    runs, sent = _by_kind(step)
    _say("\na chip sends", " GB a step")
    for kind in sorted(runs, key=sent.__getitem__, reverse=True):
        _say(kind, f"{sent[kind] / 1e9:8.3f} in {runs[kind]:,}")


def _by_kind(step: "PlannedStep") -> tuple[Counter[str], Counter[str]]:
    runs: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    for collective, num_runs in (step.collectives or {}).items():
        runs[collective.kind] += num_runs
        sent[collective.kind] += round(num_runs * collective.sent_bytes)
    return runs, sent


def _print_sampler(sampler: "PlannedSampler") -> None:
    verb = "compiled in" if sampler.refused is None else "refused after"
    _say(
        "\nsampler",
        f" {sampler.num_prompts} prompts of {sampler.prompt_len} tokens, "
        f"{sampler.max_new_tokens} new; {verb} {sampler.compile_seconds:.1f} s",
    )
    for name in ("prefill", "decode"):
        size = getattr(sampler, name)
        if size is None:
            continue
        verdict = "fits" if size <= sampler.usable else "DOES NOT FIT"
        least = "at least, " if name == sampler.refused else ""
        _say(name, f"{size / GIB:5.2f}   GiB a chip {least}with the optimizer's state: {verdict}")
    if not sampler.fits:
        _say("", _remedy(sampler))


def _remedy(sampler: "PlannedSampler") -> str:
    fewer = max(sampler.num_shards, sampler.num_rows // 8)
    if fewer < sampler.num_prompts:
        return (
            f"evaluate with fewer prompts, and say how many here, as --prompts={fewer}, or with "
            "shorter ones: these are as long as they may be"
        )
    return "evaluate with shorter prompts: these are as long as they may be, and fewer take no less"


def as_json(
    topology: Topology, found: "Fit", seconds: float, sampler: "PlannedSampler | None"
) -> dict[str, Any]:
    """Returns a plan as a JSON object: bytes, seconds, and what was tried."""
    from jax_sft import flops

    peak = flops.peak_flops(topology.chip.kind) * topology.num_chips

    def step_json(step: "PlannedStep") -> dict[str, Any]:
        runs, sent = _by_kind(step)
        return {
            "described": step.described,
            **step.split._asdict(),
            "fits": step.fits,
            "bytes": {kind: round(size) for kind, (size, _) in step.memory.items()},
            "needed_bytes": round(step.needed),
            "usable_bytes": round(step.usable),
            "flops": step.num_flops,
            "tokens": step.num_tokens,
            "seconds_at_mfu": {str(mfu): step.num_flops / mfu / peak for mfu in MFUS},
            "network_seconds": step.network_seconds,
            "collectives": {kind: [runs[kind], sent[kind]] for kind in runs},
            "compile_seconds": step.compile_seconds,
        }

    return {
        "topology": topology.name,
        "num_chips": topology.num_chips,
        "is_estimate": all(step.compile_seconds is None for step in found.tried),
        "step": None if found.step is None else step_json(found.step),
        "num_ways": found.num_ways,
        "tried": [step_json(step) for step in found.tried],
        "sampler": None if sampler is None else vars(sampler) | {"fits": sampler.fits},
        "seconds": seconds,
    }


if __name__ == "__main__":
    run_command(main)
