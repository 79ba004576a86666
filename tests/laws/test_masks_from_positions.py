"""Law 9: masks come from positions, never from token ids; pad may equal EOS."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_bpe, pad_is_eos

from jax_sft.data.batches import Batches
from jax_sft.data.samples import read_samples
from jax_sft.data.tokenization import Encoding, tokenize_samples
from jax_sft.data.types import examples_from_parts

DIALOGUES = [
    ["hello", " world"],
    ["<eos>the", "<eos> other<eos>"],
    ["low", "<eos>", "lower", "lowest"],
    ["", "the"],
]


def tokenize(tokenizer, **options):
    return tokenize_samples(read_samples(DIALOGUES), tokenizer, Encoding(seq_length=64, **options))


def test_a_pad_token_that_is_the_eos_changes_nothing():
    assert pad_is_eos().pad_token_id == pad_is_eos().eos_token_id
    assert byte_bpe().pad_token_id is None
    with_pad, counts = tokenize(pad_is_eos())
    without, other_counts = tokenize(byte_bpe())
    for name in ("inputs", "targets", "weights", "offsets"):
        assert np.array_equal(getattr(with_pad, name), getattr(without, name)), name
    assert counts == other_counts


def test_the_eos_after_every_answer_is_trained_though_it_is_the_pad_token():
    examples, counts = tokenize(pad_is_eos())
    eos = pad_is_eos().eos_token_id
    for example in examples:
        assert example.targets_T[-1] == eos and example.weights_T[-1] == 1.0
    assert (counts.untruncated_answers, counts.answers_without_stop) == (5, 0)


def test_the_same_id_is_trained_in_an_answer_and_not_in_a_prompt():
    [example] = tokenize_samples(
        read_samples([["the<eos>", "<eos>the"]]), pad_is_eos(), Encoding(seq_length=64)
    )[0]
    eos = pad_is_eos().eos_token_id
    weights_of_eos = example.weights_T[example.targets_T == eos].tolist()
    assert weights_of_eos == [0.0, 1.0, 1.0]  # the prompt's, the answer's own, the stop token


@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=8), min_size=1, max_size=12),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=60)
def test_a_batch_masks_and_separates_whatever_its_ids_are(masks, fill):
    """Examples made of any one id, such as the 0 of padding, keep weights and segments."""

    def batch_of(ids):
        parts = [
            (np.array(i[:-1]), np.array(i[1:]), np.array(mask, np.float32))
            for i, mask in zip(ids, masks, strict=True)
        ]
        batches = Batches(examples_from_parts(parts), seq_length=8, batch_size=16)
        return batches.rows(0)

    varied = batch_of([list(range(1, len(mask) + 2)) for mask in masks])
    uniform = batch_of([[fill] * (len(mask) + 1) for mask in masks])
    for name in ("weights_BT", "positions_BT", "segment_ids_BT"):
        assert np.array_equal(getattr(varied, name), getattr(uniform, name)), name
    assert int((uniform.segment_ids_BT > 0).sum()) == sum(map(len, masks))
    assert uniform.weights_BT.sum() == sum(map(sum, masks))
