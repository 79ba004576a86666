"""The device mesh, and where each array lives on it.

Every parameter and activation names its axes by what they mean ("embed", "heads", "batch");
`MESH_AXES` maps each meaning to mesh axes, once, with the reason. In: mesh sizes and logical
axis names. Out: a `jax.sharding.Mesh` and `NamedSharding`s. No other file names a mesh axis.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

# `data` stands first, so that it alone spans the slower links between hosts.
MESH_NAMES = ("data", "fsdp", "sequence", "tensor")

MESH_AXES = {
    "batch": ("data", "fsdp"),  # every device of both axes trains rows of its own
    "fsdp_batch": "data",  # the rows of all devices that have a parameter's parts between them
    "tokens": "sequence",
    "embed": "fsdp",  # the one axis that every matrix has: parameters are split along it
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_width": None,
    "experts": None,  # every device has a part of each expert, and no token leaves its device
    "layers": None,  # scanned over
    "norm": None,  # small
    "positions": None,
}


def make_mesh(
    *,
    data: int,
    fsdp: int,
    sequence: int,
    tensor: int,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Builds the mesh over all devices of all processes.

    Between the slices of a TPU multislice the network is slow, so that `data` alone spans them:
    what crosses it is then a sum of gradients a step.

    Args:
        data: devices that hold whole copies of what the other axes split.
        fsdp: devices that the parameters and the optimizer state are split over.
        sequence: devices that the tokens of a row are split over.
        tensor: devices that heads, MLP width and vocabulary are split over.
            One of the four may be -1: whatever the others leave.
        devices: those to use; None for all that there are.

    Returns:
        A mesh with the axes `MESH_NAMES`, of Auto type.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or `data` is no multiple
            of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _mesh_sizes((data, fsdp, sequence, tensor), len(devices))
    return Mesh(_arrange(sizes, devices), MESH_NAMES, axis_types=(AxisType.Auto,) * 4)


def make_abstract_mesh(
    device: AbstractDevice, num_devices: int, *, data: int, fsdp: int, sequence: int, tensor: int
) -> AbstractMesh:
    """Builds a mesh of devices that are not there, for what needs only its shape.

    Args:
        device: what each of them is.
        num_devices: how many.
        data: as in `make_mesh`, as are the next three.
        fsdp: likewise.
        sequence: likewise.
        tensor: likewise.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = _mesh_sizes((data, fsdp, sequence, tensor), num_devices)
    axis_types = (AxisType.Auto,) * 4
    return AbstractMesh(sizes, MESH_NAMES, axis_types, abstract_device=device)


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """Returns what a mesh's devices are: "cpu", "gpu" or "tpu"; here, or only compiled for."""
    if isinstance(mesh, AbstractMesh):
        return mesh.abstract_device.platform
    return mesh.devices.flat[0].platform


def _mesh_sizes(asked: Sequence[int], num_devices: int) -> tuple[int, ...]:
    sizes = list(asked)
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    if math.prod(sizes) != num_devices:
        named = ", ".join(f"{name}={size}" for name, size in zip(MESH_NAMES, sizes, strict=True))
        raise ValueError(
            f"mesh {named} needs {math.prod(abs(size) for size in sizes)} devices (or a divisor, "
            f"with a -1), but {num_devices} are here: set one axis to -1"
        )
    return tuple(sizes)


