"""From rows of any format to batches: what is trained equals a slow reference, once an epoch.

The reference spells each row out as (predecessor, token, weight) triples, byte by byte, and
cuts them as the options say; the pipeline packs, shuffles, splits over hosts and streams.
"""

import copy
import functools
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import ALL, byte_bpe, packaged_bytes, pad_is_eos

from jax_sft.config import default_sft_config
from jax_sft.data.batches import Batches, EndOfStream
from jax_sft.data.report import run_report
from jax_sft.data.samples import read_samples
from jax_sft.data.stream_batches import StreamBatches
from jax_sft.data.streams import open_stream
from jax_sft.data.tokenization import Encoding, tokenize_samples
from jax_sft.inputs import load_inputs

EOS = 256  # of the packaged byte tokenizer, and its BOS
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT, PROMPT = st.text("ab é", min_size=1, max_size=9), st.text("ab é", max_size=9)
CONTENT = st.text("abé", min_size=1, max_size=9)  # templates may strip blanks
WEIGHT = st.sampled_from([None, 0.0, 0.5, 1.0, 2.0])


@st.composite
def conversations(draw):
    messages = draw(st.sampled_from([[], [{"role": "system", "content": "s"}]])).copy()
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(CONTENT)})
        answer = {"role": "assistant", "content": draw(CONTENT), "weight": draw(WEIGHT)}
        messages.append({key: value for key, value in answer.items() if value is not None})
    return {"messages": messages}


@st.composite
def token_rows(draw):
    ids = draw(st.lists(st.integers(0, EOS), min_size=2, max_size=14))
    num_ids = len(ids)
    ids[-1] = EOS
    row = {"input_ids": ids}
    if draw(st.booleans()):
        labels = draw(
            st.lists(st.sampled_from([None, -100, 7]), min_size=num_ids, max_size=num_ids)
        )
        row["labels"] = [
            id if label is None else label for id, label in zip(ids, labels, strict=True)
        ]
    if draw(st.booleans()):
        row["loss_weights"] = draw(
            st.lists(st.sampled_from([0, 0.5, 1]), min_size=num_ids, max_size=num_ids)
        )
    if draw(st.booleans()):
        row["attention_mask"] = [int(i < max(2, num_ids - 2)) for i in range(num_ids)]
    return row


ROW = {
    "text": TEXT,
    "dialogue": st.lists(st.tuples(PROMPT, TEXT), min_size=1, max_size=3).map(
        lambda pairs: list(itertools.chain(*pairs))
    ),
    "prompt_output": st.fixed_dictionaries({"prompt": PROMPT, "output": TEXT}),
    "messages": conversations(),
    "tokens": token_rows(),
}
OPTIONS = st.fixed_dictionaries(
    {
        "seq_length": st.integers(1, 40),
        "truncation_side": st.sampled_from(["left", "right"]),
        "over_length": st.sampled_from(["truncate", "split", "drop"]),
        "add_bos": st.sampled_from([None, True]),
        "add_eos": st.sampled_from([True, "last", False]),
    }
)


@functools.cache
def tokenizer():
    with_template = copy.deepcopy(packaged_bytes())
    with_template.chat_template = TEMPLATE
    return with_template


def spelled_out(row, options):
    """The ids of a row, what each is as a target, their weights, and whether a BOS leads."""
    bos, ends = [EOS] * (options["add_bos"] is True), options["add_eos"]
    if isinstance(row, dict) and "input_ids" in row:
        num_ids = len(row["input_ids"])
        keep = [i for i in range(num_ids) if row.get("attention_mask", [1] * num_ids)[i]]
        labels = row.get("labels", row["input_ids"])
        weights = row.get("loss_weights", [1] * num_ids)
        return (
            [row["input_ids"][i] for i in keep],
            [row["input_ids"][i] if labels[i] == -100 else labels[i] for i in keep],
            [0.0 if labels[i] == -100 else float(weights[i]) for i in keep],
            0,
        )
    if isinstance(row, dict) and "messages" in row:
        bos, turns = [], []
        for message in row["messages"]:
            is_answer = message["role"] == "assistant"
            weight = message.get("weight", 1.0) if is_answer else 0.0
            turns += [(f"<{message['role']}>", 0.0, False), (message["content"], weight, is_answer)]
    elif isinstance(row, str):
        turns = [(row, 1.0, bool(ends))]
    else:
        texts = [row["prompt"], row["output"]] if isinstance(row, dict) else row
        turns = [
            (
                text,
                float(i % 2),
                i % 2 == 1 and bool(ends) and (ends is True or i == len(texts) - 1),
            )
            for i, text in enumerate(texts)
        ]
    ids, weights = list(bos), [0.0] * len(bos)
    for text, weight, is_ended in turns:
        piece = [*text.encode(), *[EOS] * is_ended]
        ids, weights = ids + piece, weights + [weight] * len(piece)
    return ids, ids, weights, len(bos)


