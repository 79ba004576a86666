"""Learns to rewrite words, from random weights, in about a minute on two CPU cores.

    python -m jax_sft.main --config=configs/quickstart.py

Everything is made here from a seed, so no network is needed: 6,000 words of 3 to 8 letters,
each to be reversed, put in upper case or cut to its first letter. The loss falls on the
answers alone, and exact match on 192 words that were never trained rises from 0 to above 0.9.
"""

import random
import string

from jax_sft.config import BYTE_TOKENIZER, SFTConfig, default_sft_config

TASKS = {
    "reverse": lambda word: word[::-1],
    "upper": str.upper,
    "first": lambda word: word[0],
}


def _words(seed: int, num_words: int) -> list[str]:
    draw = random.Random(seed)
    return [
        "".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 8)))
        for _ in range(num_words)
    ]


def train_samples() -> list[list[str]]:
    """Returns [prompt, output] pairs, every word with every task."""
    return [
        [f"{task} {word} =", f" {rewrite(word)}"]
        for word in _words(0, 6000)
        for task, rewrite in TASKS.items()
    ]


def eval_prompts() -> list[dict[str, str]]:
    """Returns prompts about other words, each with its answer."""
    trained = set(_words(0, 6000))
    held_out = [word for word in _words(1, 80) if word not in trained][:64]
    return [
        {"prompt": f"{task} {word} =", "answer": f" {rewrite(word)}"}
        for word in held_out
        for task, rewrite in TASKS.items()
    ]


def exact_match(*, outputs: list[str], answer: list[str], **_: object) -> dict[str, list[float]]:
    """Scores 1.0 for each output that is the answer to the letter."""
    pairs = zip(outputs, answer, strict=True)
    return {"exact_match": [float(output == expected) for output, expected in pairs]}


def get_config() -> SFTConfig:
    """The run."""
    return default_sft_config().evolve(
        train=dict(
            seq_length=64,
            batch_size=32,
            epochs=100,
            total_steps=800,
            eval_interval=200,
            checkpoint_interval=400,
            log_interval=100,
            checkpoint_dir="ckpts/quickstart",
            best_metric="max:metrics/exact_match",
        ),
        model=dict(
            init="random",
            # With GPT-2's own initializer_range of 0.02 so small a model learns far slower.
            config=dict(
                model_type="gpt2",
                n_layer=2,
                n_embd=64,
                n_head=4,
                n_positions=64,
                initializer_range=0.15,
            ),
        ),
        tokenizer=dict(tokenizer_path=BYTE_TOKENIZER),
        optimizer=dict(kwargs=dict(lr=4e-3, betas=(0.9, 0.98))),
        scheduler=dict(kwargs=dict(T_max=None, eta_min=0.0), warmup_steps=50),
        method=dict(gen_kwargs=dict(max_new_tokens=12, do_sample=False)),
        data=dict(
            train=f"{__file__}:train_samples",
            eval_prompts=f"{__file__}:eval_prompts",
            metric_fn=f"{__file__}:exact_match",
        ),
    )
