"""The config, turned into what will run, before there is any array: model, batches, update.

In: a validated config, the tokenizer, the inputs. Out: a model without weights, the plan of
batches, and the compiled train step with the shapes and shardings of the state it works on.
Whatever can be known to be wrong before weights are read is an error here.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from transformers import PreTrainedTokenizerBase

from jax_sft.config import SFTConfig
from jax_sft.data.batches import Batches
from jax_sft.data.types import Batch, Examples, check_ids
from jax_sft.evaluate import sweep
from jax_sft.inputs import Inputs
from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.decoder import Decoder
from jax_sft.model.lora import is_adapter
from jax_sft.model.placement import DTYPES, Placement
from jax_sft.optimizer import make_optimizer, make_schedule, trained_mask
from jax_sft.sampler import Sampling, check_prompts
from jax_sft.sharding import make_mesh, named_sharding, num_shards
from jax_sft.train_step import (
    LossFn,
    StepMetrics,
    TrainState,
    batch_sums,
    init_state,
    state_structs,
    train_step,
)


class Update(NamedTuple):
    """One optimizer step, and the state that it works on.

    Attributes:
        init: makes the state of step 0 from the model's parameters, which it takes over.
        step: (state, batch) to (state, metrics), jitted; the state is donated.
        structs: the state's shapes, dtypes and shardings.
    """

    init: Callable[[dict], TrainState]
    step: Any
    structs: TrainState


def open_model(
    config: SFTConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
) -> CausalLM:
    """Builds the model that the config describes, without weights.

    Args:
        config: the run's config.
        tokenizer: the model's own, or None.
        mesh: None for all devices that are here, as config.mesh has them.

    Raises:
        ValueError: no such model, or one that does not divide over the mesh.
    """
    model = config.model
    if mesh is None:
        mesh = make_mesh(**config.mesh.to_dict())
    return CausalLM.open(
        None if model.init == "random" else model.model_path,
        fields=model.config.to_dict(),
        tokenizer=tokenizer,
        placement=Placement(
            mesh=mesh,
            dtype=model.dtype,
            param_dtype=model.param_dtype,
            remat=model.remat,
            attention=model.attention,
            num_layers_unfrozen=model.num_layers_unfrozen,
        ),
        peft_config=None if model.peft_config is None else model.peft_config.to_dict(),
    )


def check_rows(config: SFTConfig, model: CausalLM) -> None:
    """Checks that a batch's rows fit the model's positions and divide over its mesh.

    Raises:
        ValueError: they do not.
    """
    train, mesh = config.train, model.mesh
    num_positions = model.decoder.config.num_positions
    if train.seq_length > num_positions:
        raise ValueError(
            f"train.seq_length={train.seq_length}, but the model has {num_positions} positions: "
            "set it to at most that"
        )
    _check_divides(config, "train.seq_length", train.seq_length, num_shards(mesh, "tokens"))
    name = "train.minibatch_size" if train.minibatch_size else "train.batch_size"
    rows = train.minibatch_size or train.batch_size
    _check_divides(config, name, rows, num_shards(mesh, "batch"))


def _check_divides(config: SFTConfig, name: str, size: int, ways: int) -> None:
    if size % ways:
        sizes = ", ".join(f"{axis}={size}" for axis, size in config.mesh.items())
        raise ValueError(
            f"{name}={size} does not divide over {ways} devices of the mesh ({sizes}): choose a "
            f"multiple of {ways}"
        )


def check_inputs(config: SFTConfig, model: CausalLM, inputs: Inputs) -> None:
    """Checks that token ids and prompts fit the model, and that best_metric can be measured.

    Raises:
        ValueError: an id outside the vocabulary, a bad gen_kwargs value, a prompt that with its
            output is longer than the model's positions, or a best_metric without its data.
    """
    _check_best_metric(config, inputs)
    decoder = model.decoder.config
    for example_set in (inputs.train, *inputs.evals.values()):
        check_ids(example_set.examples, vocab_size=decoder.vocab_size)
    if inputs.stream is not None:
        inputs.stream.vocab_size = decoder.vocab_size
    samplings = [Sampling(**kwargs) for _, kwargs in sweep(config.method.gen_kwargs.to_dict())]
    if inputs.prompts is not None:
        longest = max(sampling.max_new_tokens for sampling in samplings)
        check_prompts(inputs.prompts.ids, config=decoder, max_new_tokens=longest)


def split_best_metric(best_metric: str) -> tuple[str, int]:
    """Returns a metric's name, and 1 where more is better, else -1.

    "max:metrics/x" and "min:eval/loss" say it; without a word, losses and perplexities are
    better when lower, and everything else when higher.
    """
    direction, colon, name = best_metric.partition(":")
    if not colon:
        name = best_metric
        direction = "min" if name.endswith(("loss", "perplexity")) else "max"
    return name, 1 if direction == "max" else -1


def _check_best_metric(config: SFTConfig, inputs: Inputs) -> None:
    """A metric that is never measured would be noticed hours later, by a missing best/."""
    if config.train.best_metric is None:
        return
    name, _ = split_best_metric(config.train.best_metric)
    is_scored = inputs.prompts is not None and inputs.metric_fn is not None
    remedies = {
        "eval/": (bool(inputs.evals), "pass eval_samples or set data.eval"),
        "metrics/": (is_scored, "pass eval_prompts and a metric_fn"),
    }
    for start, (is_measured, remedy) in remedies.items():
        if name.startswith(start) and not is_measured:
            raise ValueError(f"train.best_metric is {name!r}, which is not measured: {remedy}")
    suffixes = [suffix for suffix, _ in sweep(config.method.gen_kwargs.to_dict())]
    if name.startswith("metrics/") and not name.endswith(tuple(suffixes)):
        named = " or ".join(name.partition("@")[0] + suffix for suffix in suffixes)
        raise ValueError(
            f"train.best_metric is {name!r}, but a metric of each of method.gen_kwargs's values "
            f"has a name of its own: set it to {named}"
        )
    if not name.startswith(tuple(remedies)):
        raise ValueError(
            f"train.best_metric is {name!r}: expected eval/loss, eval/perplexity or metrics/..., "
            "which evaluations measure"
        )


def make_batches(config: SFTConfig, examples: Examples) -> Batches:
    """Plans the batches of all epochs."""
    return Batches(
        examples,
        seq_length=config.train.seq_length,
        batch_size=config.train.batch_size,
        epochs=config.train.epochs,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        packing=config.data.packing,
    )


def make_eval_batches(config: SFTConfig, examples: Examples) -> Batches:
    """Plans one pass over held-out examples, packed as in training, in their own order."""
    return Batches(
        examples,
        seq_length=config.train.seq_length,
        batch_size=config.train.minibatch_size or config.train.batch_size,
        seed=config.train.seed,
        shuffle=False,
        packing=config.data.packing,
    )


def trained_params(config: SFTConfig, model: CausalLM) -> dict:
    """Returns a tree of bools like the params: which of them are trained.

    Raises:
        ValueError: none of them is.
    """

    def name(path: tuple) -> str:
        return jax.tree_util.keystr(path, simple=True, separator="/")

    structs = model.param_structs()
    names = [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(structs)]
    if model.adapters is not None:
        trained = {name: is_adapter(name) for name in names}
    else:
        trained = trained_mask(names, config.model.num_layers_unfrozen)
    if not any(trained.values()):
        raise ValueError(
            f"model.num_layers_unfrozen={config.model.num_layers_unfrozen} trains the final norm "
            f"alone, but this {model.config.model_type} has none with weights: unfreeze a layer"
        )
    return jax.tree_util.tree_map_with_path(lambda path, _: trained[name(path)], structs)


def make_loss(config: SFTConfig, decoder: Decoder) -> LossFn:
    """Returns what the train step differentiates: sums over a batch's rows."""
    return functools.partial(
        batch_sums,
        decoder,
        z_loss=config.method.z_loss,
        label_smoothing=config.method.label_smoothing,
        router_aux_loss=config.method.router_aux_loss,
    )


