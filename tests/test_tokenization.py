"""Which tokens are trained, in what order ids stand, and the way back to text."""

import numpy as np
import pytest
from chat_templates import tokenizer_of
from small_tokenizers import (
    ALL,
    BYTE_TOKENIZER,
    byte_bpe,
    metaspace,
    packaged_bytes,
    without_specials,
)
from transformers import AutoTokenizer

from jax_sft.data import tokenization
from jax_sft.data.samples import read_samples
from jax_sft.data.tokenization import (
    Encoding,
    check_stop_sequences,
    decode_outputs,
    prompt_ids,
    tokenize_samples,
)
from jax_sft.data.tokenizer import load_tokenizer

EOS = 256  # of the packaged byte tokenizer, whose other ids are bytes


def tokenize(samples, tokenizer=None, *, seq_length=64, **options):
    tokenizer = tokenizer or packaged_bytes()
    return tokenize_samples(
        read_samples(samples), tokenizer, Encoding(seq_length=seq_length, **options)
    )


def only(samples, tokenizer=None, **options):
    [example] = tokenize(samples, tokenizer, **options)[0]
    return example


def trained_ids(example):
    return example.targets_T[example.weights_T > 0].tolist()


def test_worked_example_of_the_docstring():
    tokenizer = metaspace()
    example = only([["Hi", " there"]], tokenizer)
    words = tokenizer.convert_ids_to_tokens(example.ids)
    assert words[0] == "<s>" and words[-1] == "</s>"
    assert example.inputs_T.tolist() == example.ids[:-1]
    assert example.targets_T.tolist() == example.ids[1:]
    num_prompt = len(tokenizer("Hi", add_special_tokens=False)["input_ids"])
    assert example.weights_T.tolist()[:num_prompt] == [0.0] * num_prompt
    assert all(example.weights_T[num_prompt:] == 1.0)
    assert tokenizer.decode(trained_ids(example)[:-1]) in ("there", " there")
    assert (example.inputs_T.dtype, example.targets_T.dtype) == (np.int32, np.int32)
    assert example.weights_T.dtype == np.float32


def test_text_trains_everything_after_the_first_token():
    example = only(["abc"])
    assert example.ids == [97, 98, 99, EOS]
    assert example.weights_T.tolist() == [1, 1, 1]
    assert example.text() == "abc<|endoftext|>"


def test_text_trains_everything_after_the_bos_that_the_tokenizer_adds():
    tokenizer = metaspace()
    example = only(["hello"], tokenizer)
    assert example.ids[0] == tokenizer.bos_token_id
    assert all(example.weights_T == 1.0)
    assert example.ids[1:-1] == tokenizer("hello", add_special_tokens=False)["input_ids"]


def test_only_outputs_and_the_eos_after_each_are_trained():
    example = only([["ab", "cd", "e", "f"]])
    assert example.ids == [97, 98, 99, 100, EOS, 101, 102, EOS]
    assert example.weights_T.tolist() == [0, 1, 1, 1, 0, 1, 1]


def test_add_eos_last_and_false():
    dialogue = ["ab", "cd", "e", "f"]
    assert only([dialogue], add_eos="last").ids == [97, 98, 99, 100, 101, 102, EOS]
    assert only([dialogue], add_eos="last").weights_T.tolist() == [0, 1, 1, 0, 1, 1]
    assert only([dialogue], add_eos=False).ids == [97, 98, 99, 100, 101, 102]


def test_add_bos_overrides_what_the_tokenizer_does():
    assert only(["ab"], add_bos=True).ids == [EOS, 97, 98, EOS]
    assert only(["ab"], add_bos=True).weights_T.tolist() == [1, 1, 1]
    plain = metaspace()("hello", add_special_tokens=False)["input_ids"]
    assert only(["hello"], metaspace(), add_bos=False).ids[:-1] == plain
    assert only(["hello"], metaspace(), add_bos=True).ids == only(["hello"], metaspace()).ids


