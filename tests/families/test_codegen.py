"""Law 6 and its neighbours for CodeGen: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="codegen",
    n_layer=2,
    n_embd=32,
    n_head=4,
    rotary_dim=4,
    n_positions=64,
    vocab_size=41,
)


class TestCodeGen(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "tied, two heads a part, whole heads turned": FIELDS
        | dict(
            tie_word_embeddings=True,
            n_head=8,
            n_ctx=64,
            n_inner=48,
            activation_function="gelu",
            layer_norm_epsilon=1e-3,
        ),
    }
    refused = {
        "heads that four parts do not share": (FIELDS | dict(n_embd=48, n_head=6), "n_head"),
        "nothing turned": (FIELDS | dict(rotary_dim=0), "rotary_dim"),
        "activation": (FIELDS | dict(activation_function="mish"), "activation_function"),
    }
