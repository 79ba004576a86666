"""Law 6 and its neighbours for Qwen2: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="qwen2",
    num_hidden_layers=3,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    vocab_size=41,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


class TestQwen2(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "windows from layer 1, tied": FIELDS
        | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
        | dict(tie_word_embeddings=True, num_key_value_heads=4),
        "windows by layer, yarn": FIELDS
        | dict(use_sliding_window=True, sliding_window=3)
        | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"])
        | dict(rms_norm_eps=0.1, hidden_act="gelu")
        | dict(
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        ),
        "window not used": FIELDS | dict(sliding_window=4, max_window_layers=1),
    }
    refused = {
        "windows both on and off": (
            FIELDS | dict(layer_types=["sliding_attention"] * 3, sliding_window=4),
            "sliding_window",
        ),
        "another layer type": (
            FIELDS | dict(layer_types=["chunked_attention"] * 3),
            "chunked_attention",
        ),
        "an activation": (FIELDS | dict(hidden_act="mish"), "hidden_act"),
    }
