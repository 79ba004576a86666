"""The registry of families, and what of a `transformers` config is read, ignored or refused."""

import json

import pytest
from transformers import AutoConfig, BertConfig, GPT2Config, LlamaConfig

from jax_sft.model.families import FAMILIES, find_family, read_config
from jax_sft.model.families.options import ACTIVATIONS, activation, require, require_off
from jax_sft.model.pretrained import read_config as read_config_file
from jax_sft.model.types import Layer

TINY = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48)
EVERY_FAMILY = pytest.mark.parametrize("model_type", FAMILIES)


def from_file(folder, **fields):
    """The decoder's config of a config.json with these fields."""
    (folder / "config.json").write_text(json.dumps(fields))
    return read_config(read_config_file(folder))


def refusal(config) -> str:
    with pytest.raises(ValueError) as caught:
        read_config(config)
    return str(caught.value)


@EVERY_FAMILY
def test_a_family_is_named_as_transformers_names_it(model_type):
    assert find_family(AutoConfig.for_model(model_type)) is FAMILIES[model_type]


def test_families_are_in_order():
    assert list(FAMILIES) == sorted(FAMILIES)


@EVERY_FAMILY
def test_a_config_of_defaults_is_read(model_type):
    config = AutoConfig.for_model(model_type)
    decoder_config = read_config(config)
    assert decoder_config.num_layers == config.num_hidden_layers
    assert decoder_config.vocab_size == config.vocab_size


@EVERY_FAMILY
def test_the_name_table_has_a_place_for_each_tensor_once(model_type):
    table = FAMILIES[model_type].tensors(read_config(AutoConfig.for_model(model_type)))
    theirs = [row.theirs for row in table]
    ours = [path for row in table for path in row.ours]
    assert len(set(theirs)) == len(theirs)
    assert len(set(ours)) == len(ours)


@pytest.mark.parametrize("config", [BertConfig(), AutoConfig.for_model("gemma3")])
def test_an_unknown_model_type_is_refused_with_those_that_are_known(config):
    message = refusal(config)
    assert repr(config.model_type) in message
    assert all(repr(name) in message for name in FAMILIES)


class TestFieldsThatAFamilyDoesNotRead:
    @EVERY_FAMILY
    def test_at_their_default_they_are_ignored_else_refused_by_name(self, model_type):
        class Later(type(AutoConfig.for_model(model_type))):
            """The class as a later release may have it."""

            later_switch: str | None = None
            _private_switch: str | None = None  # as OPT's _remove_final_layer_norm

        read_config(Later(name_or_path="somewhere"))
        for field in ("later_switch", "_private_switch"):
            message = refusal(Later(**{field: "on"}))
            assert f"{field}='on'" in message
            assert "None" in message and model_type in message

    def test_a_default_may_be_computed_of_what_is_read(self):
        class Later(LlamaConfig):
            later_width: int | None = None

            def __post_init__(self, **kwargs):
                if self.later_width is None:
                    self.later_width = 2 * self.hidden_size
                super().__post_init__(**kwargs)

        assert read_config(Later(**TINY)) == read_config(LlamaConfig(**TINY))
        assert "later_width=65" in refusal(Later(**TINY, later_width=65))

    def test_a_default_may_be_nested(self):
        class Later(LlamaConfig):
            later_options: dict | None = None
            later_sizes: tuple | list = (1, (2, 3))

            def __post_init__(self, **kwargs):
                self.later_options = {"a": {"b": 1}} | (self.later_options or {})
                super().__post_init__(**kwargs)

        read_config(Later(later_options={"a": {"b": 1}}))
        read_config(Later(later_sizes=[1, [2, 3]]))
        assert "later_options" in refusal(Later(later_options={"a": {"b": 2}}))
        assert "later_sizes" in refusal(Later(later_sizes=[1, [2, 4]]))

    def test_a_class_that_needs_arguments_is_read_by_those_it_shares(self):
        class Later(LlamaConfig):
            hidden_size: int

        assert read_config(Later(**TINY)) == read_config(LlamaConfig(**TINY))

    def test_a_class_that_needs_other_arguments_is_refused(self):
        class Later(LlamaConfig):
            later_width: int

        message = refusal(Later(later_width=3))
        assert "Later" in message and "later_width" in message

    def test_a_field_may_have_two_names(self):
        by_old_names = GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=64)
        by_new_names = GPT2Config(
            num_hidden_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=64
        )
        assert read_config(by_old_names) == read_config(by_new_names)
        assert read_config(by_old_names).width == 32

    def test_a_family_may_read_a_field_by_another_name(self):
        class Later(LlamaConfig):
            attribute_map = {"hidden_size": "later_size"}
            later_size: int = 4096

        assert read_config(Later(later_size=64)).width == 64

    def test_what_the_class_has_no_field_for_is_ignored(self):
        plain, extra = LlamaConfig(**TINY), LlamaConfig(**TINY, use_logn_attn=True, unsloth="2025")
        assert extra.use_logn_attn
        assert read_config(extra) == read_config(plain)

    def test_the_config_is_left_as_it_was(self):
        config = LlamaConfig(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10.0))
        before = config.to_dict()
        read_config(config)
        assert config.to_dict() == before


