"""Law 6 and its neighbours for Gemma 2: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="gemma2",
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=41,
    max_position_embeddings=64,
    sliding_window=4,
    query_pre_attn_scalar=8,
)


class TestGemma2(FamilyLaws):
    cases = {
        # The second layer has no window; caps as the released models have them, which the
        # scores and logits of weights this wide reach.
        "plain": FIELDS,
        "no caps, untied, biases": FIELDS
        | dict(
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            tie_word_embeddings=False,
            attention_bias=True,
            rms_norm_eps=0.1,
        ),
        "low caps, wide heads, all windows": FIELDS
        | dict(
            num_key_value_heads=4,
            head_dim=16,
            query_pre_attn_scalar=32,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=9.0,
            layer_types=["sliding_attention", "sliding_attention"],
            hidden_activation="silu",
        ),
        "full then sliding, linear rope": FIELDS
        | dict(
            num_hidden_layers=3,
            layer_types=["full_attention", "full_attention", "sliding_attention"],
            rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=4.0),
        ),
    }
    refused = {
        "both directions": (
            FIELDS | dict(use_bidirectional_attention=True),
            "use_bidirectional_attention",
        ),
        "layer type": (
            FIELDS | dict(layer_types=["chunked_attention", "full_attention"]),
            "chunked_attention",
        ),
        "no window": (FIELDS | dict(sliding_window=None), "sliding_window"),
    }
