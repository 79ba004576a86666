"""Law 6 and its neighbours for Phi: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="phi",
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=41,
    max_position_embeddings=64,
)


def rope(**fields) -> dict:
    return dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0) | fields)


class TestPhi(FamilyLaws):
    cases = {
        # Half of each head is turned, by default.
        "plain": FIELDS,
        "normed queries and keys, grouped, tied": FIELDS
        | dict(
            qk_layernorm=True,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            layer_norm_eps=0.1,
            hidden_act="relu",
        )
        | rope(rope_theta=1000.0, partial_rotary_factor=0.25),
        "whole heads turned, one key/value head": FIELDS
        | dict(num_key_value_heads=1)
        | rope(partial_rotary_factor=1.0),
        "part of a head, yarn": FIELDS
        | rope(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            partial_rotary_factor=0.5,
        ),
        # The longer example needs the long factors, and the shorter must not take them.
        "part of a head, longrope": FIELDS
        | rope(
            rope_type="longrope",
            factor=8.0,
            short_factor=[1.0, 1.5],
            long_factor=[2.0, 6.0],
            original_max_position_embeddings=8,
            partial_rotary_factor=0.5,
        ),
    }
    refused = {
        "activation": (FIELDS | dict(hidden_act="mish"), "mish"),
        "an odd number turned": (FIELDS | rope(partial_rotary_factor=0.4), "turns 3 of a head's 8"),
        "rope type": (FIELDS | rope(rope_type="proportional"), "proportional"),
    }
