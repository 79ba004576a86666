"""Choosing tokens: hand-worked cases, `transformers`' own processors, and stopping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import VOCAB_SIZE, draw_params, one_device, tiny_gpt2

from jax_sft import sampler
from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.placement import Placement
from jax_sft.sampler import (
    STOP_CHECK_INTERVAL,
    Sampling,
    check_prompts,
    choose_token,
    generate_ids,
)
from jax_sft.sharding import make_mesh, num_shards

NUM_DRAWS = 4000
# Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625.
HALVES_V = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32))


@functools.partial(jax.jit, static_argnames="sampling")
def choose_many(logits_V, seen_V, sampling):
    keys = jax.random.split(jax.random.key(0), NUM_DRAWS)
    shape = (NUM_DRAWS, logits_V.shape[0])
    return choose_token(
        jnp.broadcast_to(logits_V[None], shape),
        jnp.broadcast_to(seen_V[None], shape),
        keys,
        sampling=sampling,
    )


def frequencies(logits, seen=None, **sampling):
    logits = np.asarray(logits, np.float32)
    seen = np.zeros(logits.shape, bool) if seen is None else np.asarray(seen)
    tokens = np.asarray(choose_many(logits, seen, Sampling(**sampling)))
    return np.bincount(tokens, minlength=len(logits)) / NUM_DRAWS


def assert_drawn_as(got, expected):
    """Within five standard deviations of a share of NUM_DRAWS draws; never where 0 is expected."""
    expected = np.asarray(expected)
    assert (np.abs(got - expected) <= 5 * np.sqrt(expected * (1 - expected) / NUM_DRAWS)).all(), got


def test_draws_follow_the_distribution():
    assert_drawn_as(frequencies(HALVES_V), [0.5, 0.25, 0.125, 0.0625, 0.0625])


def test_temperature_sharpens():
    """At temperature 0.5 probabilities are squared: 64, 16, 4, 1, 1 of 86."""
    assert_drawn_as(frequencies(HALVES_V, temperature=0.5), np.array([64, 16, 4, 1, 1]) / 86)


def test_top_k_by_hand():
    assert_drawn_as(frequencies(HALVES_V, top_k=2), [2 / 3, 1 / 3, 0, 0, 0])


def test_top_p_by_hand():
    """0.5 and 0.25 do not reach 0.8; with 0.125 they do."""
    expected = np.array([4, 2, 1, 0, 0]) / 7
    assert_drawn_as(frequencies(HALVES_V, top_p=0.8), expected)
    assert_drawn_as(frequencies(HALVES_V[::-1], top_p=0.8), expected[::-1])


def test_a_tiny_top_p_keeps_the_likeliest():
    assert_drawn_as(frequencies(HALVES_V, top_p=1e-6), [1, 0, 0, 0, 0])


def test_top_p_counts_what_top_k_left():
    """Of the top two, 2/3 and 1/3, the first alone reaches 0.6."""
    assert_drawn_as(frequencies(HALVES_V, top_k=2, top_p=0.6), [1, 0, 0, 0, 0])


def test_repetition_penalty_by_hand():
    """Seen logits: 2 becomes 1, -1 becomes -2; the unseen 1.5 is then the likeliest."""
    got = frequencies([2.0, -1.0, 1.5], [True, True, False], repetition_penalty=2.0)
    assert_drawn_as(got, np.exp([1.0, -2.0, 1.5]) / np.exp([1.0, -2.0, 1.5]).sum())
    greedy = frequencies(
        [2.0, -1.0, 1.5], [True, True, False], repetition_penalty=2.0, do_sample=False
    )
    assert_drawn_as(greedy, [0, 0, 1])


@pytest.mark.parametrize("sampling", [dict(do_sample=False), dict(temperature=0.0), dict(top_k=1)])
def test_greedy_has_three_spellings(sampling):
    assert_drawn_as(frequencies(HALVES_V[[1, 0, 2]], **sampling), [0, 1, 0])


@pytest.mark.parametrize("sampling", [dict(), dict(top_k=9), dict(top_p=0.999), dict(top_k=4)])
def test_padding_of_the_vocabulary_is_never_drawn(sampling):
    logits = np.array([0.0, -60.0, -np.inf, -np.inf])
    seen = [True, True, False, False]
    got = frequencies(logits, seen, temperature=3.0, repetition_penalty=1.5, **sampling)
    assert not got[2:].any()


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(top_k=5),
        dict(top_p=0.7),
        dict(temperature=0.6, top_k=12, top_p=0.8),
        dict(repetition_penalty=1.4, temperature=1.3, top_p=0.9),
    ],
    ids=str,
)
def test_what_can_be_drawn_is_what_transformers_would_draw(kwargs):
    torch = pytest.importorskip("torch")
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as theirs

    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal(20).astype(np.float32)
    prompt = [3, 7, 7, 11]
    warpers = {
        "repetition_penalty": theirs.RepetitionPenaltyLogitsProcessor,
        "temperature": theirs.TemperatureLogitsWarper,
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
    }
    processors = [warpers[name](kwargs[name]) for name in warpers if name in kwargs]
    scores = LogitsProcessorList(processors)(torch.tensor([prompt]), torch.tensor(logits[None]))
    expected = torch.softmax(scores, -1)[0].numpy()
    assert_drawn_as(frequencies(logits, np.isin(np.arange(20), prompt), **kwargs), expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(max_new_tokens=2.5), "max_new_tokens=2.5 must be a whole number"),
        (dict(top_k=True), "top_k=True must be a whole number"),
        (dict(temperature="hot"), "temperature='hot' must be a number"),
        (dict(top_p=None), "top_p=None must be a number"),
        (dict(do_sample="no"), "do_sample='no' must be True or False"),
        (dict(temperature=-1.0), "temperature=-1.0 must be 0 or more"),
        (dict(top_k=-1), "top_k=-1 must be 0"),
        (dict(top_p=0.0), "top_p=0.0 must be in"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0 must be above 0"),
    ],
)
def test_values_out_of_range_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**kwargs)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], r"prompts\[1\] has no token"),
        ([67], r"prompts\[1\] has token id 67, but the model's vocabulary has 67"),
        ([1] * 57, r"prompts\[1\] has 57 tokens, .* exceeds the model's 64 positions"),
    ],
)
def test_prompts_that_do_not_fit_are_named(prompt, message):
    with pytest.raises(ValueError, match=message):
        check_prompts([[1] * 56, prompt], config=model().decoder.config, max_new_tokens=8)


@functools.cache
def model():
    return tiny_gpt2()


PROMPTS = [[5, 9, 2], [7], [40, 41, 42, 43, 44]]
LONG = Sampling(max_new_tokens=2 * STOP_CHECK_INTERVAL + 3, do_sample=True, temperature=2.0)


def generate(lm, prompts=PROMPTS, **kwargs):
    kwargs = dict(stop_ids=(), seed=1) | kwargs
    return generate_ids(lm.decoder, lm.params, prompts, sampling=LONG, **kwargs)


@functools.cache
def unstopped():
    return generate(model())


def test_without_a_stop_token_answers_are_full():
    assert [len(answer) for answer in unstopped()] == [LONG.max_new_tokens] * 3


def test_a_stop_token_is_the_last_of_its_answer():
    """Rows stop one by one, and stopping one changes no other."""
    stop = unstopped()[0][4]
    got = generate(model(), stop_ids=(stop,))
    for answer, full in zip(got, unstopped(), strict=True):
        expected = full[: full.index(stop) + 1] if stop in full else full
        assert answer == expected
    assert len(got[0]) <= 5 < max(map(len, got))


def test_should_stop_is_asked_every_few_tokens_and_ends_its_row():
    asked = []

    def should_stop(answer):
        asked.append(list(answer))
        return answer[:1] == unstopped()[1][:1]

    got = generate(model(), should_stop=should_stop)
    assert got[1] == unstopped()[1][:STOP_CHECK_INTERVAL]
    assert [got[0], got[2]] == [unstopped()[0], unstopped()[2]]
    assert {len(answer) for answer in asked} == {
        STOP_CHECK_INTERVAL,
        2 * STOP_CHECK_INTERVAL,
        LONG.max_new_tokens,
    }
    assert sum(answer == unstopped()[1][: len(answer)] for answer in asked) == 1


def test_a_mesh_draws_what_one_device_draws():
    """Three rows over four devices, heads over two, a vocabulary of 67 padded to 68."""
    mesh = make_mesh(data=2, fsdp=2, sequence=1, tensor=2)
    lm = tiny_gpt2(mesh=mesh)
    assert lm.decoder.vocab_padding == 1
    with jax.set_mesh(mesh):
        got = generate(lm, num_batch_shards=num_shards(mesh, "batch"))
    assert got == unstopped()


def test_a_prompt_as_long_as_the_context_allows():
    longest = [1] * (64 - LONG.max_new_tokens)
    [answer] = generate(model(), [longest])
    assert len(answer) == LONG.max_new_tokens


# Rows of more than 10 tokens turn all their tokens by other frequencies.
LONGROPE = dict(
    model_type="phi3",
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=48,
    original_max_position_embeddings=10,
    vocab_size=VOCAB_SIZE,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    rope_parameters=dict(
        rope_type="longrope",
        rope_theta=100.0,
        short_factor=[1.0, 1.1, 1.3, 2.0],
        long_factor=[4.0, 8.0, 16.0, 32.0],
        factor=4.0,
    ),
)
# With 8 new tokens each: the first never crosses, then at the 8th (too late to matter), the 6th,
# the 4th twice and the first; the last is beyond from the start.
CROSSING = [[9, 4], [3, 1, 5], [8, 30, 17, 4, 25], [2, 7, 1, 8, 2, 8, 1], [3, 1, 4, 1, 5, 9, 2]]
CROSSING += [list(range(20, 30)), list(range(40, 53))]
NUM_CROSSING = 8


@functools.cache
def longrope(mesh=None):
    lm = CausalLM.open(None, fields=LONGROPE, placement=Placement(mesh=mesh or one_device()))
    lm.params = draw_params(lm)
    return lm


def cross(lm, prompts=CROSSING, *, num_batch_shards=1, **sampling):
    sampling = Sampling(max_new_tokens=NUM_CROSSING, **sampling)
    kwargs = dict(stop_ids=(), seed=1, num_batch_shards=num_batch_shards)
    return generate_ids(lm.decoder, lm.params, prompts, sampling=sampling, **kwargs)


def test_rows_that_become_long_decode_as_by_full_passes():
    """Each alone, without a cache: then every pass turns all tokens by the row's length."""
    expected = []
    for prompt in CROSSING:
        ids = list(prompt)
        for _ in range(NUM_CROSSING):
            tokens_1T = np.array([ids + [0] * (24 - len(ids))], np.int32)
            is_token_1T = (np.arange(24) < len(ids)).astype(np.int32)[None]
            logits_1TV = longrope()(tokens_1T, np.arange(24)[None], is_token_1T)
            ids.append(int(logits_1TV[0, len(ids) - 1].argmax()))
        expected.append(ids[len(prompt) :])
    assert cross(longrope(), do_sample=False) == expected


