"""Models, meshes and batches small enough to compile in a second or two.

Weights are drawn wide, biases and norms included, so that attention, positions and every bias
matter to the numbers: with GPT-2's own initialisation a forgotten bias would change nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jax_sft.data.packing import Plan, fill_rows
from jax_sft.data.types import Batch, Examples, examples_from_parts
from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.placement import Placement
from jax_sft.sharding import MESH_NAMES

VOCAB_SIZE = 67
FIELDS = dict(
    model_type="gpt2",
    n_layer=2,
    n_embd=32,
    n_head=4,
    n_positions=64,
    vocab_size=VOCAB_SIZE,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=0,
)


@functools.cache
def one_device() -> Mesh:
    """A mesh of the first device; `make_mesh` takes all that there are."""
    return jax.make_mesh(
        (1, 1, 1, 1), MESH_NAMES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:1]
    )


def tiny_gpt2(
    *,
    mesh: Mesh | None = None,
    seed: int = 0,
    placement: dict | None = None,
    peft_config: dict | None = None,
    **fields,
):
    """A GPT-2 with wide random weights; on one device where no mesh is given."""
    placed = Placement(mesh=mesh or one_device(), **(placement or {}))
    model = CausalLM.open(None, fields=FIELDS | fields, placement=placed, peft_config=peft_config)
    model.params = draw_params(model, seed=seed)
    return model


def draw_params(model: CausalLM, *, seed: int = 0) -> dict:
    """Draws parameters with numpy, the same on every mesh, without compiling anything."""
    rng = np.random.default_rng(seed)
    config = model.decoder.config

    def draw(path: tuple, struct: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_vocabulary = name in ("embed/tokens", "head/kernel")
        shape = (config.vocab_size, *struct.shape[1:]) if is_vocabulary else struct.shape
        values = np.zeros(struct.shape, np.float32)
        values[: shape[0]] = 0.2 * rng.standard_normal(shape) + name.endswith("scale")
        return jax.device_put(values.astype(struct.dtype), struct.sharding)

    return jax.tree_util.tree_map_with_path(draw, model.param_structs())


def draw_examples(
    lengths: list[int], *, seed: int = 0, vocab_size: int = VOCAB_SIZE, trained: float = 0.7
) -> Examples:
    """Examples of random ids, of which a share is trained, the last target always."""
    rng = np.random.default_rng(seed)
    parts = []
    for length in lengths:
        ids = rng.integers(0, vocab_size, length + 1, dtype=np.int32)
        weights = (rng.random(length) < trained).astype(np.float32)
        weights[-1] = 1.0
        parts.append((ids[:-1], ids[1:], weights))
    return examples_from_parts(parts)


def lay_out(examples: Examples, rows: list[list[int]], row_len: int) -> Batch:
    """The batch whose rows hold the named examples, in that order."""
    members = np.array([i for row in rows for i in row], np.int64)
    starts = np.cumsum([0, *map(len, rows)])
    plan = Plan(members, starts, int(examples.lengths_N[members].sum()), row_len)
    return fill_rows(plan, range(len(rows)), examples, row_len)


def on_device(batch: Batch) -> Batch:
    return Batch(*map(jnp.asarray, batch))


def paths_and_leaves(tree: dict) -> list[tuple[str, np.ndarray]]:
    """Every leaf with its slash-joined path, as numpy."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def assert_close_trees(got: dict, expected: dict, *, rtol: float) -> None:
    """Checks that every leaf is equal up to `rtol` of the expected leaf's largest entry.

    A key's bias moves all scores of a query alike, so that its gradient is zero but for what
    rounding leaves of larger terms: it is measured by the tree's largest entry.
    """
    leaves = paths_and_leaves(expected)
    largest = max(np.abs(leaf).max() for _, leaf in leaves)
    for (path, ours), (_, theirs) in zip(paths_and_leaves(got), leaves, strict=True):
        scale = largest if path.endswith("key/bias") else np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * scale, err_msg=path)
