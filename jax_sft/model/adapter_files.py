"""An adapter's folder, as PEFT writes and reads it, to parameters and back.

In: adapter_config.json and adapter_model.safetensors, with the name table of the adapters. Out:
sharded parameters; and the other way. Adapters are small: a host holds them whole.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jax_sft.model import lora
from jax_sft.model.name_table import BlockReader, find_kinds, find_names
from jax_sft.model.pretrained import by_path, gather_tensor, in_file_order
from jax_sft.model.types import DecoderConfig, Family
from jax_sft.model.weight_files import INDEX_FILE, SINGLE_FILE, TensorSpec

# Ways to draw an adapter that leave its base model as it is; others change that.
_DRAWN = (False, "gaussian", "orthogonal", "eva")


def is_adapter_folder(folder: Path) -> bool:
    """Tells whether a folder holds an adapter, and not a whole model."""
    has_model = any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    return (folder / lora.CONFIG_FILE).is_file() and not has_model


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Returns the fields of adapter_config.json; how its weights were drawn matters no more.

    Raises:
        ValueError: it is no JSON object.
    """
    path = folder / lora.CONFIG_FILE
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy or download it again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no JSON object; copy or download it again")
    if fields.get("init_lora_weights") in _DRAWN:
        fields["init_lora_weights"] = True
    return fields


def base_model(folder: Path) -> str:
    """Returns the folder or hub name of an adapter's base model.

    Raises:
        ValueError: the adapter does not say.
    """
    name = read_adapter_config(folder).get("base_model_name_or_path")
    if not name:
        raise ValueError(
            f"{folder / lora.CONFIG_FILE} has no base_model_name_or_path: write the base model's"
            " folder or hub name there"
        )
    return name


def load_adapters(
    folder: Path, family: Family, adapters: lora.Adapters, *, config: DecoderConfig, like: dict
) -> dict:
    """Reads an adapter's weights to sharded parameters.

    Args:
        folder: has adapter_model.safetensors.
        family: the base model's.
        adapters: as read from adapter_config.json.
        config: the decoder's.
        like: tree of `jax.ShapeDtypeStruct` with shardings, of the adapters alone.

    Raises:
        ValueError: no such file, a damaged one, or tensors that are missing, extra or of
            another shape, all of them listed.
    """
    family = _adapter_family(family, adapters)
    leaves = by_path(like)
    kinds = find_kinds(family, config, leaves)
    files = _AdapterFile(folder)
    names = find_names(files, kinds, family, config)
    params = {}
    for kind in kinds:
        for part in kind.parts:
            for path, first_layer in part.stacks:
                struct = leaves[path]
                reader = BlockReader(files, names, kind, part, first_layer, struct.dtype)
                params[path] = jax.make_array_from_callback(
                    struct.shape, struct.sharding, _whole_slices(reader, struct.shape)
                )
    return jax.tree.unflatten(jax.tree.structure(like), [params[path] for path in leaves])


def save_adapters(
    folder: Path,
    family: Family,
    adapters: lora.Adapters,
    *,
    config: DecoderConfig,
    params: dict,
    base_model: str | None,
) -> None:
    """Writes an adapter's folder; every process takes part, and process 0 writes.

    Args:
        folder: made where it is missing.
        family: the base model's.
        adapters: which layers have one.
        config: the decoder's.
        params: the adapters alone.
        base_model: hub name or folder of the base model, for PEFT to find it.

    Raises:
        ValueError: the folder cannot be written.
    """
    leaves = by_path(params)
    kinds = find_kinds(_adapter_family(family, adapters), config, leaves)
    tensors = {}
    for kind, layer, index in in_file_order(kinds):
        tensor = gather_tensor(kind, layer, index, leaves)
        tensors[kind.name(layer, index)] = np.ascontiguousarray(tensor)
    if jax.process_index() != 0:
        return
    fields = lora.peft_fields(adapters, family.tensors(config), base_model=base_model)
    draft = folder / f"{lora.WEIGHTS_FILE}.unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, draft, metadata={"format": "pt"})
        # The old options go first, so that they never stand beside new weights.
        (folder / lora.CONFIG_FILE).unlink(missing_ok=True)
        draft.replace(folder / lora.WEIGHTS_FILE)
        (folder / lora.CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
    except OSError as error:
        raise ValueError(
            f"folder {folder} cannot be written ({error.strerror}); save to one that can"
        ) from None


class _AdapterFile:
    """The tensors of adapter_model.safetensors, with the face of `WeightFiles`."""

    def __init__(self, folder: Path) -> None:
        self.folder, path = folder, folder / lora.WEIGHTS_FILE
        if (folder / "adapter_model.bin").is_file() and not path.is_file():
            raise ValueError(
                f"adapter folder {folder} has its weights only as adapter_model.bin, which is not"
                " read (a pickle runs code); load and save it with peft, which writes"
                f" {lora.WEIGHTS_FILE}"
            )
        if not path.is_file():
            raise ValueError(
                f"adapter folder {folder} has no {lora.WEIGHTS_FILE}; pass the folder that PEFT's"
                " save_pretrained wrote"
            )
        try:
            self._tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is no whole safetensors file ({error}); copy or download it again"
            ) from None
        self.specs = {
            name: TensorSpec(tensor.shape, tensor.dtype.name)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part of a tensor."""
        return self._tensors[name][index]


def _adapter_family(family: Family, adapters: lora.Adapters) -> Family:
    """The adapters' own name table, in the place of the model's."""

    def tensors(config: DecoderConfig) -> tuple:
        return lora.adapter_tensors(family.tensors(config), adapters)

    return dataclasses.replace(family, tensors=tensors, prefix=lora.PREFIX, buffers=())


def _whole_slices(reader: BlockReader, shape: tuple[int, ...]) -> Any:
    """Calls the reader with a start and a stop for every axis."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = (axis.indices(size) for axis, size in zip(index, shape, strict=True))
        return reader(tuple(slice(start, stop) for start, stop, _ in bounds))

    return read