def test_special_tokens_spelled_out_in_the_text_are_not_doubled():
    tokenizer = metaspace()
    spelled = only(["<s>hello</s>"], tokenizer)
    assert spelled.ids.count(tokenizer.bos_token_id) == 1
    assert spelled.ids.count(tokenizer.eos_token_id) == 1
    late = only([["", "<s>hello"]], tokenizer)
    assert late.ids.count(tokenizer.bos_token_id) == 1
    assert only([["q", "a<|endoftext|>"]]).ids == [113, 97, EOS]


def test_stop_token_inside_an_output_is_trained_and_counted():
    examples, counts = tokenize([["q<|endoftext|>", "a<|endoftext|>b"]])
    assert examples[0].ids == [113, EOS, 97, EOS, 98, EOS]
    assert examples[0].weights_T.tolist() == [0, 1, 1, 1, 1]
    assert (counts.rows_with_more_stops, counts.answers_without_stop) == (1, 0)
    assert counts.untruncated_answers == 1


@pytest.mark.parametrize("options", [{"add_bos": True, "add_eos": False}, {"add_eos": True}])
def test_a_token_that_the_tokenizer_lacks_is_an_error(options):
    with pytest.raises(ValueError, match="add_(bos|eos) is True, but the tokenizer has no"):
        tokenize(["abc"], without_specials(), **options)
    assert only(["abc"], without_specials(), add_eos=False).ids == [97, 98, 99]


def test_the_prompt_comes_first_where_text_would_merge_across_the_boundary():
    tokenizer = byte_bpe()
    whole = tokenizer("hello")["input_ids"]
    prompt, output = tokenizer("hel")["input_ids"], tokenizer("lo")["input_ids"]
    assert whole[: len(prompt)] != prompt, "the test needs a merge across the boundary"
    examples, counts = tokenize([["hel", "lo"], ["hello", " world"]], tokenizer)
    assert examples[0].ids == [*prompt, *output, tokenizer.eos_token_id]
    assert examples[1].ids[:-1] == tokenizer("hello world")["input_ids"]
    assert counts.retokenized_boundaries == 1


def test_a_prompt_that_ends_in_a_space_keeps_it():
    for build in ALL:
        example = only([["hello ", "world"]], build())
        assert "hello world" in example.text(), build.__name__


def test_continuations_get_no_dummy_space():
    tokenizer = metaspace()
    ids = only([["hel", "lo", "one", "low"]], tokenizer).ids
    words = tokenizer.convert_ids_to_tokens(ids)
    assert [word for word in words[2:] if word.startswith("▁")] == []
    assert "".join(words).replace("</s>", "|") == "<s>▁hel" + "lo|onelow|"


@pytest.mark.parametrize("build", ALL)
@pytest.mark.parametrize(
    "texts",
    [
        ["the 🙂", "é\u0301ß漢字"],
        ["a\n", "\n\nb"],
        ["", " lower"],
        ["x", " "],
        ["hello", "hello", "", "there", "\t", "  one  "],
    ],
)
def test_no_text_is_lost(build, texts):
    tokenizer = build()
    example = only([texts], tokenizer, add_eos="last")
    text = example.text().removesuffix(tokenizer.eos_token)
    if build is metaspace:
        text = text.removeprefix("<s>")
    assert text.lstrip(" ") == "".join(texts).lstrip(" ")


def test_right_truncation_keeps_the_front_and_left_the_end_behind_the_bos():
    right, counts = tokenize(["abcdef"], seq_length=3)
    assert right[0].ids == [97, 98, 99, 100] and counts.truncated == 1
    left, _ = tokenize(["abcdef"], seq_length=3, truncation_side="left")
    assert left[0].ids == [100, 101, 102, EOS]
    assert left[0].weights_T.tolist() == [1, 1, 1]
    left, _ = tokenize(["abcdef"], seq_length=3, truncation_side="left", add_bos=True)
    assert left[0].ids == [EOS, 101, 102, EOS]
    # "e" does not follow a BOS in the text, so predicting it from one is not trained.
    assert left[0].weights_T.tolist() == [0, 1, 1]


