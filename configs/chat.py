"""An instruct model learns from conversations, by its own chat template.

    python -m jax_sft.preview --config=configs/chat.py --config.data.train=chats.jsonl
    python -m jax_sft.main --config=configs/chat.py --config.data.train=chats.jsonl

The file has a row a conversation, {"messages": [{"role": "user", "content": "..."}, {"role":
"assistant", "content": "..."}, ...]}, or as ShareGPT has them; JSON, JSONL and Parquet will do.
Every answer is trained, through the token that ends it. Look at the preview first: it shows what
is trained, token by token. Without a network, pass a folder that holds an instruct model with its
tokenizer: --config.model.model_path=DIR. A base model needs a template too:
--config.tokenizer.chat_template=FILE.
"""

from jax_sft.config import SFTConfig, default_sft_config


def get_config() -> SFTConfig:
    """Three epochs over conversations, for a model of some hundred million parameters."""
    return default_sft_config().evolve(
        train=dict(
            seq_length=2048,
            batch_size=8,
            epochs=3,
            total_steps=3000,
            checkpoint_dir="runs/chat",
        ),
        model=dict(model_path="HuggingFaceTB/SmolLM2-135M-Instruct"),
        optimizer=dict(kwargs=dict(lr=5e-5)),
        scheduler=dict(name="linear", kwargs=dict(start_factor=1.0, end_factor=0.1)),
        method=dict(gen_kwargs=dict(max_new_tokens=128, do_sample=False)),
        data=dict(
            eval_prompts=[
                [{"role": "user", "content": "Name three ways to keep a garden green."}],
                [{"role": "user", "content": "Explain what a compiler does, in one sentence."}],
            ],
        ),
    )
