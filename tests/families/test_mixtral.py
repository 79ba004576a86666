"""Law 6 and its neighbours for Mixtral: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="mixtral",
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    vocab_size=41,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


class TestMixtral(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "window, head_dim, three of five experts": FIELDS
        | dict(sliding_window=4, head_dim=12, num_local_experts=5, num_experts_per_tok=3)
        | dict(output_router_logits=True, router_aux_loss_coef=0.5),
        "one expert, tied": FIELDS
        | dict(num_experts_per_tok=1, tie_word_embeddings=True, num_key_value_heads=4)
        | dict(rms_norm_eps=0.1, hidden_act="gelu")
        | dict(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    }
    refused = {
        "noise on the router": (FIELDS | dict(router_jitter_noise=0.1), "router_jitter_noise"),
        "an activation": (FIELDS | dict(hidden_act="mish"), "hidden_act"),
    }
