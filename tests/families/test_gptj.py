"""Law 6 and its neighbours for GPT-J: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="gptj",
    n_layer=2,
    n_embd=32,
    n_head=4,
    rotary_dim=4,
    n_positions=64,
    vocab_size=41,
)


class TestGPTJ(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "tied, whole heads turned": FIELDS
        | dict(
            tie_word_embeddings=True,
            rotary_dim=8,
            n_inner=48,
            activation_function="gelu",
            layer_norm_epsilon=1e-3,
        ),
    }
    refused = {
        "nothing turned": (FIELDS | dict(rotary_dim=0), "rotary_dim"),
        "an odd number turned": (FIELDS | dict(rotary_dim=3), "rotary_dim"),
        "more than a head turned": (FIELDS | dict(rotary_dim=10), "rotary_dim"),
        "activation": (FIELDS | dict(activation_function="mish"), "activation_function"),
    }
