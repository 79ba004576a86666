"""Floating-point operations of a training step, and the share of the chip's peak they reach.

In: a model's shape and token counts. Out: FLOPs, and model FLOPs utilisation (MFU), by one
formula that is printed beside the figure, since tools that count differently report different
MFUs for the same run.
"""

import re

FORMULA = (
    "(2·N + 2·P + 2·trained)·tokens + (2·L + 4·L_P)·H·C·T·tokens (attention, causal half; P, L_P:"
    " parameters and layers that gradients pass), over the devices' peak"
)

# Dense bfloat16 FLOP/s a device, from the makers' data sheets, by a part of `device_kind`.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
}


def train_flops(
    *,
    num_params: int,
    num_passed: int,
    num_trained: int,
    num_layers: int,
    num_passed_layers: int,
    attention_width: int,
    row_len: int,
    num_tokens: int,
) -> float:
    """Counts the FLOPs of forward and backward passes, without recomputation.

    For each parameter and token two forward, two where the gradient is passed on, and two for
    the gradient of the parameter itself where it is trained; attention's two products cost
    4·T·H·C a token forward, of which the causal mask needs half, and twice that backward
    (Chowdhery et al. 2022, appendix B, whose count has the whole square).

    Args:
        num_params: N, position embeddings included; of experts those that a token meets.
        num_passed: how many of them gradients pass through: not those of frozen layers at the
            bottom.
        num_trained: how many of them are trained.
        num_layers: L.
        num_passed_layers: how many of them gradients pass through.
        attention_width: H·C, heads times head width.
        row_len: T, tokens a row.
        num_tokens: tokens trained on, padding included, since it is computed too.
    """
    products = 2 * (num_params + num_passed + num_trained)
    attention = (2 * num_layers + 4 * num_passed_layers) * attention_width * row_len
    return (products + attention) * num_tokens


def peak_flops(device_kind: str) -> float | None:
    """Returns a device's dense bfloat16 FLOP/s, or None where it is not known (as on CPU)."""
    for part, flops in PEAK_FLOPS.items():
        # As words: an L40S is no L4.
        if re.search(rf"\b{part}\b", device_kind):
            return flops
    return None
