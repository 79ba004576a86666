"""The pieces of a block: activations, norms, and linear layers with their adapters.

Each parameter is boxed with the names of its axes; what they mean on a mesh is `sharding.py`'s.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_sft.model.lora import Adapters
from jax_sft.model.types import Norm
from jax_sft.sharding import merge_tokens

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How the numbers are computed, apart from what the config says that they mean.

    Attributes:
        dtype: of activations and matrix products; norms, softmax and sums are float32.
        param_dtype: of the parameters; adapters are float32.
        remat: a name in `decoder.REMAT_POLICIES`.
        attention: backend, as `attention.choose_backend` returns it.
        dropout: whether dropout rates apply (a "dropout" key is then needed).
        adapters: what is trained beside the kernels, or None.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    dropout: bool = False
    adapters: Adapters | None = None


class NormLayer(nn.Module):
    """A norm over the last axes of x, in float32.

    Attributes:
        norm: its kind.
        shape: of scale and bias.
        axes: their logical axes.
        num_axes: how many of x's last axes are one vector.
        numerics: dtypes.
    """

    norm: Norm
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    numerics: Numerics
    num_axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x, normalised, in the compute dtype."""
        norm, over = self.norm, tuple(range(-self.num_axes, 0))
        x = x.astype(jnp.float32)
        if norm.kind == "layer":
            x = x - jnp.mean(x, axis=over, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=over, keepdims=True) + norm.eps)
        if norm.scale:
            start = nn.initializers.constant(1.0 - norm.scale_offset)
            x = x * broadcast(self._param("scale", start) + norm.scale_offset, x)
        if norm.bias:
            x = x + broadcast(self._param("bias", nn.initializers.zeros), x)
        return x.astype(self.numerics.dtype)

    def _param(self, name: str, init: Callable) -> jax.Array:
        param = self.param(name, named(init, *self.axes), self.shape, self.numerics.param_dtype)
        return param.astype(jnp.float32)


def kept(product_NO: jax.Array) -> jax.Array:
    """Names what some of `decoder.REMAT_POLICIES` keep for the backward pass."""
    return checkpoint_name(product_NO, "product")


class Low(NamedTuple):
    """What layers that share an adapter's A take from the first of them.

    Attributes:
        a_IR: A, float32.
        x_NI: the input, after dropout.
        low_NR: x·A.
    """

    a_IR: jax.Array
    x_NI: jax.Array
    low_NR: jax.Array


