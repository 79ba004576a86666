"""Whatever users hand in is read, or named in one line that says what is wrong with it."""

import gzip
import json

import datasets
import numpy as np
import pytest

from jax_sft.data.samples import load_eval_prompts, load_function, load_samples, read_samples


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def texts(samples):
    return [[turn.text for turn in sample.turns] for sample in samples]


def error_of(call, *args, **options):
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path, *lines):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))
    return str(path)


def write_rows(path, rows):
    return write(path, *map(json.dumps, rows))


def test_text_is_one_trained_turn_and_a_dialogue_trains_every_second():
    [text] = read_samples(["Hi"])
    assert [(turn.text, turn.trained) for turn in text.turns] == [("Hi", True)]
    [dialogue] = read_samples([["a", "b", "", " "]])
    assert [(turn.text, turn.trained) for turn in dialogue.turns] == [
        ("a", False),
        ("b", True),
        ("", False),
        (" ", True),
    ]
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
    assert all(type(turn.text) is str for sample in read for turn in sample.turns)


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
    assert "['body', 'chosen', 'prompt'], but neither 'text' nor 'prompt' with 'output'" in message


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([], "samples is empty; there must be at least one sample"),
        ("text", "samples is a single str; pass a list of them: ['text']"),
        ({"text": ["a"]}, "samples is a single dict; pass a list"),
        ((text for text in "ab"), "samples is a generator, which cannot be indexed; pass list("),
        (["a", None], "samples[1] is None; each sample must be a str, or a list of [prompt"),
        (["a", 3], "samples[1] is 3 (int); each sample"),
        (["a", b"b"], "samples[1] is b'b' (bytes); each sample"),
        (["a", ["p", "o"]], "samples[1] is a dialogue, but samples[0] is text; make all"),
        ([["p", "o"], "a"], "samples[1] is text, but samples[0] is a dialogue"),
        ([["p", "o"], ["p", "o", "p"]], "samples[1] has 3 texts; a dialogue is [prompt, output"),
        ([["p", "o"], []], "samples[1] has 0 texts"),
        ([["p", ""]], "samples[0][1] is empty, so there is nothing to train"),
        (["a", ""], "samples[1] is empty"),
        ([["p", None]], "samples[0][1] is None; pass a str"),
        ([["p", b"o"]], "samples[0][1] is b'o' (bytes); decode it to a str"),
        (["a", "\ud83d"], "samples[1] holds half of a surrogate pair at 0"),
        ([{"text": None}], "samples[0] field 'text' is None"),
        ([[{"role": "user", "content": "a"}]], "samples[0] is a conversation of messages"),
        ([{"messages": []}], "samples[0] is a conversation of messages"),
    ],
)
def test_wrong_samples_are_named(samples, expected):
    assert expected in error_of(read_samples, samples)


def test_splits_and_streams_of_datasets_are_errors_with_a_remedy():
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    assert 'samples["train"]' in error_of(read_samples, datasets.DatasetDict(train=rows))
    assert "cannot be indexed" in error_of(read_samples, rows.to_iterable_dataset())
    assert "from_pandas" in error_of(read_samples, rows.to_pandas())
    assert texts(read_samples(rows.to_pandas()["text"])) == [["a"]]


def test_long_values_are_shortened():
    message = error_of(read_samples, [{"a": 1}, "x" * 9], filter="a ==")
    assert message.startswith("data.filter 'a ==': it is not an expression")
    assert len(error_of(read_samples, [3, "x"])) < 200
    assert len(error_of(read_samples, [b"x" * 10_000])) < 200


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
    assert "no row with fields" in error_of(read_samples, ["a"], filter="label == 1")


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
        ("e.jsonl", ['{"text": "a"}', '{"text": ""}'], "e.jsonl line 2 field 'text' is empty"),
        ("f.csv", ["text", "NA", '""'], "f.csv row 1 field 'text' is empty"),
    ],
)
def test_a_malformed_file_names_the_file_and_the_line(tmp_path, name, lines, problem):
    path = write(tmp_path / name, *lines)
    assert problem in error_of(load_samples, path)


def test_missing_files_and_hub_names(tmp_path):
    for name in ("nothing.jsonl", "./nothing", str(tmp_path / "nothing")):
        assert "no such file" in error_of(load_samples, name)
    assert "pass a file instead" in error_of(load_samples, "nobody/nothing")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfd")
    assert "not UTF-8" in error_of(load_samples, str(tmp_path / "bytes.txt"))


def test_a_saved_dataset_is_a_folder(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    samples = load_samples(str(tmp_path / "saved"))
    assert texts(samples)[0] == ["p", "o"] and samples[0].origin == "saved row 0"


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
