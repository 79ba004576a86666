"""Law 6 and its neighbours for Gemma 3's text model: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="gemma3_text",
    num_hidden_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=41,
    max_position_embeddings=64,
    sliding_window=4,
    query_pre_attn_scalar=8,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
)


class TestGemma3Text(FamilyLaws):
    cases = {
        # Rotary bases by default: 10,000 within windows, 1,000,000 without.
        "plain": FIELDS,
        # As the 4B model and larger have it: only layers without a window are stretched.
        "linear rope, one key/value head": FIELDS
        | dict(
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=32,
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=100.0),
                full_attention=dict(rope_type="linear", rope_theta=1000.0, factor=8.0),
            ),
        ),
        "logit cap, untied, biases": FIELDS
        | dict(
            final_logit_softcapping=9.0,
            tie_word_embeddings=False,
            attention_bias=True,
            rms_norm_eps=0.1,
            hidden_activation="silu",
        ),
        # Six layers, of which the last alone sees everything.
        "pattern of six": {key: value for key, value in FIELDS.items() if key != "layer_types"}
        | dict(num_hidden_layers=6, intermediate_size=24),
    }
    refused = {
        "both directions": (
            FIELDS | dict(use_bidirectional_attention=True),
            "use_bidirectional_attention",
        ),
        "cap on scores": (FIELDS | dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        "layer type": (
            FIELDS | dict(layer_types=["chunked_attention"] * 3),
            "chunked_attention",
        ),
        "rope of one layer type": (
            FIELDS
            | dict(
                rope_parameters=dict(
                    sliding_attention=dict(rope_type="default", rope_theta=100.0),
                    full_attention=dict(rope_type="proportional", rope_theta=1000.0),
                )
            ),
            "proportional",
        ),
    }
