"""What is kept in bfloat16 between steps, and how float32 results are rounded to it.

A bfloat16 has 8 significant bits, so an update below 1/512 of its parameter is lost when it is
rounded to nearest, step after step. Rounded up or down by chance, with the chances that make the
mean exact, such updates add up (Gupta et al. 2015, arXiv 1502.02551, section 3.1). The same
holds for moments, of which a step changes a thousandth.
"""

from typing import Any

import jax
import jax.numpy as jnp


def in_float32(tree: Any) -> Any:
    """Returns the tree with its bfloat16 arrays in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def kept_in(tree: Any, dtype: Any) -> Any:
    """Returns the tree with its float arrays, scalars apart, rounded to nearest in a dtype."""

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if x.ndim and jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)


def round_like(tree: Any, held: Any, key: jax.Array) -> Any:
    """Rounds the float32 arrays that are to be kept in bfloat16, at random.

    Args:
        tree: new values.
        held: a tree like it, whose dtypes are to be had.
        key: every array draws from a key of its own, the same bits on any mesh.

    Returns:
        The tree in the dtypes of `held`.
    """
    leaves, treedef = jax.tree.flatten(tree)
    rounded = [
        x if x.dtype == like.dtype else round_at_random(x, jax.random.fold_in(key, number))
        for number, (x, like) in enumerate(zip(leaves, jax.tree.leaves(held), strict=True))
    ]
    return jax.tree.unflatten(treedef, rounded)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds to one of the two nearest bfloat16, so that the mean over keys is x.

    A bfloat16 is the upper half of a float32: a draw from all lower halves is added, and what
    the sum carries into the upper half is kept.

    Args:
        x: float32, any shape.
        key: of the draws.

    Returns:
        x in bfloat16; infinities and NaN as they are.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    drawn = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = (bits + drawn) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
