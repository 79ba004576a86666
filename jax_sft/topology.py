"""Accelerators by name, without having them: what their chips are, and devices to compile for.

In: a name such as "v5e:4x4", "v4-8", "2xv5e-256" or "gpu:8xH100-80GB". Out: a `Topology`, and the
devices that libtpu, or JAX's plugin for CUDA, makes up for it on any Linux machine, which programs
are compiled for and cannot run on. Nothing here imports JAX before devices are asked for.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import sys
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Iterator

    import jax

GIB = 2**30

# What JAX takes of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_MEMORY_SHARE = 0.75
_GPUS_A_NODE = 8  # that NVLink connects, in the usual machine
_CUDNN = (9, 19, 0)  # that JAX 0.10 comes with, at least
_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device is and has.

    Attributes:
        kind: its `device_kind` in JAX, or a part of it.
        memory_gib: of HBM.
        usable_gib: what a program may take of it: as libtpu 0.0.42 says when one is too large, or
            JAX's share of a GPU.
        link_bytes: a second and link, one way: along one axis of a TPU's torus, or by NVLink.
        num_axes: of the torus; 1 where all devices of a node are each other's neighbours.
        far_bytes: a second and device over the network between slices, or between nodes.
        capability: a GPU's compute capability.
        target: what XLA must know of a GPU to compile for it.
    """

    kind: str
    memory_gib: float
    usable_gib: float
    link_bytes: float
    num_axes: int
    far_bytes: float
    capability: tuple[int, int] = (0, 0)
    target: str = ""


# Memory from the makers' data sheets. Bandwidths of TPUs from Austin et al. 2025, "How to Scale
# Your Model", part 2; of GPUs from NVIDIA's data sheets (NVLink's total halved, since it counts
# both directions) and the usual network card beside each: 200 Gbit/s for an A100, 400 since.
TPUS = {
    "v4": Chip("TPU v4", 32, 30.75, 4.5e10, 3, 6.25e9),
    "v5e": Chip("TPU v5 lite", 16, 15.75, 4.5e10, 2, 3.125e9),
    "v5p": Chip("TPU v5", 96, 95.74, 9e10, 3, 6.25e9),
    "v6e": Chip("TPU v6 lite", 32, 31.25, 9e10, 2, 12.5e9),
}


def _gpu(
    kind: str,
    memory_gib: float,
    link_bytes: float,
    far_bytes: float,
    *,
    capability: tuple[int, int],
    cores: int,
    lanes: int,
    shared_kib: int,
    l2_mib: int,
    bandwidth: float,
    ghz: float,
) -> Chip:
    """Describes a GPU; the last seven are its multiprocessors, and their memories and clock."""
    target = f"""
        platform_name: "CUDA"
        device_description_str: "NVIDIA {kind}"
        dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }}
        runtime_version {{ major: 13 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
          core_count: {cores}
          fpus_per_core: {lanes}
          clock_rate_ghz: {ghz}
          memory_bandwidth: {bandwidth:.0f}
          device_memory_size: {memory_gib * GIB:.0f}
          l2_cache_size: {l2_mib * 2**20}
          shared_memory_per_core: {shared_kib * 2**10}
          shared_memory_per_block_optin: {(shared_kib - 1) * 2**10}
          shared_memory_per_block: {48 * 2**10}
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: {1536 if capability == (8, 9) else 2048}
          registers_per_core_limit: {2**16}
          registers_per_block_limit: {2**16}
          block_dim_limit_x: {2**31 - 1}
          block_dim_limit_y: {2**16 - 1}
          block_dim_limit_z: {2**16 - 1}
        }}
    """
    usable_gib = memory_gib * GPU_MEMORY_SHARE
    return Chip(kind, memory_gib, usable_gib, link_bytes, 1, far_bytes, capability, target)


# Of the multiprocessors: NVIDIA's white papers on each architecture, and the table of compute
# capabilities in the CUDA C++ Programming Guide.
_A100 = dict(capability=(8, 0), cores=108, lanes=64, shared_kib=164, l2_mib=40, ghz=1.41)
_HOPPER = dict(capability=(9, 0), cores=132, lanes=128, shared_kib=228, ghz=1.98)
_B200 = dict(capability=(10, 0), cores=148, lanes=128, shared_kib=228, l2_mib=126, ghz=1.965)
_L4 = dict(capability=(8, 9), cores=58, lanes=128, shared_kib=100, l2_mib=48, ghz=2.04)
GPUS = {
    "A100-40GB": _gpu("A100", 40, 3e11, 2.5e10, bandwidth=1.555e12, **_A100),
    "A100-80GB": _gpu("A100", 80, 3e11, 2.5e10, bandwidth=2.039e12, **_A100),
    "H100-80GB": _gpu("H100", 80, 4.5e11, 5e10, l2_mib=50, bandwidth=3.35e12, **_HOPPER),
    "H200-141GB": _gpu("H200", 140, 4.5e11, 5e10, l2_mib=60, bandwidth=4.8e12, **_HOPPER),
    "B200-180GB": _gpu("B200", 178, 9e11, 5e10, bandwidth=8e12, **_B200),
    "L4-24GB": _gpu("L4", 22, 3.2e10, 1.25e10, bandwidth=3e11, **_L4),
}

