"""Law 6 and its neighbours for BLOOM: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="bloom",
    n_layer=2,
    hidden_size=32,
    n_head=4,
    vocab_size=41,
    tie_word_embeddings=False,
)


class TestBloom(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "residual from the norm, twelve heads, tied": FIELDS
        | dict(
            apply_residual_connection_post_layernorm=True,
            tie_word_embeddings=True,
            hidden_size=36,
            n_head=12,
            layer_norm_epsilon=1e-3,
            pretraining_tp=2,
        ),
    }
    refused = {
        "sums of slices, without biases": (
            FIELDS | dict(slow_but_exact=True, pretraining_tp=2),
            "slow_but_exact",
        ),
        "heads": (FIELDS | dict(n_head=5), "n_head"),
    }
