"""One run's configuration: trlX's sections and names, typed, with no unknown keys.

What comes in: attribute assignments, `evolve`, a Python, YAML or JSON file, or flags such as
`--config.train.batch_size=4`. What goes out: an SFTConfig in which every key of
`config_keys.KEYS` is present and has its type. Nothing here touches jax or the network.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jax_sft.config_flags import help_text, parse_flags, read_config_file
from jax_sft.config_keys import KEYS, NAMED_DICTS, checked, jsonable, plain, shortened, unknown_key

__all__ = ["BYTE_TOKENIZER", "SFTConfig", "config_from_flags", "default_sft_config", "help_text"]

# A merge-free byte-level tokenizer that ships with the package, for runs without a network.
BYTE_TOKENIZER = str(Path(__file__).parent / "data" / "byte_tokenizer")


class FreeForm(ConfigDict):
    """A dict with attribute access, such as kwargs; with known names where NAMED_DICTS has any."""

    def __init__(self, values: Mapping[str, Any] | None = None, path: str = "") -> None:
        super().__init__(type_safe=False, convert_dict=False, sort_keys=False)
        object.__setattr__(self, "_path", path)
        for name, value in (values or {}).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        value = plain(value)
        if self._path in NAMED_DICTS:
            value = self._checked(name, value)
        super().__setitem__(name, FreeForm(value) if isinstance(value, dict) else value)

    def _checked(self, name: str, value: Any) -> Any:
        table, taken_by = NAMED_DICTS[self._path]
        path = f"{self._path}.{name}"
        if name not in table:
            raise unknown_key(path, table)
        if taken_by is None and isinstance(value, tuple) and value:  # swept
            return tuple(checked(path, table[name], item) for item in value)
        return checked(path, table[name], value)

    def __reduce__(self) -> tuple:
        return FreeForm, (self.to_dict(), self._path)

    def copy_and_resolve_references(self, visit_map: dict | None = None) -> "FreeForm":
        """A deep copy."""
        return FreeForm(self.to_dict(), self._path)

    def lock(self) -> "FreeForm":
        """Stays open: locking the config must not fix the names in here."""
        return self

    def to_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """The values as JSON holds them: nested dicts and lists."""
        return jsonable(self)

    def merge(self, values: Mapping[str, Any]) -> None:
        """Sets the values given, deep; the others stay."""
        for name, value in values.items():
            if isinstance(self._fields.get(name), FreeForm) and isinstance(value, Mapping):
                self[name].merge(value)
            else:
                self[name] = value


class Section(ConfigDict):
    """One section of the config: the keys of KEYS[name], each in its type."""

    def __init__(self, name: str, values: Mapping[str, Any] | None = None) -> None:
        super().__init__(type_safe=False, convert_dict=False, sort_keys=False)
        object.__setattr__(self, "_name", name)
        for key, spec in KEYS[name].items():
            self[key] = spec.default
        for key, value in (values or {}).items():
            self[key] = value
        self.lock()

    def __getitem__(self, key: str) -> Any:
        key, _, entry = key.partition(".")
        if key not in self._fields:
            raise unknown_key(f"{self._name}.{key}", KEYS[self._name])
        return self._fields[key][entry] if entry else self._fields[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in KEYS[self._name]:
            raise unknown_key(f"{self._name}.{key}", KEYS[self._name])
        path = f"{self._name}.{key}"
        value = checked(path, KEYS[self._name][key], value)
        value = FreeForm(value, path) if isinstance(value, dict) else value
        super().__setitem__(key, value)
        if key == "name" and "kwargs" in self:
            self._drop_default_kwargs()

    def _drop_default_kwargs(self) -> None:
        """A new name drops the default kwargs that it does not take, never a user's own."""
        taken_by = NAMED_DICTS[f"{self._name}.kwargs"][1]
        for name, value in KEYS[self._name]["kwargs"].default.items():
            if name not in taken_by[self.name] and self.kwargs._fields.get(name) == value:
                del self.kwargs[name]

    def __reduce__(self) -> tuple:
        return Section, (self._name, self.to_dict())

    def copy_and_resolve_references(self, visit_map: dict | None = None) -> "Section":
        """A deep copy."""
        return Section(self._name, self.to_dict())

    def to_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """The values as JSON holds them: nested dicts and lists."""
        return jsonable(self)

    def merge(self, values: Mapping[str, Any]) -> None:
        """Sets the keys given, dicts deep; the others stay."""
        for key, value in values.items():
            if isinstance(self._fields.get(key), FreeForm) and isinstance(value, Mapping):
                self[key].merge(value)
            else:
                self[key] = value


