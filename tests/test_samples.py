"""Whatever users hand in is read, or named in one line that says what is wrong with it."""

import collections
import gzip
import hashlib
import json
import os
import re

import datasets
import numpy as np
import pyarrow
import pytest

from jax_sft.data import sources, text_files
from jax_sft.data.samples import load_eval_prompts, load_function, load_samples, read_samples
from jax_sft.data.types import BadRow, Turn


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def texts(samples):
    return [[turn.text for turn in sample.content] for sample in samples]


def load_all(path, **options):
    return list(load_samples(path, **options))


def error_of(call, *args, **options):
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def bad_row(samples, **options):
    """What is wrong with the first wrong row, and what it counts as."""
    read = read_samples(samples, **options)
    with pytest.raises(BadRow) as caught:
        list(read)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message, caught.value.reason


def write(path, *lines):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))
    return str(path)


def write_rows(path, rows):
    return write(path, *map(json.dumps, rows))


def test_text_is_one_trained_turn_and_a_dialogue_trains_every_second():
    [text] = read_samples(["Hi"])
    assert text.content == (Turn("Hi", 1.0),)
    [dialogue] = read_samples([["a", "b", "", " "]])
    assert dialogue.content == (Turn("a", 0.0), Turn("b", 1.0), Turn("", 0.0), Turn(" ", 1.0))
    assert (text.origin, dialogue.origin) == ("samples[0]", "samples[0]")


@pytest.mark.parametrize(
    "samples",
    [
        ["a", "b"],
        ("a", "b"),
        np.array(["a", "b"]),
        [np.str_("a"), "b"],
        datasets.Dataset.from_dict({"text": ["a", "b"]}),
        datasets.Dataset.from_dict({"text": ["a", "b"]})["text"],
        datasets.Dataset.from_dict({"prompt": ["x", "y"], "text": ["a", "b"]}),
        [{"text": "a"}, {"text": "b"}],
    ],
)
def test_texts_of_every_kind(samples):
    read = read_samples(samples)
    assert texts(read) == [["a"], ["b"]] and len(read) == 2
    assert texts([read[1]]) == [["b"]] and texts(read[:1]) == [["a"]]
    assert all(type(turn.text) is str for sample in read for turn in sample.content)
    assert read.format == "text"


@pytest.mark.parametrize(
    "samples",
    [
        [["p", "o"], ["q", "r"]],
        [("p", "o"), ("q", "r")],
        np.array([["p", "o"], ["q", "r"]]),
        datasets.Dataset.from_dict({"prompt": ["p", "q"], "output": ["o", "r"]}),
        datasets.Dataset.from_dict(
            {"text": ["x", "y"], "prompt": ["p", "q"], "output": ["o", "r"]}
        ),
        [{"prompt": "p", "output": "o"}, {"prompt": ["q"], "output": "r"}],
    ],
)
def test_dialogues_of_every_kind(samples):
    assert texts(read_samples(samples)) == [["p", "o"], ["q", "r"]]


def test_fields_are_the_configs():
    rows = datasets.Dataset.from_dict({"prompt": ["p"], "chosen": ["c"], "body": ["b"]})
    assert texts(read_samples(rows, output_field="chosen")) == [["p", "c"]]
    assert texts(read_samples(rows, text_field="body")) == [["b"]]
    message = error_of(read_samples, rows)
    assert "['body', 'chosen', 'prompt'], but neither 'messages', nor 'prompt' with" in message


FIELDS = {
    "input_ids": [1, 2],
    "messages": [{"role": "assistant", "content": "m"}],
    "prompt": "p",
    "completion": "c",
    "output": "o",
    "text": "t",
}


def test_the_format_is_the_first_that_the_fields_fit_or_the_one_that_is_set():
    row = dict(FIELDS)
    for gone, format in [
        ("input_ids", "tokens"),
        ("messages", "messages"),
        ("output", "prompt_output"),
        ("completion", "prompt_output"),
        (None, "text"),
    ]:
        assert read_samples([row]).format == format
        assert read_samples([FIELDS | dict.fromkeys(FIELDS.keys() - row.keys())]).format == format
        row.pop(gone, None)
    formats = {"tokens": 1, "messages": 1, "prompt_output": 2, "text": 1}
    for format, num_parts in formats.items():
        samples = read_samples([FIELDS], row_format=format)
        assert samples.format == format
        if format in ("prompt_output", "text"):
            assert len(texts(samples)[0]) == num_parts
    assert texts(read_samples([{"prompt": "p", "completion": "c"}])) == [["p", "c"]]
    assert texts(read_samples([FIELDS], row_format="prompt_output")) == [["p", "o"]]
    assert texts(read_samples([{"text": ["p", "o"]}], row_format="dialogue")) == [["p", "o"]]


