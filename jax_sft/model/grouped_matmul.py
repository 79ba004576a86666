"""Products of groups of rows with a kernel of their own each: what experts compute.

In: rows, sorted by group; a kernel a group; how many rows each has. Out: each row times its group's
kernel. On TPUs `jax.lax.ragged_dot` is a kernel that does just that. Elsewhere XLA would multiply
every row with every kernel, so the rows go in blocks of one group each, a block at a time:

    group     0 0 0 0 0 1 2 2 2        blocks of two rows, from where their group begins
    blocks    0 0|0 0|0 .
                        1 .            what a block computes of the next group is
                          2 2|2 .      written over by that group's first
"""

import math

import jax
import jax.numpy as jnp

_MOST_ROWS = 512  # of a block: enough for a product to be bound by arithmetic


def grouped_matmul(x_MD: jax.Array, kernels_XDF: jax.Array, num_rows_X: jax.Array) -> jax.Array:
    """Multiplies each row with its group's kernel.

    Args:
        x_MD: rows, those of the first group first.
        kernels_XDF: a kernel a group.
        num_rows_X: int32, rows of each group; their sum is M.

    Returns:
        out_MF, in the dtype of x.
    """
    return jax.lax.platform_dependent(
        x_MD, kernels_XDF, num_rows_X, tpu=jax.lax.ragged_dot, default=_in_blocks
    )


@jax.custom_vjp
def _in_blocks(x_MD: jax.Array, kernels_XDF: jax.Array, num_rows_X: jax.Array) -> jax.Array:
    M, F = len(x_MD), kernels_XDF.shape[2]
    block_len = _block_len(M, len(num_rows_X))
    x_MD = jnp.pad(x_MD, ((0, block_len), (0, 0)))

    def add_block(out_MF: jax.Array, group: jax.Array, row: jax.Array) -> jax.Array:
        block_LF = jax.lax.dynamic_slice_in_dim(x_MD, row, block_len) @ kernels_XDF[group]
        return jax.lax.dynamic_update_slice_in_dim(out_MF, block_LF, row, 0)

    out_MF = jnp.zeros((M + block_len, F), x_MD.dtype)
    return _fold_blocks(add_block, out_MF, num_rows_X, block_len)[:M]


def _forward(x_MD, kernels_XDF, num_rows_X):
    return _in_blocks(x_MD, kernels_XDF, num_rows_X), (x_MD, kernels_XDF, num_rows_X)


def _backward(inputs, d_out_MF):
    x_MD, kernels_XDF, num_rows_X = inputs
    d_x_MD = _in_blocks(d_out_MF, kernels_XDF.swapaxes(1, 2), num_rows_X)
    block_len = _block_len(len(x_MD), len(num_rows_X))
    x_MD, d_out_MF = (jnp.pad(rows, ((0, block_len), (0, 0))) for rows in (x_MD, d_out_MF))
    ends_X = jnp.cumsum(num_rows_X)

    def add_block(sums_XDF: jax.Array, group: jax.Array, row: jax.Array) -> jax.Array:
        x_LD, d_out_LF = (
            jax.lax.dynamic_slice_in_dim(rows, row, block_len) for rows in (x_MD, d_out_MF)
        )
        is_own_L = row + jnp.arange(block_len) < ends_X[group]
        x_LD = jnp.where(is_own_L[:, None], x_LD, 0)
        d_kernel_DF = jnp.einsum("LD,LF->DF", x_LD, d_out_LF, preferred_element_type=jnp.float32)
        return sums_XDF.at[group].add(d_kernel_DF)

    sums_XDF = jnp.zeros(kernels_XDF.shape, jnp.float32)
    sums_XDF = _fold_blocks(add_block, sums_XDF, num_rows_X, block_len)
    return d_x_MD, sums_XDF.astype(kernels_XDF.dtype), None


_in_blocks.defvjp(_forward, _backward)


def _block_len(num_rows: int, num_groups: int) -> int:
    """Returns a power of two, about as many rows as a group has on average."""
    mean = max(1, num_rows // num_groups)
    return min(_MOST_ROWS, 2 ** math.ceil(math.log2(mean)))


def _fold_blocks(add_block, start: jax.Array, num_rows_X: jax.Array, block_len: int) -> jax.Array:
    """Calls add_block(sum, group, first row) for each block, in the rows' order."""
    begins_X = jnp.cumsum(num_rows_X) - num_rows_X
    num_blocks_X = -(-num_rows_X // block_len)
    ends_X = jnp.cumsum(num_blocks_X)

    def step(block: jax.Array, folded: jax.Array) -> jax.Array:
        group = jnp.searchsorted(ends_X, block, side="right")
        nth = block - (ends_X[group] - num_blocks_X[group])
        return add_block(folded, group, begins_X[group] + nth * block_len)

    return jax.lax.fori_loop(0, ends_X[-1], step, start)
