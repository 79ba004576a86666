"""Law 7: decoding over a cache gives the tokens of full forward passes, row by row."""

import functools

import family_oracle as oracle
import numpy as np
import pytest
from tiny_models import one_device, tiny_gpt2

from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.placement import Placement
from jax_sft.sampler import Sampling, generate_ids

NUM_NEW = 8
GREEDY = Sampling(max_new_tokens=NUM_NEW, do_sample=False)
SAMPLED = Sampling(max_new_tokens=NUM_NEW, top_k=20, top_p=0.9, repetition_penalty=1.2)
NEAR_TIE = 1e-3  # a smaller gap between the best two is decided by rounding


@functools.cache
def model():
    return tiny_gpt2()


@functools.cache
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 67, length).tolist() for length in (5, 1, 40, 17)]


def generate(rows, sampling, *, lm=None, seed=0):
    lm = lm or model()
    return generate_ids(lm.decoder, lm.params, rows, sampling=sampling, stop_ids=(), seed=seed)


@functools.cache
def greedy():
    return generate(prompts(), GREEDY)


def assert_same_but_for_near_ties(got, expected, lm, prompt):
    """Up to a first difference, which must be between tokens of nearly the same logit."""
    if got == expected:
        return
    at = next(i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b)
    tokens = np.zeros((1, 64), np.int32)
    so_far = [*prompt, *got[:at]]
    tokens[0, : len(so_far)] = so_far
    logits_V = np.asarray(lm(tokens))[0, len(so_far) - 1]
    assert abs(logits_V[got[at]] - logits_V[expected[at]]) < NEAR_TIE, (at, got, expected)


def test_greedy_tokens_are_those_of_full_forward_passes():
    tokens = np.zeros((len(prompts()), 64), np.int32)
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts(), greedy(), strict=True)]
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    logits_BTV = np.asarray(model()(tokens))
    assert len({tuple(answer) for answer in greedy()}) == 4, "the answers do not tell rows apart"
    for logits_TV, prompt, answer in zip(logits_BTV, prompts(), greedy(), strict=True):
        before = len(prompt) - 1
        logits_GV = logits_TV[before : before + NUM_NEW]
        chosen_G = np.take_along_axis(logits_GV, np.array(answer)[:, None], axis=1)[:, 0]
        assert (logits_GV.max(axis=1) - chosen_G < NEAR_TIE).all()


def test_each_prompt_of_a_batch_gets_its_own_answer():
    for prompt, answer in zip(prompts(), greedy(), strict=True):
        [alone] = generate([prompt], GREEDY)
        assert_same_but_for_near_ties(alone, answer, model(), prompt)


def test_draws_depend_on_the_seed_and_the_place_alone():
    answers = generate(prompts(), SAMPLED, seed=3)
    longest = prompts()[2]
    others = generate([[1, 2], prompts()[1], longest, [4] * 9], SAMPLED, seed=3)
    assert others[1:3] == answers[1:3]
    assert others[0] != answers[0] and others[3] != answers[3]
    assert generate(prompts(), SAMPLED, seed=4) != answers


def test_top_k_of_1_is_greedy():
    top_1 = Sampling(max_new_tokens=NUM_NEW, do_sample=True, top_k=1, temperature=1.7)
    assert generate(prompts(), top_1, seed=9) == greedy()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_those_of_transformers(penalty, tmp_path):
    torch = pytest.importorskip("torch")
    golden = oracle.read_golden("gpt2")["plain"]
    folder = oracle.write_folder(tmp_path, golden.fields, golden.weights)
    lm = CausalLM.from_pretrained(folder, placement=Placement(mesh=one_device()))
    theirs = oracle.torch_model(folder)
    rows = [[5, 11, 0, 7, 7], [33], [2, 19, 40]]
    sampling = Sampling(max_new_tokens=NUM_NEW, do_sample=False, repetition_penalty=penalty)
    for prompt, answer in zip(rows, generate(rows, sampling, lm=lm), strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NUM_NEW,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
        )
        # No logit of this model is within NEAR_TIE of the best on the way.
        assert answer == expected[0, len(prompt) :].tolist()
