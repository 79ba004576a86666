"""Rotary positions as `transformers` configs describe them, to frequencies.

In: the config's `rope_parameters` and the width that is turned. Out: `Rotary`, in radians a
position. Computed in float32, as `transformers` does: what is rounded here is multiplied by
positions of tens of thousands.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_sft.model.types import Rotary

# What each kind needs, and what it also reads.
_OPTIONS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        (),
        (
            "factor",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "beta_fast",
            "beta_slow",
            "truncate",
            "finetuned",  # says how a checkpoint came about
        ),
    ),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
}
_OPTIONS_OF_ALL = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)


def read_rotary(
    parameters: Mapping[str, Any],
    *,
    width: int,
    num_positions: int,
    interleaved: bool = False,
) -> Rotary:
    """Reads one dict of rope parameters.

    Args:
        parameters: `config.rope_parameters`, or one of its entries where it has one a layer type.
        width: numbers of a head that are turned (R).
        num_positions: the config's max_position_embeddings.
        interleaved: see `Rotary`.

    Raises:
        ValueError: a `rope_type` that is not built, an option that it does not have, or one that
            it needs and lacks.
    """
    kind = _find_kind(parameters)
    _check_options(parameters, kind)
    base = float(parameters["rope_theta"])
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    # Positions in a radian. The power is rounded once, so that all machines get the same.
    wavelengths = (base ** exponents.astype(np.float64)).astype(np.float32)
    if kind in ("dynamic", "yarn") and (width % 2 or width < 4):
        raise ValueError(
            f"rope_type={kind!r} with {width} numbers of a head turned is not built: choose a"
            " head_dim and partial_rotary_factor that turn an even number, 4 or more"
        )
    if kind == "dynamic":
        return Rotary(
            _floats(1 / wavelengths),
            interleaved,
            long_from=num_positions,
            ntk_factor=float(parameters["factor"]),
            ntk_base=base,
        )
    if kind == "longrope":
        return _longrope(parameters, wavelengths, num_positions, interleaved)
    if kind == "yarn":
        return _yarn(parameters, wavelengths, num_positions, interleaved)
    frequencies = 1 / wavelengths
    if kind == "linear":
        frequencies = frequencies / np.float32(parameters["factor"])
    elif kind == "llama3":
        frequencies = _llama3(parameters, frequencies, num_positions)
    return Rotary(_floats(frequencies), interleaved)


def _find_kind(parameters: Mapping[str, Any]) -> str:
    return parameters.get("rope_type") or parameters.get("type") or "default"


def _check_options(parameters: Mapping[str, Any], kind: str) -> None:
    """Refuses kinds that are not built, and options too many or too few."""
    if kind not in _OPTIONS:
        raise ValueError(f"rope_type={kind!r} is not built: choose one of {list(_OPTIONS)}")
    needed, optional = _OPTIONS[kind]
    unknown = set(parameters) - {*_OPTIONS_OF_ALL, *needed, *optional}
    if unknown:
        raise ValueError(
            f"rope_parameters has {sorted(unknown)}, which rope_type={kind!r} does not read:"
            " remove them, or correct their names"
        )
    missing = [name for name in ("rope_theta", *needed) if parameters.get(name) is None]
    if missing:
        raise ValueError(f"rope_parameters lacks {missing}, which rope_type={kind!r} needs: add it")


def context_len(parameters: Mapping[str, Any], num_positions: int) -> int:
    """Returns the longest context: dynamic scaling stretches what the config states."""
    if _find_kind(parameters) == "dynamic":
        return int(num_positions * parameters["factor"])
    return num_positions


def _llama3(
    parameters: Mapping[str, Any], frequencies: np.ndarray, num_positions: int
) -> np.ndarray:
    """Long waves are stretched, short ones kept, and those between interpolated.

    Llama 3.1's reference code, `apply_scaling`.
    """
    factor = np.float32(parameters["factor"])
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    if high <= low:
        raise ValueError(
            f"rope_parameters.high_freq_factor={high} is not above low_freq_factor={low}:"
            " choose a greater one"
        )
    trained_len = parameters.get("original_max_position_embeddings") or num_positions
    turns = np.float32(trained_len) * frequencies / np.float32(2 * math.pi)
    kept = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


def _yarn(
    parameters: Mapping[str, Any], wavelengths: np.ndarray, num_positions: int, interleaved: bool
) -> Rotary:
    """YaRN (Peng et al. 2023, section 3.2): like llama3's, with a ramp over the pairs."""
    trained_len = parameters.get("original_max_position_embeddings") or num_positions
    factor = parameters.get("factor") or num_positions / trained_len
    num_pairs = len(wavelengths)

    def pair_of(num_turns: float) -> float:
        """The pair, as a fraction, that makes so many turns in the trained length."""
        turns = math.log(trained_len / (num_turns * 2 * math.pi))
        return num_pairs * turns / math.log(float(parameters["rope_theta"]))

    first = pair_of(parameters.get("beta_fast") or 32)
    last = pair_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    if first == last:
        last += 0.001  # a ramp needs some width
    pairs = np.arange(num_pairs, dtype=np.float32)
    stretched = np.clip((pairs - np.float32(first)) / np.float32(last - first), 0, 1)
    interpolated = 1 / (np.float32(factor) * wavelengths)
    frequencies = interpolated * stretched + 1 / wavelengths * (1 - stretched)
    return Rotary(_floats(frequencies), interleaved, factor=_yarn_factor(parameters, factor))


def _yarn_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """YaRN's factor on attention (section 3.4), or the one that the config states."""
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return scale(parameters["mscale"]) / scale(parameters["mscale_all_dim"])
    return scale(1.0)


def _longrope(
    parameters: Mapping[str, Any], wavelengths: np.ndarray, num_positions: int, interleaved: bool
) -> Rotary:
    """LongRoPE (Ding et al. 2024): a factor a pair, other ones for long examples."""
    trained_len = parameters.get("original_max_position_embeddings") or num_positions
    factor = parameters.get("factor") or num_positions / trained_len
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        grown = max(factor, 1.0)
        attention_factor = math.sqrt(1 + math.log(grown) / math.log(trained_len))
    for name in ("short_factor", "long_factor"):
        if len(parameters[name]) != len(wavelengths):
            raise ValueError(
                f"rope_parameters.{name} has {len(parameters[name])} numbers, expected "
                f"{len(wavelengths)}, one for each pair that is turned"
            )
    short, long = (
        np.array(parameters[name], np.float32) for name in ("short_factor", "long_factor")
    )
    return Rotary(
        _floats(1 / (short * wavelengths)),
        interleaved,
        factor=float(attention_factor),
        long_from=trained_len,
        long_frequencies=_floats(1 / (long * wavelengths)),
    )


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