def reference(row, options):
    """The examples of a row, each a list of (predecessor, token, weight); none if dropped."""
    ids, targets, weights, num_bos = spelled_out(row, options)
    triples = list(zip(ids[:-1], targets[1:], weights[1:], strict=True))
    length = options["seq_length"]
    examples = [triples]
    if len(triples) > length and options["over_length"] == "drop":
        return []
    if len(triples) > length and options["over_length"] == "split":
        examples = [triples[i : i + length] for i in range(0, len(triples), length)]
    elif len(triples) > length and options["truncation_side"] == "right":
        examples = [triples[:length]]
    elif len(triples) > length:
        head = min(num_bos, length)
        tail = triples[len(triples) - (length - head) :] if length > head else []
        if head:  # what follows the BOS was not its successor: it is context
            first = ids[-1] if not tail else tail[0][0]
            tail = [(ids[0], first, 0.0), *tail]
        examples = [tail]
    return [example for example in examples if any(weight for _, _, weight in example)]


def examples_in(batches):
    """The examples of batches, each as its triples; whatever is no example is padding."""
    found = []
    for batch in batches:
        for inputs, targets, weights, positions, segments in zip(*batch, strict=True):
            assert not weights[segments == 0].any()
            for segment in range(1, segments.max() + 1):
                inside = segments == segment
                assert positions[inside].tolist() == list(range(inside.sum()))
                triples = zip(inputs[inside], targets[inside], weights[inside], strict=True)
                found.append(tuple((int(a), int(b), float(c)) for a, b, c in triples))
    return found


def expected_examples(rows, options):
    return Counter(tuple(example) for row in rows for example in reference(row, options))


