"""A `transformers` folder to sharded parameters, and back, by a family's name table.

In comes a folder (or hub name); out come parameters on their mesh, each process having read
only the bytes of its own devices; and the other way. The table in `families/` says which of
their tensors is which of ours; here it is turned into slices. safetensors, and old Flax
checkpoints: a pickle is never opened. Nothing is kept on the host but the piece under way.
"""

import collections
import functools
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub.errors import StrictDataclassError
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_sft.model.flax_files import open_weights
from jax_sft.model.name_table import BlockReader, Kind, find_kinds, find_names
from jax_sft.model.types import DecoderConfig, Family
from jax_sft.model.weight_files import FLOATS, TensorSpec, WeightFiles, as_bytes, write_weights

STAGING_BYTES = 2 << 30
MAX_SHARD_BYTES = 5 * 10**9
_GATHER_BYTES = 64 << 20
# Weights under the names that transformers gives them, and not what else a hub repository has.
_HUB_FILES = ["*.json", "model*.safetensors", "adapter_model.safetensors"]
_HUB_FILES += ["*.txt", "*.model", "*.jinja"]
_HUB_FILES += ["adapter_model.safetensors"]
_HUB_FLAX_FILES = ["flax_model*.msgpack"]


def resolve_folder(path: str | Path) -> Path:
    """Returns the local folder of a model: `path` itself, or a hub model's download.

    Raises:
        ValueError: there is no such folder, and the hub does not give one.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or len(folder.parts) > 2 or folder.is_absolute():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(
            f"model_path {path} {what}; pass a folder with config.json and model.safetensors,"
            " or a hub name"
        )
    from huggingface_hub import snapshot_download  # takes time; folders do without

    try:
        folder = Path(snapshot_download(str(path), allow_patterns=_HUB_FILES))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(str(path), allow_patterns=_HUB_FLAX_FILES)
        return folder
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_path {str(path)!r} is no folder here, and the hub cannot be reached or has no"
            f" such model ({type(error).__name__}); pass a folder with config.json and"
            " model.safetensors"
        ) from None


def read_config(path: str | Path) -> Any:
    """Returns the `transformers` config of a folder or hub name; code in it never runs.

    Raises:
        ValueError: there is no config, or transformers does not know its model type.
    """
    from transformers import CONFIG_MAPPING, AutoConfig  # takes seconds

    folder = resolve_folder(path)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model folder {folder} has no config.json; pass a folder that"
            " transformers' save_pretrained wrote"
        )
    try:
        fields = json.loads((folder / "config.json").read_bytes())
        if "auto_map" in fields and fields.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(
                f"model_type {fields.get('model_type')!r} is unknown to transformers: it is code in"
                " the folder (auto_map), which is never run"
            )
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder / 'config.json'} cannot be read ({reason}); pass a folder that"
            " transformers' save_pretrained wrote"
        ) from None


def read_generation_config(folder: Path) -> Any:
    """Returns the `transformers` generation config of a folder that has one.

    Raises:
        ValueError: it cannot be read, or its stop tokens are no ids.
    """
    from transformers import GenerationConfig  # takes seconds

    path = folder / "generation_config.json"
    try:
        config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read ({reason}); correct it, or remove it") from None
    stops = config.eos_token_id
    if not all(type(stop) is int for stop in (stops if isinstance(stops, list) else [stops or 0])):
        raise ValueError(f"{path} has eos_token_id {stops!r}; write an id, or a list of ids")
    return config


def load_params(
    folder: Path,
    family: Family,
    *,
    config: DecoderConfig,
    like: dict,
    staging_bytes: int = STAGING_BYTES,
) -> tuple[dict, dict[str, str]]:
    """Reads a checkpoint straight to sharded parameters.

    Args:
        folder: has `model.safetensors`, or shards and their index, or a Flax checkpoint.
        family: its name table.
        config: says what the table holds, and the vocabulary's true size.
        like: tree of `jax.ShapeDtypeStruct` with shardings; values are cast to its dtypes, a
            padded vocabulary ends in rows of zeros, and the layers may stand in
            several stacks (see `decoder.find_stacks`).
        staging_bytes: most bytes on the host beyond the parameters that live on its devices;
            programs and what the allocator keeps come to some 100 MiB more.

    Returns:
        The parameters, and the checkpoint's dtype of each tensor by its `transformers` name;
        for float64, which no parameter has, float32.

    Raises:
        ValueError: no weights, a damaged file, or tensors that are missing, extra or of
            another shape, all of them listed.
    """
    files = open_weights(folder)
    leaves = by_path(like)
    kinds = find_kinds(family, config, leaves)
    names = find_names(files, kinds, family, config)
    params = {}
    for kind in kinds:
        for part in kind.parts:
            for path, first_layer in part.stacks:
                reader = BlockReader(files, names, kind, part, first_layer, leaves[path].dtype)
                params[path] = _place(reader, leaves[path], staging_bytes)
    dtypes = {theirs: files.specs[name].dtype for theirs, name in names.items()}
    dtypes = {theirs: "float32" if d == "float64" else d for theirs, d in dtypes.items()}
    ordered = [params[path] for path in leaves]
    return jax.tree.unflatten(jax.tree.structure(like), ordered), dtypes


def by_path(tree: dict) -> dict[str, Any]:
    """Returns the leaves of a tree by their slash-joined paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def save_params(
    folder: Path,
    family: Family,
    *,
    config: DecoderConfig,
    params: dict,
    source_dtypes: dict[str, str],
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> str:
    """Writes parameters as a checkpoint that `transformers` loads.

    Every process takes part; process 0 writes, holding one tensor at a time.

    Args:
        folder: made where it is missing; its weights are replaced, its other files stay.
        family: its name table.
        config: says what the table holds, and the vocabulary's true size.
        params: the parameters, laid out as for `load_params`.
        source_dtypes: dtype of a tensor by its `transformers` name, as `load_params` gave;
            a tensor that it lacks is written in its parameter's dtype.
        dtype: "float32", "bfloat16" or "float16" for all tensors instead.
        max_shard_bytes: bytes of tensors in one file.

    Returns:
        The dtype of most numbers that were written: what config.json has to say, since
        `transformers` loads a checkpoint in the dtype that stands there.

    Raises:
        ValueError: an unknown dtype, or the folder cannot be written.
        OSError: what was written does not read back bit for bit.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(FLOATS)}")
    leaves = by_path(params)
    entries = {}
    for kind, layer, index in in_file_order(find_kinds(family, config, leaves)):
        theirs = kind.name(layer, index)
        own = leaves[kind.parts[0].stacks[0][0]].dtype.name
        spec = TensorSpec(kind.shape, dtype or source_dtypes.get(theirs, own))
        entries[theirs] = (spec, kind, layer, index)
    # Wider elements first, as the format's own writer has it: every tensor is then aligned.
    order = sorted(entries, key=lambda name: -jnp.dtype(entries[name][0].dtype).itemsize)
    specs = {name: entries[name][0] for name in order}
    tensors = (
        gather_tensor(*where, leaves).astype(jnp.dtype(spec.dtype), copy=False)
        for spec, *where in map(entries.get, order)
    )
    if jax.process_index() == 0:
        write_weights(folder, specs, tensors, max_shard_bytes=max_shard_bytes)
    else:
        for _ in tensors:  # takes part in the gathers
            pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("weights written")
    _check_written(folder, entries, leaves)
    sizes = collections.Counter()
    for spec in specs.values():
        sizes[spec.dtype] += math.prod(spec.shape)
    return sizes.most_common(1)[0][0]


def _check_written(folder: Path, entries: dict[str, tuple], leaves: dict[str, jax.Array]) -> None:
    """Reads the weights back, one tensor at a time, and compares every bit."""
    files = WeightFiles(folder) if jax.process_index() == 0 else None
    for name, (spec, *where) in entries.items():
        expected = gather_tensor(*where, leaves).astype(jnp.dtype(spec.dtype), copy=False)
        if files is None:
            continue
        if files.specs.get(name) != spec or not _reads_back(files, name, expected):
            raise OSError(
                f"{folder}: {name} reads back other than it was written; the disk may be full or "
                "failing, so save to another folder"
            )


def _reads_back(files: WeightFiles, name: str, expected: np.ndarray) -> bool:
    """Compares a tensor with its file, some rows at a time."""
    columns = tuple(slice(0, size) for size in expected.shape[1:])
    step = max(1, _GATHER_BYTES // (math.prod(expected.shape[1:]) * expected.itemsize))
    for first in range(0, len(expected), step):
        rows = slice(first, min(first + step, len(expected)))
        written = files.read(name, (rows, *columns))
        if not np.array_equal(as_bytes(written), as_bytes(expected[rows])):
            return False
    return True


def _place(reader: BlockReader, struct: jax.ShapeDtypeStruct, staging_bytes: int) -> jax.Array:
    """Fills an array shard by shard; devices that hold the same shard read it once."""
    places = struct.sharding.addressable_devices_indices_map(struct.shape)
    devices_by_index: dict[tuple, list[jax.Device]] = {}
    for device, index in places.items():
        bounds = [axis.indices(size) for axis, size in zip(index, struct.shape, strict=True)]
        key = tuple((start, stop) for start, stop, _ in bounds)
        devices_by_index.setdefault(key, []).append(device)
    shards = {}
    for key, devices in devices_by_index.items():
        index = tuple(slice(start, stop) for start, stop in key)
        shards.update(_place_shard(reader, index, devices, staging_bytes))
    return jax.make_array_from_single_device_arrays(
        struct.shape, struct.sharding, [shards[device] for device in places]
    )


def _place_shard(
    reader: BlockReader, index: tuple[slice, ...], devices: list[jax.Device], staging_bytes: int
) -> dict[jax.Device, jax.Array]:
    """Fills one shard, in pieces where it is above the budget."""
    shape = [axis.stop - axis.start for axis in index]
    # A number as it is in the file (at most float64), cast, and on CPU its copy on the device.
    number_bytes = 8 + 2 * jnp.dtype(reader.dtype).itemsize
    tile = _tile(shape, staging_bytes // number_bytes)
    if tile == shape:
        block = reader(index)
        # Waited for, so that one block at a time is on the host.
        return {device: jax.block_until_ready(jax.device_put(block, device)) for device in devices}
    shards = {device: jnp.zeros(shape, reader.dtype, device=device) for device in devices}
    corners = (range(0, size, step) for size, step in zip(shape, tile, strict=True))
    for corner in itertools.product(*corners):
        starts = [axis.start + first for axis, first in zip(index, corner, strict=True)]
        bounds = zip(starts, tile, index, strict=True)
        block = reader(tuple(slice(i, min(i + step, axis.stop)) for i, step, axis in bounds))
        for device in devices:
            piece = jax.device_put(block, device)
            shards[device] = jax.block_until_ready(_set_block(shards[device], piece, corner))
    return shards


def _tile(shape: list[int], num_numbers: int) -> list[int]:
    """Returns the shape of the pieces: cut along the first axes, no larger than asked for.

    [12, 768, 3072] in pieces of at most 5,000,000 numbers  ->  [2, 768, 3072]
    [12, 768, 3072] in pieces of at most 1,000,000 numbers  ->  [1, 325, 3072]
    """
    tile = list(shape)
    for axis in range(len(shape)):
        tile[axis] = max(1, min(shape[axis], num_numbers // math.prod(shape[axis + 1 :])))
    return tile


@functools.partial(jax.jit, donate_argnums=0)
def _set_block(array: jax.Array, block: jax.Array, corner: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, block, corner)


def in_file_order(kinds: list[Kind]) -> Iterator[tuple[Kind, int | None, int | None]]:
    """Yields what comes before the layers, layer after layer, and what comes behind."""
    for _, group in itertools.groupby(kinds, key=lambda kind: kind.is_stacked):
        members = list(group)
        for layer in sorted({layer for kind in members for layer in kind.layers}):
            for kind in members:
                if layer in kind.layers:
                    yield from ((kind, layer, index) for index in kind.indices)


def gather_tensor(
    kind: Kind, layer: int | None, index: int | None, leaves: dict[str, jax.Array]
) -> np.ndarray:
    """Brings one of their tensors to the host, as it is in the file but for the dtype."""
    num_groups, columns = kind.tensor.num_groups, []
    for part in kind.parts:
        path, at = part.stacks[0][0], ()
        if layer is not None:
            path, first = next(stack for stack in reversed(part.stacks) if stack[1] <= layer)
            at = (layer - first,)
        if index is not None:
            at += (index,)
        values = _gather_rows(leaves[path], at, part.shape[0])
        rows = [math.prod(part.shape[: part.num_row_axes])] if part.num_row_axes else []
        columns.append(values.reshape([*rows, num_groups, -1]))
    theirs = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=-1)
    theirs = theirs.reshape(*theirs.shape[:-2], -1)
    return theirs.T if kind.tensor.transpose else theirs


def _gather_rows(array: jax.Array, at: tuple[int, ...], stop: int) -> np.ndarray:
    """Brings array[at][:stop] to the host, some rows at a time, to spare the devices."""
    shape = array.shape[len(at) + 1 :]
    step = max(1, _GATHER_BYTES // (math.prod(shape) * array.dtype.itemsize))
    whole = None if array.is_fully_addressable else NamedSharding(array.sharding.mesh, P())
    gathered = np.empty((stop, *shape), array.dtype)
    for first in range(0, stop, step):
        num_rows = min(step, stop - first)
        rows = _get_rows(array, at, first, num_rows, whole)
        block = rows if whole is None else rows.addressable_data(0)
        gathered[first : first + num_rows] = np.asarray(block)
    return gathered


@functools.partial(jax.jit, static_argnums=(3, 4))
def _get_rows(
    array: jax.Array, at: tuple[int, ...], first: int, num_rows: int, whole: NamedSharding | None
) -> jax.Array:
    for i in at:
        array = jax.lax.dynamic_index_in_dim(array, i, keepdims=False)
    rows = jax.lax.dynamic_slice_in_dim(array, first, num_rows, axis=0)
    return rows if whole is None else jax.lax.with_sharding_constraint(rows, whole)