class TestWhatNoFamilyCanDo:
    @EVERY_FAMILY
    def test_quantised_models(self, model_type):
        config = AutoConfig.for_model(
            model_type, quantization_config=dict(quant_method="bitsandbytes", load_in_4bit=True)
        )
        assert "quantization_config" in refusal(config)

    def test_what_says_that_nothing_is_quantised_is_ignored(self):
        read_config(LlamaConfig(**TINY, quantization_config=None))

    @EVERY_FAMILY
    def test_layers_with_options_of_their_own(self, model_type):
        config = AutoConfig.for_model(model_type)
        config.per_layer_config = {1: {"hidden_size": 8}}
        assert "per_layer_config" in refusal(config)

    @EVERY_FAMILY
    def test_attention_in_both_directions(self, model_type):
        assert "is_causal=False" in refusal(AutoConfig.for_model(model_type, is_causal=False))
        read_config(AutoConfig.for_model(model_type, is_causal=True))

    @EVERY_FAMILY
    def test_encoders(self, model_type):
        config = AutoConfig.for_model(model_type)
        config.is_encoder_decoder = True
        assert "is_encoder_decoder=True" in refusal(config)

    def test_fields_that_do_not_go_together(self):
        config = AutoConfig.for_model("gemma2")
        config.hidden_size = 2303  # the class checks when it is made, and not from then on
        message = refusal(config)
        assert "2303" in message and "\n" not in message


