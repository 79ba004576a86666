"""How long the last process stays for the others, and a traceback in one line; pods do the rest."""

import traceback

import pytest

from jax_sft import failure
from jax_sft.distributed import World


class Store:
    """What processes told one another, each thing at its second, by a clock that sleep moves."""

    def __init__(self, **told):
        self.now, self.told = 0.0, told

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def key_value_dir_get(self, folder):
        what = folder.rstrip("/").rpartition("/")[2]
        return [(folder + number, "") for number, at in self.told[what].items() if at <= self.now]


@pytest.mark.parametrize(
    ("left", "read", "seconds"),
    [
        ({"0": 0, "1": 0.2, "2": 0.5}, {"1": 0.1, "2": 0.4}, 0.5),
        ({"0": 0}, {}, 5),  # killed, all of them
        ({"0": 0, "2": 1}, {"1": 3}, 65),  # one failed too, and one hangs in what it writes
        ({"0": 0, "1": 40}, {"1": 3}, 40),  # one was killed, and one writes to the end
    ],
)
def test_process_0_stays_as_long_as_another_is_known_to_write(left, read, seconds, monkeypatch):
    store = Store(left=left, read=read)
    monkeypatch.setattr(failure, "time", store)
    failure._wait_for_others(World(client=store, process_id=0, num_processes=3))
    assert store.now == pytest.approx(seconds, abs=0.2)


@pytest.mark.parametrize(
    ("message", "said"),
    [("one", "one"), ("one\n  File two\n\n    three", "one File two three"), ("", "")],
)
def test_the_error_of_a_traceback_is_one_line(message, said):
    try:
        raise RuntimeError(message)
    except RuntimeError:
        text = traceback.format_exc()
    assert failure.in_one_line(text) == f"RuntimeError: {said}".rstrip(": " if not said else "")
    assert failure.in_one_line("error: a mistake\n") == "error: a mistake"
