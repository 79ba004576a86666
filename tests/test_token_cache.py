"""What is in the cache is what tokenization makes, and nothing can make a run fail over it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_tokenizers import BYTE_TOKENIZER, byte_bpe, packaged_bytes

import jax_sft.data.token_cache as token_cache
from jax_sft.data.fingerprint import source_fingerprint
from jax_sft.data.samples import load_samples, read_samples
from jax_sft.data.token_cache import find_cache_dir, tokenize_all
from jax_sft.data.tokenization import Encoding, tokenize_samples
from jax_sft.data.types import BadRow, Samples

ROOT = Path(__file__).parent.parent
ENCODING = Encoding(seq_length=16, over_length="split")
ROWS = [{"prompt": f"the row {index}", "output": "lower " * (1 + index % 7)} for index in range(45)]
FILES = ["inputs.npy", "targets.npy", "weights.npy", "offsets.npy", "rows.npy", "manifest.json"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Five blocks; the last has fewer rows."""
    monkeypatch.setattr(token_cache, "ROWS_A_BLOCK", 10)


def run(cache, rows=ROWS, encoding=ENCODING, tokenizer=None, said=None, **options):
    return tokenize_all(
        rows if callable(rows) or isinstance(rows, Samples) else read_samples(rows),
        tokenizer or byte_bpe(),
        encoding,
        cache_dir=str(cache),
        say=(said if said is not None else []).append,
        **options,
    )


def assert_same(found, rows=ROWS, encoding=ENCODING, tokenizer=None):
    """Compares with what `tokenize_samples` makes of the rows in one go."""
    samples = read_samples(rows)
    examples, counts = tokenize_samples(samples, tokenizer or byte_bpe(), encoding)
    for name in ("inputs", "targets", "weights", "offsets"):
        got, expected = getattr(found.examples, name), getattr(examples, name)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    assert list(found.examples.origins) == list(examples.origins)
    assert found.examples[-1].text() == examples[-1].text()
    assert found.counts == counts
    [source] = found.sources
    assert (source.name, source.format, source.times) == (samples.source, samples.format, 1.0)
    assert source.counts == counts


def must_not_be_opened():
    raise AssertionError("the source was opened")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_built_then_found(tmp_path, num_proc):
    said = []
    assert_same(run(tmp_path, said=said, num_proc=num_proc))
    assert_same(run(tmp_path, said=said))
    [folder] = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert said == [
        f"tokens      {len(run('off').examples)} examples of samples tokenized, kept in {folder}",
        f"tokens      {len(run('off').examples)} examples of samples from the cache, {folder}",
    ]


def test_what_is_found_lies_on_disk(tmp_path):
    run(tmp_path)
    examples = run(tmp_path).examples
    for array in (examples.inputs, examples.targets, examples.weights, examples.offsets):
        assert not array.flags.owndata and not array.flags.writeable