def test_left_truncation_keeps_the_bos_that_a_chat_template_writes():
    tokenizer = tokenizer_of("llama3")
    chat = {
        "messages": [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "y"}]
    }
    whole = only([chat], tokenizer, seq_length=200)
    cut = only([chat], tokenizer, seq_length=20, truncation_side="left")
    assert cut.ids == [tokenizer.bos_token_id, *whole.ids[-20:]]
    assert cut.weights_T.tolist() == [0, *whole.weights_T[-19:]]


def test_what_just_fits_is_left_alone():
    for over_length in ("truncate", "split", "drop", "error"):
        example = only(["abc"], seq_length=3, over_length=over_length)
        assert example.ids == [97, 98, 99, EOS]


def test_split_trains_every_target_once_after_its_own_predecessor():
    ids = [*b"ppppppp", *b"abcdefgh", EOS]
    examples, counts = tokenize([["ppppppp", "abcdefgh"]], seq_length=3, over_length="split")
    assert (counts.kept, counts.split, counts.untrained_chunks) == (1, 1, 2)
    pairs = [
        (int(i), int(t))
        for example in examples
        for i, t, w in zip(example.inputs_T, example.targets_T, example.weights_T, strict=True)
        if w
    ]
    assert pairs == list(zip(ids[6:-1], ids[7:], strict=True))
    assert max(examples.lengths_N) == 3
    assert [example.origin for example in examples] == ["samples[0]"] * 3


def test_drop_and_error():
    examples, counts = tokenize(["abcdef", "a"], seq_length=3, over_length="drop")
    assert len(examples) == 1 and counts.dropped == {"over_length": 1}
    with pytest.raises(ValueError, match=r"samples\[1\] has 6 input tokens, more than seq_length"):
        tokenize(["a", "abcdef"], seq_length=3, over_length="error")


def test_what_is_left_without_a_trained_token_is_dropped_and_counted():
    examples, counts = tokenize([["abcdef", "g"], ["a", "b"]], seq_length=3)
    assert [example.origin for example in examples] == ["samples[1]"]
    assert (counts.rows_read, counts.kept, counts.dropped) == (2, 1, {"no_trained_token": 1})
    # Without BOS and EOS a single token has nothing to be predicted from.
    assert tokenize(["a"], add_eos=False)[1].dropped == {"no_trained_token": 1}


def test_stop_tokens_are_counted_for_whole_answers_only():
    _, counts = tokenize([["a", "b", "c", "d"], ["a", "bcdefghijk"]], seq_length=6)
    assert (counts.untruncated_answers, counts.answers_without_stop) == (2, 0)
    assert (counts.truncated, counts.stop_tokens) == (1, {"<|endoftext|>": 2})


def test_bad_options_are_named():
    for option in ({"over_length": "cut"}, {"truncation_side": "top"}, {"add_eos": "all"}):
        with pytest.raises(ValueError, match="choose one of"):
            tokenize(["abc"], **option)
    with pytest.raises(ValueError, match="seq_length is 0"):
        tokenize(["abc"], seq_length=0)


def test_a_truncation_stored_with_the_tokenizer_is_ignored():
    tokenizer = load_tokenizer(BYTE_TOKENIZER)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert only(["abcdef"], tokenizer, add_bos=False).ids == [*b"abcdef", EOS]


def test_prompts_that_cannot_be_generated_from():
    with pytest.raises(ValueError, match="has 2 texts; pass"):
        prompt_ids(["a", "b"], packaged_bytes())
    with pytest.raises(ValueError, match="'' has no tokens and the tokenizer adds no BOS"):
        prompt_ids("", packaged_bytes())
    with pytest.raises(ValueError, match="prompt holds None; pass a str"):
        prompt_ids(["a", None, "b"], packaged_bytes())
    assert prompt_ids("", metaspace()) == [metaspace().bos_token_id]


