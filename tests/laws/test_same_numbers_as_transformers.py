"""Law 6: logits, loss and gradients are those of `transformers` in PyTorch, for every family.

The numbers are compared in tests/families/, a file each; here is that none is left out, and
that they are those of a model as a user calls it.
"""

import family_oracle as oracle
import numpy as np
import pytest
from family_laws import TOLERANCE, laws_of, open_case

from jax_sft.model.families import FAMILIES


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_has_cases_and_numbers_stored_for_them(model_type):
    cases = laws_of(model_type).cases
    assert {fields["model_type"] for fields in cases.values()} == {model_type}
    assert oracle.read_golden(model_type).keys() == cases.keys()


def test_nothing_is_stored_that_no_family_has():
    assert {file.stem for file in oracle.GOLDEN.glob("*.npz")} == set(FAMILIES)


def test_rows_side_by_side_are_rows_alone(tmp_path):
    """A batch padded on the right, called as a user calls it."""
    case = open_case(laws_of("gpt2"), "plain", tmp_path)
    tokens = np.zeros((2, 9), np.int32)
    for row, ids in zip(tokens, oracle.IDS, strict=True):
        row[: len(ids) - 1] = ids[:-1]
    got = np.asarray(case.model(tokens))
    together, expected = np.concatenate([got[0, :9], got[1, :5]]), case.golden.numbers["logits"]
    atol = TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(together, expected, rtol=0, atol=atol)