class TestHubConfigs:
    """Files as they are found on the hub: old spellings, and keys that nobody reads."""

    def test_old_spellings_of_rope_parameters(self, tmp_path):
        scaling = dict(
            factor=8.0,
            high_freq_factor=4.0,
            low_freq_factor=1.0,
            original_max_position_embeddings=8192,
            rope_type="llama3",
        )
        old = dict(model_type="llama", max_position_embeddings=131072, **TINY)
        new = old | dict(rope_parameters=scaling | dict(rope_theta=500000.0))
        old |= dict(rope_scaling=scaling, rope_theta=500000.0, torch_dtype="bfloat16")
        assert from_file(tmp_path, **old) == from_file(tmp_path, **new)
        older = dict(model_type="llama", **TINY, rope_scaling=dict(type="linear", factor=4.0))
        newer = dict(
            model_type="llama",
            **TINY,
            rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0),
        )
        assert from_file(tmp_path, **older) == from_file(tmp_path, **newer)

    def test_llama(self, tmp_path):
        config = from_file(
            tmp_path,
            **dict(
                _name_or_path="meta-llama/Llama-3.2-1B",
                architectures=["LlamaForCausalLM"],
                attention_bias=False,
                attention_dropout=0.0,
                bos_token_id=128000,
                eos_token_id=[128001, 128008, 128009],
                head_dim=64,
                hidden_act="silu",
                hidden_size=2048,
                initializer_range=0.02,
                intermediate_size=8192,
                max_position_embeddings=131072,
                mlp_bias=False,
                model_type="llama",
                num_attention_heads=32,
                num_hidden_layers=16,
                num_key_value_heads=8,
                pretraining_tp=1,
                rms_norm_eps=1e-05,
                rope_scaling=dict(
                    factor=32.0,
                    high_freq_factor=4.0,
                    low_freq_factor=1.0,
                    original_max_position_embeddings=8192,
                    rope_type="llama3",
                ),
                rope_theta=500000.0,
                tie_word_embeddings=True,
                torch_dtype="bfloat16",
                transformers_version="4.45.0.dev0",
                unsloth_fixed=True,
                use_cache=True,
                vocab_size=128256,
            ),
        )
        assert (config.num_layers, config.num_heads, config.num_kv_heads) == (16, 32, 8)
        assert (config.head_width, config.mlp_width, config.tied_head) == (64, 8192, True)

    def test_gpt2(self, tmp_path):
        config = from_file(
            tmp_path,
            **dict(
                activation_function="gelu_new",
                architectures=["GPT2LMHeadModel"],
                attn_pdrop=0.1,
                bos_token_id=50256,
                embd_pdrop=0.1,
                eos_token_id=50256,
                gradient_checkpointing=False,
                initializer_range=0.02,
                layer_norm_epsilon=1e-05,
                model_type="gpt2",
                n_ctx=1024,
                n_embd=768,
                n_head=12,
                n_inner=None,
                n_layer=12,
                n_positions=1024,
                output_past=True,
                reorder_and_upcast_attn=True,
                resid_pdrop=0.1,
                summary_activation="tanh",
                summary_first_dropout=0.2,
                summary_proj_to_labels=False,
                summary_type="mean",
                summary_use_proj=False,
                task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
                vocab_size=50257,
                id2label={"0": "no", "1": "yes", "2": "perhaps"},
                label2id={"no": 0, "yes": 1, "perhaps": 2},
                problem_type="multi_label_classification",
                output_hidden_states=True,
                use_cache=False,
                do_sample=True,
                max_length=50,
            ),
        )
        assert (config.num_layers, config.width, config.mlp_width) == (12, 768, 3072)
        assert (config.embed_dropout, config.vocab_size) == (0.1, 50257)

    def test_gemma(self, tmp_path):
        config = from_file(
            tmp_path,
            **dict(
                architectures=["GemmaForCausalLM"],
                attention_bias=False,
                attention_dropout=0.0,
                bos_token_id=2,
                eos_token_id=1,
                head_dim=256,
                hidden_act="gelu",  # meant the tanh approximation
                hidden_activation=None,
                hidden_size=2048,
                initializer_range=0.02,
                intermediate_size=16384,
                max_position_embeddings=8192,
                model_type="gemma",
                num_attention_heads=8,
                num_hidden_layers=18,
                num_key_value_heads=1,
                pad_token_id=0,
                rms_norm_eps=1e-06,
                rope_scaling=None,
                rope_theta=10000.0,
                torch_dtype="bfloat16",
                transformers_version="4.38.0.dev0",
                use_cache=True,
                vocab_size=256000,
            ),
        )
        assert (config.activation, config.embed_scale) == ("gelu_new", 2048**0.5)
        assert (config.head_width, config.num_kv_heads, config.tied_head) == (256, 1, True)

    def test_gemma3_text(self, tmp_path):
        config = from_file(
            tmp_path,
            **dict(
                architectures=["Gemma3ForCausalLM"],
                attention_bias=False,
                attention_dropout=0.0,
                attn_logit_softcapping=None,
                bos_token_id=2,
                cache_implementation="hybrid",
                eos_token_id=[1, 106],
                final_logit_softcapping=None,
                head_dim=256,
                hidden_activation="gelu_pytorch_tanh",
                hidden_size=1152,
                initializer_range=0.02,
                intermediate_size=6912,
                max_position_embeddings=32768,
                model_type="gemma3_text",
                num_attention_heads=4,
                num_hidden_layers=26,
                num_key_value_heads=1,
                pad_token_id=0,
                query_pre_attn_scalar=256,
                rms_norm_eps=1e-06,
                rope_local_base_freq=100,
                rope_scaling=dict(rope_type="linear", factor=8.0),
                rope_theta=10000,
                sliding_window=512,
                sliding_window_pattern=3,
                torch_dtype="bfloat16",
                transformers_version="4.50.0.dev0",
                use_cache=True,
                vocab_size=262144,
            ),
        )
        assert [layer.window for layer in config.layers[:4]] == [512, 512, None, 512]
        # Base 100 within windows; 10,000, stretched by 8, without.
        for layer, base, factor in [(config.layers[0], 100, 1), (config.layers[2], 10000, 8)]:
            expected = [1 / factor, base ** (-2 / 256) / factor]
            assert layer.rotary.frequencies[:2] == pytest.approx(expected, rel=1e-6)

    def test_partial_rotary_factor_outside_of_rope_parameters(self, tmp_path):
        fields = dict(TINY, hidden_size=64, head_dim=None)
        for model_type, default in [("phi", 8), ("stablelm", 4)]:
            for stated, turned in [(dict(), default), (dict(partial_rotary_factor=0.75), 12)]:
                config = from_file(tmp_path, model_type=model_type, **fields, **stated)
                assert 2 * len(config.layers[0].rotary.frequencies) == turned

    def test_cohere2(self, tmp_path):
        config = from_file(
            tmp_path,
            **dict(
                architectures=["Cohere2ForCausalLM"],
                attention_bias=False,
                attention_dropout=0.0,
                bos_token_id=5,
                cache_implementation="hybrid",
                eos_token_id=255001,
                head_dim=128,
                hidden_act="silu",
                hidden_size=4096,
                initializer_range=0.02,
                intermediate_size=14336,
                layer_norm_eps=1e-05,
                layer_switch=4,
                logit_scale=0.25,
                max_position_embeddings=8192,
                model_type="cohere2",
                num_attention_heads=32,
                num_hidden_layers=32,
                num_key_value_heads=8,
                order_of_interleaved_layers="local_attn_first",
                pad_token_id=0,
                position_embedding_type="rope_gptj",
                rope_scaling=None,
                rope_theta=50000,
                rotary_pct=1.0,
                sliding_window=4096,
                sliding_window_pattern=4,
                torch_dtype="bfloat16",
                transformers_version="4.48.0.dev0",
                use_cache=True,
                use_embedding_sharing=True,
                use_gated_activation=True,
                use_parallel_block=True,
                use_parallel_embedding=True,
                vocab_size=256000,
            ),
        )
        assert config.layers[3] == Layer(window=None, rotary=None)
        assert [layer.window for layer in config.layers[:3]] == [4096] * 3
        assert config.layers[0].rotary.interleaved
        assert (config.logit_scale, config.tied_head) == (0.25, True)


