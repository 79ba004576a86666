"""python scripts/benchmark_trl.py ALPACA TOKENIZER [--steps=8] [--packing=bfd] [--dropout=0]

Measures TRL's SFTTrainer on what `scripts/benchmark.py --config=configs/alpaca_gpt2.py` measures:
GPT-2 124M from random weights, Alpaca's prompts masked, 4 rows of 512 tokens, packed, float32,
AdamW. Prints a JSON object; the first two steps do not count. It needs an environment of its own
(`pip install torch trl`) and, for the template, PYTHONPATH=. in a clone of this repository.
Dropout is off, as in jax_sft; 0.1 is what `transformers` gives a GPT-2.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from jax_sft.data.row_template import fill_template

WARM_UP = 2


class Measured(SFTTrainer):
    """Counts what each step is given."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.num_tokens, self.num_trained = [], []

    def training_step(self, model, inputs, *args, **kwargs):
        """Counts, and takes the step."""
        self.num_tokens.append(inputs["input_ids"].numel())
        self.num_trained.append(int((inputs["labels"] != -100).sum()))
        return super().training_step(model, inputs, *args, **kwargs)


class Clock(TrainerCallback):
    """Keeps the seconds of each step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        """Starts the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        """Stops it, after the update."""
        self.seconds.append(time.perf_counter() - self.start)


def main() -> None:
    """Prints the figures of `--steps` steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("tokenizer")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--packing", default="bfd", choices=("bfd", "wrapped", "none"))
    parser.add_argument("--dropout", type=float, default=0.0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), args.dropout)
    torch.manual_seed(0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Measured(
            model=GPT2LMHeadModel(GPT2Config(vocab_size=50257, **rates)),
            args=sft_config(args, folder),
            train_dataset=read(args.file),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    measured = sum(clock.seconds[WARM_UP:])
    figures = {
        "packing": args.packing,
        "rows": len(trainer.train_dataset),
        "trained_tokens_per_second": round(sum(trainer.num_trained[WARM_UP:]) / measured, 1),
        "tokens_per_second": round(sum(trainer.num_tokens[WARM_UP:]) / measured, 1),
        "step_seconds_median": round(statistics.median(clock.seconds[WARM_UP:]), 4),
        "peak_memory_gib": round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2
        ),  # KiB on Linux
    }
    print(json.dumps(figures))


def read(file: str) -> Dataset:
    """Returns prompts and completions; rows without an answer are left out, as our config does."""
    with open(file) as opened:
        rows = [row for row in json.load(opened) if row["output"]]
    return Dataset.from_list(
        [
            {"prompt": fill_template("alpaca", row, "a row"), "completion": row["output"]}
            for row in rows
        ]
    )


def sft_config(args: argparse.Namespace, folder: str) -> SFTConfig:
    """Returns TRL's config: its defaults, but for what the measurement fixes."""
    packing = {"packing": True, "packing_strategy": args.packing}
    return SFTConfig(
        output_dir=folder,
        max_steps=WARM_UP + args.steps,
        per_device_train_batch_size=4,
        max_length=512,
        learning_rate=2e-5,
        completion_only_loss=True,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **(packing if args.packing != "none" else {}),
    )


if __name__ == "__main__":
    main()
