"""Rope parameters to frequencies: worked by hand, and beside `transformers`' own functions."""

import math

import numpy as np
import pytest

from jax_sft.model.families.rotary_options import context_len, read_rotary

BASE = 10000.0  # with 8 numbers turned: frequencies 1, 0.1, 0.01, 0.001
# One rounding to float32 for each of a few operations.
FEW_ULPS = 3e-7


def read(rope_type, width=8, num_positions=64, **parameters):
    return read_rotary(
        {"rope_type": rope_type, "rope_theta": BASE, **parameters},
        width=width,
        num_positions=num_positions,
    )


def assert_frequencies(got, expected):
    np.testing.assert_allclose(got, expected, rtol=FEW_ULPS)


class TestByHand:
    def test_default_is_a_geometric_series(self):
        rotary = read("default")
        assert_frequencies(rotary.frequencies, [1, 0.1, 0.01, 0.001])
        assert (rotary.factor, rotary.long_from, rotary.interleaved) == (1.0, None, False)

    def test_fewer_numbers_turned_have_their_own_series(self):
        assert_frequencies(read("default", width=4).frequencies, [1, 0.01])

    def test_the_kind_may_be_named_type_or_not_at_all(self):
        plain = read_rotary({"rope_theta": BASE}, width=8, num_positions=64)
        assert plain == read("default")
        parameters = {"type": "linear", "factor": 2.0, "rope_theta": BASE}
        old = read_rotary(parameters, width=8, num_positions=64)
        assert old == read("linear", factor=2.0)

    def test_interleaved_is_passed_on(self):
        for rope_type, options in KINDS.values():
            parameters = {"rope_type": rope_type, "rope_theta": BASE, **options}
            got = read_rotary(parameters, width=8, num_positions=64, interleaved=True)
            assert got.interleaved

    def test_linear_divides(self):
        assert_frequencies(read("linear", factor=4.0).frequencies, [0.25, 0.025, 0.0025, 0.00025])

    def test_dynamic_starts_as_default_and_leaves_its_base_to_the_decoder(self):
        rotary = read("dynamic", factor=4.0)
        assert rotary.frequencies == read("default").frequencies
        assert (rotary.long_from, rotary.ntk_factor, rotary.ntk_base) == (64, 4.0, BASE)
        assert rotary.long_frequencies is None

    def test_llama3_keeps_short_waves_and_stretches_long_ones(self):
        # Turns in 64 positions: 10.19, 1.019, 0.1019, 0.01019. Kept from 2, stretched to 0.5,
        # and (1.019 - 0.5) / 1.5 = 0.3457 of the way between.
        rotary = read(
            "llama3",
            factor=8.0,
            low_freq_factor=0.5,
            high_freq_factor=2.0,
            original_max_position_embeddings=64,
        )
        kept = (64 * 0.1 / (2 * math.pi) - 0.5) / 1.5
        between = 0.1 * kept + 0.1 / 8 * (1 - kept)
        assert_frequencies(rotary.frequencies, [1, between, 0.01 / 8, 0.001 / 8])

    def test_yarn_ramps_over_the_pairs(self):
        # Pair p makes 64 / (2π · 10^p) turns in 64 positions: 32 turns would be pair -0.50, 1 turn
        # is pair 1.008. Rounded outwards and clipped, the ramp is 0, 0.5, 1, 1.
        rotary = read("yarn", factor=4.0, original_max_position_embeddings=64)
        assert_frequencies(rotary.frequencies, [1, (0.1 + 0.025) / 2, 0.01 / 4, 0.001 / 4])
        assert rotary.factor == pytest.approx(0.1 * math.log(4) + 1)

    def test_yarn_without_truncation_ramps_to_where_one_turn_is(self):
        last = math.log10(64 / (2 * math.pi))
        rotary = read("yarn", factor=4.0, original_max_position_embeddings=64, truncate=False)
        stretched = 1 / last
        assert_frequencies(
            rotary.frequencies,
            [1, 0.1 * (1 - stretched) + 0.025 * stretched, 0.01 / 4, 0.001 / 4],
        )

    def test_yarn_takes_its_factor_from_the_lengths_where_none_is_stated(self):
        by_lengths = read("yarn", factor=None, original_max_position_embeddings=16)
        assert by_lengths == read("yarn", factor=4.0, original_max_position_embeddings=16)

    @pytest.mark.parametrize(
        ("stated", "expected"),
        [
            (dict(attention_factor=1.7), 1.7),
            (dict(attention_factor=1.7, mscale=2.0, mscale_all_dim=1.0), 1.7),
            (
                dict(mscale=2.0, mscale_all_dim=0.5),
                (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
            ),
            (dict(mscale=2.0), 0.1 * math.log(4) + 1),
            (dict(factor=1.0), 1.0),
        ],
    )
    def test_yarns_factor_on_attention(self, stated, expected):
        options = dict(factor=4.0, original_max_position_embeddings=16) | stated
        assert read("yarn", **options).factor == pytest.approx(expected, rel=1e-12)

    def test_longrope_has_a_factor_a_pair_and_others_for_long_examples(self):
        rotary = read(
            "longrope",
            short_factor=[1.0, 2.0, 1.0, 4.0],
            long_factor=[5.0, 1.0, 10.0, 1.0],
            original_max_position_embeddings=16,
        )
        assert_frequencies(rotary.frequencies, [1, 0.05, 0.01, 0.00025])
        assert_frequencies(rotary.long_frequencies, [0.2, 0.1, 0.001, 0.001])
        assert rotary.long_from == 16
        # 64 positions of 16 trained: sqrt(1 + ln 4 / ln 16).
        assert rotary.factor == pytest.approx(math.sqrt(1.5))

    @pytest.mark.parametrize(
        ("stated", "expected"),
        [
            (dict(factor=16.0), math.sqrt(2)),
            (dict(factor=0.5), 1.0),
            (dict(attention_factor=1.3, factor=16.0), 1.3),
        ],
    )
    def test_longropes_factor_on_attention(self, stated, expected):
        options = KINDS["longrope"][1] | dict(original_max_position_embeddings=16) | stated
        assert read("longrope", **options).factor == pytest.approx(expected)

    def test_only_dynamic_scaling_lengthens_the_context(self):
        assert context_len({"rope_type": "dynamic", "factor": 4.0}, 64) == 256
        assert context_len({"type": "dynamic", "factor": 2.5}, 64) == 160
        for rope_type in ("default", "linear", "yarn", "longrope", "llama3"):
            assert context_len({"rope_type": rope_type, "factor": 4.0}, 64) == 64


class TestRefused:
    @pytest.mark.parametrize(
        ("rope_type", "parameters", "words"),
        [
            ("spiral", {}, "rope_type='spiral' is not built"),
            ("linear", dict(factor=2.0, stretch=3.0), "has ['stretch']"),
            ("default", dict(factor=2.0), "has ['factor']"),
            ("default", dict(full_attention={"rope_theta": 1.0}), "has ['full_attention']"),
            ("linear", {}, "lacks ['factor']"),
            ("dynamic", dict(factor=None), "lacks ['factor']"),
            ("default", dict(rope_theta=None), "lacks ['rope_theta']"),
            ("llama3", dict(factor=2.0), "lacks ['low_freq_factor', 'high_freq_factor']"),
            (
                "llama3",
                dict(factor=2.0, low_freq_factor=4.0, high_freq_factor=4.0),
                "high_freq_factor=4.0 is not above low_freq_factor=4.0",
            ),
            ("longrope", dict(short_factor=[1.0] * 4), "lacks ['long_factor']"),
            (
                "longrope",
                dict(short_factor=[1.0] * 4, long_factor=[1.0] * 3),
                "long_factor has 3 numbers, expected 4",
            ),
            ("dynamic", dict(factor=2.0, width=2), "with 2 numbers of a head turned"),
            ("yarn", dict(factor=2.0, width=5), "with 5 numbers of a head turned"),
        ],
    )
    def test_the_error_says_what(self, rope_type, parameters, words):
        with pytest.raises(ValueError) as caught:
            read(rope_type, **parameters)
        assert words in str(caught.value)


KINDS = {
    "default": ("default", {}),
    "linear": ("linear", dict(factor=3.0)),
    "dynamic": ("dynamic", dict(factor=3.0)),
    "llama3": (
        "llama3",
        dict(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "yarn": ("yarn", dict(factor=4.0, original_max_position_embeddings=32)),
    "yarn, its options": (
        "yarn",
        dict(
            factor=40.0,
            original_max_position_embeddings=32,
            beta_fast=4.0,
            beta_slow=0.5,
            mscale=0.7,
            mscale_all_dim=1.1,
            truncate=False,
        ),
    ),
    # Trained so long that the ramp begins after the first pair; and one that ends after the last.
    "yarn, long": ("yarn", dict(factor=4.0, original_max_position_embeddings=4096)),
    "yarn, long, not truncated": (
        "yarn",
        dict(factor=4.0, original_max_position_embeddings=4096, truncate=False),
    ),
    "yarn, longer": (
        "yarn",
        dict(factor=4.0, original_max_position_embeddings=4096, beta_slow=1e-6),
    ),
    "longrope": (
        "longrope",
        dict(
            original_max_position_embeddings=32,
            short_factor=[1.0, 1.1, 1.4, 2.0],
            long_factor=[1.0, 2.0, 8.0, 30.0],
        ),
    ),
    "longrope, its options": (
        "longrope",
        dict(
            original_max_position_embeddings=32,
            factor=9.0,
            short_factor=[1.0, 1.1, 1.4, 2.0],
            long_factor=[1.0, 2.0, 8.0, 30.0],
        ),
    ),
}
SCALED = [name for name in KINDS if name != "default"]


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("base", [BASE, 500000.0])
class TestBesideTransformers:
    """Their functions, for a head of 16 numbers of which half are turned."""

    def theirs(self, name, base, seq_len=None):
        pytest.importorskip("torch")
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope_type, options = KINDS[name]
        parameters = dict(rope_type=rope_type, rope_theta=base, partial_rotary_factor=0.5)
        config = LlamaConfig(
            hidden_size=64,
            num_attention_heads=4,
            max_position_embeddings=64,
            rope_parameters=parameters | options,
        )
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=seq_len)
        return frequencies.numpy(), factor

    def ours(self, name, base):
        rope_type, options = KINDS[name]
        return read(rope_type, **dict(rope_theta=base, partial_rotary_factor=0.5) | options)

    def test_frequencies_and_factor(self, name, base):
        frequencies, factor = self.theirs(name, base)
        assert_frequencies(self.ours(name, base).frequencies, frequencies)
        assert self.ours(name, base).factor == pytest.approx(factor, rel=1e-12)

    def test_frequencies_of_long_examples(self, name, base):
        rotary = self.ours(name, base)
        long = rotary.long_frequencies or rotary.frequencies
        if KINDS[name][0] == "dynamic":
            # What the decoder makes of it for 100 tokens, where 64 are known.
            grown = rotary.ntk_factor * 100 / rotary.long_from - (rotary.ntk_factor - 1)
            grown_base = rotary.ntk_base * grown ** (8 / 6)
            long = [grown_base ** (-2 * pair / 8) for pair in range(4)]
        assert_frequencies(long, self.theirs(name, base, seq_len=100)[0])


def test_default_beside_llamas_own():
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for base, head_dim in ((BASE, 128), (500000.0, 64), (5e6, 80)):
        config = LlamaConfig(
            head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": base}
        )
        frequencies, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        got = read("default", width=head_dim, rope_theta=base)
        assert_frequencies(got.frequencies, frequencies.numpy())