def make_update(config: SFTConfig, model: CausalLM, *, num_steps: int) -> Update:
    """Puts the train step together; nothing is computed yet.

    Args:
        config: the run's config.
        model: opened; its weights are not needed.
        num_steps: steps of the whole run, for schedules that end with it.
    """
    train, mesh = config.train, model.mesh
    trained = trained_params(config, model)
    optimizer, schedule = _make_optimizer(config, num_steps)
    state_dtype = DTYPES[config.optimizer.state_dtype]
    structs = state_structs(
        model.param_structs(),
        optimizer,
        trained=trained,
        replicated=named_sharding(mesh),
        state_dtype=state_dtype,
    )
    shardings = jax.tree.map(lambda struct: struct.sharding, structs)
    step = functools.partial(
        train_step,
        loss_fn=make_loss(config, model.training_decoder),
        optimizer=optimizer,
        schedule=schedule,
        trained=trained,
        num_microbatches=train.batch_size // (train.minibatch_size or train.batch_size),
        max_grad_norm=config.optimizer.max_grad_norm,
        seed=train.seed,
        grad_dtypes=_grad_dtypes(config, model),
    )
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, named_sharding(mesh)))
    init = functools.partial(
        init_state, optimizer=optimizer, trained=trained, state_dtype=state_dtype
    )
    return Update(jax.jit(init, donate_argnums=0, out_shardings=shardings), jitted, structs)


