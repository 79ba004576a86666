"""Stores tiny checkpoints of transformers' Flax classes, with the logits that those computed.

    pip install transformers==4.57.6 flax      # in an environment of its own
    python scripts/make_flax_golden.py

Writes tests/flax/<name>/{config.json, flax_model.msgpack, logits.npy}, for test_flax_files.py.
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import transformers as t  # noqa: E402

FOLDER = Path(__file__).parent.parent / "tests" / "flax"
TOKENS_BT = np.array([[3, 7, 2, 9, 10, 4, 5, 5, 1]], np.int32)
SIZES = dict(vocab_size=11, bos_token_id=0, eos_token_id=0, pad_token_id=0)
GPT2 = SIZES | dict(n_positions=16, n_embd=8, n_layer=2, n_head=2)
LLAMA = SIZES | dict(
    max_position_embeddings=16,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
OPT = SIZES | dict(
    max_position_embeddings=16,
    hidden_size=8,
    ffn_dim=12,
    num_hidden_layers=2,
    num_attention_heads=2,
)
NEO = SIZES | dict(
    max_position_embeddings=16,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    attention_types=[[["global", "local"], 1]],
    window_size=4,
)
XGLM = SIZES | dict(
    max_position_embeddings=16, d_model=8, ffn_dim=12, num_layers=2, attention_heads=2
)
MODELS = {
    "gpt2": t.FlaxGPT2LMHeadModel(t.GPT2Config(**GPT2)),
    "gpt2_untied": t.FlaxGPT2LMHeadModel(t.GPT2Config(**GPT2, tie_word_embeddings=False)),
    "gpt_neo": t.FlaxGPTNeoForCausalLM(t.GPTNeoConfig(**NEO)),
    "gptj": t.FlaxGPTJForCausalLM(t.GPTJConfig(**GPT2, rotary_dim=2)),
    "opt": t.FlaxOPTForCausalLM(t.OPTConfig(**OPT, word_embed_proj_dim=8)),
    "opt_projected": t.FlaxOPTForCausalLM(t.OPTConfig(**OPT, word_embed_proj_dim=4)),
    "xglm": t.FlaxXGLMForCausalLM(t.XGLMConfig(**XGLM)),
    "bloom": t.FlaxBloomForCausalLM(
        t.BloomConfig(**SIZES, hidden_size=8, n_layer=2, n_head=2), input_shape=(1, 4)
    ),
    "llama": t.FlaxLlamaForCausalLM(t.LlamaConfig(**LLAMA)),
    # FlaxMistral's window is one token longer than the window of PyTorch's Mistral: none here.
    "mistral": t.FlaxMistralForCausalLM(t.MistralConfig(**LLAMA, sliding_window=16)),
    "gemma": t.FlaxGemmaForCausalLM(
        t.GemmaConfig(**LLAMA, head_dim=4, hidden_activation="gelu_pytorch_tanh")
    ),
}


def main() -> None:
    for name, model in MODELS.items():
        rng = np.random.default_rng(0)
        model.params = jax.tree.map(
            lambda x, rng=rng: x + 0.3 * rng.standard_normal(x.shape, np.float32), model.params
        )
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink()
        np.save(FOLDER / name / "logits.npy", model(TOKENS_BT).logits)


if __name__ == "__main__":
    main()
