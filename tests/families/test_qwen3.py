"""Law 6 and its neighbours for Qwen3: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="qwen3",
    num_hidden_layers=3,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=64,
    vocab_size=41,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


class TestQwen3(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "biases, windows from layer 1, tied": FIELDS
        | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
        | dict(attention_bias=True, tie_word_embeddings=True, num_key_value_heads=4),
        "windows by layer, eps": FIELDS
        | dict(use_sliding_window=True, sliding_window=3, head_dim=8)
        | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"])
        | dict(rms_norm_eps=0.1, hidden_act="gelu")
        | dict(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    }
    refused = {
        "windows both on and off": (
            FIELDS | dict(layer_types=["sliding_attention"] * 3, sliding_window=4),
            "sliding_window",
        ),
        "an activation": (FIELDS | dict(hidden_act="mish"), "hidden_act"),
    }