class TestOptions:
    def test_activations_have_the_names_and_numbers_of_transformers(self):
        torch = pytest.importorskip("torch")
        import numpy as np
        from transformers.activations import ACT2FN

        from jax_sft.model.layers import ACTIVATIONS as FUNCTIONS

        values = np.linspace(-6, 6, 97, dtype=np.float32)
        for theirs, ours in ACTIVATIONS.items():
            expected = ACT2FN[theirs](torch.tensor(values)).numpy()
            got = np.asarray(FUNCTIONS[ours](values))
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6, err_msg=theirs)

    def test_an_activation_that_is_not_built_is_refused(self):
        config = LlamaConfig(hidden_act="mish")
        with pytest.raises(ValueError, match="hidden_act='mish' is not built: .*'gelu_new'"):
            activation(config, "hidden_act")

    def test_required_values(self):
        config = LlamaConfig(attention_bias=True)
        require(config, attention_bias=True, mlp_bias=False)
        with pytest.raises(ValueError, match="attention_bias=True is not built: only False is"):
            require(config, mlp_bias=False, attention_bias=False)

    @pytest.mark.parametrize("off", [False, None])
    def test_switches_that_are_off(self, off):
        require_off(LlamaConfig(use_logn_attn=off), "use_logn_attn", "no_such_field")

    @pytest.mark.parametrize("on", [True, 0, 2.5, "yes", []])
    def test_switches_that_are_on(self, on):
        with pytest.raises(ValueError, match="use_logn_attn"):
            require_off(LlamaConfig(use_logn_attn=on), "use_logn_attn")

    @pytest.mark.parametrize(
        "fields, word",
        [
            (dict(layer_types=["full_attention", "conv"]), "'conv'"),
            (dict(sliding_window=None), "sliding_window is None"),
            (dict(num_hidden_layers=3), "2 entries, but num_hidden_layers is 3"),
        ],
    )
    def test_windows_that_are_not_built(self, fields, word):
        config = AutoConfig.for_model("gemma2", num_hidden_layers=2)
        for name, value in fields.items():
            setattr(config, name, value)
        assert word in refusal(config)
