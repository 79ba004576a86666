"""The search: only ways that divide, the fastest first, and what the compiler said is kept."""

import dataclasses

import pytest

from jax_sft.config import config_from_flags, default_sft_config
from jax_sft.estimate import Estimator, Split, bandwidth
from jax_sft.fit import evolved, find_splits, flags, search
from jax_sft.planned_step import device_bytes, open_planned
from jax_sft.recipe import make_update
from jax_sft.topology import parse_topology

GPUS = parse_topology("gpu:8xH100-80GB")
LLAMA = dict(
    model_type="llama",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def config_of(**sections):
    model = dict(init="random", config=LLAMA, dtype="bfloat16") | sections.pop("model", {})
    train = dict(seq_length=64, batch_size=16) | sections.pop("train", {})
    return default_sft_config().evolve(model=model, train=train, **sections)


def estimator_of(config):
    copies = config.evolve(mesh=dict(data=8, fsdp=1, sequence=1, tensor=1))
    return Estimator(config, open_planned(copies, GPUS, None))


@pytest.fixture(scope="module")
def estimator():
    return estimator_of(config_of())


def split_of(**changes):
    split = Split(data=1, fsdp=8, sequence=1, tensor=1, minibatch_size=16, remat="full")
    return split._replace(**changes)


@pytest.mark.parametrize(
    "sizes", [dict(), dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, tensor=4)], ids=str
)
def test_the_state_s_bytes_are_exact_on_any_mesh(estimator, sizes):
    """Two key/value heads on four devices stay whole."""
    split = split_of(**sizes)
    config = evolved(config_of(), split)
    structs = make_update(config, open_planned(config, GPUS, None), num_steps=6).structs
    found = estimator.memory(split)
    assert found["parameters"] == device_bytes(structs.params)
    assert found["optimizer"] == device_bytes((structs.step, structs.opt_state))
    assert found["gradients"] == found["parameters"]


def test_what_is_kept_by_hand(estimator):
    """With everything computed again, a layer keeps its input, [rows, T, D] in bfloat16."""
    kept = estimator.memory(split_of())["activations"]
    a_layer = 2 * 64 * 64 * 2
    # And before and in the last norm a few of them in float32, which are twice as large.
    assert 3 * a_layer < kept < 12 * a_layer
    half = estimator.memory(split_of(minibatch_size=8))["activations"]
    assert kept == pytest.approx(2 * half, rel=1e-3)
    quarter = estimator.memory(split_of(sequence=4))["activations"]
    assert kept == pytest.approx(4 * quarter, rel=1e-3)
    names = ("full", "minimal", "dots", "none")
    remats = [estimator.memory(split_of(remat=name))["activations"] for name in names]
    assert remats == sorted(remats) and len(set(remats)) == len(names)


def test_microbatches_keep_less_and_sum_gradients(estimator):
    whole, parts = estimator.memory(split_of()), estimator.memory(split_of(minibatch_size=8))
    assert parts["gradients"] == 2 * whole["gradients"]
    assert parts["batch"] == whole["batch"] == 5 * 4 * 2 * 64
    assert parts["activations"] < whole["activations"]


