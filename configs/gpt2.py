"""GPT-2 learns to write positive film reviews: the first example of trlX (sft_sentiments).

    python -m jax_sft.main --config=configs/gpt2.py --config.data.train=imdb.jsonl

The file has a row a review, {"text": "...", "label": 1 or 0}; JSON, JSONL, CSV and Parquet will
do, gzipped too. The positive ones train, every token of them, at trlX's defaults: 1000 steps of
8 rows of 1024 tokens, AdamW at a constant 1e-4. Every 100 steps 64 copies of one prompt are
continued by 40 sampled tokens. Without a network, pass a folder that holds GPT-2:
--config.model.model_path=DIR. A sentiment score is --config.data.metric_fn=FILE.py:FUNCTION.
"""

from jax_sft.config import SFTConfig, default_sft_config


def get_config() -> SFTConfig:
    """The config of trlX's sft_sentiments, with GPT-2."""
    return default_sft_config().evolve(
        train=dict(checkpoint_dir="runs/gpt2"),
        model=dict(model_path="gpt2"),
        data=dict(
            filter="label == 1",
            eval_prompts=["I don't know much about Hungarian underground"] * 64,
        ),
    )
