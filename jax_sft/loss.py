"""Cross-entropy from hidden states, without ever holding the logits of a whole batch.

In: hidden states, the vocabulary, shifted targets, weights. Out: the weighted sum of losses
and the sum of weights; whoever calls divides, once, when every sum is in. Tokens go in chunks,
and a chunk's gradient is made while its logits are there, so that training multiplies with the
vocabulary three times (logits, and the gradients of both factors) and keeps no logits. A
device's trained tokens, of all its rows, are moved to the front, and what is left behind them,
such as prompts, is never multiplied with the vocabulary at all:

    weights      0 0 1 1 0 0 1 0        in the data's order
    moved        1 1 1|0 0 0|0 0        chunks of three: one of three is computed

Each device has the rows that are its own and its part of the vocabulary: the vocabulary is
gathered once, and its gradient is summed over the devices once, in float32, behind the chunks.
"""

import functools

import jax
import jax.numpy as jnp

from jax_sft.sharding import Out, map_over_devices, max_over, part_index, sum_over

_CHUNK_LEN = 512  # tokens of a device, of all its rows, whose logits are in memory


def cross_entropy(
    hidden_BTD: jax.Array,
    vocabulary_VD: jax.Array,
    *,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    vocab_size: int,
    bias_V: jax.Array | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Sums the weighted next-token losses.

    A token's loss is -log softmax(vocabulary · hidden + bias)[target], to which are added:
    `z_loss` · logsumexp² (PaLM, Chowdhery et al. 2022, section 5), which keeps logits small;
    `label_smoothing` e: the target's probability counts 1 - e, and e is spread evenly over the
    vocabulary (Szegedy et al. 2016, section 7).

    Args:
        hidden_BTD: any float dtype; the logits are float32.
        vocabulary_VD: rows from `vocab_size` on are padding and get no probability.
        targets_BT: int32, the token that follows.
        weights_BT: float32; 0 where a token is not trained.
        vocab_size: true size of the vocabulary, at most V.
        bias_V: added to the logits, or None.
        softcap: logits are cap · tanh(logit / cap); None for no cap.
        z_loss: factor, 0 for none.
        label_smoothing: e, in [0, 1).

    Returns:
        loss_sum: float32 scalar, the sum of weight · loss.
        weight_sum: float32 scalar, the sum of the weights.
    """
    loss_sum = _loss_sum(
        (vocab_size, vocabulary_VD.shape[0] > vocab_size, softcap, z_loss, label_smoothing),
        hidden_BTD,
        vocabulary_VD,
        bias_V,
        targets_BT,
        weights_BT,
    )
    return loss_sum, jnp.sum(weights_BT)


def find_chunk_len(num_tokens: int) -> int:
    """Returns how many of a device's tokens meet the vocabulary at a time."""
    return min(_CHUNK_LEN, num_tokens)


# What the loss is differentiated by, in the order of the arguments.
_HIDDEN, _VOCABULARY, _BIAS = range(3)
_TOKENS = ("batch", "tokens")
_AXES = {_HIDDEN: (*_TOKENS, None), _VOCABULARY: ("vocab", "embed"), _BIAS: ("vocab",)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sum(options, hidden_BTD, vocabulary_VD, bias_V, targets_BT, weights_BT):
    return _on_devices(options, (), hidden_BTD, vocabulary_VD, bias_V, targets_BT, weights_BT)[0]


def _loss_sum_forward(options, *inputs):
    """Makes loss and gradients in one pass; what is not differentiated costs nothing."""
    values = [None if x is None else x.value for x in inputs]
    wanted = tuple(i for i in range(3) if inputs[i] is not None and inputs[i].perturbed)
    loss_sum, *grads = _on_devices(options, wanted, *values)
    like = tuple(None if x is None else jnp.zeros((), x.dtype) for x in values[:3])
    return loss_sum, (dict(zip(wanted, grads, strict=True)), like)


def _loss_sum_backward(options, residuals, d_loss):
    grads, like = residuals
    scaled = {which: (d_loss * grad).astype(like[which].dtype) for which, grad in grads.items()}
    return *(scaled.get(which) for which in range(3)), None, None


_loss_sum.defvjp(_loss_sum_forward, _loss_sum_backward, symbolic_zeros=True)


def _on_devices(options, wanted, hidden_BTD, vocabulary_VD, bias_V, targets_BT, weights_BT):
    """Returns the loss, and the gradients by what is `wanted`."""
    of_grads = (Out(_AXES[i], () if i == _HIDDEN else _TOKENS) for i in wanted)
    return map_over_devices(
        functools.partial(_sums, options, wanted),
        hidden_BTD,
        vocabulary_VD.astype(hidden_BTD.dtype),
        bias_V,
        targets_BT,
        weights_BT,
        in_axes=((*_TOKENS, None), ("vocab", None), ("vocab",), _TOKENS, _TOKENS),
        out=(Out((), _TOKENS), *of_grads),
    )


def _sums(options, wanted, hidden_BTD, vocabulary_VD, bias_V, targets_BT, weights_BT):
    """Sums one device's losses, and their gradients."""
    num_tokens = targets_BT.size
    chunk_len = find_chunk_len(num_tokens)
    weights_N = weights_BT.reshape(-1)
    order_N = jnp.argsort(weights_N == 0, stable=True)

    def arrange(x_BT: jax.Array) -> jax.Array:
        """All rows as one, the trained tokens first, in a multiple of chunk_len."""
        moved = jnp.asarray(x_BT).reshape(num_tokens, *x_BT.shape[2:])[order_N]
        return jnp.pad(moved, ((0, -num_tokens % chunk_len),) + ((0, 0),) * (moved.ndim - 1))

    tokens = [arrange(x) for x in (hidden_BTD, targets_BT, weights_BT)]

    def add_chunk(i, sums):
        loss_sum, grads = sums
        start = i * chunk_len
        chunk = [jax.lax.dynamic_slice_in_dim(x, start, chunk_len) for x in tokens]
        loss, found = _chunk_sums(options, wanted, vocabulary_VD, bias_V, *chunk)
        grads = dict(grads)
        for which, grad in found.items():
            if which == _HIDDEN:
                grads[which] = jax.lax.dynamic_update_slice_in_dim(grads[which], grad, start, 0)
            else:
                grads[which] = grads[which] + grad
        return loss_sum + loss, grads

    zeros = {
        _HIDDEN: jnp.zeros_like(tokens[0]),
        _VOCABULARY: jnp.zeros(vocabulary_VD.shape, jnp.float32),
        _BIAS: jnp.zeros(0 if bias_V is None else bias_V.shape, jnp.float32),
    }
    num_chunks = -(-jnp.sum(weights_N != 0) // chunk_len)
    none = (jnp.float32(0), {which: zeros[which] for which in wanted})
    loss_sum, grads = jax.lax.fori_loop(0, num_chunks, add_chunk, none)
    if _HIDDEN in grads:
        d_hidden_ND = grads[_HIDDEN][jnp.argsort(order_N)]
        grads[_HIDDEN] = d_hidden_ND.reshape(hidden_BTD.shape)
    return loss_sum, *(grads[which] for which in wanted)


def _chunk_sums(options, wanted, vocabulary_VD, bias_V, hidden_ND, targets_N, weights_N):
    """Sums the losses of a chunk of tokens, and their gradients, over the whole vocabulary."""
    vocab_size, is_padded, softcap, z_loss, label_smoothing = options
    num_here = vocabulary_VD.shape[0]
    first = part_index("vocab") * num_here
    is_real_1V = (first + jnp.arange(num_here) < vocab_size)[None]
    logits_NV = jnp.einsum(
        "ND,VD->NV", hidden_ND, vocabulary_VD, preferred_element_type=jnp.float32
    )
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.astype(jnp.float32)[None]
    if softcap is not None:
        logits_NV = softcap * jnp.tanh(logits_NV / softcap)
    real_NV = jnp.where(is_real_1V, logits_NV, -jnp.inf) if is_padded else logits_NV
    largest_N = max_over(jnp.max(real_NV, axis=-1), "vocab")
    exp_NV = jnp.exp(real_NV - largest_N[:, None])
    total_N = sum_over(jnp.sum(exp_NV, axis=-1), "vocab")
    # Of the targets, one device in a row of `tensor` has each.
    here_N = targets_N - first
    found_N = jnp.take_along_axis(logits_NV, jnp.clip(here_N, 0, num_here - 1)[:, None], 1)[:, 0]
    is_here_N = (here_N >= 0) & (here_N < num_here)
    target_N = sum_over(jnp.where(is_here_N, found_N, 0.0), "vocab")
    logsumexp_N = largest_N + jnp.log(total_N)
    loss_N = logsumexp_N - (1.0 - label_smoothing) * target_N
    if label_smoothing:
        sum_N = sum_over(jnp.sum(logits_NV, axis=-1, where=is_real_1V), "vocab")
        loss_N = loss_N - label_smoothing / vocab_size * sum_N
    if z_loss:
        loss_N = loss_N + z_loss * jnp.square(logsumexp_N)
    loss_sum = jnp.sum(loss_N * weights_N)
    if not wanted:
        return loss_sum, {}
    # The derivative of each term by the logits: softmax, twice z · logsumexp · softmax, and what
    # the target and the smoothing take off.
    factor_N = weights_N * (1.0 + 2.0 * z_loss * logsumexp_N) / total_N
    d_logits_NV = exp_NV * factor_N[..., None]
    is_target_NV = jnp.arange(num_here)[None] == here_N[:, None]
    taken_NV = jnp.where(is_target_NV, 1.0 - label_smoothing, 0.0)
    if label_smoothing:
        taken_NV = taken_NV + jnp.where(is_real_1V, label_smoothing / vocab_size, 0.0)
    d_logits_NV = d_logits_NV - taken_NV * weights_N[..., None]
    if softcap is not None:
        d_logits_NV = d_logits_NV * (1.0 - jnp.square(logits_NV / softcap))
    found = {_BIAS: jnp.sum(d_logits_NV, axis=0)} if _BIAS in wanted else {}
    d_logits_NV = d_logits_NV.astype(hidden_ND.dtype)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if _HIDDEN in wanted:
        d_hidden_ND = sum_over(dot("NV,VD->ND", d_logits_NV, vocabulary_VD), "vocab")
        found[_HIDDEN] = d_hidden_ND.astype(hidden_ND.dtype)
    if _VOCABULARY in wanted:
        found[_VOCABULARY] = dot("NV,ND->VD", d_logits_NV, hidden_ND)
    return loss_sum, found
