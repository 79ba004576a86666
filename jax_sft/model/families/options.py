"""Options that many families' configs share: activations, head widths, layer types.

In: a `transformers` config. Out: values for `DecoderConfig`, or one line that says which
option is not built.
"""

from typing import Any

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "quick_gelu": "quick_gelu",
}


def activation(config: Any, field: str) -> str:
    """Returns our name of the activation that a field names.

    Raises:
        ValueError: it is not built.
    """
    name = getattr(config, field)
    if name not in ACTIVATIONS:
        raise ValueError(f"{field}={name!r} is not built: choose one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def head_width(config: Any, width_field: str, heads_field: str) -> int:
    """Returns the width over the heads.

    Raises:
        ValueError: it does not divide.
    """
    width, heads = getattr(config, width_field), getattr(config, heads_field)
    if width % heads:
        raise ValueError(
            f"{width_field}={width} does not divide by {heads_field}={heads}: choose a multiple"
        )
    return width // heads


def turned_width(config: Any, width: int) -> int:
    """Returns how many of a head's numbers rotary positions turn, by `partial_rotary_factor`.

    Args:
        config: a config that has the same rope parameters for all layers.
        width: of a head (C).

    Raises:
        ValueError: none, more than there are, or an odd number.
    """
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    turned = int(width * share)
    if turned % 2 or not 0 < turned <= width:
        raise ValueError(
            f"partial_rotary_factor={share} turns {turned} of a head's {width} numbers, which is"
            f" not built: choose one that turns an even number from 2 to {width}"
        )
    return turned


def require(config: Any, **expected: Any) -> None:
    """Refuses fields that have another value than the one that is built.

    Raises:
        ValueError: names the field, its value, and what is built.
    """
    for field, value in expected.items():
        if getattr(config, field) != value:
            raise ValueError(f"{field}={getattr(config, field)!r} is not built: only {value!r} is")


def require_off(config: Any, *fields: str) -> None:
    """Refuses switches that are on; those that are off may be False, None or missing.

    Raises:
        ValueError: names the field and its value.
    """
    for field in fields:
        value = getattr(config, field, None)
        if value is not None and value is not False:
            raise ValueError(f"{field}={value!r} is not built: only False or None is")


def layer_windows(config: Any) -> list[int | None]:
    """Returns each layer's window by `layer_types` and `sliding_window`.

    Raises:
        ValueError: a layer type that is neither full nor sliding attention, a sliding one
            without a window, or not one for each layer.
    """
    if len(config.layer_types) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types has {len(config.layer_types)} entries, but num_hidden_layers is"
            f" {config.num_hidden_layers}: give one for each layer"
        )
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    for kind in config.layer_types:
        if kind not in windows:
            raise ValueError(
                f"layer_types has {kind!r}, which is not built: choose among {list(windows)}"
            )
        if kind == "sliding_attention" and not windows[kind]:
            raise ValueError(
                f"layer_types has {kind!r}, but sliding_window is {windows[kind]!r}: give it the"
                " number of tokens that a token sees, itself among them"
            )
    return [windows[kind] for kind in config.layer_types]
