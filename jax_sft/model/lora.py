"""Low-rank adapters: PEFT's options and file format, over a family's name table.

LoRA (Hu et al. 2021): beside a frozen kernel W stand A and B of a small rank r, and the layer
computes x·W + scale · x·A·B. In: PEFT's fields by name. Out: `Adapters`, which is what the
decoder needs to know; the name table of the adapters' tensors; the fields to write back.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_sft.model.types import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_DEFAULTS = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": None,
    "exclude_modules": None,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
}
# Fields that say where an adapter came from, or belong to methods that are off.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
}
_NAMES = "a list of module names, a regular expression, or 'all-linear'"
_FIXED = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
# Linear layers, in the order in which a block calls them.
_LINEARS = (
    "embed/project",
    "attention/query",
    "attention/key",
    "attention/value",
    "attention/out",
    "mlp/gate",
    "mlp/up",
    "mlp/down",
    "final_project",
)
# What PEFT adapts by default is what holds queries and values; and for Phi its MLP too.
_DEFAULT_TARGETS = {"attention/query", "attention/value"}
_MORE_DEFAULT_TARGETS = {"phi": {"mlp/up", "mlp/down"}}


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters on some of a decoder's linear layers.

    Attributes:
        rank: inner width of an adapter (r).
        alpha: the scale of x·A·B is alpha / r.
        targets: linear layers that have one, by the last parts of their path, such as
            "attention/query".
        shared: targets that take x·A from the target before them in their module, since
            the checkpoint holds both kernels in one tensor, and PEFT gives it one A.
        dropout: rate on x, before A.
        rslora: the scale is alpha / √r (Kalajdzievski 2023).
        dora: also learn each output's magnitude (DoRA, Liu et al. 2024).
        init_std: standard deviation of A; None: uniform up to 1/√inputs, as PEFT draws it.
    """

    rank: int
    alpha: float
    targets: frozenset[str]
    shared: frozenset[str] = frozenset()
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init_std: float | None = None

    @property
    def scale(self) -> float:
        """The factor on x·A·B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def check_peft_config(fields: Mapping[str, Any]) -> None:
    """Checks what can be known without a model.

    Raises:
        ValueError: an unknown field, one that is not built, or a value out of range.
    """
    for name, value in fields.items():
        if name in _FIXED and value not in (None, _FIXED[name]):
            raise ValueError(f"peft_config.{name}={value!r} is not built: only {_FIXED[name]!r} is")
        # PEFT writes all its fields; what is off is None, False or empty.
        if name not in {*_DEFAULTS, *_FIXED, *_HARMLESS} and value not in (None, False, {}, []):
            raise ValueError(
                f"peft_config.{name}={value!r} is not built: choose among {sorted(_DEFAULTS)}"
            )
    values = _DEFAULTS | dict(fields)
    rank, dropout, init = values["r"], values["lora_dropout"], values["init_lora_weights"]
    checks = {
        "r": (type(rank) is int and rank >= 1, "a whole number, at least 1"),
        "lora_alpha": (_is_number(values["lora_alpha"]), "a number"),
        "lora_dropout": (_is_number(dropout) and 0 <= dropout < 1, "in [0, 1)"),
        "init_lora_weights": (init in (True, "gaussian"), "True or 'gaussian'"),
        "target_modules": (_are_names(values["target_modules"]), _NAMES),
        "exclude_modules": (_are_names(values["exclude_modules"]), _NAMES),
        "use_rslora": (isinstance(values["use_rslora"], bool), "True or False"),
        "use_dora": (isinstance(values["use_dora"], bool), "True or False"),
    }
    for name, (good, expected) in checks.items():
        if not good:
            raise ValueError(f"peft_config.{name}={values[name]!r} must be {expected}")


def read_peft_config(
    fields: Mapping[str, Any], tensors: Sequence[Tensor], *, model_type: str, num_layers: int
) -> Adapters:
    """Finds the layers that PEFT would adapt.

    Args:
        fields: PEFT's, by name; what is missing has PEFT's default.
        tensors: the model's name table.
        model_type: of the `transformers` config.
        num_layers: of the model.

    Raises:
        ValueError: as `check_peft_config`; no linear layer is meant; or only those of some
            of the model's layers are.
    """
    check_peft_config(fields)
    values = _DEFAULTS | dict(fields)
    targets, shared = set(), set()
    modules = _modules(tensors)
    for module, linears in modules.items():
        wanted = _is_target(values["target_modules"], module, linears, model_type, num_layers)
        unwanted = values["exclude_modules"] is not None and _is_target(
            values["exclude_modules"], module, linears, model_type, num_layers
        )
        if wanted and not unwanted:
            targets.update(linears)
            shared.update(sorted(linears, key=_LINEARS.index)[1:])
    _check_all_mean_something(values["target_modules"], modules, num_layers)
    _check_no_others(values["target_modules"], values["exclude_modules"], tensors)
    if not targets:
        short = sorted({module.rpartition(".")[2] for module in modules})
        raise ValueError(
            f"peft_config.target_modules={values['target_modules']!r} means no layer of this "
            f"model: choose among {short}, or 'all-linear'"
        )
    has_experts = any("layers/experts/" in path for tensor in tensors for path in tensor.ours)
    if has_experts and any(target.startswith("mlp/") for target in targets):
        raise ValueError(
            f"peft_config.target_modules={values['target_modules']!r} means MLPs of a model with "
            "experts, which PEFT would adapt too and for which adapters are not built: name "
            "attention's projections"
        )
    return Adapters(
        rank=values["r"],
        alpha=values["lora_alpha"],
        targets=frozenset(targets),
        shared=frozenset(shared),
        dropout=float(values["lora_dropout"]),
        rslora=values["use_rslora"],
        dora=values["use_dora"],
        init_std=1 / values["r"] if values["init_lora_weights"] == "gaussian" else None,
    )


def peft_fields(
    adapters: Adapters, tensors: Sequence[Tensor], *, base_model: str | None
) -> dict[str, Any]:
    """Returns the fields of the adapter_config.json that PEFT reads."""
    modules = {
        module: linears
        for module, linears in _modules(tensors).items()
        if adapters.targets.issuperset(linears)
    }
    kernels = {path: tensor for tensor in tensors for path in tensor.ours}
    is_conv1d = any(
        not kernels[path].transpose
        for linears in modules.values()
        for path in kernels
        if path.endswith(f"{linears[0]}/kernel")
    )
    return {
        **_FIXED,
        "base_model_name_or_path": base_model,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": adapters.dropout,
        # With the parent's name: GPT-2 has a c_proj in its attention and one in its MLP.
        "target_modules": sorted(module.rpartition("{layer}.")[2] for module in modules),
        "fan_in_fan_out": is_conv1d,
        "use_rslora": adapters.rslora,
        "use_dora": adapters.dora,
        "init_lora_weights": True if adapters.init_std is None else "gaussian",
        "inference_mode": True,
    }


def adapter_tensors(tensors: Sequence[Tensor], adapters: Adapters) -> tuple[Tensor, ...]:
    """Returns the name table of the adapters alone, as PEFT names them."""
    rows = []
    for tensor in tensors:
        linears = _linears(tensor)
        if not linears or not adapters.targets.issuperset(linears):
            continue
        module = PREFIX + tensor.theirs.removesuffix(".weight")
        homes = [path.removesuffix("kernel") for path in tensor.ours]
        first = min(zip(linears, homes, strict=True), key=lambda pair: _LINEARS.index(pair[0]))[1]
        kept = {"num_groups": tensor.num_groups}
        b = tuple(f"{home}lora_b" for home in homes)
        rows.append(Tensor(f"{module}.lora_A.weight", (f"{first}lora_a",), transpose=True))
        rows.append(Tensor(f"{module}.lora_B.weight", b, transpose=True, **kept))
        if adapters.dora:
            magnitudes = tuple(f"{home}lora_magnitude" for home in homes)
            rows.append(Tensor(f"{module}.lora_magnitude_vector", magnitudes, **kept))
    return tuple(rows)


def is_adapter(path: str) -> bool:
    """Tells whether a parameter's path is an adapter's."""
    return path.rpartition("/")[2].startswith("lora_")


def _modules(tensors: Sequence[Tensor]) -> dict[str, list[str]]:
    """The linear modules of a checkpoint, and which of our linear layers each holds."""
    return {
        tensor.theirs.removesuffix(".weight"): linears
        for tensor in tensors
        if (linears := _linears(tensor))
    }


def _linears(tensor: Tensor) -> list[str]:
    """Our linear layers in a tensor, if it is their kernel."""
    kernels = [path.removesuffix("/kernel") for path in tensor.ours if path.endswith("/kernel")]
    names = [path.removeprefix("layers/") for path in kernels]
    return names if all(name in _LINEARS for name in names) else []


def _is_target(
    wanted: Any, module: str, linears: list[str], model_type: str, num_layers: int
) -> bool:
    """Whether a module is meant: in every layer, or in none."""
    if wanted == "all-linear":
        return True
    if wanted is None:
        more = _MORE_DEFAULT_TARGETS.get(model_type, set())
        return not (_DEFAULT_TARGETS | more).isdisjoint(linears)
    names = {module.format(layer=layer) for layer in range(num_layers)}
    found = _meant(wanted, names)
    if found and found != names:
        raise ValueError(
            f"peft_config: {wanted!r} means {module.format(layer='N')} in some layers only, which "
            "is not built: name the module for all layers"
        )
    return bool(found)


def _meant(wanted: Any, names: Iterable[str]) -> set[str]:
    """PEFT's rule: a list has names or their ends, a string is a regular expression."""
    if isinstance(wanted, str):
        return {name for name in names if re.fullmatch(wanted, name)}
    ends = tuple(f".{end}" for end in wanted)
    return {name for name in names if f".{name}".endswith(ends)}


