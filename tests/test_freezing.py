"""num_layers_unfrozen, for every family: what trains, and that frozen layers are the same model."""

import re

import family_oracle as oracle
import numpy as np
import pytest
from tiny_models import one_device
from transformers import AutoConfig

from jax_sft import recipe
from jax_sft.config import default_sft_config
from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.families import FAMILIES
from jax_sft.model.placement import Placement
from jax_sft.model.pretrained import by_path

# Tied and untied, and sparse layers between dense ones, are among the families' cases.
CASES = [(kind, name) for kind in sorted(FAMILIES) for name in oracle.read_golden(kind)]
MIXED = "qwen3_moe", "experts between MLPs"


def trained_paths(fields, num_layers_unfrozen, monkeypatch):
    monkeypatch.setattr(recipe, "make_mesh", lambda **_: one_device())
    known = AutoConfig.for_model(fields["model_type"])
    fields = {name: value for name, value in fields.items() if hasattr(known, name)}
    config = default_sft_config().evolve(
        model=dict(init="random", config=fields, num_layers_unfrozen=num_layers_unfrozen)
    )
    model = recipe.open_model(config, None)
    return by_path(recipe.trained_params(config, model)), model.decoder.config


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_top_layers_train_and_what_comes_after_them(kind, name, monkeypatch):
    fields = oracle.read_golden(kind)[name].fields
    trained, decoder = trained_paths(fields, 1, monkeypatch)
    after = re.compile(r"(layers(_\d+)?|final_norm|final_project|head)/.+")
    assert {path for path in trained if trained[path]} == {p for p in trained if after.match(p)}
    below = [path for path in trained if path.startswith("frozen_layers")]
    assert bool(below) == (decoder.num_layers > 1)
    assert trained["embed/tokens"] is False


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_none_unfrozen_trains_the_final_norm_if_there_is_one(kind, monkeypatch):
    for golden in oracle.read_golden(kind).values():
        has_norm = any("norm" in n or "ln_f" in n for n in golden.shapes if "layers." not in n)
        try:
            trained, decoder = trained_paths(golden.fields, 0, monkeypatch)
        except ValueError as error:
            assert "has none with weights: unfreeze a layer" in str(error)
            assert kind in ("olmo", "opt") or not has_norm
        else:
            assert decoder.final_norm
            assert {path.split("/")[0] for path in trained if trained[path]} == {"final_norm"}


@pytest.mark.parametrize("num_layers_unfrozen", [0, 1, 3])
def test_frozen_layers_are_the_same_model(num_layers_unfrozen, tmp_path):
    """Dense and sparse layers in turns: as many stacks as layers, some of them frozen."""
    golden = oracle.read_golden(MIXED[0])[MIXED[1]]
    folder = oracle.write_folder(tmp_path / "model", golden.fields, golden.weights)
    placement = Placement(mesh=one_device(), num_layers_unfrozen=num_layers_unfrozen)
    model = CausalLM.from_pretrained(folder, placement=placement)
    stacks = [name for name in model.params if "layers" in name]
    frozen = [name for name in stacks if name.startswith("frozen")]
    assert (len(stacks) > 2, bool(frozen)) == (True, num_layers_unfrozen < len(stacks))
    for ids, logits_TV in zip(oracle.IDS, split_examples(golden.numbers["logits"]), strict=True):
        got = model(np.array([ids[:-1]]))[0]
        np.testing.assert_allclose(got, logits_TV, rtol=0, atol=1e-5 * np.abs(logits_TV).max())
    model.save_pretrained(tmp_path / "saved")
    again = CausalLM.from_pretrained(tmp_path / "saved", placement=Placement(mesh=one_device()))
    whole = CausalLM.from_pretrained(folder, placement=Placement(mesh=one_device()))
    for path, leaf in by_path(whole.params).items():
        np.testing.assert_array_equal(by_path(again.params)[path], leaf, err_msg=path)


def split_examples(logits_NV):
    return np.split(logits_NV, np.cumsum([len(ids) - 1 for ids in oracle.IDS])[:-1])