def test_a_prompt_needs_an_eos_only_where_an_output_ends_in_it():
    assert prompt_ids("abc", without_specials()) == [97, 98, 99]
    with pytest.raises(ValueError, match="has no EOS token"):
        prompt_ids(["a", "b", "c"], without_specials())
    assert prompt_ids(["a", "b", "c"], packaged_bytes()) == [97, 98, EOS, 99]
    assert prompt_ids(["a", "b", "c"], packaged_bytes(), add_eos="last") == [97, 98, 99]


def test_outputs_are_cut_at_the_earliest_stop_sequence_and_stripped():
    tokenizer = packaged_bytes()
    ids = [[*b" one \n Human: two Bot: x"], np.array([*b"no stop ", EOS, EOS])]
    stops = ["Bot:", "Human:"]
    assert decode_outputs(ids, tokenizer, stop_sequences=stops) == [" one", "no stop"]
    assert ids[0] == [*b" one \n Human: two Bot: x"] and len(ids[1]) == 10
    assert decode_outputs([[]], tokenizer) == [""] and decode_outputs([], tokenizer) == []


def test_outputs_are_cut_between_characters_never_inside_one():
    text = "né 🙂漢|rest"
    tokenizer = packaged_bytes()
    assert decode_outputs([[*text.encode()]], tokenizer, stop_sequences=["|"]) == ["né 🙂漢"]
    assert decode_outputs([[*"né 🙂".encode()]], tokenizer, stop_sequences=["漢"]) == ["né 🙂"]


@pytest.mark.parametrize("build", ALL)
def test_decoding_gives_back_the_output_that_was_trained(build):
    tokenizer = build()
    for prompt, output in [("the", " other"), ("hel", "lo"), ("one ", "low"), ("x", "\n\n🙂 é")]:
        example = only([[prompt, output]], tokenizer)
        answer = example.ids[len(prompt_ids(prompt, tokenizer)) :]
        assert decode_outputs([answer], tokenizer) == [output]


def test_stop_sequences_that_are_no_strings_are_errors():
    with pytest.raises(ValueError, match=r"is the str 'Human:'; pass a list"):
        check_stop_sequences("Human:")
    for stop in ("", None, 3):
        with pytest.raises(ValueError, match=r"stop_sequences\[1\] is"):
            decode_outputs([[97]], packaged_bytes(), stop_sequences=["a", stop])


# Rows that are token ids, and conversations


def test_token_rows_are_trained_as_labels_and_masks_say():
    ids = [5, 6, 7, 8, EOS]
    labelled = {"input_ids": ids, "labels": [-100, -100, 7, 9, EOS]}
    example = only([labelled])
    assert example.inputs_T.tolist() == [5, 6, 7, 8]
    assert example.targets_T[1:].tolist() == [7, 9, EOS], "a label may differ from the id"
    assert example.weights_T.tolist() == [0, 1, 1, 1]
    masked = only([{"input_ids": ids, "completion_mask": [0, 0, 1, 1, 1]}])
    assert masked.targets_T.tolist() == ids[1:] and masked.weights_T.tolist() == [0, 1, 1, 1]
    assert only([{"input_ids": ids}]).weights_T.tolist() == [1, 1, 1, 1]
    weighted = only([{"input_ids": ids, "loss_weights": [0.0, 0.0, 0.5, 1.0, 2.0]}])
    assert weighted.weights_T.tolist() == [0, 0.5, 1, 2]