def _check_all_mean_something(wanted: Any, modules: Iterable[str], num_layers: int) -> None:
    """PEFT would adapt what we cannot, such as lm_head: it is not left out in silence."""
    if wanted is None or isinstance(wanted, str):
        return
    names = [f".{module.format(layer=i)}" for module in modules for i in range(num_layers)]
    idle = [end for end in wanted if not any(name.endswith(f".{end}") for name in names)]
    if idle and len(idle) < len(wanted):
        raise ValueError(
            f"peft_config.target_modules has {sorted(idle)}, which are no linear layers that"
            " adapters are built for: leave them out"
        )


def _check_no_others(wanted: Any, unwanted: Any, tensors: Sequence[Tensor]) -> None:
    """An expression, too, may mean what PEFT adapts and we cannot: embeddings, and the head."""
    if not isinstance(wanted, str) or wanted == "all-linear":
        return
    is_neox = any(tensor.theirs.startswith("gpt_neox.") for tensor in tensors)
    others = {"embed_out" if is_neox else "lm_head"}  # a tied one is in no file
    others |= {
        tensor.theirs.removesuffix(".weight")
        for tensor in tensors
        if any(path.startswith(("embed/", "head/")) for path in tensor.ours)
        and not _linears(tensor)
    }
    meant = sorted(_meant(wanted, others) - _meant(unwanted or (), others))
    if meant:
        raise ValueError(
            f"peft_config.target_modules={wanted!r} means {', '.join(meant)} too, for which"
            " adapters are not built: leave it out"
        )


