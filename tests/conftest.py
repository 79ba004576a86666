"""What every test runs under: eight CPU devices, no network, no silent rank promotion.

`JAX_PLATFORMS=cuda` runs on a GPU what needs one device alone (docs/memory.md says which files).

What is cached in the user's home goes to a folder of the session instead, and so do compiled
programs, which tests and the processes they start have from each other. The variables must stand
before jax is imported, which pytest does only after this file; child processes inherit them.
Warnings are errors by pyproject.toml.
"""

import gc
import os
import tempfile

if os.environ.setdefault("JAX_PLATFORMS", "cpu") != "cpu":
    # Several processes share the GPU; float32 is float32; kernels are those that users get, of
    # those that give the same bits each time.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
    deterministic = "--xla_gpu_exclude_nondeterministic_ops=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {deterministic}"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Spares XLA's and LLVM's effort, which for small models is much of the time; 0 asks for it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=8"
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0" and "xla_backend_extra_options" not in flags:
    # XLA's older way to make LLVM's code of a fusion takes a third of the time. Where it knows no
    # other any more, the word means nothing to it.
    flags += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
os.environ["XLA_FLAGS"] = flags.strip()

# XLA runs a program's independent collectives at once, each holding a thread: with no more
# threads than devices, which is what it takes on a small machine, they wait for each other.
os.environ.setdefault("NPROC", "32")

_CACHE = tempfile.TemporaryDirectory(prefix="jax_sft_tests_")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
# Of the process that starts the others; what compiles faster than it is read is not kept.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(_CACHE.name, "compiled"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Cycles are looked for after every 700 objects, among all that libraries hold: 6% of the time.
gc.set_threshold(100_000)

import pytest  # noqa: E402


def pytest_unconfigure():
    _CACHE.cleanup()


@pytest.fixture
def no_leaked_tracers():
    """Makes a leaked tracer an error; jax then compiles slowly, so tests ask for it."""
    import jax

    with jax.checking_leaks():
        yield
