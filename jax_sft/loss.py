"""Cross-entropy from hidden states, without ever holding the logits of a whole batch.

In: hidden states, the vocabulary, shifted targets, weights. Out: the weighted sum of losses
and the sum of weights; whoever calls divides, once, when every sum is in. Tokens go in chunks,
and a chunk's gradient is made while its logits are there, so that training multiplies with the
vocabulary three times (logits, and the gradients of both factors) and keeps no logits. Trained
tokens are moved to the front of their row, and what is left behind them, such as prompts, is
never multiplied with the vocabulary at all:

    weights      0 0 1 1 0 0 1 0        in the data's order
    moved        1 1 1|0 0 0|0 0        chunks of three: one of three is computed
"""

import functools

import jax
import jax.numpy as jnp

CHUNK_LEN = 64  # tokens of each row at a time


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
    num_tokens = targets_BT.shape[1]
    chunk_len = min(CHUNK_LEN, num_tokens)
    order_BT = jnp.argsort(weights_BT == 0, axis=1, stable=True)

    def arrange(x: jax.Array) -> jax.Array:
        """Trained tokens first, in rows of a multiple of chunk_len."""
        order = order_BT.reshape(order_BT.shape + (1,) * (x.ndim - 2))
        moved = jnp.take_along_axis(x, order, axis=1)
        return jnp.pad(moved, ((0, 0), (0, -num_tokens % chunk_len)) + ((0, 0),) * (x.ndim - 2))

    num_trained = jnp.max(jnp.sum(weights_BT != 0, axis=1))
    loss_sum = _loss_sum(
        (chunk_len, vocab_size, softcap, z_loss, label_smoothing),
        arrange(hidden_BTD),
        vocabulary_VD,
        jnp.zeros((0,)) if bias_V is None else bias_V,
        arrange(targets_BT),
        arrange(weights_BT),
        -(-num_trained // chunk_len),
    )
    return loss_sum, jnp.sum(weights_BT)


# What the loss is differentiated by, in the order of the arguments; an empty bias is none.
_HIDDEN, _VOCABULARY, _BIAS = range(3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sum(options, hidden_BTD, vocabulary_VD, bias_V, targets_BT, weights_BT, num_chunks):
    def add_chunk(i, loss_sum):
        hidden_BCD, *rest = _chunk(options, i, hidden_BTD, targets_BT, weights_BT)
        return loss_sum + _chunk_loss(options, hidden_BCD, vocabulary_VD, bias_V, *rest)

    return jax.lax.fori_loop(0, num_chunks, add_chunk, jnp.float32(0))


def _loss_sum_forward(options, *inputs):
    """Makes loss and gradients in one pass; what is not differentiated costs nothing."""
    values = [x.value for x in inputs]
    hidden_BTD, vocabulary_VD, bias_V, targets_BT, weights_BT, num_chunks = values
    wanted = tuple(i for i in range(3) if inputs[i].perturbed)

    def add_chunk(i, carry):
        loss_sum, grads = carry
        hidden_BCD, *rest = _chunk(options, i, hidden_BTD, targets_BT, weights_BT)

        def chunk_loss(*factors):
            return _chunk_loss(options, *factors, *rest)

        grad_fn = jax.value_and_grad(chunk_loss, argnums=wanted)
        loss, found = grad_fn(hidden_BCD, vocabulary_VD, bias_V)
        grads = dict(grads)
        for which, grad in zip(wanted, found, strict=True):
            if which == _HIDDEN:
                start = i * options[0]
                update = jax.lax.dynamic_update_slice_in_dim
                grads[which] = update(grads[which], grad, start, axis=1)
            else:
                grads[which] = grads[which] + grad.astype(jnp.float32)
        return loss_sum + loss, grads

    zeros = {
        _HIDDEN: jnp.zeros_like(hidden_BTD),
        _VOCABULARY: jnp.zeros(vocabulary_VD.shape, jnp.float32),
        _BIAS: jnp.zeros(bias_V.shape, jnp.float32),
    }
    start = (jnp.float32(0), {which: zeros[which] for which in wanted})
    loss_sum, grads = jax.lax.fori_loop(0, num_chunks, add_chunk, start)
    like = tuple(jnp.zeros((), x.dtype) for x in (hidden_BTD, vocabulary_VD, bias_V))
    return loss_sum, (grads, like)


def _loss_sum_backward(options, residuals, d_loss):
    grads, like = residuals
    scaled = {which: (d_loss * grad).astype(like[which].dtype) for which, grad in grads.items()}
    return *(scaled.get(which) for which in range(3)), None, None, None


_loss_sum.defvjp(_loss_sum_forward, _loss_sum_backward, symbolic_zeros=True)


def _chunk(options, i, *arrays):
    chunk_len = options[0]
    return tuple(jax.lax.dynamic_slice_in_dim(x, i * chunk_len, chunk_len, axis=1) for x in arrays)


def _chunk_loss(options, hidden_BCD, vocabulary_VD, bias_V, targets_BC, weights_BC):
    _, vocab_size, softcap, z_loss, label_smoothing = options
    logits_BCV = jnp.einsum(
        "BCD,VD->BCV",
        hidden_BCD,
        vocabulary_VD.astype(hidden_BCD.dtype),
        preferred_element_type=jnp.float32,
    )
    if bias_V.size:
        logits_BCV = logits_BCV + bias_V.astype(jnp.float32)[None, None]
    if softcap is not None:
        logits_BCV = softcap * jnp.tanh(logits_BCV / softcap)
    is_real_11V = jnp.arange(logits_BCV.shape[-1])[None, None] < vocab_size
    if vocab_size < logits_BCV.shape[-1]:
        logits_BCV = jnp.where(is_real_11V, logits_BCV, -jnp.inf)
    logsumexp_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    loss_BC = logsumexp_BC - (1.0 - label_smoothing) * target_BC
    if label_smoothing:
        sum_BC = jnp.sum(logits_BCV, axis=-1, where=is_real_11V)
        loss_BC = loss_BC - label_smoothing / vocab_size * sum_BC
    if z_loss:
        loss_BC = loss_BC + z_loss * jnp.square(logsumexp_BC)
    return jnp.sum(loss_BC * weights_BC)
