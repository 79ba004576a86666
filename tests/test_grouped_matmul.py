"""Products of groups of rows: against a loop over rows, whatever the groups' sizes are."""

import math
import re

import jax
import numpy as np
import pytest

from jax_sft.model import grouped_matmul as file
from jax_sft.model.grouped_matmul import grouped_matmul

SIZES = {
    "even": [8, 8, 8, 8],
    "some are empty": [0, 13, 0, 19, 0],
    "one has all": [0, 0, 40],
    "longer than a block, and shorter": [37, 1, 9, 2, 1, 30],
    "a row each": [1, 1, 1],
    "one group": [5],
}


def draw(sizes, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(sum(sizes), 6), (len(sizes), 6, 10), (sum(sizes), 10)]
    x, kernels, d_out = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, kernels, np.array(sizes, np.int32), d_out


@pytest.mark.parametrize("most_rows", [2, 512])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_each_row_meets_its_groups_kernel(sizes, most_rows, monkeypatch):
    monkeypatch.setattr(file, "_MOST_ROWS", most_rows)
    x, kernels, num_rows, d_out = draw(sizes)

    @jax.jit
    def out_and_grads(x, kernels):
        out, backward = jax.vjp(lambda *xs: grouped_matmul(*xs, num_rows), x, kernels)
        return out, *backward(d_out)

    groups = np.repeat(np.arange(len(sizes)), sizes)
    rows = [np.float64(x) for x in (x, d_out)]
    own = np.float64(kernels)[groups]
    d_kernels = np.zeros(kernels.shape)
    np.add.at(d_kernels, groups, rows[0][:, :, None] * rows[1][:, None])
    expected = (
        np.einsum("MD,MDF->MF", rows[0], own),
        np.einsum("MF,MDF->MD", rows[1], own),
        d_kernels,
    )
    for ours, theirs in zip(out_and_grads(x, kernels), expected, strict=True):
        # Sums of up to 40 products of about 1, in float32.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_no_row_is_copied_for_each_group():
    x, kernels, num_rows, d_out = draw([64] * 8)

    def grads(x, kernels):
        return jax.vjp(lambda *xs: grouped_matmul(*xs, num_rows), x, kernels)[1](d_out)

    text = jax.jit(grads).lower(x, kernels).compile().as_text()
    shapes = [map(int, sizes.split(",")) for sizes in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(map(math.prod, shapes)) < 8 * x.size
