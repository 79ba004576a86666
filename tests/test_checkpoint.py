"""Checkpoints: what is saved comes back bit for bit, and what is damaged is said so."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_runs import flags_for

from jax_sft import checkpoint
from jax_sft.checkpoint import Checkpoints
from jax_sft.manifest import complete_steps


class State(NamedTuple):
    params: dict
    moments: tuple
    step: jax.Array
    key: jax.Array


def make_mesh(num_devices):
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((num_devices,), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices)


def make_state(step, num_devices=1):
    """Values that differ by step, of every kind of leaf a training state has."""
    rows = NamedSharding(make_mesh(num_devices), P("fsdp"))
    whole = NamedSharding(make_mesh(num_devices), P())
    values = jax.random.normal(jax.random.key(step), (8, 4))
    return State(
        params={
            "kernel": jax.device_put(values, rows),
            "scale": jax.device_put(values[0].astype(jnp.bfloat16), whole),
            "frozen": jax.device_put(jnp.zeros((0, 4)), whole),
        },
        moments=(jax.device_put(values * 2, rows), ()),
        step=jax.device_put(jnp.int32(step), whole),
        key=jax.device_put(jax.random.key(step, impl="rbg"), whole),
    )


def like(state):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, e = jax.random.key_data(a), jax.random.key_data(e)
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def saved_run(run_dir, steps=(5, 10), keep=3):
    checkpoints = Checkpoints(run_dir, keep=keep)
    for step in steps:
        checkpoints.save(step, make_state(step), {"step": step}, wait=True)
    checkpoints.close()
    return run_dir


def wait_for_poll(checkpoints):
    deadline = time.monotonic() + 30
    while (completed := checkpoints.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return completed


def files_under(folder):
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_restores_the_same_bits_and_data(tmp_path):
    saved_run(tmp_path)
    run = Checkpoints.open_for_reading(tmp_path)
    assert run.latest() == 10
    assert run.read_data(10) == {"step": 10}
    assert_same_bits(run.restore(10, like(make_state(10))), make_state(10))
    assert_same_bits(run.restore(5, like(make_state(10))), make_state(5))


@pytest.mark.parametrize(("saved_on", "restored_on"), [(4, 2), (1, 8), (8, 1)])
def test_restores_onto_another_mesh(tmp_path, saved_on, restored_on):
    if jax.device_count() < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, make_state(1, saved_on), {}, wait=True)
    target = make_state(1, restored_on)
    restored = checkpoints.restore(1, like(target))
    checkpoints.close()
    assert_same_bits(restored, target)
    assert restored.params["kernel"].sharding == target.params["kernel"].sharding
    assert restored.key.sharding.is_equivalent_to(target.key.sharding, 0)


def test_restores_a_part(tmp_path):
    saved_run(tmp_path)
    params = make_state(10).params
    part = Checkpoints.open_for_reading(tmp_path).restore(
        10, {"params": like(params)}, part="params/"
    )
    assert_same_bits(part, {"params": params})


def test_donation_after_save_does_not_reach_the_disk(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    values = jax.device_put(jnp.arange(1 << 20, dtype=jnp.float32), make_state(1).step.sharding)
    struct = like({"x": values})
    checkpoints.save(1, {"x": values}, {})
    overwrite(values).block_until_ready()
    checkpoints.close()
    restored = Checkpoints.open_for_reading(tmp_path).restore(1, struct)
    np.testing.assert_array_equal(restored["x"], np.arange(1 << 20, dtype=np.float32))


def test_data_is_taken_when_save_is_called(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    data = {"counters": {"tokens": 7}}
    checkpoints.save(1, make_state(1), data)
    data["counters"]["tokens"] = 8
    checkpoints.close()
    assert Checkpoints.open_for_reading(tmp_path).read_data(1) == {"counters": {"tokens": 7}}


def test_poll_sees_the_end_and_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    assert checkpoints.poll() is None
    for step in (1, 2, 3, 4):
        checkpoints.save(step, make_state(step), {})
        assert wait_for_poll(checkpoints) == checkpoints.latest() == step
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_old_steps_stay_until_the_new_manifest_stands(tmp_path, monkeypatch):
    saved_run(tmp_path, steps=(5,), keep=1)
    checkpoints = Checkpoints(tmp_path, keep=1)

    def fail(folder, body):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", fail)
    checkpoints.save(10, make_state(10), {})
    with pytest.raises(OSError, match="No space left"):
        wait_for_poll(checkpoints)
    assert checkpoints.latest() == 5
    monkeypatch.undo()
    checkpoints.save(10, make_state(10), {}, wait=True)  # the error was told once
    checkpoints.close()
    restored = Checkpoints.open_for_reading(tmp_path).restore(10, like(make_state(10)))
    assert_same_bits(restored, make_state(10))


@pytest.mark.parametrize("call", ["save", "close"])
def test_background_errors_reach_the_caller(tmp_path, monkeypatch, call):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, make_state(1), {}, wait=True)
    monkeypatch.setattr(checkpoint, "write_manifest", lambda folder, body: 1 / 0)
    checkpoints.save(2, make_state(2), {})
    with pytest.raises(ZeroDivisionError):
        if call == "save":
            checkpoints.save(3, make_state(3), {})
        else:
            checkpoints.close()
    checkpoints.close()


def test_a_step_reached_again_after_resume_is_not_written_twice(tmp_path):
    saved_run(tmp_path)
    checkpoints = Checkpoints(tmp_path, keep=3)
    state = checkpoints.restore(10, like(make_state(10)))
    before = files_under(tmp_path)
    checkpoints.save(10, state, {"step": 10}, wait=True)
    checkpoints.close()
    assert files_under(tmp_path) == before


@pytest.mark.parametrize("step", [3, 10])
def test_a_new_run_does_not_write_into_an_old_one(tmp_path, step):
    saved_run(tmp_path)
    checkpoints = Checkpoints(tmp_path, keep=3)
    before = files_under(tmp_path)
    with pytest.raises(ValueError, match=rf"step {step} .*already holds step 10.*resume"):
        checkpoints.save(step, make_state(step), {})
    checkpoints.close()
    assert files_under(tmp_path) == before


def test_incomplete_steps_are_ignored_and_removed_by_the_next_writer(tmp_path):
    folder = saved_run(tmp_path) / "checkpoints"
    (folder / "10" / "manifest.json").unlink()
    (folder / "12.orbax-checkpoint-tmp").mkdir()
    before = files_under(tmp_path)
    assert Checkpoints.open_for_reading(tmp_path).latest() == 5
    assert files_under(tmp_path) == before
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert sorted(path.name for path in folder.iterdir()) == ["5"]
    checkpoints.save(10, make_state(10), {}, wait=True)
    assert checkpoints.latest() == 10
    checkpoints.close()


def test_a_damaged_file_is_not_restored(tmp_path):
    saved_run(tmp_path)
    values = next((tmp_path / "checkpoints" / "10").glob("ocdbt.process_0/d/*"))
    content = bytearray(values.read_bytes())
    content[len(content) // 2] ^= 1
    values.write_bytes(content)
    message = f"{re.escape(str(values))} is damaged.*delete .*10 to use step 5"
    with pytest.raises(ValueError, match=message):
        Checkpoints.open_for_reading(tmp_path).restore(10, like(make_state(10)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": (8, 5)}, r"params/kernel is float32\[8, 4\] in it and float32\[8, 5\] here"),
        ({"extra": (2,)}, r"params/extra is absent in it and float32\[2\] here"),
        ({"kernel": None}, r"params/kernel is float32\[8, 4\] in it and absent here"),
        ({"scale": (4,)}, r"params/scale is bfloat16\[4\] in it and float32\[4\] here"),
    ],
)
def test_a_checkpoint_of_another_model_names_the_first_leaf(tmp_path, change, message):
    saved_run(tmp_path)
    target = like(make_state(10))
    for name, shape in change.items():
        if shape is None:
            del target.params[name]
        else:
            sharding = target.step.sharding
            target.params[name] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    with pytest.raises(ValueError, match=message):
        Checkpoints.open_for_reading(tmp_path).restore(10, target)


@pytest.mark.parametrize("num_rows", [6, 10])
def test_a_padded_leaf_is_cut_or_filled_with_zeros(tmp_path, num_rows):
    """As is what the optimizer keeps of it; a leaf of another name, or another width, is not."""
    saved_run(tmp_path)
    run = Checkpoints.open_for_reading(tmp_path)
    target = like(make_state(10))
    rows = jax.ShapeDtypeStruct(
        (num_rows, 4), jnp.float32, sharding=NamedSharding(make_mesh(2), P("fsdp"))
    )
    target.params["kernel"] = rows
    with pytest.raises(ValueError, match="params/kernel is float32"):
        run.restore(10, target, padded=["ernel", "scale"])
    restored = run.restore(10, target, padded=["kernel"]).params["kernel"]
    full = np.zeros((10, 4), np.float32)
    full[:8] = make_state(10).params["kernel"]
    np.testing.assert_array_equal(restored, full[:num_rows])
    target.params["kernel"] = jax.ShapeDtypeStruct((8, 5), jnp.float32, sharding=rows.sharding)
    with pytest.raises(ValueError, match=r"params/kernel is float32\[8, 4\] in it"):
        run.restore(10, target, padded=["kernel"])


def test_bad_folders_are_refused_and_left_alone(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    (tmp_path / "early" / "checkpoints" / "3").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for name, message in [
        ("missing", "does not exist"),
        ("file", "is a file"),
        ("empty", "is empty"),
        ("other", "no checkpoints/ in it"),
        ("early", "no complete checkpoint"),
    ]:
        with pytest.raises(ValueError, match=message):
            Checkpoints.open_for_reading(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be written"):
        Checkpoints(tmp_path / "file" / "run", keep=1)
    with pytest.raises(ValueError, match="mount the bucket"):
        Checkpoints("gs://bucket/run", keep=1)
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path / "missing", keep=0)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written"):
        Checkpoints(tmp_path, keep=1)


def test_what_is_no_array_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(TypeError, match="params/rate is a float"):
        checkpoints.save(1, {"params": {"rate": 0.1}}, {})
    checkpoints.close()


def run_python(code, *arguments):
    """Starts `code` with this test module importable; stdout and stderr are one pipe."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.path.dirname(__file__)]),
        "PYTHONWARNINGS": "error",
        "XLA_FLAGS": flags_for(2),
    }
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


