"""Law 6 on the attention kernels that can run here: the numbers are those of `transformers`.

What family files do with "xla", for what kernels may do differently: grouped heads, windows, soft
caps and head sizes. Where there is no TPU, its kernel is interpreted.
"""

import dataclasses
import functools

import family_laws
import pytest
from tiny_models import one_device

from jax_sft.model.causal_lm import CausalLM, Placement

CASES = {
    "gpt2": "plain",
    "llama": "plain",
    "mistral": "window, head_dim",
    "gemma2": "plain",
}


@dataclasses.dataclass
class SplashCase(family_laws.Case):
    """A family's case, computed by the TPU's kernel."""

    @functools.cached_property
    def model(self) -> CausalLM:
        placement = Placement(mesh=one_device(), attention="splash")
        model = CausalLM.from_pretrained(self.folder, placement=placement)
        assert model.decoder.numerics.attention.startswith("splash")
        return model


@pytest.fixture
def case(request, tmp_path):
    laws = family_laws.laws_of(request.param)
    opened = family_laws.open_case(laws, CASES[request.param], tmp_path)
    return SplashCase(opened.golden, opened.folder, opened.numbered)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_logits_are_the_stored_ones(case):
    family_laws.assert_close_logits(case.logits_NV, case.golden.numbers["logits"])


@pytest.mark.parametrize("case", ["gpt2", "gemma2"], indirect=True)
def test_loss_and_gradients_are_the_stored_ones(case):
    numbers, names = case.golden.numbers, sorted(case.golden.shapes)
    stored = numbers["loss"], numbers["probes"]
    family_laws.assert_close_losses(case.loss_and_probes, stored, names)
