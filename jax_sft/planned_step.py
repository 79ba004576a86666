"""A train step on devices that are not here: what it takes, as the compiler or arithmetic says.

In: the config, and a topology with or without devices to compile for. Out: a `PlannedStep`. What
is exact and what is estimated stands at each figure, and a step that does not fit is an answer.
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractDevice

from jax_sft.compiled import (
    BETWEEN_SLICES,
    Collective,
    Memory,
    Shortage,
    read_collectives,
    read_memory,
    read_shortage,
)
from jax_sft.config import SFTConfig
from jax_sft.estimate import Estimator, Split, bandwidth, split_of
from jax_sft.evaluate import sweep
from jax_sft.inputs import find_tokenizer
from jax_sft.loss import find_chunk_len
from jax_sft.model.causal_lm import CausalLM
from jax_sft.recipe import batch_structs, check_rows, compile_step, make_update, open_model
from jax_sft.sampler import Sampling, compile_sampler, rows_at_once
from jax_sft.sharding import make_abstract_mesh, make_mesh, num_shards
from jax_sft.topology import GIB, Topology

EXACT, ARITHMETIC, COMPILER = "exact", "by arithmetic", "the compiler's"


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """What one optimizer step takes.

    Attributes:
        split: how it is laid over the devices.
        memory: bytes a device by kind, and how each is known.
        needed: bytes a device, all together.
        usable: bytes a device that a program may have.
        num_flops: of all devices, by `flops.FORMULA`.
        num_tokens: of a step, padding included.
        network_seconds: that what is sent takes at least.
        collectives: how often each is executed; None where nothing was compiled.
        compile_seconds: None where nothing was compiled.
        described: the model in a line.
    """

    split: Split
    memory: dict[str, tuple[float, str]]
    needed: float
    usable: float
    num_flops: float
    num_tokens: int
    network_seconds: float | None
    collectives: Counter[Collective] | None
    compile_seconds: float | None
    described: str

    @property
    def fits(self) -> bool:
        """Whether a device has room for it."""
        return self.needed <= self.usable


@dataclasses.dataclass(frozen=True)
class PlannedSampler:
    """What an evaluation's sampling takes, beside the optimizer's state.

    Attributes:
        num_prompts: given.
        num_rows: decoded at once.
        num_shards: parts that these rows are split into.
        prompt_len: tokens of each, as long as they may be.
        max_new_tokens: of an output.
        prefill: bytes a device; with the optimizer's state.
        decode: likewise, of the loop that makes tokens; None where the prefill was refused.
        refused: which of the two the compiler refused, whose bytes are the least that it needs.
        usable: bytes a device that a program may have.
        compile_seconds: for both.
    """

    num_prompts: int
    num_rows: int
    num_shards: int
    prompt_len: int
    max_new_tokens: int
    prefill: float
    decode: float | None
    refused: str | None
    usable: float
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether a device has room for both programs, one after the other."""
        return max(self.prefill, self.decode or 0.0) <= self.usable


def open_planned(
    config: SFTConfig, topology: Topology, devices: Sequence[jax.Device] | None
) -> CausalLM:
    """Opens the config's model on a mesh of a topology's devices.

    Args:
        config: the run's config.
        topology: where it is to run.
        devices: to compile for; None for a mesh without any.
    """
    sizes = config.mesh.to_dict()
    if devices is None:
        # cuDNN's kernel asks the GPU what it can do; what remat keeps of it is the same.
        config = config.evolve(model=dict(attention="xla"))
        device = AbstractDevice(topology.chip.kind, None, topology.platform)
        mesh = make_abstract_mesh(device, topology.num_chips, **sizes)
    else:
        mesh = make_mesh(**sizes, devices=devices)
    fields, tokenizer = config.model.config.to_dict(), None
    if config.model.init == "random" and "vocab_size" not in fields:
        tokenizer = find_tokenizer(config, None)
    return open_model(config, tokenizer, mesh=mesh)