# v4-8 and v5p-8 have 8 TensorCores, which are 4 chips; v5e-8 and v6e-8 have 8 chips.
_CORES_A_CHIP = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}
# The largest v5p slice is 16x16x24, of a pod's 8960 chips (cloud.google.com/tpu/docs/v5p).
_MOST_CHIPS = {"v4": 4096, "v5p": 6144, "v5e": 256, "v6e": 256}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v6": "v6e"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices and how they are connected.

    Attributes:
        name: as it was asked for.
        chip: what each device is.
        platform: "tpu" or "gpu".
        shape: chips along each axis of a slice's torus; of GPUs, how many a node has.
        num_slices: slices, or nodes, which a slower network connects.
    """

    name: str
    chip: Chip
    platform: str
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def num_chips(self) -> int:
        """All devices together."""
        return math.prod(self.shape) * self.num_slices

    @property
    def generation(self) -> str:
        """A TPU's, such as "v5e"."""
        return next(name for name, chip in TPUS.items() if chip is self.chip)

    def describe(self) -> str:
        """Returns one line: how many devices of which kind, and how they are connected."""
        if self.platform == "gpu":
            nodes = f", {self.num_slices} nodes" if self.num_slices > 1 else ""
            return f"{self.num_chips} x {self.chip.kind}, {self.chip.memory_gib:g} GiB each{nodes}"
        torus = "x".join(map(str, self.shape))
        slices = f"{self.num_slices} slices of " if self.num_slices > 1 else ""
        return (
            f"{self.num_chips} x {self.chip.kind}, {self.chip.memory_gib:g} GiB each, "
            f"{slices}{torus}"
        )


def parse_topology(name: str) -> Topology:
    """Reads a topology's name.

        v5e:4x4           a slice by its shape, as Cloud TPU's --topology has it
        v5e-16  v4-8      by the number in its accelerator type: v4 and v5p count TensorCores,
                          two a chip; v5e (v5litepod) and v6e count chips
        2xv5e:4x4         two slices, which the data-centre network connects
        gpu:8xH100-80GB   GPUs; more than eight are nodes of eight

    Raises:
        ValueError: it is none of these, or there is no such slice.
    """
    if name.startswith("gpu:"):
        return _parse_gpus(name)
    match = re.fullmatch(r"(?:(\d+)x)?(v\w+?)(?::(\d+(?:x\d+)*)|-(\d+))", name)
    generation = match and _ALIASES.get(match[2], match[2])
    if generation not in TPUS:
        raise ValueError(
            f"--topology={name} is unknown: expected such as v5e:4x4, v4-8, 2xv5e-16 (two slices) "
            f"or gpu:8xH100-80GB, with {', '.join(TPUS)} or a GPU among {', '.join(GPUS)}"
        )
    shape = (
        tuple(map(int, match[3].split("x")))
        if match[3]
        else _usual_shape(name, generation, int(match[4]))
    )
    topology = Topology(name, TPUS[generation], "tpu", shape, int(match[1] or 1))
    _check_shape(topology, generation)
    return topology


