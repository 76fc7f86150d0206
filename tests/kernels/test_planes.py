from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.kernels import planes


def drawn(rows: int, columns: int, levels: int, seed: int) -> torch.Tensor:
    return torch.randint(levels, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 300), st.integers(1, 200), st.integers(0, 99))
def test_words_are_undone(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = drawn(rows, columns, 1 << bits, seed)
    words = planes.pack_words(codes, bits)
    assert torch.equal(planes.unpack_words(words, bits, rows, columns), codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 300), st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_scales_and_zero_points_are_undone(bits: int, rows: int, columns: int, repeats: int, more: int) -> None:
    zero_point = drawn(rows, columns, 1 << bits, 3)
    scale = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1))
    groups = columns * repeats + more
    packed = planes.pack_scale(scale, bits, repeats, groups)
    assert torch.equal(planes.unpack_scale(packed, bits, repeats, rows, columns), scale)
    assert packed.is_contiguous()  # a view with other strides would be read wrongly by a kernel
    assert packed.count_nonzero() == scale.count_nonzero() * repeats
    zeros = planes.pack_zeros(zero_point, bits, repeats, groups)
    assert list(zeros.shape) == [-(-groups // 2), packed.shape[1]]
    assert torch.equal(planes.unpack_zeros(zeros, bits, repeats, rows, columns), zero_point)


def test_a_word_written_from_the_definition() -> None:
    """Row 37 of a W4 weight is in unit 0, plane 2, row 5: bits 8 to 11; column 70 is the 6th of atom 1."""
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    codes[37, 70], codes[5 + 48, 70], codes[5, 70] = 0xA, 0xF, 0x3
    words = planes.pack_words(codes, 4)
    assert list(words.shape) == [1, 2, 16, 64]
    assert int(words[0, 1, 5, 6]) & 0xFFFF == 0xFA03
    assert words.count_nonzero() == 1


def test_a_word_of_3_bits_written_from_the_definition() -> None:
    """Row 5 + 16 j of a W3 weight is in unit 0, plane j, row 5: five codes in 15 bits."""
    codes = torch.zeros(81, 64, dtype=torch.uint8)
    for plane, code in enumerate((1, 2, 3, 4, 7)):
        codes[5 + 16 * plane, 9] = code
    codes[80, 0] = 6
    words = planes.pack_words(codes, 3)
    assert list(words.shape) == [2, 1, 16, 64]
    assert int(words[0, 0, 5, 9]) == 1 | 2 << 3 | 3 << 6 | 4 << 9 | 7 << 12
    assert int(words[1, 0, 0, 0]) == 6
    assert words.count_nonzero() == 2


def test_five_scales_take_eight_slots() -> None:
    """They are 16 bytes of 16 bits each, one copy; the last three are 0."""
    scale = torch.arange(1.0, 81.0, dtype=torch.float16)[:, None]
    packed = planes.pack_scale(scale, 3, 1, 1)
    assert list(packed.shape) == [1, 16, 8]
    assert packed[0, 5].tolist() == [6.0, 22.0, 38.0, 54.0, 70.0, 0.0, 0.0, 0.0]


def test_zero_points_of_two_groups_share_a_word() -> None:
    zero_point = torch.zeros(64, 2, dtype=torch.uint8)
    zero_point[16, 0], zero_point[0, 1] = 7, 9  # plane 1 of group 0, plane 0 of group 1
    zeros = planes.pack_zeros(zero_point, 4, 1, 2)
    assert zeros[0, 0] == (9 << 16 | 7 << 4)


def test_packing_in_parts_is_packing_at_once() -> None:
    codes = drawn(200, 130, 16, 0)
    whole = planes.pack_words(codes, 4)
    units = [planes.pack_words(codes[start : start + 64], 4) for start in range(0, 200, 64)]
    assert torch.equal(torch.cat(units), whole)
