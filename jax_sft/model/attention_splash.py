"""Attention by the splash kernel of JAX's Pallas, for TPUs.

In: queries, keys and values of one device, their segments, and a kernel that was made for their
lengths, heads, window and soft cap. Out: the averages. The kernel sees a row's order instead of
positions, which within a segment says the same. Rows are padded to whole tiles of 128 tokens by
who calls; where a row's tokens are on several devices, each has its part of the mask.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

TILE = 128  # lanes of a TPU's vector registers: tokens of a row come in multiples of it
_BLOCKS = (512, 256, 128)  # tokens a block, the largest that divides a row first


def make_kernel(
    *,
    row_len: int,
    num_heads: int,
    num_shards: int,
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> splash_attention_kernel.SplashAttentionKernel:
    """Builds the kernel of one device.

    Args:
        row_len: tokens of a row, a multiple of TILE · num_shards and of num_shards².
        num_heads: query heads on a device.
        num_shards: devices that the tokens of a row are split over.
        window: a query sees this many keys, its own among them; None for all before it.
        softcap: scores are cap · tanh(score / cap); None for no cap.
        interpret: run it as plain XLA, slowly, where there is no TPU.
    """
    shape = (row_len, row_len)
    if window is None:
        mask = splash.CausalMask(shape, shard_count=num_shards)
    else:
        mask = splash.LocalMask(shape, (window - 1, 0), offset=0, shard_count=num_shards)
    q_block = next(block for block in _BLOCKS if row_len // num_shards % block == 0)
    k_block = next(block for block in _BLOCKS if row_len % block == 0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=q_block,
            block_kv=k_block,
            block_q_dkv=q_block,
            block_kv_dkv=k_block,
            block_q_dq=q_block,
            block_kv_dq=k_block,
        ),
        head_shards=1,
        q_seq_shards=num_shards,
        attn_logits_soft_cap=softcap,
        # Kept for the backward pass where "attended" is (see `decoder.REMAT_POLICIES`).
        residual_checkpoint_name="attended",
        interpret=interpret,
    )


def attend_by_splash(
    kernel: splash_attention_kernel.SplashAttentionKernel,
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    q_segment_ids_BT: jax.Array,
    k_segment_ids_BS: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    """Averages the values that each query may see; see `attention.attend`.

    Args:
        kernel: what `make_kernel` returned, or this device's part of it.
        q_BTHC: queries.
        k_BSKC: keys of the whole rows.
        v_BSKC: values of the whole rows.
        q_segment_ids_BT: int32.
        k_segment_ids_BS: int32.
        scale: factor on q·k.

    Returns:
        out_BTHC.
    """
    q_BTHC = (q_BTHC * scale).astype(q_BTHC.dtype)
    q_BHTC, k_BKSC, v_BKSC = (jnp.swapaxes(x, 1, 2) for x in (q_BTHC, k_BSKC, v_BSKC))

    def attend_row(q_HTC, k_KSC, v_KSC, q_segment_ids_T, k_segment_ids_S):
        segment_ids = splash.SegmentIds(q_segment_ids_T, k_segment_ids_S)
        return kernel(q_HTC, k_KSC, v_KSC, segment_ids)

    out_BHTC = jax.vmap(attend_row)(q_BHTC, k_BKSC, v_BKSC, q_segment_ids_BT, k_segment_ids_BS)
    return jnp.swapaxes(out_BHTC, 1, 2)
