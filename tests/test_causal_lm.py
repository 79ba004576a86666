"""CausalLM: opened from fields or a folder, called, generating; bad input named."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_tokenizers import packaged_bytes
from tiny_models import FIELDS, draw_params, one_device, tiny_gpt2
from transformers import GPTNeoConfig, Qwen2Config

from jax_sft.model.causal_lm import CausalLM
from jax_sft.model.placement import Placement

ONE = Placement(mesh=one_device())


@pytest.fixture(scope="module")
def speaker():
    """A model with a tokenizer, made of fields and the tokenizer's own size and tokens."""
    fields = {k: v for k, v in FIELDS.items() if not k.endswith("_token_id") and k != "vocab_size"}
    model = CausalLM.open(None, fields=fields, tokenizer=packaged_bytes(), placement=ONE)
    model.params = draw_params(model)
    return model


def test_a_tokenizer_gives_a_new_model_its_vocabulary_and_tokens(speaker):
    tokenizer = packaged_bytes()
    assert speaker.decoder.config.vocab_size == len(tokenizer)
    assert speaker.config.eos_token_id == tokenizer.eos_token_id
    assert speaker.stop_ids == [tokenizer.eos_token_id]


def test_positions_and_segments_have_defaults():
    model = tiny_gpt2()
    tokens = [[5, 3, 9], [1, 2, 0]]
    got = model(tokens)
    assert got.shape == (2, 3, 67) and got.dtype == jnp.float32
    explicit = model(np.array(tokens), [[0, 1, 2]] * 2, [[1, 1, 1]] * 2)
    np.testing.assert_array_equal(got, explicit)
    # Two segments in a row are two rows.
    packed = model([[5, 3, 9]], [[0, 1, 0]], [[1, 1, 2]])
    np.testing.assert_allclose(packed[0, :2], got[0, :2], rtol=0, atol=1e-5)
    assert (packed[0, 2] != got[0, 2]).any()


def test_dtypes_may_be_given_by_name(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    model = CausalLM.from_pretrained(tmp_path, placement=ONE, param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    assert model.decoder.numerics.dtype == jnp.float32
    model = CausalLM.from_pretrained(tmp_path, placement=ONE, dtype="bfloat16")
    assert model.decoder.numerics.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="'float8' is unknown: choose auto, float32, bfloat16"):
        CausalLM.from_pretrained(tmp_path, placement=ONE, dtype="float8")


def test_what_the_model_has_no_row_for_is_refused():
    model = tiny_gpt2()
    num_positions = model.decoder.config.num_positions
    with pytest.raises(ValueError, match=f"position {num_positions} is outside"):
        model([[1] * (num_positions + 1)])
    with pytest.raises(ValueError, match="position 99999 is outside"):
        model([[1, 2]], [[0, 99999]])
    for token in (67, -1):
        with pytest.raises(ValueError, match=f"token id {token} is outside .* it has 67"):
            model(np.array([[1, token]]))
    with pytest.raises(ValueError, match="shape .2.: pass"):
        model([1, 2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([[]],), "tokens_BT is of float64: pass whole"),
        ((np.zeros((1, 0), int),), r"tokens_BT has shape \[1, 0\]: pass"),
        (([[1.7, 2.2]],), "tokens_BT is of float64: pass whole numbers"),
        (([[1, 2]], [[0, 0.5]]), "positions_BT is of float64: pass whole numbers"),
        (([[1, 2]], [0, 1]), r"positions_BT has shape \(2,\): pass that of tokens_BT, \(1, 2\)"),
        (([[1, 2]], None, [[1]]), r"segment_ids_BT has shape \(1, 1\): pass that of tokens_BT"),
    ],
)
def test_arrays_that_are_no_rows_of_ids_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        tiny_gpt2()(*given)


def test_dropout_of_pre_training_is_off_unless_asked_for():
    assert not tiny_gpt2().training_decoder.numerics.dropout
    config = tiny_gpt2(attn_pdrop=0.2).decoder.config
    rates = (config.embed_dropout, config.attention_dropout, config.residual_dropout)
    assert rates == (0.0, 0.2, 0.0)


def test_num_params_counts_no_padding():
    model = tiny_gpt2()
    expected = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert model.num_params == expected
    padded = CausalLM(model.config, placement=ONE)
    padded.decoder = dataclasses.replace(padded.decoder, vocab_padding=3, parent=None)
    assert padded.num_params == expected


