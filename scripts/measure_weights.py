"""Measures loading and saving weights, beside transformers on the same machine.

    python scripts/measure_weights.py --gigabytes=1
    python scripts/measure_weights.py --gigabytes=4 --dtype=bfloat16 --folder=/mnt/disk

Writes a Llama of random numbers, of as many layers as make that size, then loads and saves it
with jax_sft and with transformers, each in a process of its own, after a first process has
brought the files to the page cache. Peaks are resident memory (VmHWM), of which what is there
before loading is told as well; of files that a process maps, the pages that it has touched count.
jax_sft's seconds of saving include reading everything back and comparing it. Needs torch, Linux,
and three times the size on the disk.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from jax_sft.model.weight_files import TensorSpec, write_weights  # noqa: E402

V, D, F, H = 8000, 1024, 4096, 8
LAYER = {
    "input_layernorm": (D,),
    "self_attn.q_proj": (D, D),
    "self_attn.k_proj": (D, D),
    "self_attn.v_proj": (D, D),
    "self_attn.o_proj": (D, D),
    "post_attention_layernorm": (D,),
    "mlp.gate_proj": (F, D),
    "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="10^9 bytes of weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--folder", help="where to write; the system's temporary folder if left")
    parser.add_argument("--measured", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.measured:
        print(json.dumps(MEASURED[args.measured](Path(args.folder), args.dtype)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model = Path(folder) / "model"
        size = write_model(model, int(args.gigabytes * 1e9), args.dtype)
        for path in model.glob("*.safetensors"):
            subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
        print(f"{size / 1e9:.2f} GB of {args.dtype}")
        print("| | import s | peak GB | export s | peak GB | before GB |")
        print("|---|---|---|---|---|---|")
        for name in MEASURED:
            flags = [f"--measured={name}", f"--folder={folder}", f"--dtype={args.dtype}"]
            done = subprocess.run(
                [sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, check=True
            )
            numbers = json.loads(done.stdout.splitlines()[-1])
            print(f"| {name} | {' | '.join(f'{number:.2f}' for number in numbers)} |")


def write_model(folder: Path, num_bytes: int, dtype: str) -> int:
    """Writes config.json and weights; returns their bytes."""
    item = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    layer_size = sum(int(np.prod(shape)) for shape in LAYER.values())
    num_layers = max(1, round((num_bytes / item.itemsize - 2 * V * D) / layer_size))
    shapes = {"model.embed_tokens.weight": (V, D)}
    for layer in range(num_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER.items()}
    shapes |= {"model.norm.weight": (D,), "lm_head.weight": (V, D)}
    specs = {name: TensorSpec(shape, dtype) for name, shape in shapes.items()}

    def draw() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        for shape in shapes.values():
            yield rng.standard_normal(shape, np.float32).astype(item)

    write_weights(folder, specs, draw(), max_shard_bytes=5 * 10**9)
    fields = dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=num_layers,
        num_attention_heads=H,
        num_key_value_heads=H,
        tie_word_embeddings=False,
    )
    (folder / "config.json").write_text(json.dumps(fields))
    return sum(spec.num_bytes for spec in specs.values())


def with_jax_sft(folder: Path, dtype: str) -> list[float]:
    import jax

    from jax_sft.model.causal_lm import CausalLM
    from jax_sft.model.placement import Placement

    model = CausalLM.open(folder / "model", placement=Placement(param_dtype=dtype))
    jax.numpy.zeros(1).block_until_ready()
    return measure(model.load, lambda _: model.save_pretrained(folder / "ours"))


def with_transformers(folder: Path, dtype: str) -> list[float]:
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    def load() -> LlamaForCausalLM:
        model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype))
        for parameter in model.parameters():  # they are only mapped: read a number of each page
            parameter.detach().flatten()[::1024].sum()
        return model

    save = functools.partial(LlamaForCausalLM.save_pretrained, save_directory=folder / "theirs")
    return measure(load, functools.partial(save, max_shard_size="5GB"))


MEASURED = {"jax_sft": with_jax_sft, "transformers": with_transformers}


def measure(load: Callable[[], object], save: Callable[[object], object]) -> list[float]:
    """Returns seconds and peak of loading, the same of saving, and what there was before."""
    before = memory("VmRSS")
    model, *loading = timed(load)
    _, *saving = timed(lambda: save(model))
    return [*loading, *saving, before]


def timed(step: Callable[[], object]) -> tuple[object, float, float]:
    """Returns what a step returns, its seconds and its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    start = time.perf_counter()
    value = step()
    return value, time.perf_counter() - start, memory("VmHWM")


def memory(name: str) -> float:
    """Returns a line of this process's status, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