def test_most_of_the_first_rows_tell_the_format():
    samples = read_samples([None, {"text": "x"}, ["p", "o"], ["q", "r"]])
    assert samples.format == "dialogue" and samples[3].content[0].text == "q"
    nulls = [{"prompt": "p", "output": None, "text": "t"}] + [{"prompt": "p", "output": "o"}] * 2
    assert read_samples(nulls).format == "prompt_output"


def test_a_template_makes_texts_and_prompts_only():
    with pytest.raises(ValueError, match="data.template makes a text or a prompt, not a conv"):
        read_samples([FIELDS], template="{text}", row_format="messages")
    rows = [{"q": "a", "output": "b"}, {"output": "b"}, {"q": None, "output": "b"}]
    samples = read_samples(rows, template="Q: {q}")
    for index, problem in [
        (1, "data.template refers to {q}, but samples[1] has the fields"),
        (2, "samples[2] field 'q' is None; pass a str"),
    ]:
        with pytest.raises(BadRow, match=re.escape(problem)) as caught:
            samples[index]
        assert caught.value.reason == "missing_field"


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([], "samples is empty; there must be at least one sample"),
        ("text", "samples is a single str; pass a list of them: ['text']"),
        ({"text": ["a"]}, "samples is a single dict; pass a list"),
        ((text for text in "ab"), "samples is a generator, which cannot be indexed; make it a"),
        ([3, 4.5], "samples[0] is 3 (int); each sample must be a str, a list of [prompt"),
        ([None, None], "samples[0] is None; each sample must be"),
        ([{"a": 1}], "samples[0] has the fields ['a'], but neither 'messages', nor 'prompt' with"),
        ([{"role": "user", "content": "a"}], "a conversation is a list of messages"),
        ([{"instruction": "a", "output": "b"}], 'set data.template to "alpaca"'),
    ],
)
def test_samples_of_no_format_are_errors(samples, expected):
    assert expected in error_of(read_samples, samples)


@pytest.mark.parametrize(
    ("samples", "expected", "reason"),
    [
        (["a", None], "samples[1] is None; each sample must be a str", "missing_field"),
        (["a", 3], "samples[1] is 3 (int); each sample", "wrong_type"),
        (["a", b"b"], "samples[1] is b'b' (bytes); each sample", "wrong_type"),
        (["a", ["p", "o"]], "samples[1] is a dialogue, but the samples are", "other_format"),
        ([["p", "o"], "a"], "samples[1] is text, but the samples are read as dial", "other_format"),
        ([["p", "o"], ["p", "o", "p"]], "samples[1] has 3 texts; a dialogue is", "uneven_dialogue"),
        ([["p", "o"], []], "samples[1] has 0 texts", "uneven_dialogue"),
        ([["p", ""]], "samples[0][1] is empty, so there is nothing to train", "empty_answer"),
        (["a", ""], "samples[1] is empty", "empty_text"),
        ([["p", None]], "samples[0][1] is None; pass a str", "missing_field"),
        ([["p", b"o"]], "samples[0][1] is b'o' (bytes); decode it to a str", "wrong_type"),
        (["a", "\ud83d"], "samples[1] holds half of a surrogate pair at 0", "not_text"),
        ([{"text": None}], "samples[0] field 'text' is None", "missing_field"),
        ([{"text": "a"}, {"txt": "b"}], "[1] has the fields ['txt'], but not", "missing_field"),
        (
            [{"prompt": "p", "output": "o"}, {"prompt": "p", "output": None}],
            "samples[1] field 'output' is None; leave this sample out, or set data.filter",
            "missing_field",
        ),
        (
            [{"prompt": "p", "output": "o"}, {"prompt": "p", "output": None, "text": "t"}],
            "samples[1] field 'output' is None; leave this sample out",
            "missing_field",
        ),
        (
            [{"prompt": "p", "output": "o", "text": None}] * 2
            + [{"prompt": None, "output": None, "text": "t"}],
            "samples[2] is text, but the samples are read as prompt_output",
            "other_format",
        ),
        ([{"messages": []}], "samples[0] has no messages", "no_answer"),
        ([{"messages": "a"}], "field 'messages' is 'a' (str); it must be a list", "wrong_type"),
    ],
)
def test_wrong_rows_are_named_when_they_are_read(samples, expected, reason):
    message, found = bad_row(samples)
    assert expected in message and found == reason


def test_splits_and_streams_of_datasets_are_errors_with_a_remedy():
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    assert 'samples["train"]' in error_of(read_samples, datasets.DatasetDict(train=rows))
    assert "set data.streaming to True" in error_of(read_samples, rows.to_iterable_dataset())
    assert "from_pandas" in error_of(read_samples, rows.to_pandas())
    assert texts(read_samples(rows.to_pandas()["text"])) == [["a"]]


