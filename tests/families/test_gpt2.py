"""Law 6 and its neighbours for GPT-2: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="gpt2",
    n_layer=2,
    n_embd=24,
    n_head=3,
    n_positions=32,
    vocab_size=41,
    bos_token_id=0,
    eos_token_id=0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
)


class TestGPT2(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "gelu_fast": FIELDS | dict(activation_function="gelu_fast"),
        "gelu_pytorch_tanh, upcast": FIELDS
        | dict(activation_function="gelu_pytorch_tanh", reorder_and_upcast_attn=True),
        "relu, n_inner": FIELDS | dict(activation_function="relu", n_inner=20),
        "gelu, unscaled": FIELDS | dict(activation_function="gelu", scale_attn_weights=False),
        "silu, by layer": FIELDS
        | dict(activation_function="silu", scale_attn_by_inverse_layer_idx=True),
        "swish, by layer": FIELDS
        | dict(activation_function="swish", scale_attn_by_inverse_layer_idx=True),
        "tanh, eps, untied": FIELDS
        | dict(activation_function="tanh", layer_norm_epsilon=0.3, tie_word_embeddings=False),
    }
    num_differentiated = len(cases)
    refused = {
        "cross attention": (FIELDS | dict(add_cross_attention=True), "add_cross_attention"),
        "an activation": (FIELDS | dict(activation_function="mish"), "activation_function"),
        "heads that do not divide": (FIELDS | dict(n_head=5), "n_head"),
    }
