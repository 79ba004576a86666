"""How good the model is now: a loss over held-out samples, and metrics over generated text.

In: the eval batches and a loss, or the prompts, a generate function and the user's metric_fn.
Out: flat dicts of numbers to log, and a table of samples to show. One sum is divided by one
weight, so that the loss does not depend on how samples were batched.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_sft.data.types import Batch
from jax_sft.together import from_first

# metric_fn(samples=, prompts=, outputs=, **metadata) -> {name: one number a sample, or one}
MetricFn = Callable[..., Mapping[str, Any]]
# (gen_kwargs) -> outputs, one a prompt
GenerateFn = Callable[[dict[str, Any]], list[str]]


class Table(NamedTuple):
    """Samples in columns: prompt, output and each metric that has one number a sample."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


def evaluate_loss(
    sums: Callable[[Batch], tuple[jax.Array, jax.Array]], batches: Iterable[Batch], *, name: str
) -> dict[str, float]:
    """Computes the token-weighted mean loss over batches.

    Args:
        sums: a batch's (loss_sum, weight_sum), without z-loss or label smoothing.
        batches: placed on the mesh.
        name: what the metrics are called after.

    Returns:
        `name`/loss and `name`/perplexity.
    """
    # Fetched when all have been sent to the devices, and added in float64.
    fetched = jax.device_get([sums(batch) for batch in batches])
    loss_sum, weight_sum = np.sum(np.asarray(fetched, np.float64), axis=0)
    loss = float(loss_sum / weight_sum)
    return {f"{name}/loss": loss, f"{name}/perplexity": math.exp(min(loss, 700.0))}


def evaluate_prompts(
    generate: GenerateFn,
    *,
    prompts: Sequence[str],
    metadata: Mapping[str, list],
    gen_kwargs: Mapping[str, Any],
    metric_fn: MetricFn | None,
) -> tuple[dict[str, float], list[Table]]:
    """Generates from every prompt and measures the outputs.

    Of several processes all generate, and the first alone calls `metric_fn` for all of them.

    Args:
        generate: makes one output a prompt.
        prompts: their text.
        metadata: lists with one entry a prompt, passed on to `metric_fn`.
        gen_kwargs: for `generate`; each value that is a list is swept, and the metrics of
            each combination are named after it: metrics/x@temperature=0.5.
        metric_fn: None for none.

    Returns:
        Metrics to log, and one table for each combination, with a column for each argument that
        is swept; the columns of scores stand in the first process's.

    Raises:
        ValueError: `metric_fn` returned something that is neither a number nor one a sample.
    """
    metrics: dict[str, float] = {}
    tables = []
    seconds = {"time/generate": 0.0, "time/metric": 0.0}
    for suffix, kwargs in sweep(gen_kwargs):
        start = time.perf_counter()
        outputs = generate(kwargs)
        seconds["time/generate"] += time.perf_counter() - start
        columns: dict[str, Sequence] = {"prompt": prompts, "output": outputs}
        if metric_fn is not None:
            start = time.perf_counter()
            samples = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
            given = {"samples": samples, "prompts": prompts, "outputs": outputs, **metadata}
            # Copies, as they are needed again and a metric may sort or empty what it is given.
            score = functools.partial(metric_fn, **{k: list(v) for k, v in given.items()})
            means = from_first(functools.partial(_add_scores, score, columns, len(prompts)))
            metrics |= {f"metrics/{name}{suffix}": mean for name, mean in means.items()}
            seconds["time/metric"] += time.perf_counter() - start
        for name in gen_kwargs:
            if isinstance(gen_kwargs[name], list | tuple):
                columns.setdefault(name, [kwargs[name]] * len(prompts))
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        tables.append(Table(f"samples{suffix}", list(columns), rows))
    return metrics | seconds, tables


def _add_scores(
    score: Callable, columns: dict[str, Sequence], num_samples: int
) -> dict[str, float]:
    """Adds a column for each metric that has one number a sample; returns the means."""
    means = {}
    for name, values in check_scores(score(), num_samples=num_samples).items():
        means[name] = float(np.mean(values))
        if values.ndim and name in columns:
            raise ValueError(
                f"metric_fn returned a score named {name!r}, as a column of the samples is: "
                "rename it"
            )
        if values.ndim:
            columns[name] = values.tolist()
    return means


def sweep(gen_kwargs: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns each combination of the list-valued arguments, with the suffix that names it.

    {"top_k": [1, 5], "top_p": 0.9} -> [("@top_k=1", {...}), ("@top_k=5", {...})]
    """
    swept = {k: v for k, v in gen_kwargs.items() if isinstance(v, list | tuple)}
    fixed = {k: v for k, v in gen_kwargs.items() if k not in swept}
    combinations = [
        dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())
    ]
    return [
        ("".join(f"@{name}={value}" for name, value in chosen.items()), fixed | chosen)
        for chosen in combinations
    ]


def check_scores(scores: Any, *, num_samples: int) -> dict[str, np.ndarray]:
    """Turns what a metric_fn returned into arrays of shape [] or [num_samples].

    Raises:
        ValueError: it is not a dict, or a value has another length or is no number.
    """
    if not isinstance(scores, Mapping):
        raise ValueError(
            f"metric_fn returned {type(scores).__name__}: expected a dict such as "
            '{"accuracy": [0.0, 1.0, ...]}'
        )
    arrays = {}
    for name, values in scores.items():
        try:
            array = np.asarray(jax.device_get(values))
            # numpy would read None as NaN, and "1" as 1.
            array = None if array.dtype.kind in "OSU" else array.astype(np.float64)
        except (TypeError, ValueError):
            array = None
        if array is None:
            raise ValueError(
                f"metric_fn returned {str(values)[:60]!r} for {name!r}: expected numbers"
            )
        if array.shape not in ((), (num_samples,)):
            raise ValueError(
                f"metric_fn returned {name!r} of shape {list(array.shape)}: expected one number, "
                f"or one for each of the {num_samples} samples"
            )
        arrays[str(name)] = array
    return arrays