def test_generate_is_text_to_text_and_keeps_to_its_seed(speaker):
    kwargs = dict(max_new_tokens=6, temperature=1.5)
    got = speaker.generate(["ab", "c"], seed=1, **kwargs)
    assert len(got) == 2 and all(isinstance(text, str) for text in got)
    assert speaker.generate(["ab", "c"], seed=1, **kwargs) == got
    assert speaker.generate(["ab", "c"], seed=2, **kwargs) != got
    assert speaker.generate(["ab"], seed=2**32 - 1, stop_sequences=None, **kwargs)


def test_stop_sequences_end_an_output_and_are_cut_off(speaker):
    [full] = speaker.generate(["ab"], max_new_tokens=12, do_sample=False)
    stop = full[2:4]
    [cut] = speaker.generate(["ab"], max_new_tokens=12, do_sample=False, stop_sequences=[stop])
    assert cut == full[: full.index(stop)].rstrip()


def test_a_special_token_may_be_a_stop_sequence(speaker):
    """Decoded outputs leave special tokens out, so that no text would ever have it."""
    [full] = speaker.generate(["ab"], max_new_tokens=12, do_sample=False)
    model = copy.copy(speaker)
    model.tokenizer = copy.deepcopy(speaker.tokenizer)
    model.tokenizer.add_special_tokens({"additional_special_tokens": [full[2]]})
    [cut] = model.generate(["ab"], max_new_tokens=12, do_sample=False, stop_sequences=[full[2]])
    assert cut == full[: full.index(full[2])].rstrip()


@pytest.mark.parametrize(
    ("prompts", "kwargs", "message"),
    [
        ("ab", {}, "prompts is the string 'ab': pass a list of strings"),
        (["ab"], dict(max_tokens=3), "gen_kwargs has no 'max_tokens': choose among"),
        (["a" * 64], {}, r"prompts\[0\] has 64 tokens, and with max_new_tokens=40 exceeds"),
        (["ab"], dict(stop_sequences=5), "stop_sequences is 5; pass a list of str"),
        (["ab"], dict(seed=2**32), r"seed=4294967296 must be a whole number in \[0, 2\*\*32\)"),
        (["ab"], dict(seed=1.5), "seed=1.5 must be a whole number"),
    ],
)
def test_bad_prompts_and_arguments_are_named(speaker, prompts, kwargs, message):
    with pytest.raises(ValueError, match=message):
        speaker.generate(prompts, **kwargs)


def test_without_a_tokenizer_there_is_no_text():
    with pytest.raises(ValueError, match="this model has no tokenizer: pass one"):
        tiny_gpt2().generate(["ab"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(model_type="gpt3"), "model_type 'gpt3' is unknown to transformers"),
        (dict(model_type="bert"), "model_type 'bert' is not supported: choose one of"),
        (FIELDS | dict(n_layers=2), "model.config.n_layers is no field of GPT2Config"),
        (FIELDS | dict(n_head=5), "n_embd=32 does not divide by n_head=5"),
        (FIELDS | dict(activation_function="mish"), "activation_function='mish' is not built"),
        (
            FIELDS | dict(add_cross_attention=True),
            "add_cross_attention=True is not built: only False is",
        ),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CausalLM.open(None, fields=fields, placement=ONE)


def test_a_field_that_its_class_refuses_is_one_line(tmp_path):
    refused = dict(model_type="llama", hidden_size=33, num_attention_heads=4)
    with pytest.raises(ValueError, match="hidden size .33. is not a multiple") as error:
        CausalLM.open(None, fields=refused, placement=ONE)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(refused))
    with pytest.raises(ValueError, match="config.json cannot be read .*33. is not a mult") as error:
        CausalLM.open(tmp_path, placement=ONE)
    assert "\n" not in str(error.value)


ROTARY = dict(FIELDS, model_type="llama", hidden_size=32, intermediate_size=32)


