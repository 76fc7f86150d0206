"""QuantScheme: names, defaults, limits, and the group sizes it proposes."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import InputError, SchemeError
from quantkit.scheme import QuantScheme, legal_group_sizes, parse_scheme

ACTIVATIONS = st.sampled_from([(None, False), (8, False), (8, True)])
SCHEMES = st.builds(
    lambda bits, group_size, symmetric, activations: QuantScheme(bits, group_size, symmetric, *activations),
    bits=st.integers(2, 8),
    group_size=st.none() | st.integers(1, 4096),
    symmetric=st.booleans(),
    activations=ACTIVATIONS,
)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("w4a16", QuantScheme(4, 128)),
        ("w3a16", QuantScheme(3, 128)),
        ("w8a16", QuantScheme(8, None)),
        ("w8a16_g128", QuantScheme(8, 128)),
        ("w7a16", QuantScheme(7, 128)),
        ("w4a16_g64", QuantScheme(4, 64)),
        ("w4a16_channel", QuantScheme(4, None)),
        ("w4a16_asym", QuantScheme(4, 128, symmetric=False)),
        ("w8a16_asym", QuantScheme(8, None, symmetric=False)),
        ("w2a16_g32_asym", QuantScheme(2, 32, symmetric=False)),
        ("w8a16_channel_sym", QuantScheme(8, None, symmetric=True)),
        (" W4A16_G128_SYM\n", QuantScheme(4, 128)),
        ("w8a8", QuantScheme(8, None, act_bits=8)),
        ("w8a8_static", QuantScheme(8, None, act_bits=8, act_static=True)),
        ("w8a8_static_channel_asym", QuantScheme(8, None, symmetric=False, act_bits=8, act_static=True)),
        ("w4a8_g64", QuantScheme(4, 64, act_bits=8)),
    ],
)
def test_names_and_their_defaults(name: str, scheme: QuantScheme) -> None:
    assert parse_scheme(name) == scheme


@given(SCHEMES)
def test_the_text_of_a_scheme_is_its_name(scheme: QuantScheme) -> None:
    assert parse_scheme(str(scheme)) == scheme


@pytest.mark.parametrize(
    "name",
    ["", "w4", "4bit", "int4", "w4a16g128", "w4a16_128", "w4a16_g", "w4a16_g-1", "w4a16_sym_g128", "w4a16_g64_channel",
     "w8a8_dynamic", "w8a8_channel_static", "w4a16 g128", "w-4a16", "w4.5a16", "xw4a16", "w4a16_symm", "w4a16_g1e2"],
)  # fmt: skip
def test_what_is_not_a_name_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(SchemeError) as caught:
        parse_scheme(name)
    assert repr(name) in str(caught.value)
    assert "w4a16_g128" in str(caught.value)  # what to write instead
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["w1a16", "w9a16", "w0a16", "w16a16", "w4a16_g0", "w4a4_g128", "w8a9", "w8a32", "w8a0", "w8a16_static"]
)
def test_names_of_impossible_schemes_are_refused(name: str) -> None:
    with pytest.raises(SchemeError) as caught:
        parse_scheme(name)
    assert "\n" not in str(caught.value)


def test_a_name_with_thousands_of_digits_is_refused() -> None:
    with pytest.raises(SchemeError):
        parse_scheme(f"w{'9' * 5000}a16")


@pytest.mark.parametrize("bits", [1, 9, 0, -4, True, 4.0, "4", None])
def test_bits_out_of_range(bits: Any) -> None:
    with pytest.raises(SchemeError, match=r"bits=.*2 to 8"):
        QuantScheme(bits, 128)


@pytest.mark.parametrize("group_size", [0, -1, -128, True, False, 128.0, "128"])
def test_group_sizes_out_of_range(group_size: Any) -> None:
    with pytest.raises(SchemeError, match=r"group_size=.*positive integer"):
        QuantScheme(4, group_size)


@pytest.mark.parametrize("act_bits", [16, 4, 0, 7, -8, True, "8"])
def test_other_widths_of_activations_are_refused(act_bits: Any) -> None:
    with pytest.raises(SchemeError, match=r"act_bits=.*choose 8 \(a8\), or null"):
        QuantScheme(8, None, act_bits=act_bits)


def test_static_activations_are_quantized_ones() -> None:
    with pytest.raises(SchemeError, match="set act_bits: 8"):
        QuantScheme(8, None, act_static=True)
    with pytest.raises(SchemeError, match="act_static='yes' is not a truth value"):
        QuantScheme(8, None, act_bits=8, act_static="yes")  # type: ignore[arg-type]


@given(SCHEMES)
def test_the_weights_of_a_scheme(scheme: QuantScheme) -> None:
    weight = scheme.weight_only
    assert (weight.act_bits, weight.act_static) == (None, False)
    assert (weight.bits, weight.group_size, weight.symmetric) == (scheme.bits, scheme.group_size, scheme.symmetric)
    assert (weight == scheme) == (scheme.act_bits is None)


@pytest.mark.parametrize("symmetric", ["asym", "false", None, 1])
def test_symmetric_is_a_boolean(symmetric: Any) -> None:
    with pytest.raises(SchemeError):
        QuantScheme(4, 128, symmetric=symmetric)


def test_a_scheme_error_is_an_input_error() -> None:
    """The command line gives exit code 2 to what is an InputError."""
    assert issubclass(SchemeError, InputError)
    assert issubclass(SchemeError, ValueError)


def test_frozen_and_hashable() -> None:
    scheme = QuantScheme(4, 128)
    with pytest.raises(FrozenInstanceError):
        scheme.bits = 8  # type: ignore[misc]
    assert {scheme, QuantScheme(4, 128, symmetric=True, act_bits=None), QuantScheme(4, 64)} == {
        scheme,
        QuantScheme(4, 64),
    }


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_and_mid(bits: int) -> None:
    scheme = QuantScheme(bits, None)
    assert scheme.levels == 2**bits
    assert scheme.mid == 2 ** (bits - 1)


def test_groups_of_a_layer() -> None:
    assert QuantScheme(4, 128).num_groups(4096) == 32
    assert QuantScheme(4, 128).columns_per_group(4096) == 128
    assert QuantScheme(4, None).num_groups(4097) == 1
    assert QuantScheme(4, None).columns_per_group(4097) == 4097


@given(SCHEMES, st.integers(1, 20000))
def test_why_not_is_about_divisibility_alone(scheme: QuantScheme, in_features: int) -> None:
    reason = scheme.why_not(in_features)
    divides = scheme.group_size is None or in_features % scheme.group_size == 0
    assert (reason is None) == divides
    if reason is None:
        assert scheme.num_groups(in_features) * scheme.columns_per_group(in_features) == in_features
        return
    assert f"in_features={in_features}" in reason
    assert f"group_size={scheme.group_size}" in reason
    for size in legal_group_sizes(in_features):
        assert str(size) in reason
    with pytest.raises(SchemeError) as caught:
        scheme.num_groups(in_features)
    assert str(caught.value) == reason


@given(st.integers(1, 20000))
def test_legal_group_sizes_are_divisors(in_features: int) -> None:
    sizes = legal_group_sizes(in_features)
    assert sizes
    assert list(sizes) == sorted(set(sizes))
    for size in sizes:
        assert in_features % size == 0
        assert QuantScheme(4, size).why_not(in_features) is None


def test_legal_group_sizes_of_usual_layers() -> None:
    assert legal_group_sizes(4096) == (16, 32, 64, 128, 256)
    assert set(legal_group_sizes(11008)) >= {32, 64, 128}
    assert legal_group_sizes(576) == (16, 24, 32, 48, 64, 72, 96, 144, 192)
    assert legal_group_sizes(323) == (17, 19)  # no multiple of 8 divides it
    assert legal_group_sizes(257) == (257,)  # a prime
    assert legal_group_sizes(8) == (8,)  # narrower than the smallest usual group


@pytest.mark.parametrize(
    ("scheme", "in_features", "bits"),
    [
        (QuantScheme(4, 128), 4096, 4 + 16 / 128),
        (QuantScheme(4, 128, symmetric=False), 4096, 4 + 20 / 128),
        (QuantScheme(8, None), 64, 8 + 16 / 64),
        (QuantScheme(3, None, symmetric=False), 320, 3 + 19 / 320),
        (QuantScheme(2, 32), 64, 2.5),
    ],
)
def test_bits_per_weight_counts_scales_and_zero_points(scheme: QuantScheme, in_features: int, bits: float) -> None:
    assert scheme.bits_per_weight(in_features) == bits
    assert scheme.bits_per_weight(in_features, scale_bits=32) == bits + 16 / scheme.columns_per_group(in_features)
