"""Law 6 and its neighbours for Gemma: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="gemma",
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=16,
    intermediate_size=48,
    vocab_size=41,
    max_position_embeddings=64,
)


class TestGemma(FamilyLaws):
    cases = {
        # Gemma 2B's shape: one key/value head for all, heads wider than the width over them.
        "plain": FIELDS,
        "untied, biases, large eps": FIELDS
        | dict(
            num_key_value_heads=4,
            head_dim=8,
            tie_word_embeddings=False,
            attention_bias=True,
            rms_norm_eps=0.1,
            hidden_act="relu",
        ),
        "grouped, llama3 rope": FIELDS
        | dict(
            num_key_value_heads=2,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=1000.0,
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
    }
    refused = {
        "both directions": (
            FIELDS | dict(use_bidirectional_attention=True),
            "use_bidirectional_attention",
        ),
        "activation": (FIELDS | dict(hidden_act="mish"), "mish"),
    }
