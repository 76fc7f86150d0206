"""How the Triton kernels keep a weight: planes of 16 rows that share words, packed once and undone exactly.

A 16-bit word holds one column's codes of ``planes = 16 // bits`` rows that lie 16 apart, the first in the low bits.
So 16 rows of words are ``planes`` tiles of 16 rows of codes, which is what a tensor core multiplies at one time, and
one mask takes a tile out. Five codes of 3 bits share a word; codes of 5 to 7 bits take 8. Pure functions of tensors.

    words   int16 [units, atoms, 16, 64]   unit: 16 * planes rows; atom: 64 columns, 2 KB together in memory
    scale   [groups, 16 * units, slots]    the scales of a row of words together; slots: planes, up to a power of two
    zeros   int32 [ceil(groups / 2), 16 * units]   packed as words are; an even group in the low half, the next above

Rows and columns that do not fill a unit or an atom have code 0; rows and slots that fill one, scale 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS = 16  # rows of a plane
COLUMNS = 64  # columns of an atom
_WORD = 16
_UNITS_AT_ONCE = 1 << 22  # words packed at one time: bounds the working copies


def stored_bits(bits: int) -> int:
    """Bits that a code of ``bits`` takes in a word: 2, 3, 4 or 8."""
    return max(bits, 2) if bits <= 4 else 8


def num_planes(bits: int) -> int:
    """Rows whose codes share a word."""
    return _WORD // stored_bits(bits)


def num_slots(bits: int) -> int:
    """Scales that a row of words has in the packed form: one for each plane, filled up to a power of two."""
    return 1 << (num_planes(bits) - 1).bit_length()


def num_units(out_features: int, bits: int) -> int:
    """Units that hold so many rows; the last may be filled up."""
    return -(-out_features // (ROWS * num_planes(bits)))


def num_atoms(in_features: int) -> int:
    """Atoms that hold so many columns; the last may be filled up."""
    return -(-in_features // COLUMNS)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [out, in] -> int16 [units, atoms, 16, 64]."""
    atoms, unit_rows = num_atoms(codes.shape[1]), ROWS * num_planes(bits)
    words = codes.new_empty(num_units(codes.shape[0], bits), atoms, ROWS, COLUMNS, dtype=torch.int16)
    step = max(1, _UNITS_AT_ONCE // (ROWS * COLUMNS * max(atoms, 1)))
    for start in range(0, len(words), step):
        rows = codes[start * unit_rows : (start + step) * unit_rows]
        packed = _pack(rows, bits)
        wide = pad(packed, (0, atoms * COLUMNS - codes.shape[1]))
        words[start : start + step] = wide.view(-1, ROWS, atoms, COLUMNS).transpose(1, 2)
    return words


def unpack_words(words: Tensor, bits: int, out_features: int, in_features: int) -> Tensor:
    """The inverse of :func:`pack_words`: uint8 [out, in]."""
    units, atoms = words.shape[0], words.shape[1]
    codes = words.new_empty(out_features, in_features, dtype=torch.uint8)
    unit_rows = ROWS * num_planes(bits)
    step = max(1, _UNITS_AT_ONCE // (ROWS * COLUMNS * max(atoms, 1)))
    for start in range(0, units, step):
        rows = words[start : start + step].transpose(1, 2).reshape(-1, ROWS, atoms * COLUMNS)[..., :in_features]
        part = codes[start * unit_rows : (start + step) * unit_rows]
        part.copy_(_unpack(rows, bits)[: len(part)])
    return codes


def pack_scale(scale: Tensor, bits: int, repeats: int, groups: int) -> Tensor:
    """[out, g] -> [groups, 16 * units, slots]: every column ``repeats`` times, then zeros up to ``groups``."""
    planes, units = num_planes(bits), num_units(scale.shape[0], bits)
    wide = scale.repeat_interleave(repeats, 1)
    wide = pad(wide, (0, groups - wide.shape[1], 0, units * planes * ROWS - wide.shape[0]))
    rows = wide.view(units, planes, ROWS, groups).permute(3, 0, 2, 1).reshape(groups, units * ROWS, planes)
    return pad(rows, (0, num_slots(bits) - planes)).contiguous()


def unpack_scale(packed: Tensor, bits: int, repeats: int, out_features: int, columns: int) -> Tensor:
    """The inverse of :func:`pack_scale`: [out, columns]."""
    planes = num_planes(bits)
    groups, rows, slots = packed.shape
    each = packed.view(groups, rows // ROWS, ROWS, slots)[..., :planes]
    wide = each.permute(1, 3, 2, 0).reshape(rows * planes, groups)
    return wide[:out_features, : columns * repeats : repeats].contiguous()


def pack_zeros(zero_point: Tensor, bits: int, repeats: int, groups: int) -> Tensor:
    """uint8 [out, g] -> int32 [ceil(groups / 2), 16 * units]."""
    words = _pack(zero_point.repeat_interleave(repeats, 1), bits)  # [units, 16, g * repeats]
    words = pad(words, (0, groups + groups % 2 - words.shape[2])).view(-1, (groups + 1) // 2, 2)
    # A pair of int16 is one int32 with the first in the low half, on the little-endian machines that torch has.
    return words.contiguous().view(torch.int32)[..., 0].T.contiguous()


def unpack_zeros(packed: Tensor, bits: int, repeats: int, out_features: int, columns: int) -> Tensor:
    """The inverse of :func:`pack_zeros`: uint8 [out, columns]."""
    words = packed.T.contiguous().view(torch.int16)  # [16 * units, groups]
    codes = _unpack(words.view(-1, ROWS, words.shape[1])[..., : columns * repeats : repeats], bits)
    return codes[:out_features].contiguous()


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [out, length] -> int16 [units, 16, length]; the last unit filled up with code 0."""
    planes, width = num_planes(bits), stored_bits(bits)
    units = num_units(codes.shape[0], bits)
    filled = pad(codes, (0, 0, 0, units * planes * ROWS - codes.shape[0])).view(units, planes, ROWS, -1)
    words = filled[:, 0].to(torch.int16)
    for plane in range(1, planes):
        words |= filled[:, plane].to(torch.int16) << (plane * width)
    return words


def _unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`_pack`: uint8 [units * planes * 16, length]."""
    planes, width = num_planes(bits), stored_bits(bits)
    mask = (1 << width) - 1
    codes = [((words >> (plane * width)) & mask).to(torch.uint8) for plane in range(planes)]
    return torch.stack(codes, 1).reshape(-1, words.shape[-1])
