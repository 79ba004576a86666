"""LoRA: PEFT's own layers, files and numbers, in both directions; and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import assert_close_trees, draw_params, one_device, paths_and_leaves

from jax_sft.config import default_sft_config
from jax_sft.model import lora
from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.placement import Placement
from jax_sft.model.pretrained import by_path
from jax_sft.recipe import make_update, open_model, trained_params

SMALL = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=41)
LLAMA = dict(SMALL, model_type="llama", intermediate_size=48, num_key_value_heads=2)
GPT2 = dict(model_type="gpt2", n_layer=2, n_embd=32, n_head=4, n_positions=64, vocab_size=41)
NEOX = dict(SMALL, model_type="gpt_neox", intermediate_size=48)
PHI3 = dict(LLAMA, model_type="phi3", pad_token_id=0)
MIXED = dict(
    LLAMA,
    model_type="qwen3_moe",
    num_hidden_layers=4,
    mlp_only_layers=[1, 3],
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=16,
)
OPT = dict(SMALL, model_type="opt", ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64)
# Separate and fused projections, fused by groups, transposed or not; every option.
CASES = {
    "llama, by default": (LLAMA, {}),
    "llama, all, dora": (LLAMA, dict(target_modules="all-linear", use_dora=True, r=3)),
    "gpt2, by default, rslora": (GPT2, dict(use_rslora=True, lora_alpha=3)),
    "gpt2, all, dora": (GPT2, dict(target_modules="all-linear", use_dora=True, r=2)),
    "gpt2, one of two c_proj": (GPT2, dict(target_modules=["mlp.c_proj"])),
    "gpt_neox, an expression": (NEOX, dict(target_modules=r".*\.(query_key_value|dense)")),
    "phi3, fused, dora": (PHI3, dict(target_modules=["qkv_proj", "gate_up_proj"], use_dora=True)),
    "qwen3_moe, attention": (MIXED, dict(target_modules=["q_proj", "o_proj"])),
    "opt, all but one": (OPT, dict(target_modules="all-linear", exclude_modules=["fc1"])),
}
IDS = np.array([[5, 11, 0, 7, 7, 40, 3, 22, 9, 1]])
PEFTS_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning", "ignore:fan_in_fan_out"
)
# A few float32 layers in two frameworks.
TOLERANCE = 1e-5


def placed():
    return Placement(mesh=one_device())


def open_lora(fields, peft_config, seed=0):
    """A model with random weights, adapters and biases included."""
    model = CausalLM.open(None, fields=fields, placement=placed(), peft_config=peft_config)
    model.params = draw_params(model, seed=seed)
    return model


def assert_close(got, expected):
    atol = TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@pytest.fixture(params=CASES, scope="module")
def saved(request, tmp_path_factory):
    """A case's model, and a folder with its base, its adapter and both merged."""
    fields, peft_config = CASES[request.param]
    folder = tmp_path_factory.mktemp("lora")
    model = open_lora(fields, peft_config)
    base = CausalLM.open(None, fields=fields, placement=placed())
    base.params = lora.split(model.params)[0]
    base.save_pretrained(folder / "base")
    model.base_model = str(folder / "base")
    model.save_pretrained(folder / "merged")
    return peft_config, model, folder


@PEFTS_WARNINGS
def test_peft_computes_the_same_with_what_we_save(saved):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    _, model, folder = saved
    ours = np.asarray(model(IDS))

    def load(name):
        return AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="eager")

    adapted = peft.PeftModel.from_pretrained(load("base"), folder / "merged" / "adapter")
    for theirs in (adapted, load("merged")):
        with torch.no_grad():
            assert_close(ours, theirs.eval()(torch.tensor(IDS)).logits.numpy())