SAVE_FOREVER = """
    import sys
    from test_checkpoint import Checkpoints, make_state
    checkpoints = Checkpoints(sys.argv[1], keep=2)
    step = (checkpoints.latest() or 0) + 1
    checkpoints.save(step, make_state(step), {"step": step}, wait=True)
    print("ready", flush=True)
    while True:
        step += 1
        checkpoints.save(step, make_state(step), {"step": step})
        checkpoints.poll()
"""


def test_killed_at_any_moment_the_newest_complete_step_restores(tmp_path):
    rng = random.Random(0)
    newest = 0
    for _ in range(2):
        process = run_python(SAVE_FOREVER, tmp_path)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        assert process.communicate()[0] == ""
        run = Checkpoints.open_for_reading(tmp_path)
        assert run.latest() > newest
        newest = run.latest()
        assert run.read_data(newest) == {"step": newest}
        assert_same_bits(run.restore(newest, like(make_state(newest))), make_state(newest))


TWO_PROCESSES = """
    import contextlib, os, sys, time
    import jax
    port, rank, run_dir = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from test_checkpoint import Checkpoints, like, make_mesh
    rows = NamedSharding(make_mesh(4), P("fsdp"))
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    def state(factor):
        return {"x": jax.make_array_from_callback((8, 4), rows, lambda i: values[i] * factor)}
    def local(array):
        return [np.asarray(shard.data) for shard in array.addressable_shards]
    checkpoints = Checkpoints(run_dir, keep=1, is_writer=rank == "0")
    assert checkpoints.latest() is None
    checkpoints.save(1, state(1), {"step": 1})
    checkpoints.save(2, state(2), {"step": 2}, wait=True)
    assert checkpoints.latest() == 2
    restored = checkpoints.restore(2, like(state(2)))
    np.testing.assert_array_equal(local(restored["x"]), local(state(2)["x"]))
    checkpoints.close()
    # What fails waits for the save, and not for the other process, which does not close.
    checkpoints = Checkpoints(run_dir, keep=2, is_writer=rank == "0")
    checkpoints.save(3, state(3), {"step": 3})
    if rank == "1":
        with contextlib.suppress(KeyError), checkpoints:
            raise KeyError
    else:
        checkpoints.finish()
        time.sleep(2)  # process 0 ends the others with it
    print("done", flush=True)
    os._exit(0)
"""


def test_two_processes_save_and_restore_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [run_python(TWO_PROCESSES, port, rank, tmp_path) for rank in (0, 1)]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert output.splitlines()[-1] == "done"
        assert "orbax" not in output.lower()
    folder = tmp_path / "checkpoints"
    assert complete_steps(folder) == [2, 3]
    sharding = make_state(1).step.sharding
    struct = {"x": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)}
    restored = Checkpoints.open_for_reading(tmp_path).restore(2, struct)
    np.testing.assert_array_equal(restored["x"], np.arange(32.0).reshape(8, 4) * 2)
