"""Law 6 and its neighbours for Phi-3: see `family_laws`."""

import dataclasses

import family_oracle as oracle
import numpy as np
import pytest
from family_laws import FamilyLaws, open_model

from jax_sft.sampler import Sampling, generate_ids

FIELDS = dict(
    model_type="phi3",
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    vocab_size=41,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


def rope(rope_type, **parameters):
    return dict(rope_parameters={"rope_type": rope_type, "rope_theta": 100.0, **parameters})


class TestPhi3(FamilyLaws):
    cases = {
        "plain": FIELDS,
        "partial, window, tied": FIELDS
        | dict(sliding_window=4, tie_word_embeddings=True, num_key_value_heads=4)
        | dict(rms_norm_eps=0.1, hidden_act="gelu")
        | rope("default", partial_rotary_factor=0.75),
        # The longer example is longer than 8 tokens, the shorter is not.
        "longrope": FIELDS
        | dict(original_max_position_embeddings=8)
        | rope("longrope", short_factor=[1.0, 1.1, 1.3, 2.0], long_factor=[1.0, 2.0, 4.0, 8.0]),
        "longrope, partial": FIELDS
        | dict(original_max_position_embeddings=16)
        | rope(
            "longrope",
            partial_rotary_factor=0.5,
            short_factor=[1.2, 1.5],
            long_factor=[2.0, 4.0],
        ),
    }
    refused = {
        "a rope option": (FIELDS | rope("default", stretch=2.0), "stretch"),
        "an odd part of a head": (
            FIELDS | rope("default", partial_rotary_factor=0.4),
            "partial_rotary_factor",
        ),
        "an activation": (FIELDS | dict(hidden_act="mish"), "hidden_act"),
    }


def test_an_answer_that_becomes_long_is_that_of_transformers_generate(tmp_path):
    """Their `prepare_inputs_for_generation` throws the cache away at the crossing.

    Of three prompts decoded together here and alone there, the first never has more than 12
    tokens, the second does from its sixth new one on, the third from the start.
    """
    torch = pytest.importorskip("torch")
    golden = oracle.read_golden("phi3")["longrope"]
    fields = golden.fields | dict(original_max_position_embeddings=12)
    folder = oracle.write_folder(tmp_path, fields, golden.weights)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, fields["vocab_size"], length).tolist() for length in (3, 7, 20)]
    model, expected = oracle.torch_model(folder), []
    model.generation_config.eos_token_id = None
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9
        )
        expected.append(out[0, len(prompt) :].tolist())
    ours = open_model(folder)
    sampling = Sampling(max_new_tokens=9, do_sample=False)
    answers = generate_ids(
        ours.decoder, ours.params, prompts, sampling=sampling, stop_ids=(), seed=0
    )
    assert answers == expected
    kept = generate_ids(
        dataclasses.replace(
            ours.decoder, config=dataclasses.replace(ours.decoder.config, recompute_from=None)
        ),
        ours.params,
        prompts,
        sampling=sampling,
        stop_ids=(),
        seed=0,
    )
    assert [a == b for a, b in zip(kept, answers, strict=True)] == [True, False, True]
