"""Llama learns to follow instructions by LoRA: the weights stay as they are, adapters train.

    python -m jax_sft.main --config=configs/alpaca_lora.py --config.data.train=alpaca.json \
        --config.model.model_path=DIR

The data is that of alpaca_gpt2.py. DIR is any supported model (docs/families.md); left out, it is
Llama 3.2 1B from the hub, which asks for its licence to be accepted. The adapters have rank 16 and
stand on every linear layer, as in Dettmers et al. 2023 (QLoRA), section 4; the frozen weights are
bfloat16. The run's hf_model/ holds the model with the adapters merged, and in hf_model/adapter/
stand the adapters alone, for `peft`.
"""

from jax_sft.config import SFTConfig, default_sft_config


def get_config() -> SFTConfig:
    """Three epochs of 16 rows of 1024 tokens at 2e-4, decaying by a cosine."""
    return default_sft_config().evolve(
        train=dict(
            seq_length=1024,
            batch_size=16,
            minibatch_size=4,
            epochs=3,
            total_steps=10_000,
            checkpoint_dir="runs/alpaca_lora",
        ),
        model=dict(
            model_path="meta-llama/Llama-3.2-1B",
            param_dtype="bfloat16",
            peft_config=dict(r=16, lora_alpha=16, target_modules="all-linear"),
        ),
        optimizer=dict(kwargs=dict(lr=2e-4)),
        scheduler=dict(kwargs=dict(T_max=None, eta_min=0.0), warmup_steps=20),
        method=dict(gen_kwargs=dict(max_new_tokens=256)),
        data=dict(
            template="alpaca",
            filter="output != ''",  # the public data has a few rows without an answer
            output_field="output",
            eval_prompts=[
                "Below is an instruction that describes a task. "
                "Write a response that appropriately completes the request.\n\n"
                "### Instruction:\nExplain what a compiler does, in one sentence.\n\n"
                "### Response:\n"
            ],
        ),
    )
