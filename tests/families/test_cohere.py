"""Law 6 and its neighbours for Cohere: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="cohere",
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=41,
    max_position_embeddings=64,
    eos_token_id=40,
)


class TestCohere(FamilyLaws):
    cases = {
        # Command R: no norms of queries and keys, tied; its logits are scaled by 1/16.
        "plain": FIELDS,
        # Command R+.
        "normed queries and keys, grouped": FIELDS
        | dict(use_qk_norm=True, num_key_value_heads=2, logit_scale=0.8333),
        "untied, biases, dynamic rope": FIELDS
        | dict(
            tie_word_embeddings=False,
            attention_bias=True,
            layer_norm_eps=0.1,
            hidden_act="gelu",
            logit_scale=1.0,
            max_position_embeddings=8,
            rope_parameters=dict(rope_type="dynamic", rope_theta=1000.0, factor=8.0),
        ),
    }
    refused = {
        "activation": (FIELDS | dict(hidden_act="mish"), "mish"),
        "width of a head": (FIELDS | dict(hidden_size=30), "num_attention_heads=4"),
    }