def plan_step(
    config: SFTConfig,
    topology: Topology,
    devices: Sequence[jax.Device] | None,
    *,
    estimator: Estimator | None = None,
) -> PlannedStep:
    """Plans the train step: compiled where there are devices to compile for.

    Args:
        config: the run's config.
        topology: where it is to run.
        devices: to compile for; None for arithmetic alone.
        estimator: of the same run, if there is one already.

    Raises:
        ValueError: the config does not fit the model, or the mesh the devices.
    """
    model = open_planned(config, topology, devices)
    check_rows(config, model)
    estimator = estimator or Estimator(config, model)
    split = split_of(config, model.mesh.shape)
    step = PlannedStep(
        split=split,
        memory={},
        needed=0.0,
        usable=topology.chip.usable_gib * GIB,
        num_flops=estimator.flops,
        num_tokens=config.train.batch_size * config.train.seq_length,
        network_seconds=None,
        collectives=None,
        compile_seconds=None,
        described=_describe(model),
    )
    update = make_update(config, model, num_steps=config.train.total_steps)
    estimated = estimator.memory(split) | {
        "parameters": device_bytes(update.structs.params),
        "optimizer": device_bytes((update.structs.step, update.structs.opt_state)),
        "batch": device_bytes(batch_structs(config, model)),
    }
    if devices is None:
        memory = _estimated_memory(estimated)
        return dataclasses.replace(
            step,
            memory=memory,
            needed=sum(size for size, _ in memory.values()),
            network_seconds=sum(estimator.network_seconds(split, topology)),
        )
    start = time.perf_counter()
    try:
        compiled, _ = compile_step(config, model, update)
    except jax.errors.JaxRuntimeError as error:
        shortage = read_shortage(error)
        if shortage is None:
            raise
        return _too_large(step, estimated, shortage, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    collectives = read_collectives(compiled.as_text(), unknown_trips=_loss_chunks(config, split))
    said = read_memory(compiled)
    return dataclasses.replace(
        step,
        memory=_compiled_memory(estimated, said),
        needed=said.total,
        described=f"{step.described}, {model.decoder.numerics.attention} attention",
        network_seconds=_network_seconds(collectives, topology, split),
        collectives=collectives,
        compile_seconds=seconds,
    )


def find_sampling(config: SFTConfig, model: CausalLM) -> tuple[Sampling, int]:
    """Returns the run's sampling of the most new tokens, and how long prompts may be beside it.

    Raises:
        ValueError: a value of method.gen_kwargs is not as it must be, or leaves prompts no room.
    """
    options = [Sampling(**kwargs) for _, kwargs in sweep(config.method.gen_kwargs.to_dict())]
    sampling = max(options, key=lambda option: option.max_new_tokens)
    num_positions = model.decoder.config.num_positions
    room = num_positions - sampling.max_new_tokens
    if room < 1:
        raise ValueError(
            f"method.gen_kwargs.max_new_tokens={sampling.max_new_tokens} leaves prompts no room in "
            f"the model's {num_positions} positions: lower it, or leave the sampler out by "
            "--prompts=0"
        )
    return sampling, min(config.train.seq_length, room)


def plan_sampler(
    config: SFTConfig, topology: Topology, devices: Sequence[jax.Device], *, num_prompts: int
) -> PlannedSampler:
    """Compiles what an evaluation samples with: prompts as long as they may be."""
    model = open_planned(config, topology, devices)
    sampling, longest = find_sampling(config, model)
    num_batch_shards = num_shards(model.mesh, "batch")
    structs = make_update(config, model, num_steps=config.train.total_steps).structs
    beside = device_bytes(structs.opt_state)
    programs = compile_sampler(
        model.decoder,
        structs.params,
        num_prompts=num_prompts,
        prompt_len=longest,
        sampling=sampling,
        stop_ids=model.stop_ids,
        num_batch_shards=num_batch_shards,
    )
    sizes: dict[str, float] = {}
    refused, start = None, time.perf_counter()
    try:
        with jax.set_mesh(model.mesh):
            for name, program in zip(("prefill", "decode"), programs, strict=True):
                sizes[name] = read_memory(program).total + beside
    except jax.errors.JaxRuntimeError as error:
        shortage = read_shortage(error)
        if shortage is None:
            raise
        refused = "decode" if "prefill" in sizes else "prefill"
        given = 0 if shortage.is_all else device_bytes(structs.params)
        sizes[refused] = shortage.needed + given + beside
    return PlannedSampler(
        num_prompts=num_prompts,
        num_rows=rows_at_once(num_prompts, num_batch_shards),
        num_shards=num_batch_shards,
        prompt_len=longest,
        max_new_tokens=sampling.max_new_tokens,
        prefill=sizes["prefill"],
        decode=sizes.get("decode"),
        refused=refused,
        usable=topology.chip.usable_gib * GIB,
        compile_seconds=time.perf_counter() - start,
    )


def device_bytes(tree: Any) -> int:
    """Returns the bytes that a tree of `jax.ShapeDtypeStruct` with shardings has on a device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _estimated_memory(estimated: Mapping[str, float]) -> dict[str, tuple[float, str]]:
    exact = ("parameters", "optimizer", "batch")
    return {
        kind: (size, EXACT if kind in exact else ARITHMETIC) for kind, size in estimated.items()
    }


def _compiled_memory(estimated: Mapping[str, float], said: Memory) -> dict[str, tuple[float, str]]:
    """The compiler says how much is temporary; what for is attributed by arithmetic."""
    memory = _estimated_memory({k: estimated[k] for k in ("parameters", "optimizer", "batch")})
    state = sum(size for size, _ in memory.values())
    rest = float(said.temporary)
    for kind in ("activations", "gradients", "loss"):
        size = min(rest, estimated[kind])
        memory[kind], rest = (size, ARITHMETIC), rest - size
    memory["other temporary"] = (rest, "the rest that the compiler needs")
    memory["program"] = (said.program, COMPILER)
    memory["padding"] = (said.arguments + said.outputs - state, COMPILER)
    return memory


def _too_large(
    step: PlannedStep, estimated: Mapping[str, float], shortage: Shortage, seconds: float
) -> PlannedStep:
    state = sum(estimated[kind] for kind in ("parameters", "optimizer", "batch"))
    return dataclasses.replace(
        step,
        memory=_estimated_memory(estimated),
        needed=shortage.needed + (0.0 if shortage.is_all else state),
        usable=shortage.usable,
        compile_seconds=seconds,
    )


def _loss_chunks(config: SFTConfig, split: Split) -> int:
    """Turns of the loss's loop, the only one that stops early: as if every token were trained."""
    rows = split.minibatch_size // (split.data * split.fsdp)
    tokens = rows * config.train.seq_length // split.sequence
    return -(-tokens // find_chunk_len(tokens))


def _network_seconds(collectives: Counter[Collective], topology: Topology, split: Split) -> float:
    """Seconds that the collectives take at least, were nothing else in their way."""
    speeds = {axis: bandwidth(topology, split.mesh, axis) for axis in split.mesh}
    by_size = {size: speeds[axis] for axis, size in split.mesh.items() if size > 1}
    longest = speeds[max(split.mesh, key=split.mesh.__getitem__)]

    def seconds(collective: Collective) -> float:
        if collective.kind == BETWEEN_SLICES:
            return collective.sent_bytes / topology.chip.far_bytes
        # A permutation is a part of a gather or scatter that the compiler wrote as a loop.
        is_part = collective.kind == "collective-permute"
        speed = longest if is_part else by_size.get(collective.num_devices, min(speeds.values()))
        return collective.sent_bytes / speed

    return sum(num_runs * seconds(collective) for collective, num_runs in collectives.items())


def _describe(model: CausalLM) -> str:
    dtype = jax.numpy.dtype(model.decoder.numerics.dtype).name
    return f"{model.config.model_type}, {model.num_params:,} parameters, {dtype} compute"
