"""Law 6 and its neighbours for Cohere 2: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="cohere2",
    num_hidden_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=41,
    max_position_embeddings=64,
    sliding_window=4,
    eos_token_id=40,
)


class TestCohere2(FamilyLaws):
    cases = {
        # Three layers with a window and rotary positions, then one with neither.
        "plain": FIELDS,
        "untied, biases, full first": FIELDS
        | dict(
            num_hidden_layers=2,
            layer_types=["full_attention", "sliding_attention"],
            num_key_value_heads=4,
            tie_word_embeddings=False,
            attention_bias=True,
            layer_norm_eps=0.1,
            hidden_act="gelu",
            logit_scale=1.0,
            rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=4.0),
        ),
        "windows alone": FIELDS
        | dict(num_hidden_layers=2, layer_types=["sliding_attention"] * 2, sliding_window=6),
        "no positions at all": FIELDS
        | dict(num_hidden_layers=2, layer_types=["full_attention"] * 2, num_key_value_heads=1),
    }
    refused = {
        "layer type": (
            FIELDS | dict(num_hidden_layers=1, layer_types=["chunked_attention"]),
            "chunked_attention",
        ),
        "no window": (FIELDS | dict(sliding_window=None), "sliding_window"),
    }
