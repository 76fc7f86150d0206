"""Codes in panels of 16 rows, as the just-in-time kernels for CPUs read them: one stream of memory from start to end.

A unit is 64 bytes: 32 little-endian words of 16 bits, one for each of 16 rows and each column of a pair. The four
nibbles of a word belong to four pairs of columns (codes of up to 4 bits: a unit covers 8 columns), or are the low and
the high halves of two codes (of up to 8 bits: 4 columns). Units follow each other along the columns, panels along rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 16  # rows
_NIBBLES = 4  # in a word


def unit_columns(bits: int) -> int:
    """Columns of a unit."""
    return 2 * _NIBBLES if bits <= _NIBBLES else _NIBBLES


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes to panels; missing rows of the last panel are zeros.

    Args:
        codes: uint8 [out, in], in a multiple of :func:`unit_columns`.
        bits: of a code.

    Returns:
        int16 [panels, units, 16, 2].
    """
    out_features, in_features = codes.shape
    panels = -(-out_features // PANEL)
    padded = codes.new_zeros(panels * PANEL, in_features)
    padded[:out_features] = codes
    fields = unit_columns(bits) // 2  # codes in a word
    parts = padded.view(panels, PANEL, -1, fields, 2).to(torch.int32).permute(0, 2, 1, 4, 3)
    shifts = torch.arange(0, 16, 16 // fields, dtype=torch.int32, device=codes.device)
    words = (parts << shifts).sum(-1, dtype=torch.int32)
    return ((words + 2**15) % 2**16 - 2**15).to(torch.int16).contiguous()  # two's complement


def unpack_codes(words: Tensor, bits: int, out_features: int) -> Tensor:
    """The inverse of :func:`pack_codes`: uint8 [out, in]."""
    panels, units = words.shape[:2]
    # Bytes, and as few passes over them as there are: [panels, rows, units, byte of the word, column of the pair].
    moved = words.view(torch.uint8).view(panels, units, PANEL, 2, 2).permute(0, 2, 1, 4, 3).contiguous()
    if unit_columns(bits) == _NIBBLES:
        codes = moved
    else:
        codes = moved.new_empty(panels, PANEL, units, 2, 2, 2)
        torch.bitwise_and(moved, 15, out=codes[..., 0, :])
        torch.bitwise_right_shift(moved, 4, out=codes[..., 1, :])
    return codes.view(panels * PANEL, units * unit_columns(bits))[:out_features]


def pack_groups(values: Tensor) -> Tensor:
    """What each group of a row has, [out, groups], to [panels, groups, 16]; missing rows are zeros."""
    out_features, groups = values.shape
    panels = -(-out_features // PANEL)
    padded = values.new_zeros(panels * PANEL, groups)
    padded[:out_features] = values
    return padded.view(panels, PANEL, groups).transpose(1, 2).contiguous()


def unpack_groups(packed: Tensor, out_features: int) -> Tensor:
    """The inverse of :func:`pack_groups`: [out, groups]."""
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])[:out_features].contiguous()
