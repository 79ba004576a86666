"""What holds for every family: a class of tests, which a family's file fills with its cases.

    class TestLlama(FamilyLaws):
        cases = {"plain": FIELDS, "scaled": FIELDS | dict(rope_parameters={...})}
        refused = {"what": (FIELDS | dict(...), "a word that the error has")}

Numbers are those of `transformers` in PyTorch, stored everywhere and live where torch is
installed: law 6 (logits, loss and gradients are the same), law 2 (ours packs both examples in
one row with a padded tail, theirs runs each alone) and law 7 (ours decodes prompts of different
lengths together over a cache, theirs each alone by full passes). Law 5 (in = out) needs none.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import family_oracle as oracle
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import lay_out, on_device, one_device
from transformers import AutoConfig

from jax_sft.data.types import examples_from_parts
from jax_sft.model.causal_lm import CausalLM, Placement
from jax_sft.sampler import Sampling, generate_ids
from jax_sft.train_step import batch_sums

ROW_LEN = 16
NUM_TOKENS = sum(len(ids) - 1 for ids in oracle.IDS)
# A few layers of float32 in two frameworks, summed in other orders; logits are about 3.
TOLERANCE = 1e-5


@dataclasses.dataclass
class Case:
    """A case with its folder; what is computed of it is computed once.

    Attributes:
        name: its name in `cases`.
        fields: its config fields.
        golden: what is stored of it.
        folder: has its config and weights.
        scratch: for other folders.
    """

    name: str
    fields: dict[str, Any]
    golden: oracle.Golden
    folder: Path
    scratch: Path

    @functools.cached_property
    def model(self) -> CausalLM:
        return open_model(self.folder)

    @functools.cached_property
    def logits_NV(self) -> np.ndarray:
        """Our logits of both examples, in one row with a padded tail."""
        batch = packed_batch()
        logits_BTV = self.model(batch.inputs_BT, batch.positions_BT, batch.segment_ids_BT)
        return np.asarray(logits_BTV)[0, :NUM_TOKENS]

    def loss_and_probes(self) -> tuple[float, np.ndarray]:
        """Our loss of both examples in one row, and probes of its gradients."""
        loss, grads = loss_and_grads(self.model.decoder, self.model.params, packed_batch())
        shapes, folder = self.golden.shapes, self.scratch / "numbered"
        oracle.write_folder(folder, self.fields, oracle.number_elements(shapes))
        places = jax.tree.leaves(open_model(folder).params)
        named = oracle.by_their_names(shapes, places, jax.tree.leaves(grads))
        return float(loss), oracle.probe_all(named)


def make_case(model_type: str, name: str, fields: dict[str, Any], folder: Path) -> Case:
    """Writes a case's folder from what is stored of it."""
    remedy = f"run `python scripts/make_golden.py {model_type}`"
    assert oracle.golden_file(model_type).is_file(), f"nothing is stored: {remedy}"
    golden = oracle.read_golden(model_type).get(name)
    assert golden is not None, f"case {name!r} is not stored: {remedy}"
    assert golden.fields == json.loads(json.dumps(fields)), f"the fields have changed: {remedy}"
    weights = oracle.draw_weights(golden.shapes, golden.seed)
    oracle.write_folder(folder / "model", fields, weights)
    return Case(name, fields, golden, folder / "model", folder)


def open_model(folder: Path) -> CausalLM:
    return CausalLM.from_pretrained(folder, placement=Placement(mesh=one_device()))


def packed_batch():
    parts = [
        (np.array(ids[:-1], np.int32), np.array(ids[1:], np.int32), np.array(trained, np.float32))
        for ids, trained in zip(oracle.IDS, oracle.TRAINED, strict=True)
    ]
    return on_device(lay_out(examples_from_parts(parts), [[0, 1]], ROW_LEN))


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(decoder, params, batch):
    def loss_sum(params):
        return batch_sums(decoder, params, batch)[0]

    return jax.value_and_grad(loss_sum)(params)


def config_fields(folder: Path) -> dict[str, Any]:
    fields = AutoConfig.from_pretrained(folder).to_dict()
    del fields["_name_or_path"]
    return fields


def assert_close_logits(got_NV: np.ndarray, expected_NV: np.ndarray) -> None:
    atol = TOLERANCE * np.abs(expected_NV).max()
    np.testing.assert_allclose(got_NV, expected_NV, rtol=0, atol=atol)


def assert_close_probes(got: np.ndarray, expected: np.ndarray, names: list[str]) -> None:
    """Checks gradients' probes, each by its own size, or a tenth of the largest tensor's.

    A key's bias moves all scores of a query alike, so that its gradient is zero but for what
    rounding leaves of larger terms.
    """
    sizes = np.abs(expected).max(axis=1)
    errors = np.abs(got - expected).max(axis=1) / np.maximum(sizes, 0.1 * sizes.max())
    wrong = {name: error for name, error in zip(names, errors, strict=True) if error > TOLERANCE}
    assert not wrong, f"relative errors of gradients: {wrong}"


class FamilyLaws:
    """The laws, for a family's cases.

    Attributes:
        cases: config fields by name; the first is compared in gradients too.
        refused: config fields that are not built, and a word that the error must have.
    """

    cases: dict[str, dict[str, Any]]
    refused: dict[str, tuple[dict[str, Any], str]] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, indirect=True, scope="class")
        if "refused_name" in metafunc.fixturenames:
            metafunc.parametrize("refused_name", self.refused)

    def test_logits_are_the_stored_ones(self, case):
        assert_close_logits(case.logits_NV, case.golden.numbers["logits"])

    def test_logits_are_those_of_torch(self, case):
        pytest.importorskip("torch")
        assert_close_logits(case.logits_NV, oracle.torch_logits(case.folder))

    def test_loss_and_gradients_are_the_stored_ones(self, first_case):
        loss, probes = first_case.loss_and_probes()
        numbers, names = first_case.golden.numbers, sorted(first_case.golden.shapes)
        np.testing.assert_allclose(loss, numbers["loss"], rtol=TOLERANCE)
        assert_close_probes(probes, numbers["probes"], names)

    def test_greedy_tokens_over_a_cache_are_the_stored_ones(self, case):
        answers = generate_ids(
            case.model.decoder,
            case.model.params,
            oracle.PROMPTS,
            sampling=Sampling(max_new_tokens=oracle.NUM_NEW, do_sample=False),
            stop_ids=(),
            seed=0,
        )
        assert answers == case.golden.numbers["tokens"].tolist()

    def test_loaded_then_saved_is_bit_identical(self, case):
        out = case.scratch / "saved"
        case.model.save_pretrained(out)
        expected = load_file(case.folder / "model.safetensors")
        saved = load_file(out / "model.safetensors")
        assert saved.keys() == expected.keys()
        for name, values in expected.items():
            assert (saved[name].dtype, saved[name].shape) == (values.dtype, values.shape), name
            assert saved[name].tobytes() == values.tobytes(), name
        assert config_fields(out) == config_fields(case.folder)

    def test_what_is_not_built_is_refused(self, refused_name, tmp_path):
        fields, word = self.refused[refused_name]
        (tmp_path / "config.json").write_text(json.dumps(fields))
        save_file({}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError) as caught:
            CausalLM.open(tmp_path, placement=Placement(mesh=one_device()))
        assert word in str(caught.value)