def test_a_hit_does_not_open_the_source(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    fingerprint = source_fingerprint(str(path))
    built = run(tmp_path / "c", lambda: load_samples(str(path)), fingerprint=fingerprint)
    found = run(tmp_path / "c", must_not_be_opened, fingerprint=fingerprint)
    assert found.examples[-1].origin == built.examples[-1].origin == "data.jsonl line 89"
    assert found.counts == built.counts and found.sources == built.sources
    assert found.sources[0].name == str(path)


def test_rows_of_a_folder_keep_their_names(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in [("a.jsonl", ROWS[:30]), ("b.jsonl", ROWS[30:])]:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = run(tmp_path / "c", lambda: load_samples(str(folder)), fingerprint="f")
    found = run(tmp_path / "c", must_not_be_opened, fingerprint="f")
    assert found.examples[0].origin == "a.jsonl line 1"
    assert list(found.examples.origins) == list(built.examples.origins)


def test_what_decides_ids_decides_the_entry(tmp_path):
    def num_entries():
        return sum(path.is_dir() for path in tmp_path.iterdir())

    run(tmp_path)
    others = [
        dict(encoding=Encoding(seq_length=15, over_length="split")),
        dict(encoding=Encoding(seq_length=16, over_length="split", add_eos=False)),
        dict(rows=ROWS[1:]),
        dict(rows=read_samples(ROWS, filter="prompt != 'the row 3'")),
        dict(tokenizer=packaged_bytes()),
    ]
    for number, other in enumerate(others, 2):
        found = run(tmp_path, **other)
        assert num_entries() == number
        if "rows" not in other or not isinstance(other["rows"], Samples):
            assert_same(found, **other)
    run(tmp_path)
    assert num_entries() == 1 + len(others)


def test_rows_left_out_before_are_counted_from_the_cache_too(tmp_path):
    samples = [read_samples(ROWS, filter="prompt != 'the row 3'") for _ in range(2)]
    built, found = (run(tmp_path, one) for one in samples)
    assert built.counts == found.counts and found.counts.dropped == {"filter": 1}
    assert found.counts.rows_read == len(ROWS)
    assert built.examples[-1].origin == found.examples[-1].origin == "samples[44]"


def test_no_cache_and_little_data_leave_no_trace(tmp_path):
    said = []
    assert_same(run("off", said=said))
    assert_same(run(tmp_path / "small", rows=ROWS[:10], said=said), rows=ROWS[:10])
    assert not said and not any(tmp_path.iterdir())


def test_little_rows_of_many_tokens_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "LEAST_KEPT_TOKENS", 50)
    said = []
    for _ in range(2):
        assert_same(run(tmp_path, rows=ROWS[:10], said=said), rows=ROWS[:10])
    assert ["kept" in said[0], "from the cache" in said[1]] == [True, True]


class Reader:
    """Counts the rows that are read, and stops at one of them."""

    def __init__(self, stop_at=None, error=KeyboardInterrupt):
        self.stop_at, self.error, self.origins = stop_at, error, []

    def samples(self):
        samples = read_samples(ROWS)
        content = samples.to_content

        def to_content(row, origin):
            if origin == self.stop_at:
                raise self.error
            self.origins.append(origin)
            return content(row, origin)

        samples.to_content = to_content
        return samples


def test_a_build_that_was_stopped_goes_on(tmp_path):
    stopped, second = Reader(stop_at="samples[33]"), Reader()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stopped.samples(), fingerprint="f")
    assert [path.suffix for path in tmp_path.iterdir() if path.is_dir()] == [".partial"]
    assert_same(run(tmp_path, second.samples(), fingerprint="f"))
    assert second.origins == [f"samples[{index}]" for index in range(30, 45)]
    assert not list(tmp_path.glob("*.partial"))
    assert_same(run(tmp_path, must_not_be_opened, fingerprint="f"))


def test_an_error_in_the_rows_leaves_nothing(tmp_path):
    error = BadRow("samples[33] is bad", reason="bad")
    with pytest.raises(BadRow, match="is bad") as caught:
        run(tmp_path, Reader("samples[33]", error).samples(), fingerprint="f")
    assert caught.value is error
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_bad_rows_that_are_skipped_are_counted_from_the_cache_too(tmp_path):
    rows = [*ROWS[:20], {"prompt": "lonely"}, *ROWS[20:]]
    encoding = Encoding(seq_length=16, on_bad_row="skip")
    for _ in range(2):
        found = run(tmp_path, rows, encoding)
        assert_same(found, rows, encoding)
        assert sum(found.counts.dropped.values()) == 1 and found.counts.shown


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_entry_is_made_anew(tmp_path, name, damage):
    mapped = run(tmp_path)
    [folder] = [path for path in tmp_path.iterdir() if path.is_dir()]
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).unlink()  # what is mapped stays as it was
    if damage != "gone":
        (folder / name).write_bytes(data if damage == "flipped" else data[:-3])
    said = []
    assert_same(run(tmp_path, said=said))
    assert_same(mapped)
    assert [line.endswith("is damaged: made anew") for line in said[:-1]] == [True] * (
        damage != "gone"
    )
    assert "kept in" in said[-1]
    assert_same(run(tmp_path, lambda: read_samples(ROWS), said=said))
    assert "from the cache" in said[-1]


