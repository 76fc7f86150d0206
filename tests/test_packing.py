"""Bit packing against the golden words, an independent bit-by-bit packer, and itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.packing import pack, packed_words, unpack

GOLDEN = json.loads((Path(__file__).parent / "golden" / "words.json").read_text())


def reference_words(codes: list[int], bits: int) -> list[int]:
    """One row as one long Python integer, cut into words; independent of quantkit's shifts."""
    stream = "".join(f"{code:0{bits}b}"[::-1] for code in codes)  # the bits in the order in which they are stored
    stream = stream.ljust(-(-len(stream) // 32) * 32, "0")
    words = [int(stream[i : i + 32][::-1], 2) for i in range(0, len(stream), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def random_codes(bits: int, rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, length), generator=generator, dtype=torch.uint8)


def golden_codes(bits: int) -> Tensor:
    """uint8 [N, K] of the golden layer."""
    k, n = torch.arange(GOLDEN["in_features"]), torch.arange(GOLDEN["out_features"])
    codes: Tensor = (GOLDEN["code_step_k"] * k[None, :] + GOLDEN["code_step_n"] * n[:, None]) % 2**bits
    return codes.to(torch.uint8)


def hexadecimal(words: Tensor) -> list[str]:
    return [f"{int(word) & 0xFFFFFFFF:08x}" for word in words]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_golden_words(bits: int) -> None:
    expected = next(v for k, v in GOLDEN["compressed_tensors"][str(bits)].items() if k.startswith("weight_packed[0,"))
    assert hexadecimal(pack(golden_codes(bits), bits)[0, : len(expected)]) == expected


def test_golden_words_of_gptq_are_the_transpose() -> None:
    words = pack(golden_codes(4), 4).T
    assert hexadecimal(words[0, :4]) == GOLDEN["gptq"]["4"]["qweight[0, :4]"]
    assert hexadecimal(words[1, :1]) == GOLDEN["gptq"]["4"]["qweight[1, :1]"]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 140), st.integers(0, 2**16))
def test_pack_equals_the_bit_by_bit_packer(bits: int, rows: int, length: int, seed: int) -> None:
    codes = random_codes(bits, rows, length, seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert list(words.shape) == [rows, packed_words(length, bits)] == [rows, -(-length * bits // 32)]
    assert words.tolist() == [reference_words(row, bits) for row in codes.tolist()]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 140), st.integers(0, 2**16))
def test_unpack_inverts_pack(bits: int, rows: int, length: int, seed: int) -> None:
    codes = random_codes(bits, rows, length, seed)
    found = unpack(pack(codes, bits), bits, length)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert torch.equal(found, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_largest_codes_fill_every_bit_and_the_rest_is_zero(bits: int) -> None:
    """Sign bits included: a word of ones is -1, and nothing spills into the unused bits."""
    full = torch.full((1, 32), (1 << bits) - 1, dtype=torch.uint8)
    assert pack(full, bits).tolist() == [[-1] * bits]
    for length in (1, 5, 31, 33):
        ones = sum(int(word) & 0xFFFFFFFF for word in pack(full[:, :1].expand(1, length), bits)[0].unbind())
        used = length * bits
        words = [(1 << 32) - 1] * (used // 32) + ([(1 << used % 32) - 1] if used % 32 else [])
        assert ones == sum(words)


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpack_does_not_read_the_unused_bits(bits: int) -> None:
    codes = random_codes(bits, 3, 37, seed=bits)
    words = pack(codes, bits)
    unused = words.shape[1] * 32 - 37 * bits
    words[:, -1] |= torch.tensor(-1 << (32 - unused), dtype=torch.int32) if unused else 0
    assert torch.equal(unpack(words, bits, 37), codes)


def test_strided_input() -> None:
    codes = random_codes(3, 50, 7, seed=1).T
    assert not codes.is_contiguous()
    words = pack(codes, 3)
    assert torch.equal(words, pack(codes.contiguous(), 3))
    assert torch.equal(unpack(words.T.contiguous().T, 3, 50), codes)


def test_pack_does_not_change_its_input() -> None:
    codes = random_codes(5, 2, 40, seed=2)
    before = codes.clone()
    words = pack(codes, 5)
    kept = words.clone()
    unpack(words, 5, 40)
    assert torch.equal(codes, before)
    assert torch.equal(words, kept)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_shapes_are_known_without_values(bits: int) -> None:
    """The plan of a run packs on the meta device to learn sizes."""
    words = pack(torch.empty(6, 40, dtype=torch.uint8, device="meta"), bits)
    assert list(words.shape) == [6, packed_words(40, bits)]
    assert words.dtype == torch.int32


@pytest.mark.parametrize(
    "words",
    [
        torch.zeros(2, 5, dtype=torch.int64),
        torch.zeros(2, 5, dtype=torch.uint8),
        torch.zeros(2, 5, dtype=torch.float32),
        torch.zeros(2, 4, dtype=torch.int32),
        torch.zeros(2, 6, dtype=torch.int32),
        torch.zeros(10, dtype=torch.int32),
        torch.zeros(1, 2, 5, dtype=torch.int32),
    ],
)
def test_unpack_refuses_other_dtypes_and_shapes(words: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be int32 .*40 codes of 4 bits"):
        unpack(words, 4, 40)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.float32])
def test_pack_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.full((1, 8), -1).to(dtype), 4)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_pack_refuses_other_widths(bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), bits)


def test_pack_refuses_codes_that_do_not_fit() -> None:
    """They would spill into their neighbours."""
    with pytest.raises(ValueError, match="code 17 does not fit in 4 bits"):
        pack(torch.tensor([[17, 0, 3]], dtype=torch.uint8), 4)
