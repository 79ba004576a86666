"""The FLOPs formula by hand, and the peaks by the names that devices give."""

import pytest

from jax_sft.flops import peak_flops, train_flops

SHAPE = dict(num_params=10, num_layers=3, attention_width=3, row_len=5, num_tokens=7)


def test_flops_by_hand():
    """6·N a token for the parameters; 6·L·H·C·T a token for causal attention."""
    got = train_flops(num_passed=10, num_trained=10, num_passed_layers=3, **SHAPE)
    assert got == (6 * 10 + 6 * 3 * 3 * 5) * 7


def test_flops_of_a_part_by_hand():
    """Adapters: gradients pass everywhere. Frozen layers at the bottom: forward alone."""
    adapters = train_flops(num_passed=10, num_trained=1, num_passed_layers=3, **SHAPE)
    assert adapters == (4 * 10 + 2 * 1 + 6 * 3 * 3 * 5) * 7
    top = train_flops(num_passed=4, num_trained=4, num_passed_layers=1, **SHAPE)
    assert top == (2 * 10 + 4 * 4 + (2 * 3 + 4 * 1) * 3 * 5) * 7


@pytest.mark.parametrize(
    ("device_kind", "tflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
    ],
)
def test_peaks_of_known_devices(device_kind, tflops):
    assert peak_flops(device_kind) == tflops * 1e12


@pytest.mark.parametrize("device_kind", ["cpu", "NVIDIA L40S", "TPU v7"])
def test_other_devices_have_no_known_peak(device_kind):
    assert peak_flops(device_kind) is None
