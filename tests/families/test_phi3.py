"""Law 6 and its neighbours for Phi-3: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="phi3",
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


def rope(rope_type, **parameters):
    return dict(rope_parameters={"rope_type": rope_type, "rope_theta": 100.0, **parameters})


class TestPhi3(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "partial, window, tied": FIELDS
        | dict(sliding_window=4, tie_word_embeddings=True, num_key_value_heads=4)
        | dict(rms_norm_eps=0.1, hidden_act="gelu")
        | rope("default", partial_rotary_factor=0.75),
        # The longer example is longer than 8 tokens, the shorter is not.
        "longrope": FIELDS
        | dict(original_max_position_embeddings=8)
        | rope("longrope", short_factor=[1.0, 1.1, 1.3, 2.0], long_factor=[1.0, 2.0, 4.0, 8.0]),
        "longrope, partial": FIELDS
        | dict(original_max_position_embeddings=16)
        | rope(
            "longrope",
            partial_rotary_factor=0.5,
            short_factor=[1.2, 1.5],
            long_factor=[2.0, 4.0],
        ),
    }
    refused = {
        "a rope option": (FIELDS | rope("default", stretch=2.0), "stretch"),
        "an odd part of a head": (
            FIELDS | rope("default", partial_rotary_factor=0.4),
            "partial_rotary_factor",
        ),
        "an activation": (FIELDS | dict(hidden_act="mish"), "hidden_act"),
    }
