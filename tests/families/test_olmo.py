"""Law 6 and its neighbours for OLMo: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="olmo",
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=41,
    max_position_embeddings=64,
    eos_token_id=40,
)


class TestOlmo(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "grouped, tied, biases": FIELDS
        | dict(
            num_key_value_heads=2,
            tie_word_embeddings=True,
            attention_bias=True,
            hidden_act="gelu",
            rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=4.0),
        ),
    }
    refused = {
        "clipping": (FIELDS | dict(clip_qkv=8.0), "clip_qkv"),
        "width of a head": (FIELDS | dict(hidden_size=30), "num_attention_heads=4"),
    }
