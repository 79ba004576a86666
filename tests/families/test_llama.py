"""Law 6 and its neighbours for Llama: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="llama",
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    vocab_size=41,
    bos_token_id=0,
    eos_token_id=0,
)


def rope(rope_type, **parameters):
    return dict(rope_parameters={"rope_type": rope_type, "rope_theta": 10000.0, **parameters})


class TestLlama(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "biases, tied": FIELDS
        | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, hidden_act="gelu")
        | dict(num_key_value_heads=4, rms_norm_eps=0.1),
        "llama3": FIELDS
        | dict(head_dim=12, pretraining_tp=2)
        | rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
        "linear": FIELDS | rope("linear", factor=4.0),
        "partial, which it does not read": FIELDS | rope("default", partial_rotary_factor=0.5),
        # The longer example is longer than 8 tokens, the shorter is not.
        "dynamic": FIELDS | dict(max_position_embeddings=8) | rope("dynamic", factor=4.0),
        "yarn": FIELDS | rope("yarn", factor=4.0, original_max_position_embeddings=16),
        "yarn, its options": FIELDS
        | rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=2.0,
            beta_slow=0.1,
            mscale=3.0,
            mscale_all_dim=1.0,
            truncate=False,
        ),
        # Its longer example is longer than 8 tokens, too.
        "longrope": FIELDS
        | rope(
            "longrope",
            factor=8.0,
            original_max_position_embeddings=8,
            short_factor=[1.0, 1.1, 1.3, 2.0],
            long_factor=[1.0, 2.0, 4.0, 8.0],
        ),
    }
    refused = {
        "partial rotary positions, scaled": (
            FIELDS | rope("linear", factor=4.0, partial_rotary_factor=0.5),
            "partial_rotary_factor",
        ),
        "an unknown rope": (FIELDS | rope("spiral", factor=2.0), "spiral"),
        "an activation": (FIELDS | dict(hidden_act="mish"), "hidden_act"),
    }