def test_long_values_are_shortened():
    message = error_of(read_samples, [{"a": 1}, "x" * 9], filter="a ==")
    assert message.startswith("data.filter 'a ==': it is not an expression")
    assert len(error_of(read_samples, [b"x" * 10_000])) < 250


def test_filter_keeps_rows_counts_the_others_and_keeps_their_names():
    rows = [{"text": str(i), "label": i % 2, "lang": "en" if i < 4 else "de"} for i in range(6)]
    for source in (rows, datasets.Dataset.from_list(rows)):
        kept = read_samples(source, filter="label == 1 and lang in ('en', 'fr')")
        assert texts(kept) == [["1"], ["3"]]
        assert [sample.origin for sample in kept] == ["samples[1]", "samples[3]"]
        assert kept.dropped == {"filter": 4}
        first = read_samples(source, filter="label == 1", max_samples=1)
        assert texts(first) == [["1"]] and first.dropped == {"filter": 1}
        assert texts(read_samples(source, max_samples=2)) == [["0"], ["1"]]


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("n > -1", "0123"),
        ("not n == 0", "123"),
        ("n < 1 or n >= 3", "03"),
        ("0 < n <= 2", "12"),
        ("n not in [1, 2]", "03"),
        ("'a' in tag", "02"),
        ("(n == 1 or n == 2) and tag != 'b'", "2"),
        ("tag == None", ""),
    ],
)
def test_filter_expressions(expression, kept):
    rows = [{"text": str(n), "n": n, "tag": "ab"[n % 2]} for n in range(4)]
    if not kept:
        assert "keeps none of 4 rows" in error_of(read_samples, rows, filter=expression)
        return
    assert "".join(text for [text] in texts(read_samples(rows, filter=expression))) == kept


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("len(text) > 3", "'len(text)' is not allowed"),
        ("text.upper() == 'A'", "is not allowed"),
        ("__import__('os').system('x')", "is not allowed"),
        ("text[0] == 'a'", "is not allowed"),
        ("n is None", "use =="),
        ("n + 1 == 2", "'n + 1' is not allowed"),
        ("n ==", "it is not an expression"),
        ("[x for x in text]", "is not allowed"),
        ("label == 1", "data.filter reads 'label', but samples[0] has the fields ['n', 'text']"),
        ("n > 'a'", "fails on samples[0]"),
    ],
)
def test_filters_that_are_none(expression, problem):
    assert problem in error_of(read_samples, [{"text": "a", "n": 1}], filter=expression)
    if problem.startswith("data.filter reads"):
        rows = datasets.Dataset.from_list([{"text": "a", "n": 1}])
        assert problem in error_of(read_samples, rows, filter=expression)


def test_filter_needs_rows_with_fields():
    assert "no row with fields" in error_of(read_samples, [["a", "b"]], filter="label == 1")
    assert "samples[0] has the fields ['text']" in error_of(read_samples, ["a"], filter="x == 1")


def test_template_makes_the_prompt_or_the_text():
    rows = [{"question": "1+1", "output": "2"}]
    assert texts(read_samples(rows, template="Q: {question}\nA: ")) == [["Q: 1+1\nA: ", "2"]]
    rows = [{"title": "T", "body": "{b}"}]
    assert texts(read_samples(rows, template="{title}: {{{body}}}")) == [["T: {{b}}"]]


def test_alpaca_template_with_and_without_input():
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        {"instruction": "Greet.", "output": "Hi"},
    ]
    with_input, without, absent = texts(read_samples(rows, template="alpaca"))
    assert with_input == [
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n",
        "3",
    ]
    assert (
        without
        == absent
        == [
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nGreet.\n\n### Response:\n",
            "Hi",
        ]
    )


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{nothing}", "refers to {nothing}, but samples[0] has the fields ['output', 'q']"),
        ("{q.__class__}", "refers to {q.__class__}"),
        ("{q[0]}", "refers to {q[0]}"),
        ("{q!r}", "refers to {q}"),
        ("{q", "is malformed"),
        ("{}", "refers to {}"),
    ],
)
def test_templates_take_plain_fields_only(template, problem):
    rows = [{"q": "a", "output": "b"}]
    assert problem in error_of(read_samples, rows, template=template)