@pytest.mark.parametrize("format", ROW)
@given(st.data(), OPTIONS, st.booleans(), st.sampled_from(["best_fit", "none"]), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_what_is_trained_equals_the_reference_once_an_epoch(
    format, data, options, shuffle, packing, seed
):
    rows = data.draw(st.lists(ROW[format], min_size=1, max_size=9))
    samples = read_samples(rows)
    assert samples.format == format
    examples, counts = tokenize_samples(samples, tokenizer(), Encoding(**options))
    expected = expected_examples(rows, options)
    num_kept = sum(bool(reference(row, options)) for row in rows)
    assert (counts.rows_read, counts.kept) == (len(rows), num_kept)
    assert sum(counts.dropped.values()) == len(rows) - num_kept
    assert len(examples) == expected.total()
    if not len(examples):
        return
    layout = dict(batch_size=8, epochs=2, shuffle=shuffle, packing=packing, seed=seed)
    batches = Batches(examples, seq_length=options["seq_length"], **layout)
    steps = batches.num_steps // 2
    for epoch in range(2):
        taken = [batches.rows(epoch * steps + step) for step in range(steps)]
        assert Counter(examples_in(taken)) == expected
    for num_hosts in (2, 4, 8):  # each with a plan of its own, beginning at the second epoch
        size, parts = 8 // num_hosts, []
        for host in range(num_hosts):
            own = Batches(examples, seq_length=options["seq_length"], **layout)
            parts.append(own.rows(steps, (host * size, (host + 1) * size)))
        for whole, fields in zip(batches.rows(steps), zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(whole, np.concatenate(fields))


class Again:
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def all_steps(batches, first=0):
    found = []
    for step in itertools.count(first):
        try:
            found.append(batches.rows(step))
        except EndOfStream:
            return found


@pytest.mark.parametrize("format", ROW)
@given(st.data(), OPTIONS, st.integers(1, 4), st.sampled_from([1, 2, 1000]), st.booleans())
@settings(deadline=None, max_examples=25)
def test_a_stream_trains_what_loading_trains_and_resumes(
    format, data, options, batch_size, look_ahead, shuffle
):
    rows = data.draw(st.lists(ROW[format], min_size=1, max_size=9))
    rows *= data.draw(st.sampled_from([1, 20]))  # a window has 64 rows at least
    expected = expected_examples(rows, options)
    made = []
    for _ in range(2):
        stream, encoding = open_stream(Again(rows)), Encoding(**options)
        layout = dict(batch_size=batch_size, epochs=2, shuffle=shuffle, look_ahead=look_ahead)
        made.append(StreamBatches(stream, tokenizer(), encoding, **layout))
    straight = all_steps(made[0])
    assert Counter(examples_in(straight)) == expected + expected
    if not straight:
        return
    step = data.draw(st.integers(0, len(straight) - 1))
    stopped = StreamBatches(made[0].stream, tokenizer(), encoding, **layout)
    for done in range(step + 1):
        stopped.rows(done)
    made[1].seek(stopped.mark(step))
    for one, other in zip(straight[step:], all_steps(made[1], step), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("make_tokenizer", [byte_bpe, pad_is_eos, packaged_bytes])
@given(st.lists(ROW["dialogue"], min_size=1, max_size=5))
@settings(deadline=None, max_examples=25)
def test_runs_of_trained_tokens_are_the_outputs(make_tokenizer, rows):
    """Also where texts merge into longer tokens: each run says its output and then stops."""
    tokenizer = make_tokenizer()
    encoding = Encoding(seq_length=999, add_bos=True)
    examples, _ = tokenize_samples(read_samples(rows), tokenizer, encoding)
    for row, example in zip(rows, examples, strict=True):
        ended = [text + tokenizer.eos_token * (i % 2) for i, text in enumerate(row)]
        assert example.text() == tokenizer.bos_token + "".join(ended)
        trained = example.targets_T[example.weights_T > 0]
        assert tokenizer.decode(trained) == "".join(ended[1::2])


@pytest.mark.parametrize("make_tokenizer", ALL)
@given(st.lists(ROW["dialogue"], min_size=1, max_size=5), OPTIONS)
@settings(deadline=None, max_examples=25)
def test_truncation_trains_a_prefix_or_a_suffix(make_tokenizer, rows, options):
    def trained(example):
        is_trained = example.weights_T > 0
        return list(zip(example.inputs_T[is_trained], example.targets_T[is_trained], strict=True))

    length, samples = options["seq_length"], read_samples(rows)
    for side in ("left", "right"):
        options |= {"over_length": "truncate", "truncation_side": side}
        whole = tokenize_samples(
            samples, make_tokenizer(), Encoding(**options | {"seq_length": 999})
        )[0]
        cut = tokenize_samples(samples, make_tokenizer(), Encoding(**options))[0]
        cut_by_origin = {example.origin: example for example in cut}
        for one in whole:
            other = cut_by_origin.get(one.origin)
            if other is None:  # nothing was left to train on that side
                lost = one.weights_T[:length] if side == "right" else one.weights_T[2 - length :]
                assert length < 3 or not lost.any()
                continue
            assert len(other.inputs_T) == min(len(one.inputs_T), length)
            kept, all_trained = trained(other), trained(one)
            start = 0 if side == "right" else len(all_trained) - len(kept)
            assert kept == all_trained[start : start + len(kept)]


@given(
    st.lists(ROW["text"], min_size=1, max_size=6),
    st.lists(st.one_of(ROW["dialogue"], st.sampled_from([["a"], ["a", ""]])), max_size=6),
    st.sampled_from([1, 0.5, 2.5]),
    st.integers(1, 30),
)
@settings(deadline=None, max_examples=25)
def test_a_report_adds_up_over_its_sources(texts, dialogues, times, seq_length):
    dialogues = [["p", "o"], *dialogues]
    given_rows = {"texts": texts, "dialogues": dialogues}
    config = default_sft_config().evolve(
        train=dict(seq_length=seq_length),
        data=dict(
            train=[f"{__name__}:texts_of_now", [f"{__name__}:dialogues_of_now", times]],
            on_bad_row="skip",
            over_length="drop",
            eval_prompts=[],
        ),
    )
    NOW.update(given_rows)
    train = load_inputs(config, tokenizer=packaged_bytes()).train
    report = run_report(train, {})
    for field in ("rows_read", "kept", "truncated", "split", "unrolled"):
        assert report[field] == sum(source[field] for source in report["sources"]), field
    dropped = sum((Counter(source["dropped"]) for source in report["sources"]), Counter())
    assert Counter(report["dropped"]) == dropped
    for source, rows in zip(report["sources"], (texts, dialogues), strict=True):
        assert source["rows_read"] == len(rows)
        assert source["kept"] + sum(source["dropped"].values()) == len(rows)
    bad = [row for row in dialogues if len(row) == 1 or not row[1]]
    assert dropped["uneven_dialogue"] + dropped["empty_answer"] == len(bad)
    assert sum(map(len, report["problems"].values())) >= min(len(bad), 1)
    numbers = [source["kept"] * source["times"] for source in report["sources"]]
    assert report["examples"] == numbers[0] + round(numbers[1])
    assert report["tokens"] == len(train.examples.inputs)
    assert report["trained_tokens"] == int((train.examples.weights > 0).sum())


NOW = {}


def texts_of_now():
    return NOW["texts"]


def dialogues_of_now():
    return NOW["dialogues"]
