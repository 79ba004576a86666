"""Several processes give what one gives, in its order, and none outlives what started it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from small_tokenizers import byte_bpe

from jax_sft.data.row_reader import RowReader
from jax_sft.data.token_workers import Block, Task, tokenize_blocks
from jax_sft.data.tokenization import Encoding
from jax_sft.data.types import BadRow

ROOT = Path(__file__).parent.parent
READER = RowReader(format="prompt_output")
ENCODING = Encoding(seq_length=24)


def block(number, num_rows=3):
    rows = [
        {"prompt": f"the row {number}.{i}", "output": "low " * (number % 4 + i + 1)}
        for i in range(num_rows)
    ]
    return Block(rows, [f"row {number}.{i}" for i in range(num_rows)])


def parts(blocks, *, num_proc, to_content=READER.content):
    task = Task(to_content, byte_bpe(), ENCODING)
    return list(tokenize_blocks(blocks, task, num_proc=num_proc))


def test_several_processes_give_the_parts_of_one_in_their_order():
    blocks = [block(number, num_rows=1 + 40 * (number % 3 == 0)) for number in range(12)]
    expected, got = (parts(iter(blocks), num_proc=num_proc) for num_proc in (1, 2))
    assert len(got) == len(blocks)
    for one, other in zip(got, expected, strict=True):
        for name in ("inputs", "targets", "weights", "lengths", "rows"):
            ours, theirs = getattr(one, name), getattr(other, name)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        assert one.counts == other.counts


def test_no_block_is_no_part():
    assert parts([], num_proc=2) == []


def test_the_first_bad_row_is_raised_as_it_is_in_one_process():
    blocks = [block(number) for number in range(6)]
    blocks[2].rows[1] = {"prompt": "lonely"}
    blocks[3].rows[0] = {"prompt": None, "output": ""}
    caught = []
    for num_proc in (1, 2):
        with pytest.raises(BadRow) as error:
            parts(blocks, num_proc=num_proc)
        caught.append((str(error.value), error.value.reason))
    assert caught[0] == caught[1]
    assert caught[0][0].startswith("row 2.1")


def test_blocks_are_read_a_few_ahead_and_what_is_underway_is_dropped():
    num_read = 0

    def blocks():
        nonlocal num_read
        for number in range(1000):
            num_read += 1
            yield block(number, num_rows=500)

    task = Task(READER.content, byte_bpe(), ENCODING)
    generator = tokenize_blocks(blocks(), task, num_proc=2)
    next(generator)
    start = time.monotonic()
    generator.close()
    assert time.monotonic() - start < 5 and num_read == 4


def test_what_cannot_be_sent_is_refused_in_a_line():
    with pytest.raises(ValueError, match="the tokenizer cannot be sent .* data.num_proc to 1"):
        parts([block(0)], num_proc=2, to_content=lambda row, origin: None)
    with pytest.raises(ValueError, match="the rows cannot be sent .* data.num_proc to 1"):
        parts([Block([lambda: None], ["row 0"])], num_proc=2)


class OnlyHere(RowReader):
    pass


def test_what_cannot_be_made_elsewhere_is_refused_in_a_line(monkeypatch):
    monkeypatch.setattr(OnlyHere, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "OnlyHere", OnlyHere, raising=False)
    reader = OnlyHere(format="prompt_output")
    with pytest.raises(ValueError, match="cannot be read in another process .*data.num_proc to 1"):
        parts([block(0), block(1)], num_proc=2, to_content=reader.content)


class Dies:
    """Ends the process that reads a row."""

    def __call__(self, row, origin):
        os._exit(7)


def test_a_process_that_ends_by_itself_is_an_error():
    with pytest.raises(RuntimeError, match="ended by itself .exit code 7.* data.num_proc"):
        parts([block(0), block(1)], num_proc=2, to_content=Dies())


class Prints:
    def __call__(self, row, origin):
        print("this is no answer")
        return READER.content(row, origin)


def test_what_a_worker_prints_is_no_answer(capfd):
    [part] = parts([block(0)], num_proc=2, to_content=Prints())
    assert len(part.lengths) == 3
    assert "this is no answer" in capfd.readouterr().err


# A script as people write it, without `if __name__ == "__main__"`, in which JAX has threads.
SCRIPT = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
import jax.numpy as jnp
jnp.ones(8).sum().block_until_ready()
from small_tokenizers import packaged_bytes
from jax_sft.data.row_reader import RowReader
from jax_sft.data.token_workers import Block, Task, tokenize_blocks
from jax_sft.data.tokenization import Encoding
print("once", flush=True)
blocks = (Block(["some text"] * 50, ["row"] * 50) for _ in range(int(sys.argv[1])))
task = Task(RowReader(format="text").content, packaged_bytes(), Encoding(seq_length=8))
num_parts = 0
for part in tokenize_blocks(blocks, task, num_proc=2):
    if not num_parts:
        print("first", flush=True)
    num_parts += 1
print(num_parts, flush=True)
"""


def start_script(tmp_path, num_blocks, mark="none"):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = [str(ROOT), str(ROOT / "tests")]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_SFT_MARK": mark}
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(script), str(num_blocks)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
        start_new_session=True,
    )


def test_a_script_without_a_main_guard_works(tmp_path):
    out, err = start_script(tmp_path, 5).communicate(timeout=120)
    assert out.split() == ["once", "first", "5"]
    # transformers says where PyTorch is not there; in one process of the three.
    assert not err or (err.count("\n"), "PyTorch was not found" in err) == (1, True)


def marked(mark):
    """Processes whose environment has the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"JAX_SFT_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            pass  # it has ended
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("sent", ["SIGINT", "SIGKILL"])
def test_no_process_outlives_the_one_that_started_it(tmp_path, sent):
    mark = f"{os.getpid()}-{sent}"
    process = start_script(tmp_path, 1_000_000, mark)
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["once\n", "first\n"]
        assert len(marked(mark)) == 3
        if sent == "SIGINT":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        else:
            process.kill()
        out, err = process.communicate(timeout=30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not marked(mark)
    assert process.returncode and "once" not in out
    # Nothing but our own traceback of a Ctrl-C.
    assert err.count("Traceback") == (sent == "SIGINT"), err