def _arrange(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Lays the devices out so that each axis of the mesh lies along axes of the torus."""
    slices: dict[int, list] = {}
    for device in devices:
        # Nodes of GPUs have an index of their own, too, but any axis may span those.
        index = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        slices.setdefault(index, []).append(device)
    if sizes[0] % len(slices):
        raise ValueError(
            f"mesh.data={sizes[0]} is no multiple of the {len(slices)} slices, between which data "
            f"alone may be split: set it to {len(slices)}, or a multiple"
        )
    in_slice = (sizes[0] // len(slices), *sizes[1:])
    return np.concatenate([_arrange_slice(in_slice, slices[index]) for index in sorted(slices)])


def _arrange_slice(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # an axis of the mesh is only a part of one of the torus
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def named_sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """Returns the sharding of an array whose axes have the given meanings; none: replicated."""
    return NamedSharding(mesh, _partition_spec(axes))


def param_sharding(
    mesh: Mesh, *, path: str, shape: Sequence[int], axes: Sequence[str | None]
) -> NamedSharding:
    """Returns where a parameter lives.

    Args:
        mesh: the mesh.
        path: the parameter's name, for the message.
        shape: its shape.
        axes: the meaning of each of its axes. Key/value heads that do not divide stay whole.

    Raises:
        ValueError: an axis does not divide over its devices.
    """
    kept = []
    for size, axis in zip(shape, axes, strict=True):
        ways = num_shards(mesh, axis)
        if size % ways and axis == "kv_heads":
            axis = None
        elif size % ways:
            raise ValueError(
                f"{path} has {size} along its axis {axis!r}, which does not divide by {ways}, the "
                f"size of mesh axis {' x '.join(_mesh_axes(axis))}: choose a mesh that divides it"
            )
        kept.append(axis)
    return named_sharding(mesh, *kept)


def divides(sizes: Mapping[str, int], *, size: int, axis: str | None) -> bool:
    """Whether `param_sharding` takes an axis of a parameter on a mesh of these sizes.

    Key/value heads may stay whole, and a vocabulary is padded until it divides.
    """
    is_free = axis in ("kv_heads", "vocab")
    return is_free or size % math.prod(sizes[name] for name in _mesh_axes(axis)) == 0


def num_shards(mesh: Mesh, axis: str | None) -> int:
    """Returns how many parts an axis with this meaning is cut into; 1 on an empty mesh."""
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in _mesh_axes(axis))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the mesh set by `jax.set_mesh`; without one, returns it as it is.

    An axis that does not divide, such as the single token of a decode step, stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    sizes = zip(x.shape, axes, strict=True)
    kept = (_mesh_axes(axis) if size % num_shards(mesh, axis) == 0 else () for size, axis in sizes)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(axis or None for axis in kept)))


class Out(NamedTuple):
    """What a function that is mapped over devices returns.

    Attributes:
        axes: the meaning of each axis of the result.
        sum_over: what splits the terms of a sum, whose sum over the devices is the result; where
            the result is split over those very devices, each of them gets its part alone.
    """

    axes: tuple[str | None, ...]
    sum_over: tuple[str, ...] = ()


def map_over_devices(
    f: Callable[..., Any], *args: Any, in_axes: Sequence[Any], out: Out | tuple[Out, ...]
) -> Any:
    """Calls f on each device's part of the arguments, for what XLA would not split by itself.

    Args:
        f: a function of arrays to an array, or to a tuple of arrays.
        *args: whole arrays, as under `jax.jit`; or None, or a tree of arrays.
        in_axes: the meaning of each axis of each argument; None for one that each device gets as
            it is; or a tree of `PartitionSpec` for a tree.
        out: what f returns.

    Returns:
        The whole result. What an axis that does not divide means is not split, for any argument;
        without a mesh, f is called once, on everything.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return f(*args)
    whole: set[str | None] = {None}
    for arg, axes in zip(args, in_axes, strict=True):
        if isinstance(arg, jax.Array) and axes is not None:
            sizes = zip(arg.shape, axes, strict=True)
            whole |= {axis for size, axis in sizes if size % num_shards(mesh, axis)}

    def spec(axes: Any) -> Any:
        if not isinstance(axes, tuple):
            return PartitionSpec() if axes is None else axes
        return _partition_spec([None if axis in whole else axis for axis in axes])

    def add_up(x: jax.Array, of: Out) -> jax.Array:
        split = [axis for axis in of.sum_over if axis not in whole]
        names = {name for axis in split for name in _mesh_axes(axis)}
        for i, axis in enumerate(of.axes if names else ()):
            for name in names.intersection(_mesh_axes(axis)):
                x = jax.lax.psum_scatter(x, name, scatter_dimension=i, tiled=True)
                names.remove(name)
        return jax.lax.psum(x, tuple(names)) if names else x

    def part(*parts: Any) -> Any:
        result = f(*parts)
        if isinstance(out, Out):
            return add_up(result, out)
        return tuple(add_up(x, of) for x, of in zip(result, out, strict=True))

    mapped = jax.shard_map(
        part,
        in_specs=tuple(spec(axes) for axes in in_axes),
        out_specs=spec(out.axes) if isinstance(out, Out) else tuple(spec(of.axes) for of in out),
        check_vma=False,  # neither the ragged product nor a kernel has a rule for it
    )
    return mapped(*args)


def sum_over(x: jax.Array, axis: str) -> jax.Array:
    """Adds up, within a function that is mapped over devices, what an axis has split."""
    names = _mapped_axes(axis)
    return jax.lax.psum(x, names) if names else x


def max_over(x: jax.Array, axis: str) -> jax.Array:
    """Returns, within a function that is mapped over devices, the largest along a split axis."""
    names = _mapped_axes(axis)
    return jax.lax.pmax(x, names) if names else x


def part_index(axis: str) -> jax.Array | int:
    """Returns which part of a split axis a function that is mapped over devices has."""
    names = _mapped_axes(axis)
    return jax.lax.axis_index(names) if names else 0


def _mapped_axes(axis: str) -> tuple[str, ...]:
    mapped = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(name for name in _mesh_axes(axis) if name in mapped)


def merge_tokens(x_BTD: jax.Array) -> jax.Array:
    """Joins rows and tokens to one axis, [B·T, D], where no mesh axis cuts the rows.

    XLA's CPU backend takes twice as long for the gradient of a kernel over two axes as over
    one. Joining them while the tokens of a row are on several devices would move them all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x_BTD if num_shards(mesh, "tokens") > 1 else x_BTD.reshape(-1, x_BTD.shape[-1])


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    names = None if axis is None else MESH_AXES[axis]
    return () if names is None else (names,) if isinstance(names, str) else names


def _partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    return PartitionSpec(*(_mesh_axes(axis) or None for axis in axes))


def describe_mesh(mesh: Mesh) -> str:
    """Returns one line: the mesh's axes and sizes, and its devices."""
    sizes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    device = mesh.devices.flat[0]
    return f"{sizes} ({mesh.size} x {device.device_kind}, {jax.process_count()} process(es))"