def test_computing_again_takes_time_and_gathers_take_bandwidth(estimator):
    def seconds(**changes):
        return estimator.seconds(split_of(**changes), GPUS)

    full = estimator.product_seconds(split_of(), GPUS)
    assert 1.2 < full / estimator.product_seconds(split_of(remat="dots"), GPUS) < 1.4
    assert seconds(minibatch_size=8) > seconds()  # tiny: the network decides, twice as often
    waits = [estimator.network_seconds(split_of(fsdp=8 // t, tensor=t), GPUS)[1] for t in (1, 2, 4)]
    assert waits[0] == 0 < waits[1] < waits[2]


def test_bandwidth_by_hand():
    torus, mesh = parse_topology("v5e:16x16"), dict(data=1, fsdp=64, sequence=1, tensor=4)
    link = torus.chip.link_bytes
    assert bandwidth(torus, mesh, "tensor") == 2 * link
    assert bandwidth(torus, mesh, "fsdp") == 4 * link
    slices = dataclasses.replace(torus, num_slices=2)
    assert bandwidth(slices, mesh | dict(data=2), "data") == torus.chip.far_bytes
    nodes, chip = parse_topology("gpu:16xH100"), GPUS.chip
    mesh = dict(data=1, fsdp=8, sequence=1, tensor=2)
    assert bandwidth(nodes, mesh, "tensor") == chip.link_bytes
    assert bandwidth(nodes, mesh, "fsdp") == 4 * chip.far_bytes


@pytest.mark.parametrize("name", ["gpu:8xH100", "gpu:16xH100", "v5e:4x4", "2xv5e:2x2"])
def test_every_way_divides(estimator, name):
    topology, config = parse_topology(name), config_of()
    ways = list(find_splits(config, topology, estimator.model))
    assert len(ways) == len(set(ways)) > 10
    for split in ways:
        assert split.data * split.fsdp * split.sequence * split.tensor == topology.num_chips
        assert split.minibatch_size % (split.data * split.fsdp) == 0 == 16 % split.minibatch_size
        assert split.tensor in (1, 2, 4)
        assert name.startswith("gpu") or split.data % topology.num_slices == 0
        evolved(config, split).validate()
    assert (name == "2xv5e:2x2") == all(split.data > 1 for split in ways), "copies are needed"


@pytest.mark.parametrize(
    ("name", "num_rows", "mesh"),
    [
        ("v5e:4x4", 31, dict(data=1, fsdp=1, sequence=4, tensor=4)),
        ("v5e-16", 18, dict(data=1, fsdp=2, sequence=2, tensor=4)),
        ("v5e-64", 100, dict(data=1, fsdp=4, sequence=4, tensor=4)),
    ],
)
def test_rows_that_do_not_divide_are_cut(estimator, name, num_rows, mesh):
    """Even where there are more of them than chips."""
    config = config_of(train=dict(batch_size=num_rows))
    ways = list(find_splits(config, parse_topology(name), estimator.model))
    assert mesh in [split.mesh for split in ways]
    assert all(split.sequence > 1 for split in ways)


@pytest.mark.parametrize(
    ("name", "num_rows", "near"),
    [("v5e-64", 31, "28 or 32"), ("v5e-64", 3, "4"), ("2xv5e-16", 31, "30 or 32")],
)
def test_rows_that_do_not_divide_in_any_way_are_an_error(name, num_rows, near):
    """A row of 20 tokens and 4 heads are cut into 4 each, and each of two slices needs a row."""
    config = config_of(train=dict(batch_size=num_rows, seq_length=20))
    estimator, topology = estimator_of(config), parse_topology(name)
    with pytest.raises(ValueError, match=f"batch_size={num_rows} does not .*: set it to {near}$"):
        search(config, topology, estimator, plan=evolved)
    for rows in map(int, near.split(" or ")):
        config = config.evolve(train=dict(batch_size=rows))
        assert list(find_splits(config, topology, estimator.model))


NARROW = dict(model_type="opt", vocab_size=64, hidden_size=32, word_embed_proj_dim=20, ffn_dim=64)
NARROW |= dict(num_attention_heads=4, num_hidden_layers=1, max_position_embeddings=64)
EXPERTS = dict(
    LLAMA, model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=18
)


@pytest.mark.parametrize(("fields", "fsdps", "tensors"), [(NARROW, 4, 4), (EXPERTS, 8, 2)])
def test_every_parameter_divides(fields, fsdps, tensors):
    """Also narrow embeddings, and experts that are not as wide as the MLP."""
    config = config_of(model=dict(config=fields))
    model = estimator_of(config).model
    ways = list(find_splits(config, GPUS, model))
    assert max(split.fsdp for split in ways) == fsdps
    assert max(split.tensor for split in ways) == tensors
    for mesh in {tuple(split.mesh.items()) for split in ways}:
        open_planned(config.evolve(mesh=dict(mesh)), GPUS, None).param_structs()


@dataclasses.dataclass
class Planned:
    """What the search reads of a planned step."""

    needed: float
    fits: bool


def test_the_fastest_that_fits_is_found(estimator):
    config, asked = config_of(), []

    def plan(config):
        split = Split(
            **config.mesh.to_dict(),
            minibatch_size=config.train.minibatch_size,
            remat=config.model.remat,
        )
        asked.append(split)
        return Planned(needed=1.0, fits=len(asked) == 3)

    found = search(config, GPUS, estimator, plan=plan)
    assert found.step is found.tried[2] and len(asked) == 3
    seconds = [estimator.seconds(split, GPUS) for split in asked]
    ways = list(find_splits(config, GPUS, estimator.model))
    fastest = sorted(estimator.seconds(split, GPUS) for split in ways)
    assert seconds[0] <= 1.02 * fastest[0] and seconds[2] <= 1.1 * fastest[2]


def test_rows_that_are_too_long_for_a_chip_are_cut():
    """And others, which divide over the chips, are not."""
    positions = LLAMA | dict(max_position_embeddings=2048)
    config = config_of(model=dict(config=positions), train=dict(seq_length=2048, batch_size=8))
    estimator = estimator_of(config)
    ways = list(find_splits(config, GPUS, estimator.model))
    whole = [split for split in ways if split.sequence == 1]
    least = min(sum(estimator.memory(split).values()) for split in whole)
    small = dataclasses.replace(GPUS.chip, usable_gib=least / 1.16 / 2**30)

    def plan(config):
        asked.append(config.mesh.sequence)
        return Planned(needed=1.0, fits=len(asked) == 3)

    for chip, is_cut, num_ways in ((GPUS.chip, False, len(whole)), (small, True, len(ways))):
        asked = []
        found = search(config, dataclasses.replace(GPUS, chip=chip), estimator, plan=plan)
        assert found.step is not None and found.num_ways == num_ways
        assert [sequence > 1 for sequence in asked] == [is_cut] * 3


def test_what_is_far_too_large_is_not_tried(estimator):
    """And of the others only as many as were asked for."""
    middle = sorted(sum(estimator.memory(split_of(minibatch_size=r)).values()) for r in (8, 16))
    small = dataclasses.replace(GPUS.chip, usable_gib=middle[0] / 2**30)
    topology = dataclasses.replace(GPUS, chip=small)
    asked = []

    def plan(config):
        asked.append(config)
        return Planned(needed=1.0, fits=False)

    found = search(config_of(), topology, estimator, plan=plan, most=1000)
    assert found.step is None and 2 < len(found.tried) == len(asked) < found.num_ways
    few = search(config_of(), topology, estimator, plan=plan, most=2)
    assert few.step is None and len(few.tried) == 2


def test_flags_ask_for_the_split():
    split = split_of(fsdp=2, tensor=4, minibatch_size=8, remat="dots")
    config = config_from_flags(flags(split))
    assert config.mesh.to_dict() == split.mesh
    assert (config.train.minibatch_size, config.model.remat) == (8, "dots")


def test_adapters_have_few_gradients():
    estimator = estimator_of(config_of(model=dict(peft_config=dict(r=2))))
    found = estimator.memory(split_of())
    assert 0 < found["gradients"] < found["parameters"] / 10
    full = estimator.product_seconds(split_of(), GPUS)
    # Forward, forward again, and backward without gradients of the kernels: 6 in the place of 4.
    assert full / estimator.product_seconds(split_of(remat="dots"), GPUS) == pytest.approx(
        1.5, abs=0.03
    )
