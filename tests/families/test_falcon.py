"""Law 6 and its neighbours for Falcon: see `family_laws`."""

import family_oracle as oracle
import numpy as np
import pytest
from family_laws import FamilyLaws, assert_close_logits, open_model

FIELDS = dict(
    model_type="falcon",
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=48,
    max_position_embeddings=64,
    vocab_size=41,
)
NEW = FIELDS | dict(new_decoder_architecture=True, num_kv_heads=2)


class TestFalcon(FamilyLaws):
    cases = {
        "old, one key/value head": FIELDS,
        "old, consecutive, twelve heads, alibi, biases, untied": FIELDS
        | dict(
            alibi=True,
            bias=True,
            multi_query=False,
            parallel_attn=False,
            tie_word_embeddings=False,
            hidden_size=36,
            num_attention_heads=12,
            ffn_hidden_size=None,
            layer_norm_epsilon=1e-3,
        ),
        "old, all heads, rope dynamic": FIELDS
        | dict(
            multi_query=False,
            num_ln_in_parallel_attn=1,
            max_position_embeddings=8,
            rope_parameters=dict(rope_type="dynamic", rope_theta=500.0, factor=8.0),
        ),
        "new, two norms, alibi": NEW | dict(alibi=True, activation="relu"),
        "new, one norm, biases, rope linear": NEW
        | dict(
            num_ln_in_parallel_attn=1,
            multi_query=False,
            bias=True,
            rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0),
        ),
    }
    refused = {
        "new and consecutive": (NEW | dict(parallel_attn=False), "parallel_attn"),
        "new with three norms": (
            NEW | dict(num_ln_in_parallel_attn=3),
            "num_ln_in_parallel_attn",
        ),
        "old with two norms": (
            FIELDS | dict(num_ln_in_parallel_attn=2),
            "num_ln_in_parallel_attn",
        ),
        "old with some heads": (FIELDS | dict(multi_query=False, num_kv_heads=2), "num_kv_heads"),
        "heads in unequal groups": (NEW | dict(num_kv_heads=3), "num_kv_heads"),
        "partial rotary": (
            FIELDS
            | dict(
                rope_parameters=dict(
                    rope_type="linear", rope_theta=500.0, factor=4.0, partial_rotary_factor=0.5
                )
            ),
            "partial_rotary_factor",
        ),
        "activation": (FIELDS | dict(activation="mish"), "activation"),
    }


def test_alibi_where_bfloat16_skips_positions(tmp_path):
    """It holds no odd number beyond 256."""
    torch = pytest.importorskip("torch")
    fields = TestFalcon.cases["old, consecutive, twelve heads, alibi, biases, untied"]
    fields = fields | dict(max_position_embeddings=320)
    shapes = oracle.shapes_on_disk(fields, tmp_path / "theirs")
    folder = oracle.write_folder(tmp_path, fields, oracle.draw_weights(shapes, seed=0))
    ids_BT = np.arange(320)[None] % fields["vocab_size"]
    with torch.no_grad():
        expected_BTV = oracle.torch_model(folder)(torch.tensor(ids_BT)).logits.numpy()
    assert_close_logits(np.asarray(open_model(folder)(ids_BT)), expected_BTV)
