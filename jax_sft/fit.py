"""The fastest way to lay a run over devices that fits them: mesh, rows at a time, what is kept.

In: the config, whose batch stays, and a topology. Out: a planned step. Arithmetic ranks all ways
by the roofline of `estimate.Estimator.seconds`: FLOPs and recomputation over the chips' peak,
and what is sent over the links' bandwidth. What it finds far too large is left out; of the others
the fastest are compiled, one after the other, until one fits: the compiler refuses in seconds.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax

from jax_sft.config import SFTConfig
from jax_sft.estimate import Estimator, Split
from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.decoder import logical_axes
from jax_sft.planned_step import PlannedStep
from jax_sft.sharding import divides
from jax_sft.topology import GIB, Topology

MOST_PLANNED = 12
_REMATS = ("none", "dots", "minimal", "full")  # how fast the way to the host is, nobody knows
# Arithmetic's memory may be too high by about this: what it finds larger is not compiled.
_DOUBT = 1.15
# Beyond this many chips the tensor axis has never paid for training on a torus.
_MOST_TENSOR = 16
# Ways within this much of the fastest are as fast as it, for all that arithmetic knows.
_TIE = 1.02


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a search found.

    Attributes:
        step: the fastest step that fits; None if none did.
        num_ways: how many ways were ranked.
        tried: those that were planned exactly, in order.
    """

    step: PlannedStep | None
    num_ways: int
    tried: list[PlannedStep]


def search(
    config: SFTConfig,
    topology: Topology,
    estimator: Estimator,
    *,
    plan: Callable[[SFTConfig], PlannedStep],
    most: int = MOST_PLANNED,
) -> Fit:
    """Finds the fastest step that fits.

    Args:
        config: the run's config; its mesh, minibatch_size and remat are not read.
        topology: where it is to run.
        estimator: of the run.
        plan: plans the step of a config, exactly.
        most: how many steps are planned at most.

    Raises:
        ValueError: the rows do not divide in any way.
    """
    ways = list(find_splits(config, topology, estimator.model))
    if not ways:
        raise ValueError(_why_none(config, topology, estimator.model))
    num_ways, tried = 0, []
    for some in (
        [split for split in ways if not _cuts_needlessly(config, topology, split)],
        [split for split in ways if _cuts_needlessly(config, topology, split)],
    ):
        num_ways += len(some)
        for split in _promising(config, topology, estimator, some)[: most - len(tried)]:
            step = plan(evolved(config, split))
            tried.append(step)
            if step.fits:
                return Fit(step, num_ways, tried)
    return Fit(None, num_ways, tried)


def find_splits(config: SFTConfig, topology: Topology, model: CausalLM) -> Iterator[Split]:
    """Yields every split that divides: rows over data and fsdp, parameters over fsdp and tensor."""
    num_rows = config.train.batch_size
    for mesh in _find_meshes(config, topology, model):
        num_ways = mesh["data"] * mesh["fsdp"]
        if num_rows % num_ways:
            continue
        for rows in _divisors(num_rows // num_ways):
            for remat in _REMATS:
                yield Split(**mesh, minibatch_size=rows * num_ways, remat=remat)


def _cuts_needlessly(config: SFTConfig, topology: Topology, split: Split) -> bool:
    """Whether tokens of a row are split although rows divide over the chips that tensor leaves."""
    divides_whole = config.train.batch_size % (topology.num_chips // split.tensor) == 0
    return split.sequence > 1 and divides_whole


def _promising(
    config: SFTConfig, topology: Topology, estimator: Estimator, ways: Sequence[Split]
) -> list[Split]:
    """Those that arithmetic does not find far too large, fastest first."""
    usable = topology.chip.usable_gib * GIB
    sizes = {split: sum(estimator.memory(split).values()) for split in ways}
    seconds = {split: estimator.seconds(split, topology) for split in ways}
    ranked = _rank(config, ways, seconds, sizes)
    return [split for split in ranked if sizes[split] <= usable * _DOUBT]


def _find_meshes(
    config: SFTConfig, topology: Topology, model: CausalLM
) -> Iterator[dict[str, int]]:
    """Yields the meshes that divide the parameters and a row, whatever the number of rows.

    Slices of TPUs have copies of the weights; nodes of GPUs may split them.
    """
    num_chips, axes = topology.num_chips, _param_axes(model)
    num_copies = topology.num_slices if topology.platform == "tpu" else 1
    for tensor, sequence, fsdp in itertools.product(_divisors(num_chips), repeat=3):
        data, rest = divmod(num_chips, tensor * sequence * fsdp)
        if rest or data % num_copies or tensor > _MOST_TENSOR:
            continue
        mesh = dict(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
        is_whole = all(divides(mesh, size=size, axis=axis) for size, axis in axes)
        if is_whole and config.train.seq_length % sequence == 0:
            yield mesh


def _param_axes(model: CausalLM) -> set[tuple[int, str | None]]:
    """The size and meaning of every axis of every parameter."""
    shapes, axes = logical_axes(model.decoder)
    structs = jax.tree.leaves(shapes)
    names = jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return {
        axis
        for struct, meanings in zip(structs, names, strict=True)
        for axis in zip(struct.shape, meanings, strict=True)
    }


def _why_none(config: SFTConfig, topology: Topology, model: CausalLM) -> str:
    """Says which numbers of rows would divide; the mesh of `data` alone divides all else."""
    num_rows = config.train.batch_size
    ways = {mesh["data"] * mesh["fsdp"] for mesh in _find_meshes(config, topology, model)}
    below = max(num_rows // number * number for number in ways)
    above = min(-(-num_rows // number) * number for number in ways)
    near = f"{below} or {above}" if below else str(above)
    return (
        f"train.batch_size={num_rows} does not divide over the {topology.num_chips} chips of "
        f"{topology.name}, however they are arranged: set it to {near}"
    )


def evolved(config: SFTConfig, split: Split) -> SFTConfig:
    """Returns the config with the split in it."""
    return config.evolve(
        mesh=split.mesh,
        train=dict(minibatch_size=split.minibatch_size),
        model=dict(remat=split.remat),
    )


def flags(split: Split) -> list[str]:
    """Returns the flags that ask for a split."""
    return [
        *(f"--config.mesh.{axis}={size}" for axis, size in split.mesh.items()),
        f"--config.train.minibatch_size={split.minibatch_size}",
        f"--config.model.remat={split.remat}",
    ]


def _rank(
    config: SFTConfig,
    ways: Sequence[Split],
    seconds: dict[Split, float],
    sizes: dict[Split, float],
) -> list[Split]:
    """Fastest first; among ways as fast as one another, fewer microbatches, then less memory."""
    groups: list[list[Split]] = []
    for split in sorted(ways, key=seconds.__getitem__):
        if not groups or seconds[split] > _TIE * seconds[groups[-1][0]]:
            groups.append([])
        groups[-1].append(split)

    def key(split: Split) -> tuple[int, float]:
        return config.train.batch_size // split.minibatch_size, sizes[split]

    return [split for group in groups for split in sorted(group, key=key)]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