@PEFTS_WARNINGS
def test_what_peft_saves_is_loaded_to_the_same_logits(saved, tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    peft_config, _, folder = saved
    base = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **peft_config))
    torch.manual_seed(0)
    for name, param in theirs.named_parameters():
        if "lora_" in name:
            param.data += 0.3 * torch.randn(param.shape)
    theirs.save_pretrained(tmp_path)
    model = CausalLM.from_pretrained(tmp_path, placement=placed())
    with torch.no_grad():
        assert_close(np.asarray(model(IDS)), theirs.eval()(torch.tensor(IDS)).logits.numpy())
    # And back, bit for bit, under the same names.
    model.save_adapter(tmp_path / "again")
    expected, again = (
        load_file(place / "adapter_model.safetensors") for place in (tmp_path, tmp_path / "again")
    )
    assert again.keys() == expected.keys()
    assert all(again[name].tobytes() == expected[name].tobytes() for name in expected)


def test_merged_and_reloaded_are_the_adapted_model(saved):
    _, model, folder = saved
    ours = np.asarray(model(IDS))
    assert_close(CausalLM.from_pretrained(folder / "merged", placement=placed())(IDS), ours)
    base = CausalLM.from_pretrained(folder / "base", placement=placed())(IDS)
    assert np.abs(ours - base).max() > 0.1, "the adapters change nothing"
    reloaded = CausalLM.from_pretrained(folder / "merged" / "adapter", placement=placed())
    np.testing.assert_array_equal(reloaded(IDS), ours)


def test_new_adapters_change_nothing_until_they_are_trained(saved):
    peft_config, _, folder = saved
    base = CausalLM.from_pretrained(folder / "base", placement=placed())
    new = CausalLM.open(folder / "base", placement=placed(), peft_config=peft_config)
    new.load(seed=3)
    assert_close(new(IDS), np.asarray(base(IDS)))
    other = CausalLM.open(folder / "base", placement=placed(), peft_config=peft_config)
    other.load(seed=4)
    a = {path: leaf for path, leaf in paths_and_leaves(new.params) if path.endswith("lora_a")}
    assert a and all(
        (leaf != a[path]).any() for path, leaf in paths_and_leaves(other.params) if path in a
    )


def run_config(**peft_config):
    return (
        default_sft_config()
        .evolve(
            train=dict(seq_length=16, batch_size=2),
            model=dict(init="random", config=LLAMA | dict(max_position_embeddings=64)),
            mesh=dict(fsdp=1, data=-1),
        )
        .evolve(model=dict(peft_config=peft_config or None))
    )


@pytest.fixture
def one_device_only(monkeypatch):
    monkeypatch.setattr("jax_sft.recipe.make_mesh", lambda **_: one_device())


def test_only_adapters_are_trained_and_have_optimizer_state(one_device_only):
    config = run_config(r=2, target_modules="all-linear")
    model = open_model(config, None)
    trained = dict(paths_and_leaves(trained_params(config, model)))
    assert {path for path, is_trained in trained.items() if is_trained} == {
        path for path in trained if lora.is_adapter(path)
    }
    # q, k, v, o; gate, up, down: rank · (inputs + outputs), in two layers.
    num_trained = model.count_params(by_path(trained_params(config, model)).__getitem__)
    assert num_trained == 2 * 2 * (64 + 48 + 48 + 64 + 3 * 80)
    structs = make_update(config, model, num_steps=3).structs
    moments = [leaf.size for leaf in jax.tree.leaves(structs.opt_state) if leaf.size > 1]
    assert sum(moments) == 2 * num_trained


def test_the_base_may_be_bfloat16_and_adapters_stay_float32(one_device_only):
    config = run_config(r=2).evolve(model=dict(param_dtype="bfloat16"))
    dtypes = {path: leaf.dtype.name for path, leaf in paths_and_structs(open_model(config, None))}
    assert {dtypes[path] for path in dtypes if lora.is_adapter(path)} == {"float32"}
    assert {dtypes[path] for path in dtypes if not lora.is_adapter(path)} == {"bfloat16"}


def paths_and_structs(model):
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), struct)
        for path, struct in jax.tree_util.tree_leaves_with_path(model.param_structs())
    ]


def test_dropout_is_of_the_adapters_input():
    plain, dropped = (
        open_lora(LLAMA, dict(target_modules=["o_proj"], lora_dropout=rate)) for rate in (0.0, 0.5)
    )
    np.testing.assert_array_equal(dropped(IDS), plain(IDS))
    rows = (IDS, np.arange(IDS.size)[None], np.ones_like(IDS))

    def train(model):
        rngs = {"dropout": jax.random.key(0)}
        return model.training_decoder.apply({"params": model.params}, *rows, rngs=rngs)[0]

    assert np.abs(train(dropped) - train(plain)).max() > 0.1


