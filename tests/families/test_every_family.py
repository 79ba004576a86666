"""Every model type that is built has its cases, and numbers stored for them."""

import importlib
import inspect

import pytest
from family_laws import FamilyLaws
from family_oracle import GOLDEN, read_golden

from jax_sft.model.families import FAMILIES


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_has_cases_and_stored_numbers(model_type):
    module = importlib.import_module(f"test_{model_type.replace('-', '_')}")
    classes = [value for value in vars(module).values() if inspect.isclass(value)]
    [laws] = [kind for kind in classes if issubclass(kind, FamilyLaws) and kind is not FamilyLaws]
    assert {fields["model_type"] for fields in laws.cases.values()} == {model_type}
    assert read_golden(model_type).keys() == laws.cases.keys()


def test_nothing_is_stored_that_no_family_has():
    assert {file.stem for file in GOLDEN.glob("*.npz")} == FAMILIES.keys()
