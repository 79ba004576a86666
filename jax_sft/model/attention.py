"""attend(): causal attention within segments, with one meaning and a backend a platform.

In: queries, keys, values, and for each of them a position and a segment. Out: for each query
the average of the values that it may see. A query sees a key of its own segment that does not
come later, and nothing else: so packed examples never meet, and the mask is made from
positions and segments alone, never from token ids.

    segment    1 1 1 2 2 0        key  1 1 1 2 2 0
    position   0 1 2 0 1 0      query
                                  1    x . . . . .
                                  1    x x . . . .
                                  1    x x x . . .
                                  2    . . . x . .
                                  2    . . . x x .
                                  0    . . . . . x      (padding sees itself, not NaN)

Every device computes its own rows and heads, and, where rows are split over devices, its own
queries, for which it gathers the keys and values of the whole rows.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sft.model.attention_cudnn import attend_by_cudnn
from jax_sft.model.attention_splash import TILE, attend_by_splash, make_kernel
from jax_sft.model.attention_xla import attend_in_blocks, pad_tokens
from jax_sft.model.types import Alibi, DecoderConfig
from jax_sft.sharding import Out, map_over_devices, named_sharding, num_shards

BACKENDS = ("auto", "xla", "splash", "cudnn")
_BEST = {"tpu": "splash", "gpu": "cudnn"}
# What the axes of each argument mean: the queries' tokens may be split, keys and values are whole.
_Q, _KV = ("batch", "tokens", "heads", None), ("batch", None, "kv_heads", None)
_IDS = (("batch", "tokens"), ("batch", None))


def choose_backend(
    asked: str, *, platform: str, config: DecoderConfig, dtype: Any
) -> tuple[str, str]:
    """Returns the backend that "auto" means, or the one that was asked for, and a reason.

    Args:
        asked: one of `BACKENDS`.
        platform: "cpu", "gpu" or "tpu".
        config: of the decoder whose features it must have.
        dtype: of its queries.

    Returns:
        A name for `attend`, and why it is not the platform's own, or "".

    Raises:
        ValueError: the name is unknown, or the backend asked for cannot do what is needed.
    """
    if asked not in BACKENDS:
        raise ValueError(f"model.attention={asked!r} is unknown: choose one of {BACKENDS}")
    name = _BEST.get(platform, "xla") if asked == "auto" else asked
    lack = _lack(name, platform=platform, config=config, dtype=dtype)
    if lack and asked != "auto":
        raise ValueError(f"model.attention={asked!r} {lack}: choose auto or xla")
    if lack:
        return "xla", f"{name} {lack}"
    return ("splash_interpreted" if name == "splash" and platform == "cpu" else name), ""


def _lack(name: str, *, platform: str, config: DecoderConfig, dtype: Any) -> str:
    """What a backend lacks for a model; "" for nothing."""
    if name == "xla":
        return ""
    if config.alibi is not None:
        return "has no ALiBi"
    if config.attention_dropout:
        return "has no dropout of attention weights"
    if name == "splash":
        return "" if platform in ("tpu", "cpu") else f"is for TPUs, and this is a {platform}"
    if platform != "gpu":
        return f"is for NVIDIA GPUs, and this is a {platform}"
    if config.attention_softcap is not None:
        return "has no soft cap"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if config.head_width > 128 or config.head_width % 8:
        return f"has no heads of width {config.head_width}"
    return ""


def check_backend(name: str, *, config: DecoderConfig, dtype: Any) -> str:
    """Compares a backend with "xla" on this machine: packed rows, forward and backward.

    What a kernel does depends on its library and its device, and a wrong mask shows in no error.

    Args:
        name: as `choose_backend` returned it.
        config: whose heads are compared.
        dtype: of the queries.

    Returns:
        What is wrong with it, or "".
    """
    # Of the first rows cuDNN is told where examples begin; one of the others has too many for it.
    # The last of each is padding.
    batches = (((170, 190, 1, 64, 87), (300, 212)), ((9,) * 50 + (62,), (300, 212)))
    shape = (2, 512)
    *keys, direction = jax.random.split(jax.random.key(0), 4)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    shapes = [(*shape, num_heads, config.head_width) for num_heads in heads]
    qkv = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]

    @functools.partial(jax.jit, static_argnums=0)
    def out_and_grads(backend: str, segment_ids_BT, positions_BT) -> list[jax.Array]:
        attended = functools.partial(
            attend,
            q_positions_BT=positions_BT,
            k_positions_BS=positions_BT,
            q_segment_ids_BT=segment_ids_BT,
            k_segment_ids_BS=segment_ids_BT,
            scale=config.head_width**-0.5,
            window=min((layer.window for layer in config.layers if layer.window), default=None),
            softcap=config.attention_softcap,
            backend=backend,
        )
        out, backward = jax.vjp(attended, *qkv)
        grads = backward(jax.random.normal(direction, out.shape, out.dtype))
        return [x.astype(jnp.float32) for x in (out, *grads)]

    # A few roundings of numbers of about 1; what a wrong mask changes is about 1 itself.
    tolerance = 16 * float(jnp.finfo(dtype).eps)
    for rows in batches:
        segment_ids_BT, positions_BT = np.zeros((2, *shape), np.int32)
        for row, lengths in enumerate(rows):
            segment_ids_BT[row] = np.repeat([*range(1, len(lengths)), 0], lengths)
            positions_BT[row] = np.concatenate([np.arange(length) for length in lengths])
        try:
            found = out_and_grads(name, segment_ids_BT, positions_BT)
        except (NotImplementedError, RuntimeError, ValueError) as error:  # what JAX and XLA raise
            return f"fails here: {str(error).splitlines()[0]}"
        expected = out_and_grads("xla", segment_ids_BT, positions_BT)
        errors = [np.abs(np.subtract(*pair)) for pair in zip(found, expected, strict=True)]
        if not all((error <= tolerance).all() for error in errors):  # which NaN is not
            return f"gives other numbers here, by up to {max(map(np.max, errors)):.2g}"
    return ""


def attend(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segment_ids_BT: jax.Array,
    k_segment_ids_BS: jax.Array,
    scale: float | jax.Array,
    window: int | None = None,
    softcap: float | None = None,
    alibi: Alibi | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    backend: str = "xla",
) -> jax.Array:
    """Averages the values that each query may see, weighted by softmax(scale · q·k).

    Scores and softmax are in float32, and no [B, H, T, S] array of them is made. Where T equals
    S the queries and keys must be the same tokens in the same order, with positions that rise by
    1 along each segment.

    Args:
        q_BTHC: queries, any float dtype.
        k_BSKC: keys; K divides H, and each key head serves H / K query heads.
        v_BSKC: values.
        q_positions_BT: int32, the query's position within its segment.
        k_positions_BS: int32, the key's.
        q_segment_ids_BT: int32, from 0; a query sees keys of the same segment only.
        k_segment_ids_BS: int32.
        scale: factor on q·k.
        window: a query sees this many keys, its own among them; None for all before it.
        softcap: scores are cap · tanh(score / cap); None for no cap.
        alibi: what is added to the scores by distance, or None.
        dropout_rate: share of the weights set to 0 while training.
        dropout_key: PRNG key, needed where `dropout_rate` is above 0.
        backend: as `choose_backend` returns it; all but "xla" need T equal to S, and have
            neither `alibi` nor dropout.

    Returns:
        out_BTHC, in the dtype of the values.
    """
    T, H = q_BTHC.shape[1:3]
    S, K = k_BSKC.shape[1:3]
    if K % num_shards(jax.sharding.get_abstract_mesh(), "kv_heads"):
        # Too few to be split: each query head gets a copy of its own, which can be.
        k_BSKC, v_BSKC = (jnp.repeat(x, H // K, axis=2) for x in (k_BSKC, v_BSKC))
    qkv, ids = (q_BTHC, k_BSKC, v_BSKC), (q_segment_ids_BT, k_segment_ids_BS)
    slots_T = jnp.arange(T, dtype=jnp.int32) if T == S else None
    scale = jnp.asarray(scale, jnp.float32)
    if backend.startswith("splash"):
        interpret = backend == "splash_interpreted"
        return _attend_by_splash(*qkv, *ids, scale, window, softcap, interpret)
    if backend == "cudnn":
        return map_over_devices(
            functools.partial(attend_by_cudnn, window=window),
            *(*qkv, *ids, slots_T, scale),
            in_axes=(_Q, _KV, _KV, *_IDS, ("tokens",), ()),
            out=Out(_Q),
        )
    # A key a row and head, so that no mesh changes what is dropped.
    keys_BH = jax.random.split(dropout_key, (len(q_BTHC), H)) if dropout_rate else None
    bias_BHS = None if alibi is None else _alibi_bias(alibi, k_positions_BS)
    return map_over_devices(
        functools.partial(
            attend_in_blocks, window=window, softcap=softcap, dropout_rate=dropout_rate
        ),
        *(*qkv, *ids, q_positions_BT, k_positions_BS, slots_T, bias_BHS, scale, keys_BH),
        in_axes=(
            *(_Q, _KV, _KV, *_IDS, *_IDS),
            *(("tokens",), ("batch", "heads", None), (), ("batch", "heads")),
        ),
        out=Out(_Q),
    )


def _attend_by_splash(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    q_segment_ids_BT: jax.Array,
    k_segment_ids_BT: jax.Array,
    scale: jax.Array,
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> jax.Array:
    """Makes a kernel for each device's heads and queries, and rows of whole tiles."""
    T, H = q_BTHC.shape[1:3]
    mesh = jax.sharding.get_abstract_mesh()
    num_token_shards, num_head_shards = (num_shards(mesh, name) for name in ("tokens", "heads"))
    # The kernel splits its mask's shards once more, by as many.
    room = -T % math.lcm(TILE * num_token_shards, num_token_shards**2)
    kernel = make_kernel(
        row_len=T + room,
        num_heads=H // num_head_shards,
        num_shards=num_token_shards,
        window=window,
        softcap=softcap,
        interpret=interpret,
    )
    parts = None
    if num_token_shards > 1:
        parts = kernel.manual_sharding_spec(named_sharding(mesh, None, "tokens"))
    out_BTHC = map_over_devices(
        attend_by_splash,
        kernel,
        *(pad_tokens(x, room) for x in (q_BTHC, k_BTKC, v_BTKC)),
        *(pad_tokens(ids, room, -1) for ids in (q_segment_ids_BT, k_segment_ids_BT)),
        scale,
        in_axes=(parts, _Q, _KV, _KV, *_IDS, ()),
        out=Out(_Q),
    )
    return out_BTHC[:, :T]


def _alibi_bias(alibi: Alibi, positions_BS: jax.Array) -> jax.Array:
    """Returns bias_BHS; by the key's position alone, since softmax ignores what all keys share."""

    def rounded(x: jax.Array) -> jax.Array:
        # A cast to bfloat16 and back may be optimised away; this may not.
        return jax.lax.reduce_precision(x, 8, 7) if alibi.bfloat16 else x

    slopes_H = rounded(jnp.array(alibi.slopes, jnp.float32))
    positions_BS = rounded(positions_BS.astype(jnp.float32))
    return alibi.factor * rounded(slopes_H[None, :, None] * positions_BS[:, None, :])
