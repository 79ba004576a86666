"""Law 6 and its neighbours for Qwen3-MoE: see `family_laws`."""

from family_laws import FamilyLaws

FIELDS = dict(
    model_type="qwen3_moe",
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    moe_intermediate_size=24,
    num_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    vocab_size=41,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


class TestQwen3Moe(FamilyLaws):
    cases = {
        "experts alone": FIELDS,
        "experts between MLPs": FIELDS
        | dict(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
        | dict(norm_topk_prob=True, num_experts=5, num_experts_per_tok=3),
        "MLP first, window, biases, head_dim, tied": FIELDS
        | dict(mlp_only_layers=[0], use_sliding_window=True, sliding_window=4, head_dim=12)
        | dict(attention_bias=True, tie_word_embeddings=True, num_key_value_heads=4)
        | dict(output_router_logits=True, router_aux_loss_coef=0.5),
        "MLPs alone, window not used": FIELDS
        | dict(mlp_only_layers=[0, 1], sliding_window=4, rms_norm_eps=0.1, hidden_act="gelu")
        | dict(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    }
    refused = {
        "an activation": (FIELDS | dict(hidden_act="mish"), "hidden_act"),
    }
