"""One file a family: its `transformers` config to ours, and its tensor names to ours."""

from typing import Any

from jax_sft.model.families import gpt2
from jax_sft.model.types import Family

FAMILIES = {"gpt2": gpt2.FAMILY}


def find_family(config: Any) -> Family:
    """Returns the family of a `transformers` config.

    Raises:
        ValueError: its `model_type` is not one that is built.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported: choose one of {sorted(FAMILIES)}"
        )
    return FAMILIES[config.model_type]
