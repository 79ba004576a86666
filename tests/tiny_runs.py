"""A run so small that what it does can be looked at: one layer, 16 wide, on bytes.

Samples are made by counting, so that every test sees the same ones.
"""

import os
import re
from pathlib import Path

from jax_sft.config import BYTE_TOKENIZER, SFTConfig, default_sft_config

SAMPLES = [[f"{n} + 1 =", f" {n + 1}"] for n in range(24)]
PROMPTS = ["1 + 1 =", "2 + 1 ="]
TINY_GPT2 = dict(
    model_type="gpt2", n_layer=1, n_embd=16, n_head=2, n_positions=32, initializer_range=0.1
)


def tiny_config(run_dir: Path | str, **sections: dict) -> SFTConfig:
    """Six steps of eight rows of sixteen tokens, an evaluation and a checkpoint each third."""
    config = default_sft_config().evolve(
        train=dict(
            seq_length=16,
            batch_size=8,
            epochs=100,
            total_steps=6,
            eval_interval=3,
            checkpoint_interval=3,
            log_interval=1,
            checkpoint_dir=run_dir,
            tracker=None,
        ),
        model=dict(init="random", config=TINY_GPT2),
        tokenizer=dict(tokenizer_path=BYTE_TOKENIZER),
        optimizer=dict(kwargs=dict(lr=1e-2)),
        method=dict(gen_kwargs=dict(max_new_tokens=4, do_sample=False)),
    )
    return config.evolve(**sections)


def flags_for(num_devices: int) -> str:
    """XLA_FLAGS of a process with some CPU devices: else those of this one."""
    return re.sub(r"(device_count=)\d+", rf"\g<1>{num_devices}", os.environ["XLA_FLAGS"])


def is_time(name: str) -> bool:
    """Whether a logged value is a measured time, which no two runs share."""
    return name.startswith("time/") or name.endswith(("_per_second", "_seconds", "_wait_share"))