def test_token_rows_that_were_masked_are_looked_at_for_their_stop_token():
    stopped = {"input_ids": [5, 6, EOS, 5, 7, EOS], "completion_mask": [0, 1, 1, 0, 1, 1]}
    cut = {"input_ids": [5, 6, EOS, 5, 7, 8], "completion_mask": [0, 1, 1, 0, 1, 1]}
    counts = tokenize([stopped, cut])[1]
    assert (counts.untruncated_answers, counts.answers_without_stop) == (4, 1)
    assert counts.stop_tokens == {"<|endoftext|>": 3}
    assert tokenize([cut], add_eos=False)[1].untruncated_answers == 0
    assert tokenize([{"input_ids": [5, 6, 7]}])[1].untruncated_answers == 0
    other = tokenize([cut], stop_tokens=("\x08",))[1]
    assert (other.answers_without_stop, other.stop_tokens) == (0, {"<|endoftext|>": 1, "\x08": 1})


TURNS = "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}"


def chats(template, *, num_turns=2, **options):
    tokenizer = AutoTokenizer.from_pretrained(BYTE_TOKENIZER)
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    return tokenize([messages * num_turns], tokenizer, **options), tokenizer


def test_a_conversation_without_stop_tokens_becomes_an_example_an_answer():
    (examples, counts), _ = chats(TURNS)
    assert [example.text() for example in examples] == [
        "uQaA<|endoftext|>",
        "uQaAuQaA<|endoftext|>",
    ]
    assert [trained_ids(example) for example in examples] == [[65, EOS]] * 2
    assert (counts.rows_read, counts.kept, counts.unrolled, counts.added_stops) == (1, 1, 1, 2)
    assert counts.stop_tokens == {"<|endoftext|>": 2} and counts.answers_without_stop == 0
    assert {example.origin for example in examples} == {"samples[0]"}


def test_answers_that_are_dropped_from_a_row_that_is_kept_are_counted():
    (examples, counts), _ = chats(TURNS, seq_length=6, over_length="drop")
    assert len(examples) == 1 and (counts.kept, counts.partly_dropped) == (1, 1)
    (examples, counts), _ = chats(TURNS, seq_length=3, over_length="drop")
    assert not len(examples) and counts.dropped == {"over_length": 1} and not counts.kept


def test_a_conversation_gets_the_special_tokens_of_its_template_alone():
    template = TURNS.replace("{% for", "{{ bos_token }}{% for", 1).replace(
        "{{ m.role[0] + m.content }}",
        "{{ m.role[0] + m.content }}{% if m.role != 'user' %}{{ eos_token }}{% endif %}",
    )
    (examples, _), tokenizer = chats(template)
    tokenizer.bos_token = tokenizer.eos_token
    [example] = examples
    assert example.text() == "<|endoftext|>uQaA<|endoftext|>uQaA<|endoftext|>"
    again = tokenize(
        [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]],
        tokenizer,
        add_bos=True,
    )[0]
    assert again[0].text() == "<|endoftext|>uQaA<|endoftext|>", "once, and by the template"


def test_without_a_chat_template_conversations_are_refused():
    with pytest.raises(ValueError, match="the tokenizer has no chat template: set tokenizer.chat_"):
        chats(None)


def test_a_template_that_fails_is_a_bad_row():
    template = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(
        ValueError, match=r"samples\[0\]: the chat template fails on it \(Roles must"
    ):
        chats(template)
    (examples, counts), _ = chats(template, on_bad_row="skip")
    assert not len(examples) and counts.dropped == {"template_error": 1}


def test_texts_are_encoded_some_at_a_time(monkeypatch):
    samples = [[f"{n} +" * n, " x" * n] for n in range(1, 9)]
    expected, _ = tokenize(samples)
    monkeypatch.setattr(tokenization, "_CHARACTERS_A_CALL", 20)
    examples, counts = tokenize(samples)
    assert counts.kept == 8
    for name in ("inputs", "targets", "weights", "offsets"):
        np.testing.assert_array_equal(getattr(examples, name), getattr(expected, name))
