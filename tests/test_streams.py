"""A stream gives the rows that reading at once gives, from any index on."""

import gzip
import json
import pickle
import re
import tracemalloc

import datasets
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jax_sft.data.samples import load_samples, read_samples
from jax_sft.data.streams import open_stream
from jax_sft.data.types import BadRow

ROWS = [{"prompt": f"p{i}", "output": f"o{i}", "label": i % 3} for i in range(7)]


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write_rows(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def samples_of(stream, start=0):
    """Each row's name and content, as Samples give them."""
    rows = stream.rows_from(start)
    return [(stream.name(i), stream.to_content(row, stream.name(i))) for i, row in rows]


def read_at_once(samples):
    return [(sample.origin, sample.content) for sample in samples]


def indices(stream, start=0):
    return [index for index, _ in stream.rows_from(start)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.parquet"])
@pytest.mark.parametrize("options", [{}, {"filter": "label == 1"}, {"max_samples": 3}])
def test_a_streamed_file_is_the_file(tmp_path, name, options):
    path = tmp_path / name
    if "jsonl" in name:
        write_rows(path, ROWS)
    else:
        plain = tmp_path / name.removesuffix(".gz")
        getattr(datasets.Dataset.from_list(ROWS), f"to_{name.split('.')[1]}")(str(plain))
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(plain.read_bytes()))
    stream = open_stream(str(path), **options)
    loaded = load_samples(str(path), **options)
    assert (stream.format, stream.source) == (loaded.format, loaded.source)
    assert samples_of(stream) == read_at_once(loaded)
    assert samples_of(stream) == read_at_once(loaded), "again"
    assert indices(stream) == {"filter": [1, 4], "max_samples": [0, 1, 2]}.get(
        next(iter(options), None), list(range(7))
    )


def test_lines_of_text_and_values_keep_their_numbers(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n \nthree")
    stream = open_stream(str(tmp_path / "a.txt"))
    assert samples_of(stream) == read_at_once(load_samples(str(tmp_path / "a.txt")))
    assert indices(stream) == [0, 2, 4] and stream.name(2) == "a.txt line 3"
    assert indices(stream, 1) == [2, 4] and indices(stream, 5) == []
    path = write_rows(tmp_path / "b.jsonl", [["p", "o"], ["q", "r"]])
    assert samples_of(open_stream(path)) == read_at_once(load_samples(path))


def test_a_streamed_folder_of_json_is_the_folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in [("a.jsonl", ROWS[:3]), ("b.jsonl.gz", ROWS[3:4]), ("c.json", ROWS[4:])]:
        write_rows(folder / name, [row | {"day": "2024-01-01"} for row in rows])
    stream, loaded = open_stream(str(folder)), load_samples(str(folder))
    assert samples_of(stream) == read_at_once(loaded)
    assert [row for _, row in stream.rows_from(0)] == loaded.rows_in(0, 7)
    for number, index in enumerate(indices(stream)):
        assert samples_of(stream, index) == read_at_once(loaded)[number:]
        assert samples_of(stream, index + 1) == read_at_once(loaded)[number + 1 :]
    with pytest.raises(ValueError, match=re.escape("has the splits ['train'], not 'test': set")):
        open_stream(str(folder), split="test")
    (folder / "c.json").write_text('[{"text": "a"}]')
    with pytest.raises(ValueError, match="c.json: one JSON array cannot be read piece by piece"):
        open_stream(str(folder))


class Again:
    def __iter__(self):
        return iter(ROWS)


def test_streams_of_objects_and_functions(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    expected = read_at_once(read_samples(ROWS))
    for source in (Again(), ROWS, table, table.to_iterable_dataset(num_shards=3)):
        stream = open_stream(source)
        assert samples_of(stream) == expected and stream.source == "samples"
        assert samples_of(stream, 5) == expected[5:]
    (tmp_path / "rows.py").write_text("def make():\n    yield from ['a', 'b', 'c']\n")
    stream = open_stream(f"{tmp_path}/rows.py:make", max_samples=2)
    assert indices(stream) == indices(stream) == [0, 1] and indices(stream, 1) == [1]
    assert stream.name(1) == f"{tmp_path}/rows.py:make sample 1"
    table.save_to_disk(tmp_path / "saved")
    assert indices(open_stream(str(tmp_path / "saved")), 3) == [3, 4, 5, 6]


def test_a_shuffled_dataset_resumes_in_its_order():
    shuffled = datasets.Dataset.from_list(ROWS).to_iterable_dataset().shuffle(seed=3, buffer_size=4)
    stream = open_stream(shuffled)
    whole = list(stream.rows_from(0))
    assert list(stream.rows_from(4)) == whole[4:] and whole != list(enumerate(ROWS))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    lines=st.lists(st.sampled_from(["", " ", "x", "y"]), min_size=1, max_size=12),
    start=st.integers(0, 13),
    max_samples=st.none() | st.integers(1, 5),
    filter=st.none() | st.just("kind == 'x'"),
)
def test_resuming_at_an_index_is_the_rest_of_the_straight_run(
    tmp_path, lines, start, max_samples, filter
):
    rows = [json.dumps({"text": "t", "kind": kind}) if kind.strip() else kind for kind in lines]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    kept = [i for i, kind in enumerate(lines) if kind.strip() and (kind == "x" or not filter)]
    if not kept:
        with pytest.raises(ValueError, match="is empty|keeps no row"):
            open_stream(str(tmp_path / "a.jsonl"), filter=filter, max_samples=max_samples)
        return
    stream = open_stream(str(tmp_path / "a.jsonl"), filter=filter, max_samples=max_samples)
    assert indices(stream) == kept[:max_samples]
    assert indices(stream, start) == [i for i in kept[:max_samples] if i >= start]


def test_conversations_and_bad_rows_stream_too(tmp_path):
    messages = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    path = write_rows(tmp_path / "a.jsonl", [{"messages": messages}, {"messages": messages[:1]}])
    stream = open_stream(path, train_turns="last")
    assert stream.format == "messages"
    (_, first), (index, second) = stream.rows_from(0)
    to_content = pickle.loads(pickle.dumps(stream.to_content))
    assert [m.weight for m in to_content(first, "row").messages] == [0, 1]
    with pytest.raises(BadRow, match="a.jsonl line 2 has no assistant message"):
        to_content(second, stream.name(index))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ((row for row in ROWS), "samples is a generator, which can be read only once; pass an"),
        (3, "samples is a int, which is no stream; pass an IterableDataset"),
        ({"train": ROWS}, 'is no stream; pass a split, as samples["train"]'),
        ([], "samples is empty; there must be at least one sample"),
        ([3], "samples[0] is 3 (int); each sample must be"),
        ("nothing.jsonl", "no such file"),
        ("nobody/nothing", "pass a file instead"),
    ],
)
def test_what_cannot_be_streamed(source, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        open_stream(source)


def test_files_that_cannot_be_streamed(tmp_path):
    for name, content, problem in [
        ("a.json", '[{"text": "a"}]', "a.json: one JSON array cannot be read piece by piece"),
        ("b.csv", "text\n", "b.csv is empty"),
        ("c.csv", "", "c.csv is empty"),
        ("d.csv", "text,text\na,b\n", "d.csv: two columns are named 'text'"),
        ("e.jsonl", "", "e.jsonl is empty"),
        ("f.jsonl", '{"text": "a"}\n{"text"', "f.jsonl line 2: malformed JSON"),
        ("g.jsonl", '{"text": "a", "text": "b"}', "g.jsonl line 1: an object has the key"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=re.escape(problem)):
            read_stream(tmp_path / name)


def read_stream(path):
    """What a stream's rows hold; a wrong one raises what is said of it."""
    stream = open_stream(str(path))
    return [stream.to_content(row, "row") for _, row in stream.rows_from(0)]


def test_a_fault_far_into_a_file_is_named_when_it_is_reached(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path, [{"text": "a"}] * 5000)
    path.write_bytes(path.read_bytes() + b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="a.jsonl line 5001: not UTF-8 text"):
        read_stream(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_that_shrinks_under_a_stream_is_an_error(tmp_path, name):
    path = tmp_path / name
    if name == "a.csv":
        path.write_text("text\n" + "a\n" * 300)
    else:
        write_rows(path, [{"text": "a"}] * 300)
    stream = open_stream(str(path))
    rows = stream.rows_from(0)
    next(rows)
    path.write_text(path.read_text()[:-2])
    for call in (lambda: list(rows), lambda: next(stream.rows_from(3))):
        with pytest.raises(ValueError, match="the file changed while it was read"):
            call()


def test_a_stream_of_a_large_file_takes_little_memory(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "x" * 1000}] * 20_000)
    stream = open_stream(path)
    tracemalloc.start()
    assert sum(1 for _ in stream.rows_from(10)) == 19_990
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000, "the file has 20 MB"


@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_a_streamed_folder_of_tables_or_texts_is_the_folder(tmp_path, suffix):
    folder = tmp_path / "data"
    folder.mkdir()
    head = ["text"] * (suffix == ".csv")
    for name, lines in [("a", ["1", "2"]), ("b", ["NA", "", "3"])]:
        (folder / f"{name}{suffix}").write_text("\n".join([*head, *lines, ""]))
    stream, loaded = open_stream(str(folder)), load_samples(str(folder))
    rows = list(stream.rows_from(0))
    assert [row for _, row in rows] == loaded.rows_in(0, 5)
    for number, (index, _) in enumerate(rows):
        assert list(stream.rows_from(index)) == rows[number:]
        assert list(stream.rows_from(index + 1)) == rows[number + 1 :]


@pytest.mark.parametrize("kinds", [None, datasets.Features(text=datasets.Value("string"))])
def test_a_stream_of_datasets_may_know_its_columns_or_not(kinds):
    rows = [{"text": "a"}, {"text": "b"}]
    stream = open_stream(
        datasets.IterableDataset.from_generator(lambda: iter(rows), features=kinds)
    )
    assert [row for _, row in stream.rows_from(0)] == rows


def test_what_is_no_stream_of_rows_is_named(tmp_path):
    table = pyarrow.table({"text": ["a"]})
    with pytest.raises(ValueError, match="samples is a Table; pass datasets.Dataset.from_dict"):
        open_stream(table)
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(ValueError, match="data.split is 'train.:9.', but a file that is streamed"):
        open_stream(str(tmp_path / "a.txt"), split="train[:9]")


def test_options_say_what_rows_there_are_and_what_they_hold():
    rows = [{"text": "a", "label": 1}] * 3
    options = [{}, dict(filter="label == 1"), dict(max_samples=2), dict(template="{text}!")]
    said = [open_stream(rows, **option).options for option in options]
    assert len(set(said)) == len(said) and said[0] == "", "as runs were known by before"
    assert said == [open_stream(list(rows), **option).options for option in options]