def test_rows_that_become_long_draw_the_same_among_others():
    drawn = cross(longrope(), temperature=2.0)
    for row, prompt in enumerate(CROSSING):
        others = [[1, 2]] * len(CROSSING)
        others[row] = prompt
        assert cross(longrope(), others, temperature=2.0)[row] == drawn[row]


def test_rows_that_become_long_draw_the_same_on_a_mesh():
    """Seven rows in four shards of two."""
    mesh = make_mesh(data=2, fsdp=2, sequence=1, tensor=2)
    with jax.set_mesh(mesh):
        got = cross(longrope(mesh), temperature=2.0, num_batch_shards=num_shards(mesh, "batch"))
    assert got == cross(longrope(), temperature=2.0)


def test_rows_that_become_long_are_computed_once_and_stopped_ones_never(monkeypatch):
    full = cross(longrope(), do_sample=False)
    rows = []
    original = sampler._recompute_rows

    def recompute_rows(*args):
        rows.extend(np.flatnonzero(args[-1]).tolist())
        return original(*args)

    monkeypatch.setattr(sampler, "_recompute_rows", recompute_rows)
    cross(longrope(), do_sample=False)
    assert rows == [5, 3, 4, 2]
    rows.clear()
    stopping = Sampling(max_new_tokens=NUM_CROSSING, do_sample=False)
    stop = full[3][0]
    lm = longrope()
    generate_ids(lm.decoder, lm.params, CROSSING, sampling=stopping, stop_ids=[stop], seed=1)
    long_before = [answer.index(stop) if stop in answer else NUM_CROSSING for answer in full]
    needed = [11 - len(prompt) for prompt in CROSSING]
    assert sorted(rows) == [row for row in (2, 3, 4, 5) if long_before[row] >= needed[row]]
    assert 3 not in rows


def test_stop_strings_are_asked_as_often_where_rows_become_long():
    asked = set()
    lm = longrope()
    sampling = Sampling(max_new_tokens=STOP_CHECK_INTERVAL + 3, do_sample=False)
    generate_ids(
        lm.decoder,
        lm.params,
        CROSSING,
        sampling=sampling,
        stop_ids=(),
        seed=0,
        should_stop=lambda answer: asked.add(len(answer)),
    )
    assert asked == {STOP_CHECK_INTERVAL, STOP_CHECK_INTERVAL + 3}


def test_nothing_is_computed_anew_where_no_row_can_become_long(monkeypatch):
    monkeypatch.setattr(sampler, "_recompute", None)
    assert generate(model()) == unstopped()
    assert cross(longrope(), [[9, 4], list(range(40, 53))], do_sample=False)