ROWS = [{"prompt": "p", "output": "o"}, {"prompt": "q", "output": "r\u2028s"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
def test_files_of_every_format(tmp_path, name):
    path = tmp_path / name
    if "jsonl" in name:
        write(path, json.dumps(ROWS[0]), "", json.dumps(ROWS[1]))
    elif name == "a.json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        table = datasets.Dataset.from_list(ROWS)
        getattr(table, f"to_{path.suffix[1:]}")(str(path))
    samples = load_samples(str(path))
    assert texts(samples) == [["p", "o"], ["q", "r\u2028s"]]
    origins = [sample.origin for sample in samples]
    if "jsonl" in name:
        assert origins == [f"{name} line 1", f"{name} line 3"]
    elif name == "a.csv":
        assert origins == ["a.csv line 2", "a.csv line 3"]
    else:
        assert origins == [f"{name} row 0", f"{name} row 1"]


def test_files_of_texts_and_lists(tmp_path):
    path = write(tmp_path / "a.txt", "one", "", " two ", "  ")
    samples = load_samples(path)
    assert texts(samples) == [["one"], [" two "]] and samples.dropped == {"blank_line": 2}
    assert samples[1].origin == "a.txt line 3"
    lists = write_rows(tmp_path / "b.jsonl", [["p", "o"], ["q", "r"]])
    assert texts(load_samples(lists)) == [["p", "o"], ["q", "r"]]
    strings = write(tmp_path / "c.json", '["a",\n', '"b"]')
    assert texts(load_samples(strings)) == [["a"], ["b"]]
    odd = write_rows(tmp_path / "d.data", ROWS)
    assert "set data.format" in error_of(load_samples, odd)
    assert texts(load_samples(odd, format="jsonl"))[0] == ["p", "o"]


@pytest.mark.parametrize(
    ("name", "lines", "problem"),
    [
        ("a.jsonl", ['{"text": "a"}', "", '{"text": "b"', '{"text": "c"}'], "a.jsonl line 3: mal"),
        ("b.jsonl", ['["p", "o"]', '["p"'], "b.jsonl line 2: malformed JSON"),
        ("c.json", ['[{"text": "a"},', '{"text" "b"}]'], "c.json line 2: malformed JSON"),
        ("d.jsonl", [], "d.jsonl is empty"),
        ("e.jsonl", ['{"text": "a", "text": "b"}'], "e.jsonl line 1: an object has the key 'text'"),
        ("f.json", ['[{"text": "a"},', '{"text": "a", "text": "b"}]'], "f.json line 2: an object"),
        ("g.csv", ["text,text", "a,b"], "g.csv: two columns are named 'text'; rename one"),
        ("h.csv", ["text,label", "a,1", "b,c,2"], "h.csv line 3: 3 cells, but 2 columns; quote"),
        ("i.csv", ["text,label", '"a', '",1', "b"], "i.csv line 4: 1 cells, but 2 columns"),
        ("j.csv", [], "j.csv is empty; there must be at least one sample"),
        ("k.csv", ["text"], "k.csv is empty"),
        ("l.txt", ["", " "], "l.txt is empty"),
        ("m.json", ["[]"], "m.json is empty"),
        ("n.jsonl", ['{"text": "a"}{"text": "b"}'], "n.jsonl line 1: malformed JSON (Extra data"),
        ("t.csv", ["prompt;output", "a;b"], "t.csv: its columns seem to be separated by ';'"),
        ("u.csv", ["text,label", '"a,1', "b,2"], "u.csv line 2: 1 cells, but 2 columns"),
        ("v.json", ['[{"text": "a"},', "]"], "v.json line 1: malformed JSON (Comma behind"),
        ("w.jsonl", ['{"text": ' + "[" * 9999], "w.jsonl line 1: values nested too deep"),
        ("x.jsonl", ['{"text": "a", "n": ' + "9" * 5000 + "}"], "x.jsonl line 1: a number of"),
        (
            "y.json",
            ["[", *['{"text": "a"},'] * 200, '{"text": "a", "text": "b"}]'],
            "y.json line 202: an object has the key 'text' twice",
        ),
        ("p.json", ['["a",', '"b"', '"c"]'], "p.json line 3: malformed JSON (Expecting ','"),
        ("q.json", ['["a"] 3'], "q.json line 1: malformed JSON (Extra data"),
        ("r.json", ['["a",'], "r.json line 2: malformed JSON"),
        ("s.csv.gz", ["text,text", "a,b"], "s.csv.gz: two columns are named"),
    ],
)
def test_a_malformed_file_names_the_file_and_the_line(tmp_path, name, lines, problem):
    path = write(tmp_path / name, *lines)
    assert problem in error_of(load_all, path)


def test_bad_rows_of_files_are_named(tmp_path):
    for name, lines, problem in [
        ("e.jsonl", ['{"text": "a"}', "", '{"text": ""}'], "e.jsonl line 3 field 'text' is empty"),
        ("f.csv", ["text", "NA", "", " ", '""'], "f.csv line 5 field 'text' is empty"),
        ("g.jsonl", ['{"text": "a"}', '["b"]'], "g.jsonl line 2 is a dialogue, but the samples"),
        ("h.jsonl", ['{"text": "a"}', "7"], "h.jsonl line 2 is 7 (int); each sample must be"),
        ("i.jsonl", ['{"text": "\\ud83d"}'], "i.jsonl line 1 field 'text' holds half of a surr"),
        ("j.json", ['[{"text": "a"}, ["b"]]'], "j.json row 1 is a dialogue, but the samples"),
    ]:
        samples = load_samples(write(tmp_path / name, *lines))
        with pytest.raises(BadRow) as caught:
            list(samples)
        assert problem in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.csv.gz"])
def test_bytes_that_are_no_utf8_are_named_by_their_line(tmp_path, name):
    texts = {"txt": ["a", "b"], "csv": ["text", "b"]}.get(
        name.split(".")[1], ['{"text": "a"}', '{"text": "b"}']
    )
    lines = ["["] * (name == "a.json") + texts + ["]"] * (name == "a.json")
    content = "\n".join(lines).encode().replace(b"b", b"\xff")
    if name == "a.json":
        content = content.replace(b"}\n{", b"},\n{")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    line = 3 if name == "a.json" else 2
    message = error_of(load_all, str(tmp_path / name))
    assert f"{name} line {line}: not UTF-8 text (invalid start byte); convert" in message


def test_gzip_data_that_is_taken_for_text(tmp_path):
    twice = gzip.compress(gzip.compress(b'{"text": "a"}\n'))
    (tmp_path / "a.jsonl.gz").write_bytes(twice)
    assert "unpack it, once more" in error_of(load_samples, str(tmp_path / "a.jsonl.gz"))


def test_a_gzip_table_that_is_cut_behind_its_first_rows(tmp_path):
    rows = "".join(
        json.dumps({"text": hashlib.sha256(bytes([i])).hexdigest()}) + "\n" for i in range(256)
    )
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode() * 9, 1)[:-30])
    assert "a.jsonl.gz: no whole gzip file" in error_of(load_samples, str(tmp_path / "a.jsonl.gz"))