class SFTConfig(ConfigDict):
    """The configuration of one run; `help_text()` lists every key.

    Sections are attributes (`config.train.seq_length = 2048`). A name that the config does not
    have, or a value of another type, is a ValueError wherever it is set.
    """

    def __init__(self) -> None:
        super().__init__(type_safe=False, convert_dict=False, sort_keys=False)
        for name in KEYS:
            self[name] = {}
        self.lock()

    def __getitem__(self, name: str) -> Any:
        name, _, key = name.partition(".")
        if name not in self._fields:
            raise unknown_key(name, KEYS)
        return self._fields[name][key] if key else self._fields[name]

    def __setitem__(self, name: str, values: Mapping[str, Any]) -> None:
        if name not in KEYS:
            raise unknown_key(name, KEYS)
        if not isinstance(values, Mapping | ConfigDict):
            raise ValueError(
                f"config section {name} is {shortened(values)}; expected a dict of keys"
            )
        super().__setitem__(name, Section(name, values))

    def __reduce__(self) -> tuple:
        return SFTConfig.from_dict, (self.to_dict(),)

    def copy_and_resolve_references(self, visit_map: dict | None = None) -> "SFTConfig":
        """A deep copy."""
        return SFTConfig.from_dict(self.to_dict())

    def evolve(self, **sections: Mapping[str, Any]) -> "SFTConfig":
        """Returns a changed copy; this config stays as it is.

        Args:
            **sections: dicts of the keys to change, `train=dict(batch_size=4)`; free-form dicts
                such as `optimizer.kwargs` are merged, deep.

        Returns:
            The new config.

        Raises:
            ValueError: a name that the config does not have, or a value of another type.
        """
        new = self.copy_and_resolve_references()
        for name, values in sections.items():
            section = new[name]
            if not isinstance(values, Mapping | ConfigDict):
                raise ValueError(f"config section {name} is {shortened(values)}; expected a dict")
            section.merge(plain(values))
        new._check_arguments()
        return new

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SFTConfig":
        """The config that `to_dict` wrote; a part of one is evolved over the defaults.

        Args:
            values: {section: {key: value}}.

        Returns:
            The config.

        Raises:
            ValueError: a name that the config does not have, or a value of another type.
        """
        config = cls()
        for name in values:
            if name not in KEYS:
                raise unknown_key(str(name), KEYS)
        complete = all(
            isinstance(values.get(name), Mapping | ConfigDict) and set(values[name]) == set(keys)
            for name, keys in KEYS.items()
        )
        if not complete:
            return config.evolve(**values)
        # A complete config's kwargs are all of them: defaults merged in would add to them.
        for name, keys in values.items():
            config[name] = keys
        config._check_arguments()
        return config

    def to_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Every section and key, in plain dicts, lists and scalars, as config.json holds it."""
        return jsonable(self)

    def validate(self) -> None:
        """Checks what one key alone cannot show.

        Raises:
            ValueError: one line with the value, what was expected and the remedy.
        """
        self._check_arguments()
        for check in (_check_batch, _check_mesh, _check_schedule, _check_model, _check_metric):
            check(self)

    def _check_arguments(self) -> None:
        """The kwargs are all arguments of the optimizer and of the schedule that are named."""
        for path, (_, taken_by) in NAMED_DICTS.items():
            section, key = path.split(".")
            owner = self[section].name
            for name in self[section][key] if taken_by else ():
                if name not in taken_by[owner]:
                    raise ValueError(
                        f"{path}.{name} is not an argument of {section}.name {owner}; "
                        f"it takes {', '.join(taken_by[owner]) or 'none'}, leave {name} out"
                    )


def _check_batch(config: SFTConfig) -> None:
    batch, rows = config.train.batch_size, config.train.minibatch_size
    if rows is not None and batch % rows:
        raise ValueError(
            f"train.minibatch_size {rows} does not divide train.batch_size {batch}; "
            f"take a divisor, as {math.gcd(batch, rows)}"
        )


def _check_mesh(config: SFTConfig) -> None:
    sizes = dict(config.mesh.items())
    for axis, size in sizes.items():
        if size == 0:
            raise ValueError(f"mesh.{axis} is 0; expected a number of devices, or -1: those left")
    if sum(size == -1 for size in sizes.values()) > 1:
        raise ValueError(f"mesh is {sizes}; expected at most one -1, give the others as numbers")
    rows, shards = (
        config.train.minibatch_size or config.train.batch_size,
        sizes["data"] * sizes["fsdp"],
    )
    if shards > 0 and rows % shards:
        raise ValueError(
            f"a microbatch of {rows} rows does not divide over mesh.data x mesh.fsdp = {shards} "
            "devices; take a multiple as train.batch_size or train.minibatch_size"
        )
    if sizes["sequence"] > 0 and config.train.seq_length % sizes["sequence"]:
        raise ValueError(
            f"train.seq_length {config.train.seq_length} is not a multiple of mesh.sequence "
            f"{sizes['sequence']}; take one that is"
        )


def _check_schedule(config: SFTConfig) -> None:
    kwargs, schedule = config.optimizer.kwargs, config.scheduler.kwargs
    if "lr" not in kwargs:
        raise ValueError("optimizer.kwargs has no lr; set the learning rate, as lr=1e-4")
    if config.scheduler.name == "linear":
        for name in ("start_factor", "end_factor"):
            if name not in schedule:
                raise ValueError(
                    f"scheduler.kwargs has no {name}, which linear needs; "
                    "start_factor=1.0 and end_factor=0.0 decay lr to zero"
                )
    # With T_max far beyond any run the schedule is constant, whatever eta_min is.
    if config.scheduler.name == "cosine_annealing" and "eta_min" in schedule:
        period = schedule["T_max"] if "T_max" in schedule else None
        if schedule.eta_min > kwargs.lr and (period is None or period < 1e9):
            raise ValueError(
                f"scheduler.kwargs.eta_min {schedule.eta_min} is above optimizer.kwargs.lr "
                f"{kwargs.lr}, so the learning rate would rise; set eta_min to at most lr"
            )


def _check_model(config: SFTConfig) -> None:
    model = config.model
    if model.peft_config is not None:
        from jax_sft.model.lora import check_peft_config  # imports JAX

        check_peft_config(model.peft_config.to_dict())
        if model.num_layers_unfrozen != -1:
            raise ValueError(
                f"model.num_layers_unfrozen is {model.num_layers_unfrozen}, but with "
                "model.peft_config all layers are frozen and the adapters train; set one of them"
            )
    if model.init == "random" and "model_type" not in model.config:
        raise ValueError(
            "model.init is 'random' but model.config names no model_type; "
            "give the transformers config, as model.config={'model_type': 'gpt2', 'n_layer': 2}"
        )


def _check_metric(config: SFTConfig) -> None:
    metric = config.train.best_metric
    direction, colon, name = metric.partition(":") if metric is not None else ("max", ":", "loss")
    if not direction or (colon and (direction not in ("max", "min") or not name)):
        raise ValueError(
            f"train.best_metric is {metric!r}; expected a logged metric, with its direction, "
            "as max:metrics/x or min:eval/loss"
        )


def default_sft_config() -> SFTConfig:
    """The default of trlX for supervised fine-tuning: GPT-2, AdamW at a constant 1e-4."""
    return SFTConfig()


def config_from_flags(argv: Sequence[str]) -> SFTConfig:
    """The config that a command line asks for: the file's, with the flags over it.

    Args:
        argv: the words after the command, `--config=FILE --config.train.batch_size=4 ...`.

    Returns:
        The config, not yet validated.

    Raises:
        ValueError: one line that names the flag, or the file and its line.
    """
    file, overrides = parse_flags(argv)
    config = SFTConfig() if file is None else _config_from_file(file)
    return config.evolve(**overrides)


def _config_from_file(file: str) -> SFTConfig:
    held = read_config_file(file)
    if isinstance(held, SFTConfig):
        return held
    if file.endswith(".py"):
        raise ValueError(
            f"{file}: get_config() returned {shortened(held)}; expected an SFTConfig, "
            "as default_sft_config().evolve(...)"
        )
    try:
        return SFTConfig.from_dict(held)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
