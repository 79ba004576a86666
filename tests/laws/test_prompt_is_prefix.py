"""Law 8: an eval prompt's ids are the exact prefix that training masked."""

import numpy as np
import pytest
from chat_templates import FAMILIES, tokenizer_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import ALL

from jax_sft.data.samples import read_samples
from jax_sft.data.tokenization import (
    Encoding,
    encode_prompt,
    prompt_ids,
    tokenize_rows,
    tokenize_samples,
)
from jax_sft.data.types import Conversation, Message

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
    examples, counts = tokenize_samples(samples, tokenizer, Encoding(10_000, **options))
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
            samples = read_samples([[prompt, output]])
            [whole] = tokenize_samples(samples, tokenizer, Encoding(99))[0]
            prefix = prompt_ids(prompt, tokenizer)
            assert whole.ids[: len(prefix)] == prefix
            assert not whole.weights_T[: len(prefix) - 1].any()
            assert whole.weights_T[len(prefix) - 1 :].all()


THOUGHTS = st.sampled_from(["", "", "<think>\nthe\n</think>\n\n"])
NOT_BLANK = OUTPUTS.filter(str.strip)
EXCHANGES = st.lists(
    st.tuples(NOT_BLANK, THOUGHTS, NOT_BLANK, st.sampled_from([0.0, 0.5, 1.0])),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("build", ALL)
@given(exchanges=EXCHANGES)
@example(exchanges=[("lo", "", "hello", 1.0), ("he", "<think>\nr\n</think>\n\n", "lo", 1.0)])
@settings(deadline=None, max_examples=15)
def test_every_answer_of_a_chat_is_trained_behind_the_ids_of_its_eval_prompt(
    build, name, exchanges
):
    tokenizer, encoding = tokenizer_of(name, build), Encoding(10_000)
    messages, prompts = [], []
    for asked, thought, answer, weight in exchanges:
        messages.append(Message({"role": "user", "content": asked}, 0.0))
        if weight:
            prompts.append((Conversation(tuple(messages)), bool(thought)))
        messages.append(Message({"role": "assistant", "content": thought + answer}, weight))
    part = tokenize_rows(
        [Conversation(tuple(messages))], ["row 1"], lambda row, origin: row, tokenizer, encoding
    )
    begun = []  # the ids in front of each trained answer, over all sequences of the row
    for one in part.examples if len(part.lengths) else ():
        trained = np.concatenate([[False], one.weights_T > 0])
        starts = np.flatnonzero(trained & ~np.concatenate([[False], trained[:-1]]))
        begun += [one.ids[:start] for start in starts]
    expected = [
        encode_prompt(prompt, tokenizer, encoding, reasons=thinks)[0] for prompt, thinks in prompts
    ]
    assert sorted(begun) == sorted(expected)
