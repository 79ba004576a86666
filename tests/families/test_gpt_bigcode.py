"""Law 6 and its neighbours for GPT-BigCode: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="gpt_bigcode",
    n_layer=2,
    n_embd=32,
    n_head=4,
    n_positions=64,
    vocab_size=41,
)


class TestGPTBigCode(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "all heads, unscaled, untied": FIELDS
        | dict(
            multi_query=False,
            scale_attn_weights=False,
            tie_word_embeddings=False,
            n_inner=48,
            activation_function="relu",
            layer_norm_epsilon=1e-3,
            attention_softmax_in_fp32=False,
        ),
    }
    refused = {
        "cross-attention": (
            FIELDS | dict(add_cross_attention=True, multi_query=False),
            "add_cross_attention",
        ),
        "activation": (FIELDS | dict(activation_function="mish"), "activation_function"),
    }
