"""Config fields that a user sets by name, into a `transformers` config.

In: a dict such as {"model_type": "gpt2", "n_layer": 2}. Out: a new config made of them, or a
loaded one with them changed. A field that the class has not is refused, and so is a change that
would be lost, since the class made other fields of it when it was read.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from jax_sft.model.families import find_family, read_config
from jax_sft.model.types import DecoderConfig

# Names that hub configs have for what classes now keep in rope_parameters.
_ROTARY = ("rope_theta", "partial_rotary_factor", "rope_scaling")


def new_config(
    fields: dict[str, Any], *, tokenizer: PreTrainedTokenizerBase | None = None
) -> PretrainedConfig:
    """Makes a config of fields alone.

    Args:
        fields: by name, `model_type` among them.
        tokenizer: gives the vocabulary's size and the special tokens that fields leave out.

    Raises:
        ValueError: a field or its value is not one of the class's.
    """
    model_type = fields["model_type"]
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError:
        raise ValueError(
            f"model.config.model_type {model_type!r} is unknown to transformers: see its list"
        ) from None
    of_tokenizer = _special_tokens(tokenizer).items()
    fields = {name: value for name, value in of_tokenizer if hasattr(default, name)} | fields
    _check_names(default, fields)
    with _one_line_of_a_bad_field():
        return type(default)(**{k: v for k, v in fields.items() if k != "model_type"})


def set_fields(config: PretrainedConfig, fields: dict[str, Any]) -> None:
    """Changes fields of a loaded config, in place.

    Args:
        config: of a model that has weights.
        fields: by name; `model_type` may be named, and must be the config's own.

    Raises:
        ValueError: a field or its value is not one of the class's, or would change nothing.
    """
    _check_names(config, fields)
    if "model_type" in fields and fields["model_type"] != config.model_type:
        raise ValueError(
            f"model.config.model_type is {fields['model_type']!r}, but the model in model_path "
            f"is {config.model_type!r}: leave it out, or set model.init='random'"
        )
    old = {name: getattr(config, name, None) for name in fields}
    with _one_line_of_a_bad_field():
        for name, value in fields.items():
            setattr(config, *_as_kept(config, name, value))
    if fields:
        _check_changes(config, old)


def _as_kept(config: PretrainedConfig, name: str, value: Any) -> tuple[str, Any]:
    """A field and its value as the class keeps them: older names are parts of rope_parameters."""
    rotary = getattr(config, "rope_parameters", None)
    if name not in _ROTARY or not rotary or "rope_theta" not in rotary:
        return name, value
    if name != "rope_scaling":
        return "rope_parameters", {**rotary, name: value}
    kept = {part: rotary[part] for part in _ROTARY if part in rotary}
    scaling = {
        "rope_type" if part == "type" else part: given for part, given in (value or {}).items()
    }
    return "rope_parameters", {**kept, "rope_type": "default", **scaling}


def _special_tokens(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    return {"vocab_size": len(tokenizer), **ids}


def _check_changes(config: PretrainedConfig, old: dict[str, Any]) -> None:
    """Refuses changes that would be lost: classes make some fields of others when they are read.

    Args:
        config: changed, field by field.
        old: the values before, of what was changed.
    """
    kind, meant = type(config).__name__, read_config(config)
    if _read_again(config) != meant:
        raise ValueError(
            f"model.config.{', '.join(old)}: {kind} makes another model of these fields when it is"
            " read from a file: change too what it makes of them"
        )
    made = {name for name in find_family(config).harmless if name in old}
    idle = [name for name in made if getattr(config, name) != old[name]]
    without = copy.deepcopy(config)
    for name in idle:
        setattr(without, name, old[name])
    if idle and _read_again(without) == meant:
        raise ValueError(
            f"model.config.{', '.join(sorted(idle))} changes nothing of a model that is loaded:"
            f" leave it out, or set what {kind} makes of it, as layer_types or attention_layers"
        )


def _read_again(config: PretrainedConfig) -> DecoderConfig | None:
    """What the config would say after it was saved and loaded; None where it would be refused."""
    try:
        return read_config(type(config).from_dict(config.to_dict()))
    except (ValueError, StrictDataclassError):
        return None


def _is_read(config: PretrainedConfig, name: str, value: Any) -> bool:
    """Whether a field that the class does not keep is one that it, or its family, reads."""
    if name in _ROTARY and hasattr(config, "rope_parameters"):
        return True
    try:
        plain, other = (read_config(type(config)(**kwargs)) for kwargs in ({}, {name: value}))
    except (ValueError, TypeError, StrictDataclassError):
        return False
    return plain != other


@contextlib.contextmanager
def _one_line_of_a_bad_field() -> Iterator[None]:
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"model.config: {' '.join(str(error).split())}") from None


def _check_names(config: PretrainedConfig, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if not hasattr(config, name) and not _is_read(config, name, value):
            raise ValueError(
                f"model.config.{name} is no field of {type(config).__name__}: see its documentation"
            )
