"""GPT-2 learns to follow instructions: the second example of trlX (sft_alpaca).

    python -m jax_sft.main --config=configs/alpaca_gpt2.py --config.data.train=alpaca.json

The file has a row an instruction, {"instruction": "...", "input": "" or "...", "output": "..."};
JSON, JSONL, CSV and Parquet will do. Prompts are rendered by Alpaca's template and masked, so
answers alone train. The numbers are trlX's, with GPT-2 in the place of GPT-J: 2400 steps of
4 rows of 1024 tokens, AdamW at a constant 2e-5, answers of up to 256 tokens. Without a network,
pass a folder that holds GPT-2: --config.model.model_path=DIR.
"""

from jax_sft.config import SFTConfig, default_sft_config

EVAL_INSTRUCTIONS = [
    "Name three ways to keep a garden green in a dry summer.",
    "Explain what a compiler does, in one sentence.",
    "Write a short poem about the sea.",
    "What is the capital of Hungary?",
]


def get_config() -> SFTConfig:
    """The config of trlX's sft_alpaca, with GPT-2."""
    return default_sft_config().evolve(
        train=dict(
            seq_length=1024, batch_size=4, total_steps=2400, checkpoint_dir="runs/alpaca_gpt2"
        ),
        model=dict(model_path="gpt2"),
        optimizer=dict(kwargs=dict(lr=2e-5)),
        scheduler=dict(kwargs=dict(eta_min=2e-5)),
        method=dict(gen_kwargs=dict(max_new_tokens=256)),
        data=dict(
            template="alpaca",
            filter="output != ''",  # the public data has a few rows without an answer
            output_field="output",
            eval_prompts=[alpaca_prompt(instruction) for instruction in EVAL_INSTRUCTIONS],
        ),
    )


def alpaca_prompt(instruction: str) -> str:
    """What data.template='alpaca' renders for an instruction without input."""
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )
