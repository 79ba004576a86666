"""Law 8: an eval prompt's ids are the exact prefix that training masked."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import ALL

from jax_sft.data.samples import read_samples
from jax_sft.data.tokenization import prompt_ids, tokenize_samples

# Letters that merge in the small tokenizers, white space, the special tokens' own text,
# characters of several bytes, and one that combines with the letter before it.
PIECES = st.sampled_from(
    ["h", "e", "l", "lo", "hello", "the", "r", " ", "  ", "\n", "<s>", "</s>", "<eos>"]
    + ["<|endoftext|>", "é", "🙂", "漢", "\u0301", "▁", "1"]
)
PROMPTS = st.lists(PIECES, max_size=5).map("".join)
OUTPUTS = st.lists(PIECES, min_size=1, max_size=5).map("".join)
DIALOGUES = st.lists(st.tuples(PROMPTS, OUTPUTS), min_size=1, max_size=3).map(
    lambda pairs: [text for pair in pairs for text in pair]
)


@pytest.mark.parametrize("build", ALL)
@given(
    dialogue=DIALOGUES,
    add_bos=st.sampled_from([None, True, False]),
    add_eos=st.sampled_from([True, "last", False]),
)
@example(dialogue=["hel", "lo"], add_bos=None, add_eos=True)
@example(dialogue=["hello ", "the"], add_bos=None, add_eos=True)
@example(dialogue=["h", "el", "lo", " the"], add_bos=None, add_eos="last")
@example(dialogue=["", "<s>hello"], add_bos=True, add_eos=True)
@settings(deadline=None, max_examples=60)
def test_every_answer_is_trained_behind_the_ids_of_its_eval_prompt(
    build, dialogue, add_bos, add_eos
):
    tokenizer = build()
    options = {"add_bos": add_bos, "add_eos": add_eos}
    samples = read_samples([dialogue])
    examples, counts = tokenize_samples(samples, tokenizer, seq_length=10_000, **options)
    if not len(examples):  # one token in all, with nothing before it to predict it from
        assert counts.dropped == {"no_trained_token": 1}
        return
    ids = examples[0].ids
    trained = [False, *(examples[0].weights_T > 0).tolist()]
    expected = [False] * len(ids)
    for answer in range(1, len(dialogue), 2):
        start = _num_prompt_ids(dialogue[:answer], ids, tokenizer, options)
        if answer + 1 < len(dialogue):
            end = _num_prompt_ids(dialogue[: answer + 2], ids, tokenizer, options)
            end -= _num_ids_of_turn(dialogue[: answer + 1], end, ids, tokenizer, options)
        else:
            end = len(ids)
        expected[start:end] = [True] * (end - start)
    expected[0] = False  # the first token follows nothing
    assert trained == expected


def _num_prompt_ids(prompt, ids, tokenizer, options):
    """Asserts that the prompt's ids are a prefix, and returns how many there are."""
    try:
        prefix = prompt_ids(prompt, tokenizer, **options)
    except ValueError as error:
        assert "has no tokens" in str(error)
        prefix = []
    assert ids[: len(prefix)] == prefix
    return len(prefix)


def _num_ids_of_turn(before, end, ids, tokenizer, options):
    """How many ids the prompt after `before` has: an empty prompt there has none."""
    without = prompt_ids([*before, ""], tokenizer, **options)
    assert ids[: len(without)] == without
    return end - len(without)


@pytest.mark.parametrize("build", ALL)
def test_an_answer_changes_nothing_before_it(build):
    tokenizer = build()
    for prompt in ("hel", "the ", "one\n", "é", " "):
        for output in ("lo", " world", "\n\n", "\u0301", "🙂"):
            [whole] = tokenize_samples(read_samples([[prompt, output]]), tokenizer, seq_length=99)[
                0
            ]
            prefix = prompt_ids(prompt, tokenizer)
            assert whole.ids[: len(prefix)] == prefix
            assert not whole.weights_T[: len(prefix) - 1].any()
            assert whole.weights_T[len(prefix) - 1 :].all()