def test_a_file_without_rights_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    problem = "a.txt: it cannot be opened (Permission denied); see to its rights"
    assert problem in error_of(load_all, path)


def test_a_csv_column_without_a_name_is_read(tmp_path):
    """pandas writes its index so."""
    path = write(tmp_path / "a.csv", ",text", "0,a", "1,b")
    assert texts(load_samples(path)) == [["a"], ["b"]]


def test_a_gigantic_text_is_refused(monkeypatch):
    monkeypatch.setattr("jax_sft.data.row_checks.MOST_CHARACTERS", 9)
    with pytest.raises(
        BadRow, match=r"samples\[1\] has 10 characters; a text may have 9"
    ) as caught:
        list(read_samples(["a" * 9, "a" * 10]))
    assert caught.value.reason == "gigantic_text"


def test_gzip_files_that_are_cut_or_none(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 100)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    assert "no whole gzip file" in error_of(load_samples, str(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "none.txt.gz").write_bytes(b"text")
    assert "no whole gzip file" in error_of(load_samples, str(tmp_path / "none.txt.gz"))
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    assert "unpack it with gunzip" in error_of(load_samples, str(tmp_path / "a.parquet.gz"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path, monkeypatch, name):
    line = {"txt": "a", "csv": "text"}.get(name[2:], '{"text": "a"}')
    lines = [f"[{line},", f"{line}]"] if name == "a.json" else [line, line]
    path = write(tmp_path / name, *lines)

    def shrink_then_check(file, state):
        write(tmp_path / name, lines[0])
        text_files.check_unchanged(file, state)

    monkeypatch.setattr(sources, "check_unchanged", shrink_then_check)
    assert f"{name}: the file changed while it was read; read" in error_of(load_samples, path)


def test_lines_that_are_not_the_rows_are_an_error(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", "prompt,output", "p,o", "q,r")
    columns = ["prompt", "output"]
    monkeypatch.setattr(sources, "csv_columns", lambda path: (columns, np.arange(1)))
    assert "2 rows on 1 lines; write each row on a line" in error_of(load_samples, path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.ndjson"])
@pytest.mark.parametrize(
    "values",
    [
        ["2024-01-01", "2024-05-06 07:08:09"],
        ["4", 4],
        ["null", '{"a": 1}', [1], {"b": 0.12345678901234567}],
        [{"n": 5, "m": 1}, {"m": 5.5, "n": 2}],
        [[{"a": 1, "b": None}], [{"c": "2024-01-01"}]],
    ],
    ids=["dates", "numbers", "JSON texts", "fields in another order", "other fields"],
)
def test_values_of_json_files_are_what_is_written(tmp_path, name, values):
    rows = [{"text": "a", "value": value} for value in values]
    lines = [json.dumps(row) for row in rows]
    text = f"[{','.join(lines)}]" if name == "a.json" else "\r\n\r\n".join(lines)
    content = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    read = load_samples(str(tmp_path / name)).rows_in(0, len(rows))
    assert json.dumps(read) == json.dumps(rows)


def test_a_number_far_into_a_json_file_leaves_the_texts_around_it(tmp_path):
    rows = [{"text": "a" * 1_000_000} for _ in range(11)] + [{"text": "b"}, {"text": 7}]
    samples = load_samples(write_rows(tmp_path / "a.jsonl", rows))
    assert samples[11].content == (Turn("b", 1.0),)
    assert "line 13 field 'text' is 7 (int)" in error_of(lambda: samples[12])


def test_a_filter_reads_none_where_a_json_row_lacks_the_field(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b", "label": 1}])
    assert texts(load_samples(path, filter="label == 1")) == [["b"]]
    assert texts(load_samples(path, filter="label == None")) == [["a"]]
    message = error_of(load_samples, path, filter="labels != 1")
    assert "data.filter reads 'labels', but a.jsonl line 1 has the fields ['text']" in message


def test_cells_of_a_csv_file_are_texts_and_filters_see_numbers(tmp_path):
    lines = ["text,label,zip,score", "007,1,02139,0.5", "8,2,2139,-1", '"1,0",1,x,NA']
    path = write(tmp_path / "a.csv", *lines)
    assert texts(load_samples(path)) == [["007"], ["8"], ["1,0"]]
    for filter, kept in [
        ("label == 1", ["007", "1,0"]),
        ("label in (2, 3)", ["8"]),
        ("zip == '02139'", ["007"]),
        ("zip == 2139", ["007", "8"]),
        ("label == '1' and zip != 'x'", ["007"]),
        ("0 < label < 2 and zip != 2139", ["1,0"]),
        ("score == 'NA' or score < 0", ["8", "1,0"]),
        ("text > label", ["007", "8", "1,0"]),
        ("not score == -1 and label", ["007", "1,0"]),
        ("label == None", []),
    ]:
        if not kept:
            assert "keeps none of 3" in error_of(load_samples, path, filter=filter)
            continue
        assert [text for [text] in texts(load_samples(path, filter=filter))] == kept, filter
    assert "fails on a.csv line 4 ('NA' is no number)" in error_of(
        load_samples, path, filter="score > 0"
    )


def test_missing_files_and_hub_names(tmp_path):
    for name in ("nothing.jsonl", "./nothing", str(tmp_path / "nothing")):
        assert "no such file" in error_of(load_samples, name)
    assert "patterns are not read" in error_of(load_samples, "data/*.jsonl")
    assert "pass a file instead" in error_of(load_samples, "nobody/nothing")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfd")
    assert "bytes.txt line 1: not UTF-8" in error_of(load_samples, str(tmp_path / "bytes.txt"))


@pytest.mark.parametrize("load", [load_samples, load_eval_prompts])
@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("", "'' names no source; pass an existing"),
        ("/", "/: the root of all folders is no source"),
    ],
)
def test_an_empty_name_and_the_root_are_no_sources(load, source, problem):
    message = error_of(load, source)
    assert problem in message and "module:function" in message


def test_a_saved_dataset_is_a_folder(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    samples = load_samples(str(tmp_path / "saved"))
    assert texts(samples)[0] == ["p", "o"] and samples[0].origin == "saved row 0"


def test_a_saved_dict_of_splits_gives_the_split(tmp_path):
    splits = {"train": ROWS, "held_out": ROWS[1:]}
    tables = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    assert len(load_samples(str(tmp_path / "saved"))) == 2
    assert texts(load_samples(str(tmp_path / "saved"), split="held_out"))[0][0] == "q"
    message = error_of(load_samples, str(tmp_path / "saved"), split="test")
    assert "it has the splits ['held_out', 'train'], not 'test': set data.split" in message


def folder_of_json(path):
    """Two splits, whose train has three files: lines, packed lines and an array."""
    (path / "more").mkdir(parents=True)
    lines = [json.dumps({"text": text, "day": "2024-01-01"}) for text in "abc"]
    write(path / "train-1.jsonl", lines[0], "", lines[1])
    write(path / "train-2.jsonl.gz", "", '{"text": "c", "day": 5.5}')
    write(path / "train-3.json", '[{"text": "d", "day": 5},', '{"text": "e"}]')
    write(path / "more" / "test.jsonl", *lines[:1])
    return str(path)


def test_a_folder_of_json_is_its_files(tmp_path):
    samples = load_samples(folder_of_json(tmp_path / "data"))
    assert samples.rows_in(0, 5) == [
        {"text": "a", "day": "2024-01-01"},
        {"text": "b", "day": "2024-01-01"},
        {"text": "c", "day": 5.5},
        {"text": "d", "day": 5},
        {"text": "e"},
    ]
    assert isinstance(samples.rows_in(3, 4)[0]["day"], int)
    assert [sample.origin for sample in samples] == [
        "train-1.jsonl line 1",
        "train-1.jsonl line 3",
        "train-2.jsonl.gz line 2",
        "train-3.json row 0",
        "train-3.json row 1",
    ]
    picked = load_samples(str(tmp_path / "data"), filter="day == 5.5 or day == None", max_samples=2)
    assert [sample.origin for sample in picked] == ["train-2.jsonl.gz line 2", "train-3.json row 1"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("test", "a"), ("train+test", "abcdea"), ("train[60%:]", "de"), ("all", "abcdea")],
)
def test_a_folder_of_json_has_splits(tmp_path, monkeypatch, split, expected):
    monkeypatch.chdir(folder_of_json(tmp_path / "data"))
    read = load_samples(".", split=split)
    assert "".join(text for [text] in texts(read)) == expected
    origins = {"a": "line 1", "e": "train-3.json row 1"}
    assert read[len(read) - 1].origin.endswith(origins[expected[-1]])
    assert "Unknown split" in error_of(load_samples, ".", split="none")


def test_a_folder_of_many_files_has_one_of_them_open(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(20):
        write_rows(folder / f"{number:02}.jsonl", [{"text": str(number)}] * 2)
    before = len(os.listdir("/proc/self/fd"))
    samples = load_samples(str(folder))
    assert [int(text) for [text] in texts(samples)] == [row // 2 for row in range(40)]
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    write(folder / "07.jsonl", "{")
    assert "07.jsonl: the file changed while it was read" in error_of(lambda: samples[14])
    message = error_of(lambda: list(load_samples(str(folder))))
    assert "07.jsonl line 1: malformed JSON" in message


def test_functions_give_samples(tmp_path, monkeypatch):
    path = tmp_path / "my_data.py"
    path.write_text("def rows():\n    return [['p', 'o'], ['q', 'r']]\nnumber = 3\n")
    samples = load_samples(f"{path}:rows")
    assert texts(samples) == [["p", "o"], ["q", "r"]]
    assert samples[1].origin == f"{path}:rows sample 1"
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_function("my_data:rows")() == [["p", "o"], ["q", "r"]]
    for spec, problem in [
        ("my_data:nothing", "has no function 'nothing'"),
        ("my_data:number", "has no function 'number'"),
        ("no_such_module:rows", "no module named 'no_such_module'"),
        (f"{tmp_path}/none.py:rows", "no such file"),
        ("rows", "names no function"),
    ]:
        assert problem in error_of(load_function, spec)


def test_eval_prompts_and_their_metadata(tmp_path):
    assert load_eval_prompts(["a", ["p", "o", "q"]]) == (["a", ["p", "o", "q"]], {})
    rows = [{"prompt": "a", "answer": 1}, {"prompt": ["b"], "answer": None}]
    expected = (["a", ["b"]], {"answer": [1, None]})
    assert load_eval_prompts(rows) == expected
    assert rows[0] == {"prompt": "a", "answer": 1}, "what callers hand in is left alone"
    rows[1]["prompt"] = "b"
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    assert load_eval_prompts(path) == (["a", "b"], {"answer": [1, None]})
    del rows[0]["answer"]
    path = write_rows(tmp_path / "sparse.jsonl", rows)
    assert load_eval_prompts(path) == (["a", "b"], {"answer": [None, None]})
    assert load_eval_prompts(write(tmp_path / "prompts.txt", "a", "", "b")) == (["a", "b"], {})
    (tmp_path / "prompts.py").write_text("def make():\n    return ['a']\n")
    assert load_eval_prompts(f"{tmp_path}/prompts.py:make") == (["a"], {})
    assert load_eval_prompts(np.array(["a", "b"])) == (["a", "b"], {})


@pytest.mark.parametrize(
    ("prompts", "problem"),
    [
        ([], "eval_prompts is empty"),
        (["a", None], "eval_prompts[1] is None"),
        (
            ["a", ["p", "o"]],
            "eval_prompts[1] has 2 texts; it must be [prompt, output, ..., prompt]",
        ),
        ([{"question": "a"}], "eval_prompts[0] has keys ['question']; it needs the key"),
        (
            [{"prompt": "a", "x": 1}, {"prompt": "b", "y": 1}],
            "eval_prompts[1] has the keys ['y'] beside its prompt, eval_prompts[0] has ['x']",
        ),
        ([{"prompt": "a", "x": 1}, "b"], "eval_prompts[1] has the keys [] beside its prompt"),
        ("nothing.txt", "no such file"),
    ],
)
def test_wrong_eval_prompts_are_named(prompts, problem):
    assert problem in error_of(load_eval_prompts, prompts)


# Tables, and what else `datasets` reads


def write_table(path, *texts):
    rows = [{"text": text} for text in texts]
    if path.suffix == ".csv":
        write(path, "text", *texts)
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    os.utime(path, (10**9, 10**9))


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "folder/train.csv", "folder/train.parquet"])
def test_a_table_that_changed_is_read_anew_though_its_time_did_not(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    source = str(path.parent if "/" in name else path)
    write_table(path, "old")
    assert texts(load_samples(source)) == [["old"]]
    write_table(path, "new")
    assert texts(load_samples(source)) == [["new"]]


def test_a_folder_of_csv_is_its_files(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train-1.csv", "text,label", "007,1", "NA,2")
    write(folder / "train-2.csv", "text,label", '"a', 'b",1', "null,1.50")
    samples = load_samples(str(folder))
    assert texts(samples) == [["007"], ["NA"], ["a\nb"], ["null"]]
    assert [sample.origin for sample in samples] == [
        *("train-1.csv line 2", "train-1.csv line 3", "train-2.csv line 2", "train-2.csv line 4")
    ]
    assert len(load_samples(str(folder), filter="label == 1")) == 2
    write(folder / "train-2.csv", "text,label", "a,b,c")
    assert "train-2.csv line 2: 3 cells, but 2 columns" in error_of(load_samples, str(folder))


def test_a_folder_of_text_is_its_files(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train-1.txt", "a", "", "b")
    write(folder / "train-2.txt", "", "c")
    samples = load_samples(str(folder))
    assert texts(samples) == [["a"], ["b"], ["c"]] and samples.dropped == {"blank_line": 2}
    assert samples[2].origin == "train-2.txt line 2"
    assert texts(load_samples(str(folder), filter="text != 'b'")) == [["a"], ["c"]]


def test_a_folder_whose_readme_has_options_is_read_by_them(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.csv", "text;x", "a;1")
    config = "- config_name: default\n  data_files: a.csv\n  sep: ';'"
    write(folder / "README.md", "---", "configs:", config, "---")
    assert texts(load_samples(str(folder))) == [["a"]]


def test_a_file_is_split_as_a_folder_is(tmp_path):
    path = write(tmp_path / "a.jsonl", *(json.dumps({"text": text}) for text in "abcde"))
    assert texts(load_samples(path, split="train[:40%]")) == [["a"], ["b"]]
    assert load_samples(path, split="train[4:]")[0].origin == "a.jsonl line 5"
    assert len(load_samples(path, split="test")) == 5, "splits are of hub datasets and folders"
    assert "data.split is 'train[x]'" in error_of(load_samples, path, split="train[x]")


def test_images_beside_the_text_are_left_as_they_are(tmp_path):
    def columns(decode):
        image = datasets.Image(decode=decode)
        text = datasets.Value("string")
        return datasets.Features(text=text, image=image, more=datasets.List(image))

    picture = {"bytes": b"no picture", "path": None}
    rows = [{"text": "a", "image": picture, "more": [picture]}]
    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    kinds = datasets.Features(columns(False), image=plain, more=datasets.List(plain))
    table = datasets.Dataset.from_list(rows, features=kinds).cast(columns(True))
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(str(tmp_path / "a.parquet"))
    sources_of_it = [table, str(tmp_path / "saved"), str(tmp_path / "a.parquet")]
    before = sorted(path.name for path in (tmp_path / "saved").iterdir())
    for source in sources_of_it:
        read = load_samples if isinstance(source, str) else read_samples
        assert texts(read(source)) == [["a"]]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == before


def test_sequences_without_slices_are_read_too():
    assert texts(read_samples(collections.deque(["a", "b"]))) == [["a"], ["b"]]


def test_tables_of_other_libraries_are_named(tmp_path):
    table = pyarrow.table({"text": ["a"]})
    message = "samples is a Table; pass datasets.Dataset.from_dict(samples.to_pydict())"
    assert error_of(read_samples, table) == message


def test_keys_that_are_no_texts_are_named():
    assert "samples[1] has the fields ['1', 'q']" in bad_row([{"text": "p"}, {1: "B", "q": "x"}])[0]


def test_a_file_of_functions_may_have_dataclasses(tmp_path):
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from typing import ClassVar\n@dataclass\nclass A:\n    y: ClassVar[int] = 3\n"
        "def rows():\n    return [str(A.y)]\n"
    )
    assert load_function(f"{tmp_path}/own.py:rows")() == ["3"]
    assert "'./own' is no module's name; write module:rows" in error_of(load_function, "./own:rows")


def test_of_a_dialogue_the_last_output_alone_may_be_trained():
    dialogue = ["p", "o", "q", "r"]
    for sample in (dialogue, {"prompt": dialogue[:3], "output": "r"}):
        [read] = read_samples([sample], train_turns="last")
        assert [turn.weight for turn in read.content] == [0, 0, 0, 1]
    message = error_of(read_samples, [dialogue], train_turns="flagged")
    assert "data.train_turns is 'flagged', but the samples are dialogue rows" in message
