"""A pod on this machine: several processes of the real entry, a few CPU devices each.

The environment is that of a pod started by hand. To import what training needs takes longer
than a tiny run, so it is done once, in a process that forks for each of a pod's; from there on
each goes through `python -m jax_sft.main` and Python's own end. `act` is the metric of the
runs: process 0 alone calls it, and at a given call it does what a pod may suffer.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tiny_runs import PROMPTS, flags_for

ROOT = Path(__file__).parent.parent
SECONDS = 120  # for one pod to end


class Ended(NamedTuple):
    """How a process ended: exit code (minus the signal's number), and what it said."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.rstrip().splitlines()[-1]


class Pods:
    """Starts pods in a folder, in which their processes run."""

    def __init__(self, folder: Path, process: subprocess.Popen) -> None:
        self.folder, self._process, self._num_runs = folder, process, 0

    def run(
        self,
        *flags: str,
        num_processes: int = 2,
        num_devices: int = 4,
        act: str = "",
        own_flags: dict[int, tuple[str, ...]] | None = None,
        own_folders: dict[int, Path] | None = None,
    ) -> list[Ended]:
        """Runs a pod to its end.

        Args:
            flags: of all processes.
            num_processes: of the pod.
            num_devices: of each.
            act: what the metric does, and at which of its calls: "2 kill 1 FILE" kills process 1
                at the second, once that file is there; at call 0, where all read their prompts,
                "0 term 1" sends process 1 SIGTERM, and "0 raise 1" has it raise.
            own_flags: more flags for some processes.
            own_folders: other folders for some to run in.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._num_runs += 1
        logs = self.folder / f"logs.{self._num_runs}"
        logs.mkdir()
        environ = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(num_processes),
            "XLA_FLAGS": flags_for(num_devices),
            "POD_PIDS": str(logs / "pids"),
            "POD_ACT": act,
        }
        pids = []
        for number in range(num_processes):
            job = {
                "environ": environ | {"JAX_PROCESS_ID": str(number)},
                "folder": str((own_folders or {}).get(number, self.folder)),
                "argv": [*flags, *(own_flags or {}).get(number, ())],
                "out": str(logs / f"out.{number}"),
                "err": str(logs / f"err.{number}"),
            }
            pids.append(self._ask(job))
        (logs / "pids").write_text(" ".join(map(str, pids)))
        codes = self._ask({"wait": pids, "seconds": SECONDS})
        said = [
            [(logs / f"{name}.{i}").read_text() for name in ("out", "err")]
            for i in range(num_processes)
        ]
        return [Ended(code, *texts) for code, texts in zip(codes, said, strict=True)]

    def _ask(self, job: dict[str, Any]) -> Any:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def opened(folder: Path) -> Iterator[Pods]:
    """Starts what forks, and ends it."""
    environ = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "OPENBLAS_NUM_THREADS": "1",  # forking is for processes of one thread
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    process = subprocess.Popen(
        [sys.executable, "-W", "error", __file__],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield Pods(folder, process)
        process.stdin.close()


def _serve() -> None:
    """Forks for each job on standard input, and waits where it is asked to."""
    import jax_sft.train  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            answer = _wait(job["wait"], job["seconds"])
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # JAX has threads only once it has devices
                answer = os.fork()
            if answer == 0:
                return _become(job)
        print(json.dumps(answer), flush=True)


def _wait(pids: list[int], seconds: float) -> list[int]:
    codes: dict[int, int] = {}
    last = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > last:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def _become(job: dict[str, Any]) -> None:
    os.environ.update(job["environ"])
    os.chdir(job["folder"])
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["main", *job["argv"]]
    runpy.run_module("jax_sft.main", run_name="__main__", alter_sys=True)


_num_calls = 0


def act(*, outputs: list[str], **_) -> dict[str, list[int]]:
    """The metric of a pod's runs; see `Pods.run`."""
    global _num_calls
    assert os.environ["JAX_PROCESS_ID"] == "0", "process 0 alone calls the metric"
    _num_calls += 1
    _act(_num_calls)
    return {"length": [len(output) for output in outputs]}


def prompts() -> list[str]:
    """Eval prompts, which every process asks for before it trains."""
    _act(0)
    return PROMPTS


def _act(call: int) -> None:
    if not os.environ["POD_ACT"]:
        return
    when, what, process, *files = os.environ["POD_ACT"].split()
    if call != int(when):
        return
    if what == "raise":
        if process == os.environ["JAX_PROCESS_ID"]:
            raise ZeroDivisionError(f"of process {process} alone,\nin two lines")
        return
    last = time.monotonic() + 60
    while not all(map(os.path.exists, files)) and time.monotonic() < last:
        time.sleep(0.02)
    pid = int(Path(os.environ["POD_PIDS"]).read_text().split()[int(process)])
    os.kill(pid, signal.SIGTERM if what == "term" else signal.SIGKILL)
    if what == "term":
        time.sleep(2.5)  # JAX looks for the signal every second


if __name__ == "__main__":
    _serve()