def test_a_folder_that_cannot_be_written_to_is_told_and_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    assert_same(run(tmp_path / "file" / "cache", said=said))
    [line] = said
    assert line.startswith("tokens      not kept for later runs: ")


def test_a_disk_that_fills_up_is_told_and_done_without(tmp_path, monkeypatch):
    append = token_cache.TokenWriter.append

    def full(writer, part, first_row):
        if first_row == 20:
            raise OSError(28, "No space left on device", "inputs.npy")
        append(writer, part, first_row)

    monkeypatch.setattr(token_cache.TokenWriter, "append", full)
    said = []
    assert_same(run(tmp_path, said=said))
    assert "No space left" in said[0] and len(said) == 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_rows_that_cannot_be_told_apart_are_not_kept(tmp_path):
    rows = [row | {"extra": object()} for row in ROWS]
    assert_same(run(tmp_path, rows))
    assert not any(tmp_path.iterdir())


def test_an_error_of_reading_is_not_taken_for_the_cache_s(tmp_path):
    def gone():
        raise OSError("the data is gone")

    with pytest.raises(OSError, match="the data is gone"):
        run(tmp_path, gone, fingerprint="f")


def test_num_proc_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="data.num_proc is 0; there must be at least 1"):
        run(tmp_path, num_proc=0)


def test_where_the_cache_is(monkeypatch):
    assert find_cache_dir("off") is None
    assert find_cache_dir("~/x") == Path.home() / "x"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert find_cache_dir(None) == Path("/somewhere/jax_sft")
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert find_cache_dir(None) == Path.home() / ".cache" / "jax_sft"


def test_the_tests_keep_out_of_the_user_s_cache():
    assert "jax_sft_tests_" in str(find_cache_dir(None))


# Tokenizes slowly, and says what it does.
SCRIPT = f"""
import sys, time
import jax_sft.data.token_cache as token_cache
from jax_sft.data.samples import read_samples
from jax_sft.data.tokenization import Encoding
from jax_sft.data.tokenizer import load_tokenizer
token_cache.ROWS_A_BLOCK = 10
samples = read_samples(["some text %d" % i for i in range(40)])
content = samples.to_content
def to_content(row, origin):
    if origin in ("samples[0]", "samples[39]"):
        print(origin, flush=True)
    time.sleep(float(sys.argv[2]))
    return content(row, origin)
samples.to_content = to_content
tokenizer = load_tokenizer({str(BYTE_TOKENIZER)!r})
print("ready", flush=True)
sys.stdin.readline()
found = token_cache.tokenize_all(
    samples, tokenizer, Encoding(seq_length=16), cache_dir=sys.argv[1], fingerprint="f"
)
print(len(found.examples), int(found.examples.inputs.sum()), flush=True)
"""


def start_script(cache, seconds_a_row):
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(cache), str(seconds_a_row)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "ready\n"
    return process


def lines_of(process):
    out, _ = process.communicate("\n", timeout=60)
    assert process.returncode == 0
    return out.splitlines()


def test_one_process_builds_and_the_others_wait_and_take_over(tmp_path):
    """The first is killed while it builds; one of the others goes on, the last reads."""
    first, second, third = (start_script(tmp_path, seconds) for seconds in (0.1, 0.02, 0.02))
    first.stdin.write("\n")
    first.stdin.flush()
    assert first.stdout.readline() == "samples[0]\n"
    for process in (second, third):
        process.stdin.write("\n")
        process.stdin.flush()
    [partial] = tmp_path.glob("*.partial")
    deadline = time.monotonic() + 30
    while (partial / "blocks.jsonl").read_text().count("\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    told = [lines_of(process) for process in (second, third)]
    assert told[0][-1] == told[1][-1]
    assert all("waiting for another process that makes" in lines[0] for lines in told)
    built, found = sorted(told, key=lambda lines: "from the cache" in lines[1])
    # Its first blocks were there.
    assert built[1] == "samples[39]" and "tokenized, kept in" in built[2] and len(built) == 4
    assert "from the cache" in found[1] and len(found) == 3
