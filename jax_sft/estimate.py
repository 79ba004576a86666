"""What a step takes, by arithmetic alone: memory a device by kind, and seconds.

In: the config, its model without weights, and ways to split them over devices. Out: bytes, which
are exact where shapes and shardings alone decide them (parameters, optimizer, batch) and otherwise
of what a trace of the loss keeps for its backward pass; and the seconds of a roofline. It says
what is worth compiling; whoever has a compiler then asks that.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jax_sft import flops
from jax_sft.config import SFTConfig
from jax_sft.data.types import Batch
from jax_sft.loss import find_chunk_len
from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.pretrained import by_path
from jax_sft.recipe import make_loss, make_update, trained_params
from jax_sft.sharding import platform_of
from jax_sft.startup import flops_a_step
from jax_sft.topology import Topology
from jax_sft.train_step import combine, partition

# An axis of this length, or of this many times the row's, is known to be rows.
_TRACED_ROWS = 13

# Of the peak, what large products reach: the best runs that are published, recomputation counted,
# are at 60 to 70% (MaxText, 32B on v5p-128, has an MFU of 71.5%).
_PRODUCT_SHARE = 0.65

# Sums over microbatches and what is added to them: what compiled steps hold of them at once, for
# v4-8 and v5e-16 between 3.7 and 5.2 times, for an H200 twice.
_COPIES = {"tpu": 4, "gpu": 2}
# Of what a layer computes again, the part that compiled steps hold at once: for an H200 between a
# fifth and a half of it.
_HELD_AGAIN = {"tpu": 1.0, "gpu": 0.35}


class Split(NamedTuple):
    """How a run is laid over devices: the sizes of the mesh, rows at a time, what is kept."""

    data: int
    fsdp: int
    sequence: int
    tensor: int
    minibatch_size: int
    remat: str

    @property
    def mesh(self) -> dict[str, int]:
        """The mesh's sizes by name."""
        return {name: getattr(self, name) for name in ("data", "fsdp", "sequence", "tensor")}


def split_of(config: SFTConfig, mesh: Mapping[str, int]) -> Split:
    """Returns the split that a config asks for.

    Args:
        config: the run's config.
        mesh: its mesh's sizes, without -1.
    """
    rows = config.train.minibatch_size or config.train.batch_size
    return Split(**mesh, minibatch_size=rows, remat=config.model.remat)


