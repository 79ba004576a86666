"""A mixture of experts: each token goes to a few of many MLPs, and their outputs are summed.

In: hidden states. Out: what is added to the residual stream; and, where asked for, how evenly
the router spread the tokens. Tokens are sorted by expert, so that each expert's are one block
of a ragged product, and none is dropped:

    token      a    b    c        sorted    b0  a1  c1  a2  c2  b3
    experts   1 2  0 3  2 1       blocks    1   2       2       1     tokens of each expert
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_sft.model.grouped_matmul import grouped_matmul
from jax_sft.model.layers import ACTIVATIONS, Kernel, Numerics, kept
from jax_sft.model.types import DecoderConfig
from jax_sft.sharding import Out, map_over_devices


class ExpertsLayer(nn.Module):
    """A router and its experts, each a gated MLP without biases."""

    config: DecoderConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """Returns what is added to the residual stream.

        Sows "balance" in the collection "losses": see `balance`.
        """
        c, n, experts = self.config, self.numerics, self.config.experts
        D, X, F = c.width, experts.num_experts, experts.mlp_width
        in_axes, out_axes = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        router_DX = Kernel((D, X), ("embed", "experts"), c.init_std, n, name="router")()
        gate_XDF = Kernel((X, D, F), in_axes, c.init_std, n, name="gate")()
        up_XDF = Kernel((X, D, F), in_axes, c.init_std, n, name="up")()
        down_XFD = Kernel((X, F, D), out_axes, c.residual_init_std, n, name="down")()
        dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        logits_BTX = kept(dot("BTD,DX->BTX", x_BTD, router_DX))
        probs_BTX = jax.nn.softmax(logits_BTX, axis=-1)
        weights_BTN, chosen_BTN = jax.lax.top_k(probs_BTX, experts.num_chosen)
        if experts.renormalise:
            weights_BTN = weights_BTN / jnp.sum(weights_BTN, axis=-1, keepdims=True)
        self.sow("losses", "balance", balance(probs_BTX, chosen_BTN, segment_ids_BT > 0))
        tokens = ("batch", "tokens", None)
        return map_over_devices(
            functools.partial(_mix, activation=c.activation),
            x_BTD,
            weights_BTN.astype(x_BTD.dtype),
            chosen_BTN,
            gate_XDF,
            up_XDF,
            down_XFD,
            in_axes=(
                tokens,
                tokens,
                tokens,
                (None, None, "mlp"),
                (None, None, "mlp"),
                (None, "mlp", None),
            ),
            out=Out(tokens, sum_over=("mlp",)),
        )


def balance(probs_BTX: jax.Array, chosen_BTN: jax.Array, is_real_BT: jax.Array) -> jax.Array:
    """How unevenly a row's tokens are spread over the experts: N when evenly, X at worst.

    The auxiliary loss of Fedus et al. 2021 ("Switch Transformers", equations 4 to 6), for
    tokens with N experts each: X · sum over experts of (choices a token) · (mean probability).
    It is taken row by row: products of means over a whole batch would not be the same when
    the batch is cut into microbatches.

    Args:
        probs_BTX: the router's probabilities.
        chosen_BTN: the experts that each token goes to.
        is_real_BT: False for padding, which does not count.

    Returns:
        balance_B, float32; 0 for a row of padding.
    """
    num_experts = probs_BTX.shape[-1]
    real_BT1 = is_real_BT[..., None].astype(jnp.float32)
    num_real_B1 = jnp.maximum(jnp.sum(real_BT1, axis=1), 1.0)
    chosen_BTX = jnp.sum(jax.nn.one_hot(chosen_BTN, num_experts), axis=2)
    share_BX = jnp.sum(chosen_BTX * real_BT1, axis=1) / num_real_B1
    mean_BX = jnp.sum(probs_BTX * real_BT1, axis=1) / num_real_B1
    return num_experts * jnp.sum(share_BX * mean_BX, axis=-1)


def _mix(
    x_BTD: jax.Array,
    weights_BTN: jax.Array,
    chosen_BTN: jax.Array,
    gate_XDF: jax.Array,
    up_XDF: jax.Array,
    down_XFD: jax.Array,
    *,
    activation: str,
) -> jax.Array:
    B, T, D = x_BTD.shape
    num_chosen = chosen_BTN.shape[-1]
    expert_M = chosen_BTN.reshape(-1)
    order_M = jnp.argsort(expert_M, stable=True)
    num_tokens_X = jnp.bincount(expert_M, length=gate_XDF.shape[0])
    x_MD = x_BTD.reshape(-1, D)[order_M // num_chosen]
    gate_MF = ACTIVATIONS[activation](grouped_matmul(x_MD, gate_XDF, num_tokens_X))
    up_MF = grouped_matmul(x_MD, up_XDF, num_tokens_X)
    out_MD = grouped_matmul(gate_MF * up_MF, down_XFD, num_tokens_X)
    # Back to the tokens' order: a gather, and not a sum in an order that varies.
    out_BTND = out_MD[jnp.argsort(order_M)].reshape(B, T, num_chosen, D)
    return jnp.sum(out_BTND * weights_BTN[..., None], axis=2)
