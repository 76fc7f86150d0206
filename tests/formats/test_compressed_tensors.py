"""compressed-tensors: golden words, exact round trips, and what malformed tensors are told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden_layer import WORDS, golden, hexadecimal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats import CompressedTensors
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

FORMAT = CompressedTensors()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def make(
    scheme: QuantScheme, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> QuantizedTensor:
    """Random codes, zero points and scales, half of which are negative (AutoRound writes such files)."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.num_groups(columns)
    codes = torch.randint(0, scheme.levels, (rows, columns), generator=generator, dtype=torch.uint8)
    zero_point = torch.randint(0, scheme.levels, (rows, groups), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, groups, generator=generator) + 0.5
    scale[::2] *= -1
    zero_point = zero_point.fill_(scheme.mid) if scheme.symmetric else zero_point
    return QuantizedTensor(codes, scale.to(dtype), zero_point, scheme)


def test_golden_words_of_codes_and_zero_points() -> None:
    tensors = FORMAT.encode(golden(4))
    words = WORDS["compressed_tensors"]["4"]
    assert hexadecimal(tensors["weight_packed"][0, :4]) == words["weight_packed[0, :4]"]
    assert hexadecimal(tensors["weight_zero_point"][:, 0]) == words["weight_zero_point[:, 0]"]
    # The identities of FORMATS.md: the transposes are GPTQ's words.
    assert hexadecimal(tensors["weight_packed"].T[0, :4]) == WORDS["gptq"]["4"]["qweight[0, :4]"]
    assert hexadecimal(tensors["weight_zero_point"].T[0]) == WORDS["gptq"]["4"]["v2 qzeros[0]"]


