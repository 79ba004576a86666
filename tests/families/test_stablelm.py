"""Law 6 and its neighbours for StableLM: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="stablelm",
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=48,
    vocab_size=41,
    max_position_embeddings=64,
)


def rope(**fields) -> dict:
    return dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0) | fields)


class TestStableLm(FamilyLaws):
    cases = {
        # A quarter of each head is turned, by default.
        "plain": FIELDS,
        # Stable LM 2 1.6B.
        "biases": FIELDS
        | dict(use_qkv_bias=True, layer_norm_eps=0.1, hidden_act="gelu")
        | rope(rope_theta=1000.0, partial_rotary_factor=0.5),
        # Stable LM 2 12B.
        "parallel, normed queries and keys, grouped": FIELDS
        | dict(use_parallel_residual=True, qk_layernorm=True, num_key_value_heads=2),
        "normed queries and keys, tied, linear rope": FIELDS
        | dict(qk_layernorm=True, tie_word_embeddings=True, layer_norm_eps=0.1)
        | rope(rope_type="linear", factor=4.0, partial_rotary_factor=1.0),
        "parallel, biases, one key/value head, dynamic rope": FIELDS
        | dict(use_parallel_residual=True, use_qkv_bias=True, num_key_value_heads=1)
        | dict(max_position_embeddings=8)
        | rope(rope_type="dynamic", factor=8.0, partial_rotary_factor=0.5),
    }
    refused = {
        "dropout after the MLP alone": (FIELDS | dict(hidden_dropout=0.1), "hidden_dropout"),
        "nothing turned": (FIELDS | rope(partial_rotary_factor=0.0), "turns 0 of a head's 8"),
        "width of a head": (FIELDS | dict(hidden_size=30), "num_attention_heads=4"),
    }
