"""Law 6 and its neighbours for XGLM: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="xglm",
    num_layers=2,
    d_model=32,
    attention_heads=4,
    ffn_dim=48,
    max_position_embeddings=64,
    vocab_size=41,
    # Tied to embeddings that are scaled, each token would be followed by itself.
    tie_word_embeddings=False,
)


class TestXGLM(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "tied, unscaled, odd width": FIELDS
        | dict(
            tie_word_embeddings=True,
            scale_embedding=False,
            d_model=35,
            attention_heads=5,
            pad_token_id=None,
            activation_function="relu",
        ),
    }
    refused = {
        "a pad token that erases a position": (FIELDS | dict(pad_token_id=5), "pad_token_id"),
        "cross-attention": (FIELDS | dict(add_cross_attention=True), "add_cross_attention"),
        "activation": (FIELDS | dict(activation_function="mish"), "activation_function"),
    }
