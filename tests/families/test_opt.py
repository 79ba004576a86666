"""Law 6 and its neighbours for OPT: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="opt",
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    ffn_dim=48,
    max_position_embeddings=64,
    vocab_size=41,
)


class TestOPT(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "norms after sums, narrow embeddings": FIELDS
        | dict(do_layer_norm_before=False, word_embed_proj_dim=16),
        "no biases, norms without weights, untied": FIELDS
        | dict(
            enable_bias=False,
            layer_norm_elementwise_affine=False,
            tie_word_embeddings=False,
            activation_function="gelu",
        ),
        "no final norm, narrow embeddings, untied": FIELDS
        | dict(_remove_final_layer_norm=True, word_embed_proj_dim=24, tie_word_embeddings=False),
    }
    refused = {
        "activation": (FIELDS | dict(activation_function="mish"), "activation_function"),
        "heads": (FIELDS | dict(num_attention_heads=5), "num_attention_heads"),
    }