class Linear(nn.Module):
    """Sums the last axes of x with the first of a kernel; adds a bias and an adapter.

    Attributes:
        shape: of the kernel, inputs before outputs.
        axes: logical axes of the kernel.
        num_inputs: leading axes of the kernel that are summed over.
        init_std: standard deviation of random weights.
        numerics: dtypes and adapters.
        bias: whether it has one, on the kernel's other axes.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    num_inputs: int
    init_std: float
    numerics: Numerics
    bias: bool

    @nn.compact
    def __call__(self, x: jax.Array, low: Low | None = None) -> tuple[jax.Array, Low | None]:
        """Takes x [B, T, *inputs] to [B, T, *outputs].

        Args:
            x: the input.
            low: of the layer that this one shares A with (see `Adapters.shared`).

        Returns:
            The output; and what others may share, where this layer has an adapter.
        """
        dtype, adapters = self.numerics.dtype, self.numerics.adapters
        init = nn.initializers.normal(self.init_std)
        kernel = self._param("kernel", init, self.shape, self.axes)
        outputs, output_axes = self.shape[self.num_inputs :], self.axes[self.num_inputs :]
        kernel_IO = kernel.astype(dtype).reshape(math.prod(self.shape[: self.num_inputs]), -1)
        x_NI = merge_tokens(x.reshape(*x.shape[:2], -1))
        y_NO = x_NI @ kernel_IO
        if adapters is None or "/".join(self.path[-2:]) not in adapters.targets:
            y_NO, low = kept(y_NO), None
        else:
            y_NO, low = self._adapt(adapters, x_NI, y_NO, kernel, low)
        y = y_NO.reshape(*x.shape[:2], *outputs)
        if self.bias:
            axes = tuple("norm" if axis == "embed" else axis for axis in output_axes)
            bias = self._param("bias", nn.initializers.zeros, outputs, axes)
            y = y + broadcast(bias.astype(dtype), y)
        return y, low

    def _adapt(
        self,
        adapters: Adapters,
        x_NI: jax.Array,
        y_NO: jax.Array,
        kernel: jax.Array,
        low: Low | None,
    ) -> tuple[jax.Array, Low]:
        """Returns x·W and what the adapter adds to it; and x·A, with what it is made of."""
        inputs, outputs = self.shape[: self.num_inputs], self.shape[self.num_inputs :]
        input_axes, output_axes = self.axes[: self.num_inputs], self.axes[self.num_inputs :]
        rank, scale, dtype = adapters.rank, adapters.scale, x_NI.dtype
        rate = adapters.dropout if self.numerics.dropout else 0.0
        if low is None:
            shape, axes = (*inputs, rank), (*input_axes, None)
            a = self._param("lora_a", _init_a(adapters, inputs), shape, axes, jnp.float32)
            a_IR = a.reshape(-1, rank)
            if rate:
                x_NI = nn.Dropout(rate, deterministic=False)(x_NI)
            low = Low(a_IR, x_NI, kept(x_NI @ a_IR.astype(dtype)))
        shape, axes = (rank, *outputs), (None, *output_axes)
        b = self._param("lora_b", nn.initializers.zeros, shape, axes, jnp.float32)
        b_RO = b.reshape(rank, -1)
        added_NO = scale * (low.low_NR @ b_RO.astype(dtype))
        if not adapters.dora:
            return kept(y_NO + added_NO), low
        magnitude = self._param(
            "lora_magnitude", nn.initializers.ones, outputs, output_axes, jnp.float32
        )
        # The norm is a constant to the gradient (DoRA, section 4.3). It and the magnitude's share
        # of it are in float32: their distance from 1 is what is learned.
        kernel_IO = kernel.reshape(-1, b_RO.shape[1])
        whole_IO = kernel_IO.astype(jnp.float32) + scale * (low.a_IR @ b_RO)
        norm_O = jax.lax.stop_gradient(jnp.linalg.norm(whole_IO, axis=0))
        y_NO = kept(y_NO)
        plain_NO = kept(low.x_NI @ kernel_IO.astype(dtype)) if rate else y_NO
        share = broadcast(magnitude.reshape(-1) / norm_O, plain_NO)
        turned_NO = (share - 1).astype(dtype) * plain_NO + share.astype(dtype) * added_NO
        return y_NO + turned_NO, low

    def _param(
        self, name: str, init: Callable, shape: tuple, axes: tuple, dtype: Any = None
    ) -> jax.Array:
        return self.param(name, named(init, *axes), shape, dtype or self.numerics.param_dtype)


class Kernel(nn.Module):
    """A kernel by itself, for products that `Linear` does not make.

    Attributes:
        shape: its shape.
        axes: its logical axes.
        init_std: standard deviation of random weights.
        numerics: dtypes.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init_std: float
    numerics: Numerics

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns it in the compute dtype."""
        init = named(nn.initializers.normal(self.init_std), *self.axes)
        kernel = self.param("kernel", init, self.shape, self.numerics.param_dtype)
        return kernel.astype(self.numerics.dtype)


class NamedAxes(nn.Partitioned):
    """A parameter with the names of its axes."""

    def unbox(self, apply_constraint: bool = True) -> Any:
        """Returns the array; flax would look for the names on the mesh."""
        return self.value


def named(init: Callable, *axes: str | None) -> Callable:
    """Returns the initializer, its result boxed with the names of its axes."""
    return lambda *args: NamedAxes(init(*args), axes)


def broadcast(x: jax.Array, y: jax.Array) -> jax.Array:
    """Gives x leading axes of size 1 until it has as many as y."""
    return x.reshape((1,) * (y.ndim - x.ndim) + x.shape)


def _init_a(adapters: Adapters, inputs: tuple[int, ...]) -> Callable:
    if adapters.init_std is not None:
        return nn.initializers.normal(adapters.init_std)
    bound = 1 / math.sqrt(math.prod(inputs))

    def uniform(key: jax.Array, shape: tuple, dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return uniform
