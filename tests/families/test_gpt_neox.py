"""Law 6 and its neighbours for GPT-NeoX: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="gpt_neox",
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    vocab_size=41,
)


def _rope(**parameters: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5} | parameters}


class TestGPTNeoX(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "consecutive, no bias, tied, whole heads turned": FIELDS
        | dict(
            use_parallel_residual=False,
            attention_bias=False,
            tie_word_embeddings=True,
            hidden_act="gelu_new",
            layer_norm_eps=1e-3,
        )
        | _rope(partial_rotary_factor=1.0),
        "rope linear": FIELDS | _rope(rope_type="linear", factor=4.0),
        "rope dynamic": FIELDS
        | dict(max_position_embeddings=8)
        | _rope(rope_type="dynamic", factor=8.0),
        "rope yarn": FIELDS
        | _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    }
    refused = {
        "nothing turned": (FIELDS | _rope(partial_rotary_factor=0.0), "partial_rotary_factor"),
        "an odd number turned": (
            FIELDS | _rope(partial_rotary_factor=0.4),
            "partial_rotary_factor",
        ),
        "rope type": (FIELDS | _rope(rope_type="proportional"), "rope_type"),
        "activation": (FIELDS | dict(hidden_act="mish"), "hidden_act"),
    }
