"""What holds for every family: a class of tests, which a family's file fills with its cases.

    class TestLlama(FamilyLaws):
        cases = {"plain": FIELDS, "linear": FIELDS | rope("linear", factor=4.0)}
        refused = {"what": (FIELDS | dict(...), "a word that the error has")}

Numbers are those of `transformers` in PyTorch, stored everywhere and live where torch is
installed: law 6 (logits, loss and gradients are the same), law 2 (ours packs both examples in
one row with a padded tail, theirs runs each alone) and law 7 (ours decodes prompts of different
lengths together, theirs each alone). Law 5 (in = out) needs none.
"""

import dataclasses
import functools
import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import family_oracle as oracle
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import lay_out, on_device, one_device
from transformers import AutoConfig

from jax_sft.data.types import examples_from_parts
from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.placement import Placement
from jax_sft.sampler import Sampling, generate_ids
from jax_sft.train_step import batch_sums

ROW_LEN = 16
NUM_TOKENS = sum(len(ids) - 1 for ids in oracle.IDS)
# A few layers of float32 in two frameworks, summed in other orders; logits are about 3.
TOLERANCE = 1e-5


@dataclasses.dataclass
class Case:
    """A case with its folders; what several laws need of it is computed once.

    Attributes:
        golden: what is stored of it.
        folder: has its config and weights.
        numbered: the same with the weights of `oracle.number_elements`.
    """

    golden: oracle.Golden
    folder: Path
    numbered: Path

    @functools.cached_property
    def model(self) -> CausalLM:
        return open_model(self.folder)

    @functools.cached_property
    def logits_NV(self) -> np.ndarray:
        """Our logits of both examples, in one row with a padded tail."""
        batch = packed_batch()
        logits_BTV = self.model(batch.inputs_BT, batch.positions_BT, batch.segment_ids_BT)
        return np.asarray(logits_BTV)[0, :NUM_TOKENS]

    @functools.cached_property
    def loss_and_probes(self) -> tuple[float, np.ndarray]:
        """Our loss of both examples in one row, and probes of its gradients."""
        loss, grads = loss_and_grads(self.model.decoder, self.model.params, packed_batch())
        places = jax.tree.leaves(open_model(self.numbered).params)
        named = oracle.by_their_names(self.golden.shapes, places, jax.tree.leaves(grads))
        return float(loss), oracle.probe_all(named)


@functools.cache
def open_case(laws: type["FamilyLaws"], name: str, folder: Path) -> Case:
    """Writes a case's folders, by what is stored of it."""
    fields = laws.cases[name]
    model_type = fields["model_type"]
    remedy = f"run `python scripts/make_golden.py {model_type}`"
    assert oracle.golden_file(model_type).is_file(), f"nothing is stored: {remedy}"
    golden = oracle.read_golden(model_type).get(name)
    assert golden is not None, f"case {name!r} is not stored: {remedy}"
    assert golden.fields == json.loads(json.dumps(fields)), f"the fields have changed: {remedy}"
    return Case(
        golden,
        folder=oracle.write_folder(folder / "model", fields, golden.weights),
        numbered=oracle.write_folder(
            folder / "numbered", fields, oracle.number_elements(golden.shapes)
        ),
    )


def laws_of(model_type: str) -> type["FamilyLaws"]:
    """The class of tests in a family's file."""
    file = Path(__file__).parent / "families" / f"test_{model_type.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = [value for value in vars(module).values() if inspect.isclass(value)]
    [laws] = [kind for kind in classes if issubclass(kind, FamilyLaws) and kind is not FamilyLaws]
    return laws


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


def assert_close_logits(
    got_NV: np.ndarray, expected_NV: np.ndarray, tolerance: float = TOLERANCE
) -> None:
    atol = tolerance * np.abs(expected_NV).max()
    np.testing.assert_allclose(got_NV, expected_NV, rtol=0, atol=atol)


def assert_close_losses(
    got: tuple[float, np.ndarray],
    expected: tuple[float, np.ndarray],
    names: list[str],
    tolerance: float = TOLERANCE,
) -> None:
    """Checks losses and their gradients' probes.

    Each probe is measured by its own size, or a tenth of the largest tensor's: a key's bias
    moves all scores of a query alike, so that its gradient is zero but for what rounding
    leaves of larger terms.
    """
    np.testing.assert_allclose(got[0], expected[0], rtol=tolerance)
    sizes = np.abs(expected[1]).max(axis=1)
    errors = np.abs(got[1] - expected[1]).max(axis=1) / np.maximum(sizes, 0.1 * sizes.max())
    # Not "> tolerance", which NaN is not.
    wrong = {
        name: error for name, error in zip(names, errors, strict=True) if not error < tolerance
    }
    assert not wrong, f"relative errors of gradients: {wrong}"


class FamilyLaws:
    """The laws, for a family's cases.

    Attributes:
        cases: config fields by name.
        refused: config fields that are not built, and a word that the error must have.
        num_differentiated: of how many cases, from the first, gradients are compared too.
    """

    cases: dict[str, dict[str, Any]]
    refused: dict[str, tuple[dict[str, Any], str]] = {}
    num_differentiated: int = 1

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        names = list(self.cases)
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", names, indirect=True)
        if "differentiated" in metafunc.fixturenames:
            names = names[: self.num_differentiated]
            metafunc.parametrize("differentiated", names, indirect=True)
        if "refused_name" in metafunc.fixturenames:
            metafunc.parametrize("refused_name", self.refused)

    def test_logits_are_the_stored_ones(self, case):
        assert_close_logits(case.logits_NV, case.golden.numbers["logits"])

    def test_logits_are_those_of_torch(self, case):
        pytest.importorskip("torch")
        assert_close_logits(case.logits_NV, oracle.torch_logits(case.folder))

    def test_loss_and_gradients_are_the_stored_ones(self, differentiated):
        numbers, names = differentiated.golden.numbers, sorted(differentiated.golden.shapes)
        stored = numbers["loss"], numbers["probes"]
        assert_close_losses(differentiated.loss_and_probes, stored, names)

    def test_loss_and_gradients_are_those_of_torch(self, differentiated):
        pytest.importorskip("torch")
        case, shapes = differentiated, differentiated.golden.shapes
        theirs = oracle.torch_loss_probes(case.folder, case.numbered, shapes)
        assert_close_losses(case.loss_and_probes, theirs, sorted(shapes))

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

    def test_loaded_then_saved_is_bit_identical(self, case, tmp_path):
        case.model.save_pretrained(tmp_path)
        expected = load_file(case.folder / "model.safetensors")
        saved = load_file(tmp_path / "model.safetensors")
        assert saved.keys() == expected.keys()
        for name, values in expected.items():
            assert (saved[name].dtype, saved[name].shape) == (values.dtype, values.shape), name
            assert saved[name].tobytes() == values.tobytes(), name
        assert config_fields(tmp_path) == config_fields(case.folder)

    def test_what_is_not_built_is_refused(self, refused_name, tmp_path):
        fields, word = self.refused[refused_name]
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError) as caught:
            CausalLM.open(tmp_path, placement=Placement(mesh=one_device()))
        assert word in str(caught.value)
