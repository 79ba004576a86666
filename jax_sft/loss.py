"""Cross-entropy from hidden states, without ever holding the logits of a whole batch.

In: hidden states, the vocabulary, shifted targets, weights. Out: the weighted sum of losses
and the sum of weights; whoever calls divides, once, when every sum is in. Tokens go in chunks,
and a chunk's gradient is made while its logits are there, so that training multiplies with the
vocabulary three times (logits, and the gradients of both factors) and keeps no logits.
"""

import functools

import jax
import jax.numpy as jnp

CHUNK_LEN = 128  # tokens of each row at a time


def cross_entropy(
    hidden_BTD: jax.Array,
    vocabulary_VD: jax.Array,
    *,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    vocab_size: int,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Sums the weighted next-token losses.

    A token's loss is -log softmax(vocabulary · hidden)[target], to which are added:
    `z_loss` · logsumexp² (PaLM, Chowdhery et al. 2022, section 5), which keeps logits small;
    `label_smoothing` e: the target's probability counts 1 - e, and e is spread evenly over the
    vocabulary (Szegedy et al. 2016, section 7).

    Args:
        hidden_BTD: any float dtype; the logits are float32.
        vocabulary_VD: rows from `vocab_size` on are padding and get no probability.
        targets_BT: int32, the token that follows.
        weights_BT: float32; 0 where a token is not trained.
        vocab_size: true size of the vocabulary, at most V.
        z_loss: factor, 0 for none.
        label_smoothing: e, in [0, 1).

    Returns:
        loss_sum: float32 scalar, the sum of weight · loss.
        weight_sum: float32 scalar, the sum of the weights.
    """
    num_tokens = targets_BT.shape[1]
    chunk_len = min(CHUNK_LEN, num_tokens)
    padding = -num_tokens % chunk_len

    def split(x: jax.Array) -> jax.Array:
        """[B, T, ...] to [chunks, B, chunk_len, ...]"""
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, chunk_len, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    loss_sum = _loss_sum(
        (vocab_size, z_loss, label_smoothing),
        split(hidden_BTD),
        vocabulary_VD,
        split(targets_BT),
        split(weights_BT),
    )
    return loss_sum, jnp.sum(weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sum(options, hidden_NBTD, vocabulary_VD, targets_NBT, weights_NBT):
    def add_chunk(loss_sum, chunk):
        hidden_BTD, targets_BT, weights_BT = chunk
        loss = _chunk_loss(options, hidden_BTD, vocabulary_VD, targets_BT, weights_BT)
        return loss_sum + loss, None

    chunks = (hidden_NBTD, targets_NBT, weights_NBT)
    return jax.lax.scan(add_chunk, jnp.float32(0), chunks)[0]


def _loss_sum_forward(options, hidden_NBTD, vocabulary_VD, targets_NBT, weights_NBT):
    """Makes loss and gradients in one pass; what is not differentiated costs nothing."""
    hidden_NBTD, d_hidden_wanted = hidden_NBTD.value, hidden_NBTD.perturbed
    vocabulary_VD, d_vocabulary_wanted = vocabulary_VD.value, vocabulary_VD.perturbed
    targets_NBT, weights_NBT = targets_NBT.value, weights_NBT.value
    wanted = tuple(i for i, want in enumerate((d_hidden_wanted, d_vocabulary_wanted)) if want)

    def add_chunk(carry, chunk):
        loss_sum, d_vocabulary_VD = carry
        hidden_BTD, targets_BT, weights_BT = chunk

        def chunk_loss(hidden_BTD, vocabulary_VD):
            return _chunk_loss(options, hidden_BTD, vocabulary_VD, targets_BT, weights_BT)

        loss, grads = jax.value_and_grad(chunk_loss, argnums=wanted)(hidden_BTD, vocabulary_VD)
        d_hidden_BTD = grads[0] if d_hidden_wanted else None
        if d_vocabulary_wanted:
            d_vocabulary_VD = d_vocabulary_VD + grads[-1].astype(jnp.float32)
        return (loss_sum + loss, d_vocabulary_VD), d_hidden_BTD

    zeros_VD = jnp.zeros(vocabulary_VD.shape, jnp.float32) if d_vocabulary_wanted else None
    (loss_sum, d_vocabulary_VD), d_hidden_NBTD = jax.lax.scan(
        add_chunk, (jnp.float32(0), zeros_VD), (hidden_NBTD, targets_NBT, weights_NBT)
    )
    dtype = jnp.zeros((), vocabulary_VD.dtype)
    return loss_sum, (d_hidden_NBTD, d_vocabulary_VD, dtype)


def _loss_sum_backward(options, residuals, d_loss):
    d_hidden_NBTD, d_vocabulary_VD, dtype = residuals
    if d_hidden_NBTD is not None:
        d_hidden_NBTD = (d_loss * d_hidden_NBTD).astype(d_hidden_NBTD.dtype)
    if d_vocabulary_VD is not None:
        d_vocabulary_VD = (d_loss * d_vocabulary_VD).astype(dtype.dtype)
    return d_hidden_NBTD, d_vocabulary_VD, None, None


_loss_sum.defvjp(_loss_sum_forward, _loss_sum_backward, symbolic_zeros=True)


def _chunk_loss(options, hidden_BTD, vocabulary_VD, targets_BT, weights_BT):
    vocab_size, z_loss, label_smoothing = options
    logits_BTV = jnp.einsum(
        "BTD,VD->BTV",
        hidden_BTD,
        vocabulary_VD.astype(hidden_BTD.dtype),
        preferred_element_type=jnp.float32,
    )
    is_real_11V = jnp.arange(logits_BTV.shape[-1])[None, None] < vocab_size
    if vocab_size < logits_BTV.shape[-1]:
        logits_BTV = jnp.where(is_real_11V, logits_BTV, -jnp.inf)
    logsumexp_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    loss_BT = logsumexp_BT - (1.0 - label_smoothing) * target_BT
    if label_smoothing:
        sum_BT = jnp.sum(logits_BTV, axis=-1, where=is_real_11V)
        loss_BT = loss_BT - label_smoothing / vocab_size * sum_BT
    if z_loss:
        loss_BT = loss_BT + z_loss * jnp.square(logsumexp_BT)
    return jnp.sum(loss_BT * weights_BT)
