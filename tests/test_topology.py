"""Devices by name: what a name means, and one line for each that means nothing."""

import importlib.util

import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from jax_sft.flops import peak_flops
from jax_sft.topology import (
    GPUS,
    TPUS,
    as_if_here,
    make_devices,
    parse_topology,
    prepare_environment,
)


@pytest.mark.parametrize(
    ("name", "shape", "num_slices"),
    [
        ("v5e:4x4", (4, 4), 1),
        ("v5e-16", (4, 4), 1),
        ("v5litepod-16", (4, 4), 1),
        ("v5e-256", (16, 16), 1),
        ("v5e-1", (1, 1), 1),
        ("v6e-8", (2, 4), 1),
        ("v6e-64", (8, 8), 1),
        ("v4-8", (2, 2, 1), 1),
        ("v4-32", (2, 2, 4), 1),
        ("v5p-128", (4, 4, 4), 1),
        ("v5p-512", (4, 8, 8), 1),
        ("v5p-12288", (16, 16, 24), 1),
        ("v4:4x4x12", (4, 4, 12), 1),
        ("2xv5e:4x4", (4, 4), 2),
        ("4xv5p-128", (4, 4, 4), 4),
        ("gpu:8xH100-80GB", (8,), 1),
        ("gpu:1xL4", (1,), 1),
        ("gpu:16xh200", (8,), 2),
        ("gpu:A100-40GB", (1,), 1),
    ],
)
def test_a_name_means_a_shape(name, shape, num_slices):
    found = parse_topology(name)
    assert (found.shape, found.num_slices) == (shape, num_slices)


@pytest.mark.parametrize(
    ("name", "chips"),
    [("v4-8", 4), ("v5p-512", 256), ("v5e-256", 256), ("2xv6e-64", 128), ("gpu:24xB200-180", 24)],
)
def test_v4_and_v5p_count_cores_and_the_others_chips(name, chips):
    assert parse_topology(name).num_chips == chips


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v7x-8", "--topology=v7x-8 is unknown: expected such as v5e:4x4"),
        ("v5e", "is unknown"),
        ("tpu", "is unknown"),
        ("v5e-24", "no usual slice has 24 chips; give its shape"),
        ("v4-12", "no usual slice has 12 TensorCores"),
        ("v5e:4x4x4", "a v5e slice has 2 axes and up to 256 chips"),
        ("v5e:32x32", "a v5e slice has 2 axes and up to 256 chips"),
        ("v4:2x2", "a v4 slice has 3 axes"),
        ("v4-12288", "no usual slice has 12288 TensorCores"),
        ("v5p-16384", "a v5p slice has 3 axes and up to 6144 chips"),
        ("0xv5e-16", "at least one slice"),
        ("gpu:8xA100", "may be A100-40GB or A100-80GB"),
        ("gpu:8xV100-16GB", "expected such as gpu:8xH100-80GB"),
        ("gpu:12xH100", "has 12 GPUs"),
    ],
)
def test_a_name_without_meaning_is_one_line(name, words):
    with pytest.raises(ValueError) as error:
        parse_topology(name)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_peak_of_every_chip_is_known():
    assert all(peak_flops(chip.kind) for chip in (*TPUS.values(), *GPUS.values()))


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "jax\[tpu\]"'):
        prepare_environment(parse_topology("v5e-16"))


def test_a_plugin_that_does_not_compile_is_done_without(monkeypatch, capsys):
    def refuse(*_, **__):
        raise NotImplementedError("topology not implemented")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax_cuda13_plugin")
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    assert make_devices(parse_topology("gpu:8xH100")) is None
    said = capsys.readouterr().err
    assert said == "JAX's plugin for CUDA does not compile here: topology not implemented\n"


def test_a_gpu_that_is_not_here_answers():
    with as_if_here(parse_topology("gpu:L4")):
        assert cudnn.check_compute_capability("8.9") and cudnn.check_compute_capability("8.0")
        assert not cudnn.check_compute_capability("9.0")
        assert not cudnn.is_cuda_compute_capability_equal("8.0")
        assert cudnn.check_cudnn_version() == 91900
    assert not cudnn.check_compute_capability("8.0")


def test_a_topology_in_one_line():
    assert parse_topology("2xv5e:4x4").describe() == (
        "32 x TPU v5 lite, 16 GiB each, 2 slices of 4x4"
    )
    assert parse_topology("gpu:16xH100").describe() == "16 x H100, 80 GiB each, 2 nodes"