@pytest.mark.parametrize("bits", [3, 8])
def test_golden_words_of_other_widths(bits: int) -> None:
    packed = FORMAT.encode(golden(bits))["weight_packed"]
    assert hexadecimal(packed[0, :3]) == WORDS["compressed_tensors"][str(bits)]["weight_packed[0, :3]"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_names_shapes_and_dtypes(bits: int, symmetric: bool) -> None:
    scheme = QuantScheme(bits, 30, symmetric=symmetric)
    q = make(scheme, rows=7, columns=90)
    tensors = FORMAT.encode(q)
    found = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    expected = {
        "weight_packed": (torch.int32, [7, -(-90 * bits // 32)]),
        "weight_scale": (torch.bfloat16, [7, 3]),
        "weight_shape": (torch.int64, [2]),
    }
    if not symmetric:
        expected["weight_zero_point"] = (torch.int32, [-(-7 * bits // 32), 3])
    assert found == expected
    assert tensors["weight_shape"].tolist() == [7, 90]
    assert torch.equal(tensors["weight_scale"], q.scale)
    assert all(tensor.is_contiguous() for tensor in tensors.values())  # safetensors asks for it


@settings(deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    rows=st.integers(1, 70),
    group=st.integers(1, 40),
    groups=st.integers(1, 4),
    channel=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_decode_inverts_encode(
    bits: int, symmetric: bool, rows: int, group: int, groups: int, channel: bool, dtype: torch.dtype, seed: int
) -> None:
    """Rows that do not fill a word of zero points included."""
    scheme = QuantScheme(bits, None if channel else group, symmetric=symmetric)
    q = make(scheme, rows, group * groups, dtype, seed)
    back = FORMAT.decode("layer", FORMAT.encode(q), scheme, (rows, group * groups))
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale, q.scale)
    assert torch.equal(back.zero_point, q.zero_point)
    assert (back.scheme, back.scale.dtype, back.g_idx) == (scheme, dtype, None)
    assert back.digest() == q.digest()


@pytest.mark.parametrize("scheme", [QuantScheme(4, 64), QuantScheme(3, 32, symmetric=False), QuantScheme(8, None)])
def test_the_size_is_what_the_scheme_promises(scheme: QuantScheme) -> None:
    tensors = FORMAT.encode(make(scheme, rows=64, columns=128))
    stored = sum(t.numel() * t.element_size() for name, t in tensors.items() if name != "weight_shape")
    assert 8 * stored == scheme.bits_per_weight(128) * 64 * 128


def test_reordered_groups_are_not_written() -> None:
    q = make(QuantScheme(4, 16), 4, 32)
    reordered = QuantizedTensor(q.codes, q.scale, q.zero_point, q.scheme, (torch.arange(32) % 2).to(torch.int32))
    with pytest.raises(SchemeError, match="g_idx"):
        FORMAT.encode(reordered)


ASYM, SYM = QuantScheme(4, 16, symmetric=False), QuantScheme(4, 16)


def refused(tensors: dict[str, Tensor], scheme: QuantScheme = ASYM, shape: tuple[int, int] = (6, 48)) -> str:
    """The one line that a stranger's tensors are refused with."""
    with pytest.raises(CheckpointError) as caught:
        FORMAT.decode("model.layers.0.mlp.up_proj", tensors, scheme, shape)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def encoded(scheme: QuantScheme = ASYM) -> dict[str, Tensor]:
    return FORMAT.encode(make(scheme, 6, 48))


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_missing_tensors(name: str) -> None:
    tensors = encoded()
    del tensors[name]
    assert refused(tensors).startswith(f"model.layers.0.mlp.up_proj.{name}: is missing; ")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("weight_packed", torch.int64),
        ("weight_packed", torch.uint8),
        ("weight_packed", torch.float32),
        ("weight_scale", torch.float64),
        ("weight_scale", torch.int32),
        ("weight_zero_point", torch.int8),
        ("weight_zero_point", torch.bfloat16),
    ],
)
def test_wrong_dtypes(name: str, dtype: torch.dtype) -> None:
    tensors = encoded()
    tensors[name] = tensors[name].to(dtype)
    found = refused(tensors)
    assert found.startswith(f"model.layers.0.mlp.up_proj.{name}: is {str(dtype).removeprefix('torch.')} ")
    assert "asks for" in found


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("weight_packed", (5, 6)),
        ("weight_packed", (6, 7)),
        ("weight_packed", (6, 6, 1)),
        ("weight_packed", (36,)),
        ("weight_scale", (6, 1)),
        ("weight_scale", (3, 6)),
        ("weight_scale", (6, 3, 1)),
        ("weight_scale", ()),
        ("weight_zero_point", (6, 3)),
        ("weight_zero_point", (3, 1)),
        ("weight_zero_point", (0, 3)),
    ],
)
def test_wrong_shapes(name: str, shape: tuple[int, ...]) -> None:
    tensors = encoded()
    tensors[name] = torch.ones(shape, dtype=tensors[name].dtype)
    found = refused(tensors)
    assert found.startswith(f"model.layers.0.mlp.up_proj.{name}: is ")
    assert str(list(shape)) in found


@pytest.mark.parametrize("scheme", [ASYM, SYM])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
def test_scales_that_make_no_sense(bad: float, scheme: QuantScheme) -> None:
    tensors = encoded(scheme)
    tensors["weight_scale"][4, 2] = bad
    assert refused(tensors, scheme).startswith("model.layers.0.mlp.up_proj.weight_scale: holds NaN, inf or 0; ")


@pytest.mark.parametrize("stored", [[48, 6], [6, 47], [6], [], [6, 48, 1], [-6, -48]])
def test_a_weight_shape_that_lies(stored: list[int]) -> None:
    tensors = encoded() | {"weight_shape": torch.tensor(stored, dtype=torch.int64)}
    assert refused(tensors).startswith("model.layers.0.mlp.up_proj.weight_shape: ")


@pytest.mark.parametrize("shape", [(6, 64), (6, 32), (5, 48), (48, 6), (7, 48)])
def test_the_models_shape_decides(shape: tuple[int, int]) -> None:
    scheme = QuantScheme(4, None)
    assert "model.layers.0.mlp.up_proj.weight_" in refused(encoded(scheme), scheme, shape)


def test_the_configs_scheme_decides() -> None:
    for scheme in (QuantScheme(8, 16), QuantScheme(3, 16), QuantScheme(4, 24), QuantScheme(4, None)):
        assert "model.layers.0.mlp.up_proj.weight_" in refused(encoded(SYM), scheme)
    assert "weight_zero_point: is missing" in refused(encoded(SYM), ASYM)


def test_a_group_size_that_does_not_divide() -> None:
    assert "model.layers.0.mlp.up_proj" in refused(encoded(), QuantScheme(4, 32))


def test_reordered_groups_are_refused() -> None:
    g_idx = (torch.arange(48) % 3).to(torch.int32)
    assert "g_idx" in refused(encoded() | {"weight_g_idx": g_idx})


# int-quantized: 8-bit weights and activations


def int8(symmetric: bool = True, static: bool = False, dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    """The golden codes (3k + 5n) % 256 and zero points n, in one group a row."""
    k, n = torch.arange(64), torch.arange(32)
    codes = ((3 * k[None, :] + 5 * n[:, None]) % 256).to(torch.uint8)
    zero_point = torch.full((32, 1), 128) if symmetric else n[:, None]
    scheme = QuantScheme(8, None, symmetric, act_bits=8, act_static=static)
    scale = torch.ones(32, 1, dtype=dtype)
    return QuantizedTensor(codes, scale, zero_point.to(torch.uint8), scheme, act_scale=0.0625 if static else None)


def test_golden_bytes_of_int_quantized() -> None:
    """Codes minus 128: 00 03 06 … becomes 80 83 86 …, and 125 + 3 becomes 0."""
    tensors = FORMAT.encode(int8(symmetric=False, static=True))
    found = {name: (t.dtype, list(t.shape)) for name, t in tensors.items()}
    assert found == {
        "weight": (torch.int8, [32, 64]),
        "weight_scale": (torch.bfloat16, [32, 1]),
        "weight_zero_point": (torch.int8, [32, 1]),
        "input_scale": (torch.bfloat16, [1]),
    }
    assert tensors["weight"][0, :4].tolist() == [-128, -125, -122, -119]
    assert tensors["weight"][1, 41].item() == 0
    assert tensors["weight"][1, 63].item() == (3 * 63 + 5) - 128
    assert bytes(tensors["weight"].view(torch.uint8)[0, :4].tolist()).hex() == "80838689"
    assert tensors["weight_zero_point"].flatten().tolist() == list(range(-128, -96))
    assert tensors["input_scale"].tolist() == [0.0625]
    assert set(FORMAT.encode(int8())) == {"weight", "weight_scale"}
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@settings(deadline=None)
@given(
    st.booleans(),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.integers(0, 2**16),
)
def test_decode_inverts_encode_of_int_quantized(
    symmetric: bool, static: bool, rows: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    scheme = QuantScheme(8, None, symmetric, act_bits=8, act_static=static)
    weight = make(scheme.weight_only, rows, columns, dtype, seed)
    act_scale = float(torch.tensor(0.013 * (1 + seed)).to(dtype)) if static else None
    q = replace(weight, scheme=scheme, act_scale=act_scale)
    back = FORMAT.decode("layer", FORMAT.encode(q), scheme, (rows, columns))
    assert back.digest() == q.digest()
    assert back.act_scale == act_scale
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.zero_point, q.zero_point)


def test_an_input_scale_with_more_digits_than_the_weights_is_kept() -> None:
    q = replace(int8(static=True), act_scale=float(torch.tensor(0.1)))
    tensors = FORMAT.encode(q)
    assert tensors["input_scale"].dtype == torch.float32
    assert FORMAT.decode("a", tensors, q.scheme, (32, 64)).digest() == q.digest()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": None}, "weight: is missing"),
        ({"weight": torch.zeros(32, 64)}, r"is float32 \[32, 64\]"),
        ({"weight": torch.zeros(32, 63, dtype=torch.int8)}, r"int8 \[32, 63\]"),
        ({"weight_scale": torch.ones(32)}, r"weight_scale: is float32 \[32\]"),
        ({"weight_scale": torch.zeros(32, 1)}, "NaN, inf or 0"),
        ({"weight_zero_point": torch.ones(32, 1, dtype=torch.int8)}, "weight_zero_point: is not zero"),
        ({"input_scale": None}, "input_scale: is missing"),
        ({"input_scale": torch.ones(2)}, r"input_scale: is float32 \[2\]"),
        ({"input_scale": torch.tensor([0.0])}, "input_scale: is 0.0"),
        ({"input_scale": torch.tensor([float("nan")])}, "input_scale: is nan"),
        ({"input_zero_point": torch.tensor([3], dtype=torch.int8)}, "input_zero_point: is not zero"),
    ],
)
def test_malformed_int_quantized_layers(change: dict[str, Tensor | None], reason: str) -> None:
    q = int8(static=True)
    tensors = {**FORMAT.encode(q), **change}
    with pytest.raises(CheckpointError, match=reason) as caught:
        FORMAT.decode("a.b", {n: t for n, t in tensors.items() if t is not None}, q.scheme, (32, 64))
    assert str(caught.value).startswith("a.b.")


def test_zeros_that_symmetric_layers_do_not_need_are_let_through() -> None:
    q = int8(static=True)
    zeros = {
        "input_zero_point": torch.zeros(1, dtype=torch.int8),
        "weight_zero_point": torch.zeros(32, 1, dtype=torch.int8),
    }
    assert FORMAT.decode("a", {**FORMAT.encode(q), **zeros}, q.scheme, (32, 64)).digest() == q.digest()


@pytest.mark.parametrize("scheme", [QuantScheme(4, None, act_bits=8), QuantScheme(8, 32, act_bits=8)], ids=str)
def test_other_schemes_with_quantized_activations_are_refused(scheme: QuantScheme) -> None:
    assert "write w8a8_channel" in str(FORMAT.why_not(scheme))
    with pytest.raises(SchemeError, match="is not written"):
        FORMAT.encode(make(scheme, 4, 64))
