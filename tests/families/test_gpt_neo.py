"""Law 6 and its neighbours for GPT-Neo: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="gpt_neo",
    num_layers=2,
    attention_types=[[["global", "local"], 1]],
    window_size=4,
    hidden_size=32,
    num_heads=4,
    max_position_embeddings=64,
    vocab_size=41,
)


class TestGPTNeo(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "untied, all windows": FIELDS
        | dict(
            tie_word_embeddings=False,
            attention_types=[[["local"], 2]],
            window_size=6,
            intermediate_size=48,
            activation_function="relu",
            layer_norm_epsilon=1e-3,
        ),
        "no windows": FIELDS | dict(attention_types=[[["global"], 2]], activation_function="gelu"),
    }
    refused = {
        "attention type": (FIELDS | dict(attention_types=[[["sparse"], 2]]), "attention_types"),
        "activation": (FIELDS | dict(activation_function="mish"), "activation_function"),
    }
