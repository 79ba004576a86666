"""Law 6 and its neighbours for SmolLM3: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="smollm3",
    num_hidden_layers=4,
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


class TestSmolLM3(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "every other layer, windows, biases, untied": FIELDS
        | dict(no_rope_layer_interval=2, use_sliding_window=True, sliding_window=4)
        | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
        "by layer, longer than the model": FIELDS
        | dict(no_rope_layers=[0, 1, 1, 0, 1], num_key_value_heads=4)
        | dict(use_sliding_window=True, sliding_window=3)
        | dict(layer_types=["full_attention", "sliding_attention"] * 2)
        | dict(rms_norm_eps=0.1, hidden_act="gelu")
        | dict(rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}),
    }
    refused = {
        "windows both on and off": (
            FIELDS | dict(layer_types=["sliding_attention"] * 4, sliding_window=4),
            "use_sliding_window",
        ),
        "an activation": (FIELDS | dict(hidden_act="mish"), "hidden_act"),
    }