def test_joined_is_what_was_split():
    model = open_lora(LLAMA, dict(r=2))
    assert_close_trees(lora.join(*lora.split(model.params)), model.params, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(target_modules=["wq"]), "target_modules=.'wq'. means no layer .*'q_proj'"),
        (dict(target_modules=r".*layers\.0\..*q_proj"), "in some layers only"),
        (dict(target_modules=r".*(q_proj|lm_head)"), r"means lm_head too, for which adapters are"),
        (dict(target_modules=r".*(v_proj|tokens)"), r"means model\.embed_tokens too, for which"),
        (dict(use_dora="yes"), "use_dora='yes' must be True or False"),
        (dict(exclude_modules="all-linear"), "means no layer"),
        (
            dict(target_modules=["q_proj", "lm_head"]),
            "target_modules has .'lm_head'., which are no",
        ),
        (dict(peft_type="PROMPT_TUNING"), "peft_type='PROMPT_TUNING' is not built"),
        (dict(bias="all"), "bias='all' is not built: only 'none'"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa' must be True or 'gaussian'"),
        (dict(rank=4), "rank=4 is not built: choose among"),
        (dict(target_modules="(q_proj"), "target_modules='.q_proj' must be a list of module names"),
        (dict(target_modules=7), "target_modules=7 must be a list of module names"),
        (dict(lora_dropout=1.0), r"lora_dropout=1.0 must be in \[0, 1\)"),
    ],
    ids=str,
)
def test_what_is_not_built_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CausalLM.open(None, fields=LLAMA, placement=placed(), peft_config=fields)


def test_mlps_beside_experts_are_refused():
    with pytest.raises(ValueError, match="means MLPs of a model with experts"):
        CausalLM.open(
            None, fields=MIXED, placement=placed(), peft_config=dict(target_modules="all-linear")
        )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"),
            "no whole safetensors",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is no JSON"),
        (lambda folder: edit(folder, r=3), r"another shape .*\[8, 32\] instead of \[3, 32\]"),
        (lambda folder: edit(folder, base_model_name_or_path=None), "base_model_name_or_path"),
        (lambda folder: drop_one(folder), "1 missing: base_model.model.*lora_A"),
    ],
)
def test_a_damaged_adapter_is_refused(damage, message, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        CausalLM.from_pretrained(tmp_path / "adapter", placement=placed())


@pytest.mark.parametrize("left_out", [["lm_head", "embed_tokens"], r"lm_head|.*embed_tokens"])
def test_an_expression_may_mean_more_than_is_left_out(left_out):
    peft_config = dict(target_modules=r".*(q_proj|lm_head|tokens)", exclude_modules=left_out)
    assert open_lora(LLAMA, peft_config).adapters.targets == {"attention/query"}


def test_how_an_adapter_was_drawn_matters_where_it_changed_the_base(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "adapter")
    for drawn in (False, "gaussian", "orthogonal"):
        edit(tmp_path / "adapter", init_lora_weights=drawn)
        assert CausalLM.open(tmp_path / "adapter", placement=placed()).adapters is not None
    edit(tmp_path / "adapter", init_lora_weights="pissa")
    with pytest.raises(ValueError, match="init_lora_weights='pissa' must be True or 'gaussian'"):
        CausalLM.open(tmp_path / "adapter", placement=placed())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An adapter's folder, with its base model's beside it."""
    folder = tmp_path_factory.mktemp("whole")
    model = open_lora(LLAMA, {})
    model.base_model = str(folder / "base")
    model.save_pretrained(folder / "base")
    model.save_adapter(folder / "adapter")
    return folder / "adapter"


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def drop_one(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path, metadata={"format": "pt"})


def test_an_adapter_cannot_be_saved_of_a_model_without(tmp_path):
    model = CausalLM.open(None, fields=LLAMA, placement=placed())
    with pytest.raises(ValueError, match="no adapters: set model.peft_config"):
        model.save_adapter(tmp_path)