def _are_names(value: Any) -> bool:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error:
            return False
        return True
    return value is None or (
        isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def split(params: dict) -> tuple[dict, dict]:
    """Splits a parameter tree into (base, adapters)."""
    flat = flatten_dict(params, sep="/")
    base = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    adapters = {path: leaf for path, leaf in flat.items() if is_adapter(path)}
    return unflatten_dict(base, sep="/"), unflatten_dict(adapters, sep="/")


def join(base: dict, adapters: dict) -> dict:
    """Puts together what `split` took apart."""
    flat = flatten_dict(base, sep="/") | flatten_dict(adapters, sep="/")
    return unflatten_dict(flat, sep="/")


def with_magnitudes(params: dict) -> dict:
    """Sets DoRA's magnitudes to the norms of the kernels, from which they start."""
    flat = flatten_dict(params, sep="/")
    for path, magnitude in flat.items():
        if path.endswith("/lora_magnitude"):
            kernel = flat[path.removesuffix("lora_magnitude") + "kernel"]
            flat[path] = _norm(kernel.astype(jnp.float32), magnitude, _num_stacked(path))
    return unflatten_dict(flat, sep="/")


def merge(params: dict, adapters: Adapters) -> dict:
    """Adds the adapters to the kernels beside them, in float32, and returns the base alone."""
    flat = flatten_dict(params, sep="/")
    merged = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for path, b in flat.items():
        home, _, name = path.rpartition("/")
        if name != "lora_b":
            continue
        kernel = merged[f"{home}/kernel"]
        num_stacked = _num_stacked(path)
        a = flat[f"{_owner(home, flat)}/lora_a"]
        stack = a.shape[:num_stacked]
        low, up = a.reshape(*stack, -1, adapters.rank), b.reshape(*stack, adapters.rank, -1)
        added = jnp.matmul(low, up, precision="highest").reshape(kernel.shape)
        whole = kernel.astype(jnp.float32) + adapters.scale * added
        magnitude = flat.get(f"{home}/lora_magnitude")
        if magnitude is not None:
            share = magnitude / _norm(whole, magnitude, num_stacked)
            ones = (1,) * (kernel.ndim - magnitude.ndim)
            whole = whole * share.reshape(*stack, *ones, *magnitude.shape[num_stacked:])
        merged[f"{home}/kernel"] = whole.astype(kernel.dtype)
    return unflatten_dict(merged, sep="/")


def _owner(home: str, flat: dict[str, Any]) -> str:
    """The layer whose A a layer takes: its own, or that of the nearest before it."""
    name = home.rpartition("/")[2]
    module = home.removesuffix(name)
    names = [linear.rpartition("/")[2] for linear in _LINEARS]
    before = reversed(names[: names.index(name) + 1])
    return next(module + other for other in before if f"{module}{other}/lora_a" in flat)


def _num_stacked(path: str) -> int:
    """How many of a leaf's axes are layers."""
    return int("layers" in path.split("/")[0])


def _norm(kernel: jax.Array, magnitude: jax.Array, num_stacked: int) -> jax.Array:
    """The norm of each output's column: over the inputs, which stand before the outputs."""
    inputs = range(num_stacked, num_stacked + kernel.ndim - magnitude.ndim)
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(inputs)))
