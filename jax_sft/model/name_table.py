"""A family's name table, with shapes: which block of their tensors is which block of ours.

In comes the table of `families/` and our parameters' shapes; out come the names and shapes
that a checkpoint must have, what a given one has too much or too little, and any block of a
parameter, read from the files. Import and export share this one reading of the table.
"""

import dataclasses
import itertools
import math
import re
from typing import Any

import numpy as np

from jax_sft.model.types import DecoderConfig, Family, Tensor
from jax_sft.model.weight_files import FLOATS, WeightFiles, contiguous

_MAX_LISTED = 200
_COMPARED_ROWS = 4096
_STACK = re.compile(r"(?P<frozen>frozen_)?layers(_(?P<first>\d+))?/")


@dataclasses.dataclass(frozen=True)
class Part:
    """One of our parameters, as columns of one of their tensors.

    Attributes:
        stacks: the leaves that hold it, and the first layer of each; several where layers are
            split into stacks.
        shape: of one of theirs, without the vocabulary's padding.
        num_row_axes: how many of its axes are rows of theirs; the others are columns.
        first_column: where its columns begin in each group of theirs.
        group_len: how many of its columns are in a group.
    """

    stacks: tuple[tuple[str, int], ...]
    shape: tuple[int, ...]
    num_row_axes: int
    first_column: int
    group_len: int


@dataclasses.dataclass(frozen=True)
class Kind:
    """A row of the name table with its shapes.

    Attributes:
        tensor: the row.
        parts: ours, in the order of their columns.
        shape: theirs, as it is in the file.
        layers: the layers that have it; (None,) where it is not stacked.
        indices: the numbers along our next axis, such as experts; (None,) where there is none.
    """

    tensor: Tensor
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    layers: tuple[int | None, ...]
    indices: tuple[int | None, ...]

    @property
    def is_stacked(self) -> bool:
        """Whether our leaves have an axis of layers."""
        return self.layers != (None,)

    def name(self, layer: int | None, index: int | None) -> str:
        """Returns the name of one of theirs."""
        return self.tensor.theirs.format(layer=layer, index=index)

    @property
    def names(self) -> list[str]:
        """Their names, layer by layer."""
        places = itertools.product(self.layers, self.indices)
        return [self.name(layer, index) for layer, index in places]

    @property
    def group_len(self) -> int:
        """Columns of theirs in a group."""
        return sum(part.group_len for part in self.parts)


def find_kinds(family: Family, config: DecoderConfig, leaves: dict[str, Any]) -> list[Kind]:
    """Puts shapes to the name table.

    Args:
        family: has the table.
        config: the decoder's.
        leaves: our parameters, or their structs, by path.
    """
    stacks = _find_stacks(leaves)
    kinds = [_find_kind(tensor, config, leaves, stacks) for tensor in family.tensors(config)]
    known = {path for kind in kinds for part in kind.parts for path, _ in part.stacks}
    assert known == set(leaves), f"not both in table and parameters: {known ^ set(leaves)}"
    return kinds


def find_names(
    files: WeightFiles, kinds: list[Kind], family: Family, config: DecoderConfig
) -> dict[str, str]:
    """Maps their names to those in the files, which may lack the base model's prefix.

    Raises:
        ValueError: tensors are missing, unknown or of another shape, all of them listed.
    """
    wanted = {name: kind.shape for kind in kinds for name in kind.names}
    untied = family.tensors(dataclasses.replace(config, tied_head=False))
    tied = {tensor.theirs for tensor in untied} - {kind.tensor.theirs for kind in kinds}
    names, tied_names, unknown = {}, [], []
    for name in files.specs:
        spellings = [spelling for spelling in (name, family.prefix + name) if spelling in wanted]
        if spellings and spellings[0] not in names:
            names[spellings[0]] = name
        elif name in tied:
            tied_names.append(name)
        elif not _is_buffer(name, family):
            unknown.append(name)
    if tied_names:
        _tie(files, kinds, names, tied_names)
    problems = {
        "missing": [name for name in wanted if name not in names],
        "unknown": unknown,
        "of another shape than config.json says": [
            f"{name} {list(files.specs[name].shape)} instead of {list(wanted[theirs])}"
            for theirs, name in names.items()
            if files.specs[name].shape != wanted[theirs]
        ],
        "no floating-point numbers": [
            f"{name} ({files.specs[name].dtype})"
            for name in names.values()
            if files.specs[name].dtype not in FLOATS
        ],
    }
    if any(problems.values()):
        told = "; ".join(_tell(what, found) for what, found in problems.items() if found)
        raise ValueError(
            f"weights in {files.folder} do not fit its config.json: {told}; pass the folder of one"
            " whole model"
        )
    return names