def _grad_dtypes(config: SFTConfig, model: CausalLM) -> dict:
    """Returns a tree of dtypes like the params; what is computed with in float32 stays in it."""
    asked, compute = config.optimizer.grad_dtype, jnp.dtype(model.decoder.numerics.dtype).name
    if asked == "bfloat16" and compute != "bfloat16":
        raise ValueError(
            f"optimizer.grad_dtype is bfloat16, but model.dtype is {compute}: set both to bfloat16"
        )

    def dtype(path: tuple, _: Any) -> Any:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        is_precise = name in ("bias", "scale") or name.startswith("lora_")
        return DTYPES["float32" if is_precise else asked]

    return jax.tree_util.tree_map_with_path(dtype, model.param_structs())


def compile_step(
    config: SFTConfig, model: CausalLM, update: Update
) -> tuple[Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]], float]:
    """Compiles the train step, once, for the run's shapes and shardings.

    Returns:
        (state, batch) to (state, metrics), and the seconds that compiling took.
    """
    start = time.perf_counter()
    with jax.set_mesh(model.mesh):
        compiled = update.step.lower(update.structs, batch_structs(config, model)).compile()
    return compiled, time.perf_counter() - start


def batch_structs(config: SFTConfig, model: CausalLM) -> Batch:
    """Describes one global batch."""
    shape = (config.train.batch_size, config.train.seq_length)
    where = named_sharding(model.mesh, "batch", "tokens")
    ints = jax.ShapeDtypeStruct(shape, "int32", sharding=where)
    floats = jax.ShapeDtypeStruct(shape, "float32", sharding=where)
    return Batch(ints, ints, floats, ints, ints)


def _make_optimizer(
    config: SFTConfig, num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    kwargs: dict[str, Any] = config.optimizer.kwargs.to_dict()
    schedule = make_schedule(
        config.scheduler.name,
        config.scheduler.kwargs.to_dict(),
        lr=kwargs.pop("lr"),
        warmup_steps=config.scheduler.warmup_steps,
        total_steps=num_steps,
    )
    optimizer = make_optimizer(
        config.optimizer.name, kwargs, schedule=schedule, decay_mask=_decay_mask
    )
    return optimizer, schedule


def _decay_mask(params: dict) -> dict:
    """Weight decay is for matrices: norms and biases are left alone."""

    def decays(path: tuple, _: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return name not in ("bias", "scale", "lora_magnitude")

    return jax.tree_util.tree_map_with_path(decays, params)
