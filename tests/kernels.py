"""Which kernels of attention the tests run, and how near each comes to float32.

On CPU that is "xla" and the TPU's kernel, interpreted; with `JAX_PLATFORMS=cuda` it is "xla" and
cuDNN's, which computes in bfloat16.
"""

import jax

ON_GPU = jax.default_backend() == "gpu"
RUN_HERE = ("xla", "cudnn") if ON_GPU else ("xla", "splash")


def tolerance(backend: str, float32: float, bfloat16: float) -> float:
    """Returns what a backend may be off by."""
    return bfloat16 if backend == "cudnn" else float32


def dtype_of(backend: str) -> str:
    """Returns the dtype that a backend is given its queries in."""
    return "bfloat16" if backend == "cudnn" else "float32"
