"""Fingerprints are equal where ids and masks are, and differ where they might."""

import copy
import json

import datasets
import numpy as np
import pytest
from small_tokenizers import BYTE_TOKENIZER, byte_bpe, metaspace, packaged_bytes
from tokenizers import AddedToken
from transformers import AutoTokenizer

from jax_sft.data.fingerprint import (
    code_fingerprint,
    samples_fingerprint,
    source_fingerprint,
    tokenizer_fingerprint,
)
from jax_sft.data.samples import read_samples


def all_differ(fingerprints):
    fingerprints = list(fingerprints)
    assert None not in fingerprints
    return len(set(fingerprints)) == len(fingerprints)


def test_a_files_fingerprint_is_of_its_bytes_and_its_reading(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n')
    first = source_fingerprint(str(path))
    path.write_text('{"text": "x"}\n')
    assert source_fingerprint(str(path)) == first
    options = [
        dict(split="test"),
        dict(text_field="body"),
        dict(filter="a == 1"),
        dict(format="text"),
    ]
    others = [source_fingerprint(str(path), **option) for option in options]
    path.write_text('{"text": "y"}\n')
    assert all_differ([first, *others, source_fingerprint(str(path))])


def test_a_saved_datasets_fingerprint_is_its_own(tmp_path):
    folders = [str(tmp_path / name) for name in "ab"]
    for folder, text in zip(folders, "xy", strict=True):
        datasets.Dataset.from_list([{"text": text}]).save_to_disk(folder)
    assert source_fingerprint(folders[0]) == source_fingerprint(folders[0])
    assert all_differ(map(source_fingerprint, folders))


def test_a_folder_of_jsons_fingerprint_is_its_files(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n')
    first = source_fingerprint(str(tmp_path))
    (tmp_path / "test.jsonl").write_text('{"text": "x"}\n')
    assert source_fingerprint(str(tmp_path)) == first
    (tmp_path / "train.jsonl").write_text('{"text": "y"}\n')
    second = source_fingerprint(str(tmp_path))
    (tmp_path / "train.jsonl").rename(tmp_path / "train-2.jsonl")
    assert all_differ([first, second, source_fingerprint(str(tmp_path))])


def test_a_functions_samples_have_none_before_it_is_called():
    assert source_fingerprint("module:function") is None


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="gone.jsonl: no such file"):
        source_fingerprint("gone.jsonl")


ROWS = [{"prompt": f"p{i}", "output": "x"} for i in range(2500)]


def test_a_lists_fingerprint_is_of_its_rows():
    def of(rows, **options):
        return samples_fingerprint(read_samples(rows, **options))

    changed = [*ROWS[:-1], {"prompt": "p2499", "output": "y"}]
    assert of(ROWS) == of(copy.deepcopy(ROWS)) == of(tuple(ROWS))
    assert all_differ(
        [
            of(ROWS),
            of(ROWS[::-1]),
            of(changed),
            of(ROWS, max_samples=2400),
            of(ROWS, filter="prompt != 'p3'"),
            of(ROWS, output_field="output", prompt_field="output"),
            of(ROWS, template="{output}"),
            of(datasets.Dataset.from_list(ROWS)),
            of(datasets.Dataset.from_list(changed)),
            of(datasets.Dataset.from_list(ROWS)["output"]),
            of([["ab", "c"]]),
            of([["a", "bc"]]),
            of(["ab"]),
        ]
    )


def test_rows_of_arrays_are_told_apart():
    def of(*arrays):
        return samples_fingerprint(read_samples([{"input_ids": array} for array in arrays]))

    ids = np.arange(5)
    assert of(ids) == of(ids.copy())
    assert all_differ([of(ids), of(ids + 1), of(ids, ids), of(ids.tolist())])


def test_rows_without_plain_content_have_none():
    samples = read_samples([{"text": "x", "extra": object()}])
    assert samples_fingerprint(samples) is None
    samples = read_samples(["x"])
    samples.to_content = lambda row, origin: None
    assert samples_fingerprint(samples) is None


def test_a_tokenizers_fingerprint_is_of_all_that_it_saves(tmp_path):
    def load():
        return AutoTokenizer.from_pretrained(BYTE_TOKENIZER)

    def changed(change):
        tokenizer = load()
        change(tokenizer)
        return tokenizer_fingerprint(tokenizer)

    first = tokenizer_fingerprint(load())
    copied = load()
    copied.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == first
    assert all_differ(
        [
            first,
            changed(lambda t: setattr(t, "chat_template", "{{ messages }}")),
            changed(lambda t: t.add_tokens(["wörld"])),
            changed(lambda t: t.add_tokens([AddedToken("nowhere", lstrip=True)])),
            changed(lambda t: t.add_tokens([AddedToken("nowhere", rstrip=True)])),
            changed(lambda t: t.add_special_tokens({"pad_token": "<pad>"})),
            tokenizer_fingerprint(byte_bpe()),
            tokenizer_fingerprint(metaspace()),
        ]
    )


def test_a_tokenizers_last_call_does_not_matter():
    tokenizer = copy.deepcopy(packaged_bytes())
    first = tokenizer_fingerprint(tokenizer)
    tokenizer("some text", truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == first


def test_a_tokenizer_that_cannot_be_saved_has_none(monkeypatch):
    tokenizer = copy.deepcopy(packaged_bytes())

    def save_pretrained(folder):
        raise NotImplementedError

    monkeypatch.setattr(tokenizer, "save_pretrained", save_pretrained, raising=False)
    assert tokenizer_fingerprint(tokenizer) is None


def test_our_code_has_a_fingerprint():
    assert len(code_fingerprint()) == 32 and json.dumps(code_fingerprint())
