"""Law 6 on the attention kernels that can run here: the numbers are those of `transformers`.

What family files do with "xla", for what kernels may do differently: grouped heads, windows, soft
caps and head sizes. On CPU the TPU's kernel is interpreted; on a GPU it is cuDNN's.
"""

import dataclasses
import functools

import family_laws
import pytest
from kernels import ON_GPU, RUN_HERE, dtype_of, tolerance
from tiny_models import one_device

from jax_sft.model import attention_cudnn
from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.placement import Placement

CASES = {
    "gpt2": "plain",
    "llama": "plain",
    "mistral": "window, head_dim",
    "gemma2": "plain",
}
KERNEL = RUN_HERE[-1]
if ON_GPU:  # cuDNN has no soft caps and no heads of 12, and is not chosen for them
    CASES = {"gpt2": "plain", "llama": "plain", "qwen2": "windows from layer 1, tied"}
TOLERANCE = tolerance(KERNEL, family_laws.TOLERANCE, 0.05)


@dataclasses.dataclass
class KernelCase(family_laws.Case):
    """A family's case, computed by the platform's kernel."""

    @functools.cached_property
    def model(self) -> CausalLM:
        placement = Placement(mesh=one_device(), attention=KERNEL, dtype=dtype_of(KERNEL))
        model = CausalLM.from_pretrained(self.folder, placement=placement)
        assert model.decoder.numerics.attention.startswith(KERNEL)
        return model


@pytest.fixture(autouse=True)
def room_for_all_examples(monkeypatch):
    """cuDNN is told where each example of a row of 16 begins."""
    monkeypatch.setattr(attention_cudnn, "MEAN_LEN", 4)


@pytest.fixture
def case(request, tmp_path):
    laws = family_laws.laws_of(request.param)
    opened = family_laws.open_case(laws, CASES[request.param], tmp_path)
    return KernelCase(opened.golden, opened.folder, opened.numbered)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_logits_are_the_stored_ones(case):
    family_laws.assert_close_logits(case.logits_NV, case.golden.numbers["logits"], TOLERANCE)


@pytest.mark.parametrize("case", ["gpt2", "llama" if ON_GPU else "gemma2"], indirect=True)
def test_loss_and_gradients_are_the_stored_ones(case):
    numbers, names = case.golden.numbers, sorted(case.golden.shapes)
    stored = numbers["loss"], numbers["probes"]
    family_laws.assert_close_losses(case.loss_and_probes, stored, names, TOLERANCE)
