"""Law 6 and its neighbours for OLMo 2: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="olmo2",
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=41,
    max_position_embeddings=64,
    eos_token_id=40,
)


class TestOlmo2(FamilyLaws):
    cases = {
        "plain": FIELDS,
        # Grouped, as the 32B model is.
        "grouped, biases": FIELDS
        | dict(
            num_key_value_heads=2,
            attention_bias=True,
            rms_norm_eps=0.1,
            hidden_act="gelu",
        ),
        "tied, one key/value head, yarn rope": FIELDS
        | dict(
            num_key_value_heads=1,
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=1000.0,
                factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
    }
    refused = {
        "activation": (FIELDS | dict(hidden_act="mish"), "mish"),
        "rope type": (
            FIELDS | dict(rope_parameters=dict(rope_type="proportional", rope_theta=1000.0)),
            "proportional",
        ),
    }
