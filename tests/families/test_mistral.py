"""Law 6 and its neighbours for Mistral: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="mistral",
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=None,
    max_position_embeddings=64,
    vocab_size=41,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


class TestMistral(FamilyLaws):
    cases = {
        "no window": FIELDS,
        "window, head_dim": FIELDS | dict(sliding_window=4, head_dim=12),
        "window of all, tied": FIELDS
        | dict(sliding_window=4096, tie_word_embeddings=True, num_key_value_heads=4)
        | dict(rms_norm_eps=0.1, hidden_act="gelu")
        | dict(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    }
    refused = {
        "an activation": (FIELDS | dict(hidden_act="mish"), "hidden_act"),
        "a rope option": (
            FIELDS | dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "stretch": 3.0}),
            "stretch",
        ),
    }
