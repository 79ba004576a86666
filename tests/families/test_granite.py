"""Law 6 and its neighbours for Granite: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="granite",
    num_hidden_layers=2,
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


class TestGranite(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "factors": FIELDS
        | dict(embedding_multiplier=3.0, attention_multiplier=0.3)
        | dict(residual_multiplier=0.22, logits_scaling=0.5),
        "biases, tied": FIELDS
        | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
        | dict(num_key_value_heads=4, rms_norm_eps=0.1, hidden_act="gelu")
        | dict(rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}),
    }
    refused = {
        "an activation": (FIELDS | dict(hidden_act="mish"), "hidden_act"),
    }