def _parse_gpus(name: str) -> Topology:
    match = re.fullmatch(r"gpu:(?:(\d+)x)?([A-Z]\w+)(?:-(\d+)(?:GB|G)?)?", name, re.IGNORECASE)
    wanted = "" if match is None else "-".join(part for part in match.groups()[1:] if part).upper()
    found = [gpu for gpu in GPUS if gpu == f"{wanted}GB" or gpu.startswith(f"{wanted}-")]
    if match is None or not found:
        raise ValueError(
            f"--topology={name} is unknown: expected such as gpu:8xH100-80GB, with one of "
            f"{', '.join(GPUS)}"
        )
    if len(found) > 1:
        raise ValueError(f"--topology={name} may be {' or '.join(found)}: name its memory too")
    num_gpus = int(match[1] or 1)
    a_node = min(num_gpus, _GPUS_A_NODE)
    if num_gpus < 1 or num_gpus % a_node:
        raise ValueError(
            f"--topology={name} has {num_gpus} GPUs: expected up to {_GPUS_A_NODE}, or a multiple "
            "of it"
        )
    return Topology(name, GPUS[found[0]], "gpu", (a_node,), num_gpus // a_node)


def _usual_shape(name: str, generation: str, count: int) -> tuple[int, ...]:
    """The shape of a slice that was asked for by its size: as near to a cube as it goes."""
    if (generation, count) == ("v5p", 12288):  # the one usual slice that is no power of two
        return (16, 16, 24)
    num_axes, cores = TPUS[generation].num_axes, _CORES_A_CHIP[generation]
    shape = [2, 2, 1] if num_axes == 3 else [1, 1]
    num_chips = count / cores
    while math.prod(shape) < num_chips:
        shape[shape.index(min(shape))] *= 2
    if math.prod(shape) != num_chips:
        raise ValueError(
            f"--topology={name}: no usual slice has {count} "
            f"{'chips' if cores == 1 else 'TensorCores'}; give its shape, as "
            f"{generation}:{'4x4x4' if num_axes == 3 else '4x4'}"
        )
    return tuple(sorted(shape)) if num_axes == 2 or min(shape) > 1 else tuple(shape)


def _check_shape(topology: Topology, generation: str) -> None:
    num_axes, num_chips = topology.chip.num_axes, math.prod(topology.shape)
    if len(topology.shape) != num_axes or not 1 <= num_chips <= _MOST_CHIPS[generation]:
        raise ValueError(
            f"--topology={topology.name}: a {generation} slice has {num_axes} axes and up to "
            f"{_MOST_CHIPS[generation]} chips, as {generation}:"
            f"{'4x4x4' if num_axes == 3 else '4x4'}"
        )
    if topology.num_slices < 1:
        raise ValueError(f"--topology={topology.name}: expected at least one slice")


def has_compiler(topology: Topology) -> bool:
    """Whether what compiles for such devices is installed; it needs none of them."""
    names = ("libtpu",) if topology.platform == "tpu" else _CUDA_PLUGINS
    return any(importlib.util.find_spec(name) is not None for name in names)


def prepare_environment(topology: Topology) -> None:
    """Sets what JAX and its plugins read where there is no such device; before JAX is imported.

    Raises:
        ValueError: libtpu is not installed. Without JAX's plugin for CUDA there is arithmetic.
    """
    if topology.platform == "tpu" and not has_compiler(topology):
        raise ValueError(
            "libtpu is not installed, which compiles for TPUs on any Linux machine: "
            'pip install "jax[tpu]"'
        )
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")  # any: the name decides
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    # The plugin for CUDA compiles without what it takes to run.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if topology.platform == "gpu":
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # says that it measures no kernels


def make_devices(topology: Topology) -> "list[jax.Device] | None":
    """Returns a topology's devices, for programs that are compiled and never run.

    Args:
        topology: `prepare_environment` stands before this.

    Returns:
        None where nothing is installed that compiles for them.

    Raises:
        ValueError: libtpu knows no such slice.
    """
    return _make_gpus(topology) if topology.platform == "gpu" else _make_tpus(topology)


def _make_tpus(topology: Topology) -> "list[jax.Device]":
    import jax
    from jax.experimental.topologies import get_topology_desc

    shape = "x".join(map(str, topology.shape))
    # v4 and v5p run a program on both cores of a chip at once: one device a chip.
    is_one = _CORES_A_CHIP[topology.generation] == 1
    options = {"chip_config_name": "default" if is_one else "megacore"}
    if math.prod(topology.shape) < 4:
        options["chips_per_host_bounds"] = (*topology.shape, 1, 1)[:3]
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    try:
        return get_topology_desc(f"{topology.generation}:{shape}", "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--topology={topology.name}: libtpu has no such slice ({reason})"
        ) from None


def _make_gpus(topology: Topology) -> "list[jax.Device] | None":
    from jax.experimental.topologies import get_topology_desc

    if not has_compiler(topology):
        return None
    # Slices, nodes in each, GPUs in each.
    shape = f"1x{topology.num_slices}x{topology.shape[0]}"
    options = dict(topology=shape, target_config=topology.chip.target)
    try:
        return get_topology_desc(topology.name, "cuda", **options).devices
    except (NotImplementedError, RuntimeError) as error:  # of another version, or a part of it
        reason = str(error).splitlines()[0]
        print(f"JAX's plugin for CUDA does not compile here: {reason}", file=sys.stderr)
        return None


@contextlib.contextmanager
def as_if_here(topology: Topology) -> "Iterator[None]":
    """Has JAX's cuDNN attention answer for GPUs that are not here: it asks the first that is."""
    if topology.platform == "tpu":
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # private

    def numbers(capability: str) -> tuple[int, ...]:
        return tuple(map(int, capability.split(".")))

    major, minor, patch = _CUDNN
    its = topology.chip.capability
    answers = {
        "check_cudnn_version": lambda: 10_000 * major + 100 * minor + patch,
        "check_compute_capability": lambda least: its >= numbers(least),
        "is_cuda_compute_capability_equal": lambda other: its == numbers(other),
    }
    with mock.patch.multiple(cudnn, **answers):
        yield
