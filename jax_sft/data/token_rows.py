"""Rows that hold token ids to TokenRow: which ids are trained, and towards what.

What comes in are input_ids with labels or a mask as `transformers` and TRL name them,
what goes out is not shifted yet.

    input_ids         5    6    7    8    0
    attention_mask    1    1    1    1    0
    labels         -100 -100    7    9 -100
    ids_T             5    6    7    8
    targets_T         5    6    7    9
    weights_T         0    0    1    1
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_sft.data.row_checks import what
from jax_sft.data.types import BadRow, TokenRow

IGNORED = -100  # the label of what is not trained, in transformers and PyTorch
MASKS = "completion_mask", "assistant_masks", "assistant_mask", "loss_mask"


def read_token_row(row: Mapping[str, Any], origin: str) -> TokenRow:
    """Reads a row of token ids.

    Args:
        row: input_ids; attention_mask, whose zeros are taken off; labels, as long as the
            ids and not shifted; one of MASKS, of 0 and 1; loss_weights, numbers from 0
            up. Where several say what is trained, they are multiplied; where none does,
            all is trained.
        origin: what errors name.

    Raises:
        BadRow: the lengths differ, an id is negative, or there are fewer than two.
    """
    ids_T = _ids(row.get("input_ids"), f"{origin} input_ids")
    targets_T, weights_T = ids_T, np.ones(len(ids_T), np.float32)
    labels_T = _beside(row, "labels", origin, len(ids_T))
    if labels_T is not None:
        labels_T = _integers(labels_T, f"{origin} labels")
        is_trained = labels_T != IGNORED
        _check_range(labels_T[is_trained], f"{origin} labels")
        targets_T = np.where(is_trained, labels_T, ids_T)
        weights_T = is_trained.astype(np.float32)
    is_masked = labels_T is not None
    for name in (*MASKS, "loss_weights"):
        mask_T = _beside(row, name, origin, len(ids_T))
        if mask_T is None:
            continue
        is_masked = True
        weights_T = weights_T * _weights(mask_T, f"{origin} {name}", is_mask=name in MASKS)
    attended_T = _beside(row, "attention_mask", origin, len(ids_T))
    kept_T = slice(None)
    if attended_T is not None:
        kept_T = _weights(attended_T, f"{origin} attention_mask", is_mask=True) > 0
    if len(ids_T[kept_T]) < 2:
        raise BadRow(
            f"{origin} has {len(ids_T[kept_T])} token ids; there must be two, for the first is "
            "never predicted",
            reason="too_few_tokens",
        )
    return TokenRow(
        ids_T=ids_T[kept_T].astype(np.int32),
        targets_T=targets_T[kept_T].astype(np.int32),
        weights_T=weights_T[kept_T].astype(np.float32),
        is_masked=is_masked,
    )


def _ids(value: Any, where: str) -> np.ndarray:
    if value is None:
        raise BadRow(f"{where} is None; pass a list of ints", reason="missing_field")
    ids_T = _integers(_array(value, where), where)
    _check_range(ids_T, where)
    return ids_T


def _beside(row: Mapping[str, Any], name: str, origin: str, length: int) -> np.ndarray | None:
    """A field with a value a token, or None where the row has none."""
    value = row.get(name)
    if value is None:
        return None
    values_T = _array(value, f"{origin} {name}")
    if len(values_T) != length:
        raise BadRow(
            f"{origin} has {length} input_ids, but {len(values_T)} {name}; give every id one",
            reason="mismatched_lengths",
        )
    return values_T


def _array(value: Any, where: str) -> np.ndarray:
    try:
        values_T = np.asarray(value)
    except ValueError:  # lists of several lengths
        values_T = np.zeros(())
    if values_T.ndim != 1 or values_T.size and values_T.dtype.kind not in "biuf":
        raise BadRow(f"{where} is {what(value)}; pass a list of numbers", reason="wrong_type")
    return values_T


def _integers(values_T: np.ndarray, where: str) -> np.ndarray:
    """As int64; whole floats are taken, for Arrow makes all ids floats where one row has one."""
    is_bool = values_T.dtype.kind == "b"
    wrong_T = values_T if is_bool else values_T[values_T != np.floor(values_T)]
    if wrong_T.size:
        raise BadRow(f"{where} has {wrong_T[0].item()}; token ids are ints", reason="wrong_type")
    _check_range(values_T, where, least=IGNORED)  # before a cast that would wrap around
    return values_T.astype(np.int64)


def _check_range(ids_T: np.ndarray, where: str, *, least: int = 0) -> None:
    most = np.iinfo(np.int32).max
    wrong_T = ids_T[(ids_T < least) | (ids_T > most)]
    if len(wrong_T):
        raise BadRow(
            f"{where} has {wrong_T[0].item()}; token ids are from 0 to {most}", reason="wrong_type"
        )


def _weights(values_T: np.ndarray, where: str, *, is_mask: bool) -> np.ndarray:
    weights_T = values_T.astype(np.float32)
    if is_mask and not np.isin(weights_T, (0, 1)).all():
        given = what(values_T.tolist())
        raise BadRow(f"{where} is {given}; a mask is 0 and 1", reason="wrong_type")
    if not (np.isfinite(weights_T) & (weights_T >= 0)).all():
        raise BadRow(
            f"{where} is {what(values_T.tolist())}; weights are numbers from 0 up",
            reason="wrong_type",
        )
    return weights_T
