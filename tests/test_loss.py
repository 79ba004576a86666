"""The chunked loss against plain float64 arithmetic over full logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sft.loss import cross_entropy, find_chunk_len

B, D, V, PADDED = 2, 6, 11, 13
CHUNK_LEN = find_chunk_len(10_000)
OPTIONS = {
    "plain": {},
    "z-loss": dict(z_loss=0.1),
    "smoothing": dict(label_smoothing=0.2),
    "both": dict(z_loss=0.1, label_smoothing=0.2),
    "softcap": dict(softcap=2.0, z_loss=0.1),
}


def draw(num_tokens, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((B, num_tokens, D)).astype(np.float32)
    vocabulary = rng.standard_normal((PADDED, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, num_tokens), dtype=np.int32)
    weights = (rng.random((B, num_tokens)) < 0.6) * rng.random((B, num_tokens))
    return hidden, vocabulary, targets, weights.astype(np.float32)


def naive(
    hidden, vocabulary, targets, weights, *, bias=0.0, softcap=None, z_loss=0.0, label_smoothing=0.0
):
    """Loss sum and its gradients for hidden, vocabulary and bias, in float64."""
    hidden, real = np.float64(hidden), np.float64(vocabulary[:V])
    logits, slope = hidden @ real.T + bias, 1.0
    if softcap is not None:
        slope = 1 - np.tanh(logits / softcap) ** 2
        logits = softcap * np.tanh(logits / softcap)
    highest = logits.max(-1, keepdims=True)
    logsumexp = np.log(np.exp(logits - highest).sum(-1, keepdims=True)) + highest
    probabilities = np.exp(logits - logsumexp)
    wanted = (1 - label_smoothing) * np.eye(V)[targets] + label_smoothing / V
    loss = -(wanted * (logits - logsumexp)).sum(-1) + z_loss * logsumexp[..., 0] ** 2
    d_logits = probabilities * (1 + 2 * z_loss * logsumexp) - wanted
    d_logits = d_logits * weights[..., None] * slope
    d_vocabulary = np.zeros(vocabulary.shape)
    d_vocabulary[:V] = np.einsum("BTV,BTD->VD", d_logits, hidden)
    return (loss * weights).sum(), d_logits @ real, d_vocabulary, d_logits.sum((0, 1))


def loss_sum(hidden, vocabulary, targets, weights, **options):
    return cross_entropy(
        hidden, vocabulary, targets_BT=targets, weights_BT=weights, vocab_size=V, **options
    )[0]


# Float32 sums of up to 300 terms; gradients are about 1.
CLOSE = dict(rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("num_tokens", [5, CHUNK_LEN + 22])
def test_loss_and_gradients_are_those_of_full_logits(options, num_tokens):
    inputs = draw(num_tokens)
    fn = jax.jit(jax.value_and_grad(functools.partial(loss_sum, **options), argnums=(0, 1)))
    loss, (d_hidden, d_vocabulary) = fn(*inputs)
    expected, expected_hidden, expected_vocabulary, _ = naive(*inputs, **options)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    np.testing.assert_allclose(d_hidden, expected_hidden, **CLOSE)
    np.testing.assert_allclose(d_vocabulary, expected_vocabulary, **CLOSE)
    assert not np.asarray(d_vocabulary)[V:].any(), "the vocabulary's padding gets a gradient"


@pytest.mark.parametrize("argnum", [0, 1], ids=["hidden", "vocabulary"])
def test_the_gradient_of_one_factor_alone(argnum):
    inputs = draw(5)
    got = jax.jit(jax.grad(loss_sum, argnums=argnum))(*inputs)
    np.testing.assert_allclose(got, naive(*inputs)[1 + argnum], **CLOSE)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_bias_on_the_logits(softcap):
    inputs = draw(5)
    bias = np.random.default_rng(1).standard_normal(PADDED).astype(np.float32)

    def with_bias(bias, *inputs):
        return loss_sum(*inputs, bias_V=bias, softcap=softcap)

    got = jax.jit(jax.value_and_grad(with_bias, argnums=(0, 1)))(bias, *inputs)
    loss, d_hidden, _, d_bias = naive(*inputs, bias=bias[:V], softcap=softcap)
    np.testing.assert_allclose(got[0], loss, rtol=2e-6)
    np.testing.assert_allclose(got[1][0][:V], d_bias, **CLOSE)
    np.testing.assert_allclose(got[1][1], d_hidden, **CLOSE)


def test_a_loss_without_gradients_and_a_scaled_gradient():
    inputs = draw(5)
    expected, expected_hidden, *_ = naive(*inputs)
    np.testing.assert_allclose(jax.jit(loss_sum)(*inputs), expected, rtol=2e-6)
    doubled = jax.jit(jax.grad(lambda *args: -2.0 * loss_sum(*args)))(*inputs)
    np.testing.assert_allclose(doubled, -2.0 * expected_hidden, **CLOSE)


def test_sums_are_sums_and_untrained_targets_do_not_count():
    hidden, vocabulary, targets, weights = draw(5)
    elsewhere = np.where(weights > 0, targets, (targets + 1) % V)
    kwargs = dict(weights_BT=weights, vocab_size=V)
    loss, weight = cross_entropy(hidden, vocabulary, targets_BT=targets, **kwargs)
    same, _ = cross_entropy(hidden, vocabulary, targets_BT=elsewhere, **kwargs)
    assert float(loss) == float(same)
    np.testing.assert_allclose(weight, weights.sum(dtype=np.float64), rtol=1e-6)


def test_a_loss_by_hand():
    """Logits (ln 2, 0) give the probabilities 2/3 and 1/3."""
    hidden = jnp.full((1, 2, 1), np.log(2.0))
    loss, weight = cross_entropy(
        hidden,
        jnp.array([[1.0], [0.0]]),
        targets_BT=jnp.array([[0, 1]]),
        weights_BT=jnp.array([[1.0, 2.0]]),
        vocab_size=2,
    )
    np.testing.assert_allclose(loss, np.log(3 / 2) + 2 * np.log(3), rtol=1e-6)
    assert float(weight) == 3.0


def test_logits_of_a_long_row_are_never_whole():
    num_tokens = 8 * CHUNK_LEN
    inputs = draw(num_tokens)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss_sum, argnums=(0, 1)))(*inputs)
    sizes = set()

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            sizes.update(np.prod(out.aval.shape, dtype=int) for out in eqn.outvars)
            for param in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(param, "jaxpr", param)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jaxpr.jaxpr)
    assert CHUNK_LEN * PADDED in sizes, "the walk does not see the chunks' logits"
    assert max(sizes) <= max(CHUNK_LEN * PADDED, B * num_tokens * D)
