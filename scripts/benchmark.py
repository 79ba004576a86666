"""python scripts/benchmark.py --config=F [--config.a.b=v ...] [--steps=8]: measures training.

Runs the very step that training runs, on the config's data, and prints a JSON object: trained
and total tokens a second, step seconds (median), MFU where the device's peak is known, compile
seconds, memory: the peak, and what the compiler says that the step takes, and the share of the time
spent waiting for data. Nothing is saved. Compilation and the first two steps do not count.
Weights are random unless the config's model_path holds some: speed does not depend on them.
"""

import json
import resource
import statistics
import sys
import time

import jax

from jax_sft.command import run_command
from jax_sft.compiled import read_memory
from jax_sft.config import config_from_flags
from jax_sft.data.batches import prefetch
from jax_sft.inputs import find_tokenizer, load_inputs
from jax_sft.model.pretrained import by_path
from jax_sft.recipe import compile_step, make_batches, make_update, open_model, trained_params
from jax_sft.sharding import describe_mesh, named_sharding
from jax_sft.startup import flops_a_step, peak_flops
from jax_sft.topology import GIB

WARM_UP = 2


def main(argv: list[str]) -> None:
    """Prints the figures of `--steps` steps."""
    steps = [int(flag.split("=")[1]) for flag in argv if flag.startswith("--steps=")] or [8]
    config = config_from_flags([flag for flag in argv if not flag.startswith("--steps=")])
    config.validate()
    tokenizer = find_tokenizer(config, None)
    model = open_model(config, tokenizer)
    start = time.perf_counter()
    inputs = load_inputs(
        config,
        tokenizer=tokenizer,
        samples=None,
        eval_samples=None,
        eval_prompts=None,
        metric_fn=None,
        stop_sequences=(),
    )
    batches = make_batches(config, inputs.train.examples)
    plan = batches.plan(0)
    data_seconds = time.perf_counter() - start
    update = make_update(config, model, num_steps=batches.num_steps)
    take_step, compile_seconds = compile_step(config, model, update)
    model.init(config.train.seed)
    state = update.init(model.params)
    sharding = named_sharding(model.mesh, "batch", "tokens")
    placed = prefetch(lambda step: batches.place(step, sharding), range(WARM_UP + steps[0]))
    seconds, waits, num_tokens, num_trained = [], [], 0, 0
    for step in range(WARM_UP + steps[0]):
        start = time.perf_counter()
        batch = next(placed)
        waits.append(time.perf_counter() - start)
        state, metrics = take_step(state, batch)
        metrics = jax.device_get(metrics)
        seconds.append(time.perf_counter() - start)
        if step >= WARM_UP:
            num_tokens += int(metrics.num_tokens)
            num_trained += int(metrics.num_trained)
    placed.close()
    measured = sum(seconds[WARM_UP:])
    peak = peak_flops(model)
    flops = flops_a_step(config, model, trained=by_path(trained_params(config, model)))
    figures = {
        "devices": describe_mesh(model.mesh),
        "parameters": model.num_params,
        "attention": model.decoder.numerics.attention,
        "rows x tokens": f"{config.train.batch_size} x {config.train.seq_length}",
        "trained_tokens_per_second": round(num_trained / measured, 1),
        "tokens_per_second": round(num_tokens / measured, 1),
        "step_seconds_median": round(statistics.median(seconds[WARM_UP:]), 4),
        "mfu": None if peak is None else round(flops * steps[0] / measured / peak, 4),
        "steps": steps[0],
        "compile_seconds": round(compile_seconds, 1),
        "data_seconds": round(data_seconds, 1),
        "waiting_for_data": f"{sum(waits[WARM_UP:]) / measured:.2%}",
        "packing_efficiency": round(plan.efficiency, 4),
        "peak_memory_gib": round(_peak_memory_gib(), 2),
        "compiled_memory_gib": round(read_memory(take_step).total / GIB, 2),
        "last_loss": round(float(metrics.loss), 4),
    }
    print(json.dumps(figures, indent=2))


def _peak_memory_gib() -> float:
    """Peak of the first device where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"] / GIB
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / GIB


if __name__ == "__main__":
    run_command(main)
