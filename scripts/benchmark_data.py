"""python scripts/benchmark_data.py FILE TOKENIZER [--num_proc=1,2] [--seq_length=1024]

Measures what happens to data before the first step, and prints a JSON object a line: tokenization
of a file with so many processes, the same from the cache, and planning the rows of 10k to 10M
lengths drawn from the file's. Each is measured in a process of its own: seconds by the clock, CPU
seconds of all its processes, and its peak memory beyond what it had when the measuring began.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from jax_sft.data.fingerprint import source_fingerprint
from jax_sft.data.packing import plan_rows
from jax_sft.data.samples import load_samples
from jax_sft.data.token_cache import tokenize_all
from jax_sft.data.tokenization import Encoding
from jax_sft.data.tokenizer import load_tokenizer
from jax_sft.data.types import ExampleSet

NUM_LENGTHS = (10_000, 100_000, 1_000_000, 10_000_000)


def find_tokens(args: argparse.Namespace, tokenizer: Any, num_proc: int) -> ExampleSet:
    return tokenize_all(
        lambda: load_samples(args.file),
        tokenizer,
        Encoding(seq_length=args.seq_length),
        num_proc=num_proc,
        cache_dir=args.cache_dir,
        fingerprint=source_fingerprint(args.file),
        say=lambda line: None,
    )


def measured(what: str, run: Callable[[], dict[str, Any]]) -> None:
    """Prints what a run took, and what it says of itself."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
    before, cpu, start = memory("VmRSS"), cpu_seconds(), time.perf_counter()
    about = run()
    seconds = time.perf_counter() - start
    figures = {
        "what": what,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds() - cpu, 3),
        "peak_mb": round((memory("VmHWM") - before) / 2**20, 1),
    }
    print(json.dumps(figures | about), flush=True)


def memory(name: str) -> int:
    """Bytes that the kernel counts under this name, file pages that are mapped included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {name}: run this on Linux")


def cpu_seconds() -> float:
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    usages = [resource.getrusage(kind) for kind in kinds]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_tokens(args: argparse.Namespace, what: str, num_proc: int) -> None:
    tokenizer = load_tokenizer(args.tokenizer)
    tokenizer("to load what loads late")

    def run() -> dict[str, Any]:
        examples, counts, _ = find_tokens(args, tokenizer, num_proc)
        return {"examples": len(examples), "rows": counts.rows_read, "tokens": len(examples.inputs)}

    measured(what, run)


def measure_plan(args: argparse.Namespace, num_lengths: int) -> None:
    lengths_N = find_tokens(args, load_tokenizer(args.tokenizer), 1).examples.lengths_N
    drawn_N = np.random.default_rng(0).choice(lengths_N.astype(np.int32), num_lengths)

    def run() -> dict[str, Any]:
        plan = plan_rows(drawn_N, args.seq_length)
        return {"rows": plan.num_rows, "fill": round(plan.efficiency, 5)}

    measured(f"plan {num_lengths:,} lengths", run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("tokenizer")
    parser.add_argument("--num_proc", default="1,2")
    parser.add_argument("--seq_length", type=int, default=1024)
    parser.add_argument("--cache_dir", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        kind, _, number = args.one.partition(":")
        if kind == "plan":
            measure_plan(args, int(number))
        else:
            measure_tokens(args, f"{kind}, num_proc {number}", int(number))
        return
    with tempfile.TemporaryDirectory() as folder:
        for num_proc in args.num_proc.split(","):
            with tempfile.TemporaryDirectory() as fresh:
                measure_apart(fresh, f"tokenize:{num_proc}")
        for one in ("tokenize, kept:1", "from the cache:1", *(f"plan:{n}" for n in NUM_LENGTHS)):
            measure_apart(folder, one)


def measure_apart(cache_dir: str, one: str) -> None:
    command = [sys.executable, __file__, *sys.argv[1:], f"--cache_dir={cache_dir}", f"--one={one}"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