@pytest.mark.parametrize(
    ("fields", "stated"),
    [
        (ROTARY | dict(rope_theta=5e5), dict(rope_theta=5e5)),
        (ROTARY | dict(rope_scaling=dict(rope_type="linear", factor=2.0)), dict(factor=2.0)),
        (ROTARY | dict(rope_scaling=dict(type="linear", factor=2.0)), dict(factor=2.0)),
    ],
)
def test_older_names_of_rotary_fields_are_as_in_a_config_file(fields, stated, tmp_path):
    """Classes keep them in rope_parameters, and read them from files under their own names."""
    fields = {name: value for name, value in fields.items() if not name.startswith("n_")}
    fields |= dict(num_hidden_layers=1, num_attention_heads=4)
    new = CausalLM.open(None, fields=fields, placement=ONE)
    assert new.config.rope_parameters.items() >= stated.items()
    (tmp_path / "config.json").write_text(json.dumps(fields))
    read = CausalLM.open(tmp_path, placement=ONE)
    assert read.decoder.config == new.decoder.config
    changed = {name: value for name, value in fields.items() if name.startswith("rope_")}
    (tmp_path / "config.json").write_text(json.dumps(fields | dict.fromkeys(changed)))
    loaded = CausalLM.open(tmp_path, fields=changed, placement=ONE)
    assert loaded.decoder.config == new.decoder.config


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        (dict(model_type="bloom", n_layer=1, seq_length=99), dict(num_positions=99)),
        (dict(model_type="qwen3_moe", num_hidden_layers=1, head_dim=24), dict(head_width=24)),
        (dict(model_type="codegen", n_layer=1, n_embd=32, n_head=4, rotary_dim=4), {}),
    ],
)
def test_fields_that_a_class_does_not_keep_are_read_all_the_same(fields, sizes):
    model = CausalLM.open(None, fields=fields, tokenizer=packaged_bytes(), placement=ONE)
    read = dataclasses.asdict(model.decoder.config)
    assert read.items() >= (sizes | dict(vocab_size=len(packaged_bytes()))).items()


def test_more_unfrozen_layers_than_there_are():
    with pytest.raises(ValueError, match="num_layers_unfrozen=3, but the model has 2 layers"):
        tiny_gpt2(placement={"num_layers_unfrozen": 3})


def test_a_saved_model_is_opened_with_its_tokenizer_and_changed_fields(speaker, tmp_path):
    speaker.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    opened = CausalLM.from_pretrained(tmp_path, placement=ONE)
    assert opened.tokenizer is not None
    kwargs = dict(max_new_tokens=6, do_sample=False)
    assert opened.generate(["ab"], **kwargs) == speaker.generate(["ab"], **kwargs)
    (tmp_path / "tokenizer_config.json").unlink()  # tokenizer.json is enough for transformers
    assert CausalLM.open(tmp_path, placement=ONE).tokenizer is not None
    changed = CausalLM.open(tmp_path, fields=dict(resid_pdrop=0.5), placement=ONE)
    assert changed.decoder.config.residual_dropout == 0.5
    with pytest.raises(ValueError, match="model_type is 'llama', but the model in model_path"):
        CausalLM.open(tmp_path, fields=dict(model_type="llama"), placement=ONE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "generation_config.json cannot be read"),
        ("[]", "generation_config.json cannot be read"),
        ('{"eos_token_id": "2"}', "generation_config.json has eos_token_id '2'; write an id"),
    ],
)
def test_a_damaged_generation_config_is_one_line(text, message, tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        CausalLM.open(tmp_path, placement=ONE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", [None, 3])
def test_what_is_no_path_is_named(path):
    with pytest.raises(ValueError, match=f"path is {path}: pass a model's folder"):
        CausalLM.from_pretrained(path)


SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
NEO_SIZES = dict(hidden_size=16, num_layers=2, num_heads=2, vocab_size=9)
WINDOWS = dict(use_sliding_window=True, sliding_window=3)
SLIDING = dict(layer_types=["sliding_attention"] * 2)
LOCAL = dict(attention_types=[[["local"], 2]])


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (Qwen2Config(**SIZES), WINDOWS, "use_sliding_window changes nothing of a model that is lo"),
        (Qwen2Config(**SIZES), SLIDING | dict(sliding_window=3), "Qwen2Config makes another model"),
        (
            GPTNeoConfig(**NEO_SIZES, attention_types=[[["global"], 2]]),
            LOCAL,
            "set what GPTNeoConfig makes of it, as layer_types or attention_layers",
        ),
    ],
    ids=["no effect", "lost when saved", "another family"],
)
def test_a_changed_field_that_would_be_lost_is_refused(config, fields, message, tmp_path):
    """The class has made layer_types, or attention_layers, when the config was made."""
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        CausalLM.open(tmp_path, fields=fields, placement=ONE)


def test_a_changed_field_may_come_with_what_is_made_of_it(tmp_path):
    Qwen2Config(**SIZES).save_pretrained(tmp_path)
    model = CausalLM.open(tmp_path, fields=WINDOWS | SLIDING, placement=ONE)
    assert [layer.window for layer in model.decoder.config.layers] == [3, 3]