class Estimator:
    """Estimates splits of one run.

    Attributes:
        model: the run's.

    Args:
        config: the run's config; its mesh, minibatch_size and remat are not read.
        model: opened, on any mesh.
    """

    def __init__(self, config: SFTConfig, model: CausalLM) -> None:
        self._config, self.model = config, model
        self._structs = make_update(config, model, num_steps=config.train.total_steps).structs
        self._trained = trained_params(config, model)
        self._platform = "gpu" if platform_of(model.mesh) == "gpu" else "tpu"
        self._itemsize = jnp.dtype(model.decoder.numerics.dtype).itemsize
        self._kept = functools.cache(self._trace)

    def memory(self, split: Split) -> dict[str, float]:
        """Estimates bytes a device by kind.

        Parameters, optimizer and batch are exact but for the padding of a vocabulary. Gradients
        are those of the trained parameters in their dtype, several times where microbatches are
        summed; activations what the backward pass is given; the loss a chunk's logits, the whole
        vocabulary and its gradient; working memory a layer's weights, twice, and what its
        backward pass computes again.
        """
        train, c = self._config.train, self.model.decoder.config
        state = self._structs
        kept, _ = partition(state.params, self._trained)
        num_parts = train.batch_size // split.minibatch_size
        rows = split.minibatch_size / (split.data * split.fsdp)
        tokens = rows * train.seq_length / split.sequence
        vocabulary = c.vocab_size / split.tensor
        width = c.embed_width or c.width
        is_whole = num_parts == 1 and self.model.decoder.numerics.param_dtype == jnp.bfloat16
        is_low = self._config.optimizer.grad_dtype == "bfloat16" or is_whole
        gradients = self._bytes(kept, split, itemsize=2 if is_low else 4)
        # What is offloaded is on the host.
        remat = "minimal" if split.remat == "offload" else split.remat
        activations = sum(self._kept_bytes(leaf, split) for leaf in self._kept(remat))
        chunk = find_chunk_len(math.ceil(tokens))
        return {
            "parameters": self._bytes(state.params, split),
            "optimizer": self._bytes((state.step, state.opt_state), split),
            "batch": 5 * 4 * num_parts * tokens,
            "gradients": gradients * (1 if num_parts == 1 else _COPIES[self._platform]),
            "activations": activations,
            "loss": vocabulary * (chunk * 8 + width * (self._itemsize + 4)),
            "working": self._layer_bytes(split),
        }

    def seconds(self, split: Split, topology: Topology) -> float:
        """Estimates a step's time by a roofline.

        Products and the sums and gathers of parameters overlap, so that the longer of the two
        counts; what the tensor and sequence axes exchange stands in between and is added
        (Austin et al. 2025, "How to Scale Your Model", part 5).
        """
        overlapped, exposed = self.network_seconds(split, topology)
        return max(self.product_seconds(split, topology), overlapped) + exposed

    def product_seconds(self, split: Split, topology: Topology) -> float:
        """The part of `seconds` that the products take, those computed again among them."""
        products, attention = self._forward_flops
        again = {"minimal": products, "full": products + attention}
        num_flops = self.flops + again.get(split.remat, 0.0)
        peak = flops.peak_flops(topology.chip.kind) * topology.num_chips
        return num_flops / (_PRODUCT_SHARE * peak)

    @functools.cached_property
    def flops(self) -> float:
        """FLOPs of a step over all devices, by `flops.FORMULA`."""
        return flops_a_step(self._config, self.model, trained=by_path(self._trained))

    @functools.cached_property
    def _forward_flops(self) -> tuple[float, float]:
        """Of the products with parameters, and of attention: see `flops.train_flops`."""
        train, c = self._config.train, self.model.decoder.config
        nothing = dict.fromkeys(by_path(self._trained), False)
        passes = flops_a_step(self._config, self.model, trained=nothing)
        width = c.num_layers * c.num_heads * c.head_width
        a_third = 2 * width * train.seq_length**2 * train.batch_size
        return (passes - 3 * a_third) / 2, a_third

    def network_seconds(self, split: Split, topology: Topology) -> tuple[float, float]:
        """Seconds of what overlaps with products, and of what they wait for.

        A microbatch gathers the weights for the forward and for the backward pass and scatters
        the gradients, all in the compute dtype; `data` sums what `fsdp` has scattered. A layer
        sums its two outputs over `tensor` in each pass, and gathers keys and values over
        `sequence`. A gather or scatter of n parts sends (n - 1) / n of the whole.
        """
        train, c, item = self._config.train, self.model.decoder.config, self._itemsize
        num_parts = train.batch_size // split.minibatch_size
        whole = split._replace(data=1, fsdp=1)
        kept, _ = partition(self._structs.params, self._trained)
        weights = self._bytes(self._structs.params, whole, itemsize=item)
        gradients = self._bytes(kept, whole, itemsize=item)
        rows = split.minibatch_size / (split.data * split.fsdp)
        tokens = rows * train.seq_length / split.sequence
        passes = 3 if split.remat in ("full", "minimal") else 2

        def wait(axis: str, sent: float) -> float:
            size = split.mesh[axis]
            return sent * (1 - 1 / size) / bandwidth(topology, split.mesh, axis)

        overlapped = num_parts * (
            wait("fsdp", 2 * weights + gradients) + wait("data", 2 * gradients / split.fsdp)
        )
        heads = 2 * c.num_kv_heads * c.head_width
        exposed = wait("tensor", passes * 2 * 2 * tokens * c.width * item)
        exposed += wait("sequence", 2 * passes * rows * train.seq_length * heads * item)
        return overlapped, num_parts * c.num_layers * exposed

    def _bytes(self, tree: Any, split: Split, *, itemsize: int | None = None) -> float:
        """Bytes a device of a tree of shapes and shardings, were they on the split's mesh."""
        return sum(
            math.prod(self._part_sizes(leaf, split)) * (itemsize or leaf.dtype.itemsize)
            for leaf in jax.tree.leaves(tree)
        )

    def _part_sizes(self, leaf: jax.ShapeDtypeStruct, split: Split) -> Iterator[float]:
        spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else ()
        for size, axes in zip(leaf.shape, (*spec, *[None] * len(leaf.shape)), strict=False):
            names = (axes,) if isinstance(axes, str) else axes or ()
            ways = math.prod(split.mesh[name] for name in names)
            is_whole = size % ways and size == self.model.decoder.config.num_kv_heads
            yield size if is_whole else size / ways

    def _layer_bytes(self, split: Split) -> float:
        layers = self._structs.params["layers"] if "layers" in self._structs.params else {}
        a_layer = self._bytes(layers, split._replace(data=1, fsdp=1), itemsize=self._itemsize)
        again = 0.0
        if split.remat != "none":
            again = sum(self._kept_bytes(leaf, split) for leaf in self._kept("none"))
            again *= _HELD_AGAIN[self._platform]
        return (2 * a_layer + again) / self.model.decoder.config.num_layers

    def _kept_bytes(self, leaf: jax.ShapeDtypeStruct, split: Split) -> float:
        """Bytes a device of an array that a trace keeps: [layers, rows, tokens, ...]."""
        train, c = self._config.train, self.model.decoder.config
        shape, ways = leaf.shape, 1.0
        if shape[:1] == (c.vocab_size + self.model.decoder.vocab_padding,):
            return 0.0  # the gradient of the vocabulary, which is the loss's
        rows = [size for size in shape if size in (_TRACED_ROWS, _TRACED_ROWS * train.seq_length)]
        if not rows:  # weights in the compute dtype
            ways = split.fsdp * split.tensor
        else:
            traced_share = split.minibatch_size / _TRACED_ROWS
            ways = split.data * split.fsdp * split.sequence / traced_share
            split_sizes = {c.num_heads, c.num_kv_heads, c.mlp_width, c.num_heads * c.head_width}
            others = [size for size in shape[1:] if size in split_sizes - {c.width}]
            if any(size % split.tensor == 0 for size in others):
                ways *= split.tensor
        return math.prod(shape) * leaf.dtype.itemsize / ways

    def _trace(self, remat: str) -> list[jax.ShapeDtypeStruct]:
        """What the backward pass is given of a few rows, beside the parameters themselves."""
        decoder = self.model.training_decoder
        decoder = decoder.clone(numerics=dataclasses.replace(decoder.numerics, remat=remat))
        loss_fn = make_loss(self._config, decoder)
        shape = (_TRACED_ROWS, self._config.train.seq_length)
        ints, floats = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
        batch = Batch(ints, ints, floats, ints, ints)

        def kept(params: dict, batch: Batch, key: jax.Array) -> list[jax.Array]:
            trained, rest = partition(params, self._trained)

            def sums(trained: dict) -> Any:
                return loss_fn(combine(trained, rest), batch, key)

            _, pull, _ = jax.vjp(sums, trained, has_aux=True)
            given = {id(leaf) for leaf in jax.tree.leaves((params, batch))}
            return [leaf for leaf in jax.tree.leaves(pull) if id(leaf) not in given]

        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._structs.params
        )
        return jax.eval_shape(kept, params, batch, jax.random.key(0))


def bandwidth(topology: Topology, mesh: Mapping[str, int], axis: str) -> float:
    """Returns the bytes a second that a device sends when an axis of the mesh is one ring.

    On a TPU's torus a ring uses both directions of each link, and an axis that is longer than one
    of the torus lies along several. Between slices, and between nodes of GPUs, each device brings
    its own share of the network.
    """
    chip, size = topology.chip, mesh[axis]
    names = list(mesh)
    inner = math.prod(mesh[name] for name in names[names.index(axis) + 1 :])
    near = math.prod(topology.shape)
    if topology.platform == "gpu":
        in_node = max(1, min(size, near // inner))
        return chip.link_bytes if inner * size <= near else chip.far_bytes * in_node
    if inner * size > near:
        return chip.far_bytes
    return 2 * chip.link_bytes * _num_axes(topology.shape, size)


def _num_axes(shape: Sequence[int], size: int) -> int:
    """How many axes of a torus a ring of this size lies along."""
    reached = 1
    for number, length in enumerate(sorted(shape, reverse=True), start=1):
        reached *= length
        if reached >= size:
            return number
    return len(shape)