@dataclasses.dataclass(frozen=True)
class BlockReader:
    """Reads any block of one of our leaves, in the leaf's dtype.

    Attributes:
        files: the checkpoint.
        names: from `find_names`.
        kind: the row of the table.
        part: which of its parts.
        first_layer: the model's layer that the leaf's first entry is.
        dtype: the leaf's.
    """

    files: WeightFiles
    names: dict[str, str]
    kind: Kind
    part: Part
    first_layer: int
    dtype: Any

    def __call__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Returns the block at `index`; what pads the vocabulary is zero."""
        block = np.zeros([axis.stop - axis.start for axis in index], self.dtype)
        layers, indices = (None,), (None,)
        targets = block[None, None]
        if self.kind.is_stacked:
            layers = range(self.first_layer + index[0].start, self.first_layer + index[0].stop)
            index, targets = index[1:], block[:, None]
        if self.kind.indices != (None,):
            indices = range(index[0].start, index[0].stop)
            index, targets = index[1:], targets[:, 0]
        for i, layer in enumerate(layers):
            for j, number in enumerate(indices):
                self._fill(targets[i, j], self.kind.name(layer, number), index)
        return block

    def _fill(self, block: np.ndarray, theirs: str, index: tuple[slice, ...]) -> None:
        shape, split = self.part.shape, self.part.num_row_axes
        if self.kind.tensor.vocabulary:
            stop = min(index[0].stop, shape[0])
            if stop <= index[0].start:
                return
            index = (slice(index[0].start, stop), *index[1:])
            block = block[: stop - index[0].start]
        column, column_axes, column_index = _merge(index[split:], shape[split:])
        row, row_axes, row_index = (), (), ()
        if split:
            merged, row_axes, row_index = _merge(index[:split], shape[:split])
            row = (merged,)
        pieces = [self._read(theirs, (*row, piece)) for piece in self._their_columns(column)]
        values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)
        block[...] = values.reshape(row_axes + column_axes)[row_index + column_index]

    def _read(self, theirs: str, ranges: tuple[slice, ...]) -> np.ndarray:
        if self.kind.tensor.transpose:
            return contiguous(self.files.read(self.names[theirs], ranges[::-1]).T)
        return self.files.read(self.names[theirs], ranges)

    def _their_columns(self, ours: slice) -> list[slice]:
        """Finds our columns among theirs, group by group."""
        own, every, first = self.part.group_len, self.kind.group_len, self.part.first_column
        columns = []
        for group in range(ours.start // own, -(-ours.stop // own)):
            start = max(ours.start - group * own, 0)
            stop = min(ours.stop - group * own, own)
            base = group * every + first
            columns.append(slice(base + start, base + stop))
        return columns


def _find_stacks(leaves: dict[str, Any]) -> list[tuple[str, range]]:
    """Returns the top-level stacks of layers with the layers they hold, from the bottom up."""
    sizes = {}
    for path, leaf in leaves.items():
        match = _STACK.match(path)
        if match:
            is_frozen, first = bool(match["frozen"]), int(match["first"] or 0)
            sizes[not is_frozen, first, match[0][:-1]] = leaf.shape[0]
    stacks, end = [], 0
    for (_, first, name), size in sorted(sizes.items()):
        # Adapters may stand in some of the stacks alone: then what is below them is not here.
        start = first or end
        stacks.append((name, range(start, start + size)))
        end = start + size
    return stacks


def _find_kind(
    tensor: Tensor,
    config: DecoderConfig,
    leaves: dict[str, Any],
    stacks: list[tuple[str, range]],
) -> Kind:
    is_stacked, is_indexed = "{layer}" in tensor.theirs, "{index}" in tensor.theirs
    parts, layers, indices, first_column = [], (None,), (None,), 0
    for path in tensor.ours:
        found = [(path, range(0))]
        if is_stacked:
            inner = path.removeprefix("layers/")
            found = [(f"{name}/{inner}", layers) for name, layers in stacks]
            found = [(stack, layers) for stack, layers in found if stack in leaves]
            layers = tuple(layer for _, some in found for layer in some)
        assert found and found[0][0] in leaves, f"{path} is in the name table only"
        shape = leaves[found[0][0]].shape[int(is_stacked) :]
        if is_indexed:
            indices, shape = tuple(range(shape[0])), shape[1:]
        if tensor.vocabulary:
            shape = (config.vocab_size, *shape[1:])
        split = tensor.num_row_axes
        if split is None:
            split = _num_row_axes(path, len(shape))
        group_len, rest = divmod(math.prod(shape[split:]), tensor.num_groups)
        assert not rest, f"{path} {shape} does not split into {tensor.num_groups} groups"
        firsts = tuple((stack, some.start) for stack, some in found)
        parts.append(Part(firsts, shape, split, first_column, group_len))
        first_column += group_len
    rows = (math.prod(shape[:split]),) if split else ()
    theirs = (*rows, first_column * tensor.num_groups)
    shape = theirs[::-1] if tensor.transpose else theirs
    return Kind(tensor, tuple(parts), shape, layers, indices)


def _num_row_axes(path: str, num_axes: int) -> int:
    """Returns how many axes are inputs: of [H, C, D] two, of [D, H, C] one, of a bias none."""
    if path.endswith(("/bias", "/scale", "/lora_magnitude")):
        return 0
    return num_axes - 1 if path.endswith(("/out/kernel", "/lora_a")) else 1


def _merge(
    index: tuple[slice, ...], shape: tuple[int, ...]
) -> tuple[slice, tuple[int, ...], tuple[slice, ...]]:
    """Turns a block of some axes into a range of them merged.

        index [1:3, 0:2] of shape [4, 8]  ->  range 8:24, axes (2, 8), index [:, 0:2] of those

    Returns:
        The smallest range of whole entries of the first axis, the axes that it splits into,
        and where the block is in them.
    """
    inner = math.prod(shape[1:])
    merged = slice(index[0].start * inner, index[0].stop * inner)
    return merged, (index[0].stop - index[0].start, *shape[1:]), (slice(None), *index[1:])


def _tie(
    files: WeightFiles, kinds: list[Kind], names: dict[str, str], tied_names: list[str]
) -> None:
    """Lets a tied head stand in for a missing embedding; else they must be equal.

    `transformers` does not tie tensors that differ, whatever the config says.
    """
    embedding = next(kind.tensor.theirs for kind in kinds if "embed/tokens" in kind.tensor.ours)
    for name in tied_names:
        if embedding not in names:
            names[embedding] = name
        elif not _are_equal(files, name, names[embedding]):
            raise ValueError(
                f"weights in {files.folder}: {name} differs from {names[embedding]}, but"
                " config.json ties them; set model.config.tie_word_embeddings=False"
            )


def _are_equal(files: WeightFiles, name: str, other: str) -> bool:
    shape = files.specs[name].shape
    if files.specs[other].shape != shape:
        return False
    blocks = (
        (
            slice(first, min(first + _COMPARED_ROWS, shape[0])),
            *(slice(0, size) for size in shape[1:]),
        )
        for first in range(0, shape[0], _COMPARED_ROWS)
    )
    return all(np.array_equal(files.read(name, at), files.read(other, at)) for at in blocks)


def _is_buffer(name: str, family: Family) -> bool:
    spellings = (name, family.prefix + name)
    return any(
        re.fullmatch(pattern, spelling)
        for pattern, spelling in itertools.product(family.buffers, spellings)
    )


def _tell(what: str, found: list[str]) -> str:
    more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
    return f"{len(found)} {what}: {', '.join(found[:_MAX_LISTED])}{more}"
