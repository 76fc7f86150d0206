"""Bit packing: the only shifts outside of the kernels. Pure functions, little-endian bit order (low bits first)."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 32
_BYTE = 8
_CODES_AT_ONCE = 2**22  # bounds the 64-bit working copies


def packed_words(length: int, bits: int) -> int:
    """int32 words that hold ``length`` codes of ``bits`` bits as one dense bit stream."""
    return -(-length * bits // _WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension into a dense bit stream; codes of 3, 5, 6 and 7 bits cross words.

    Args:
        codes: uint8 [rows, length], each below ``2**bits``.
        bits: 1 to 8.

    Returns:
        int32 [rows, ceil(length * bits / 32)]; unused high bits of the last word are zero.

    Raises:
        ValueError: ``codes`` is not uint8 or does not fit, or ``bits`` is out of range.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, not {codes.dtype}")
    if codes.numel() and not codes.is_meta and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    if codes.is_meta:
        return torch.empty(codes.shape[0], packed_words(codes.shape[1], bits), dtype=torch.int32, device="meta")
    return torch.cat([_pack(part, bits) for part in codes.split(_rows_at_once(codes.shape[1]))])


def _pack(codes: Tensor, bits: int) -> Tensor:
    rows, length = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -length % _WORD)).view(rows, -1, _WORD)
    words = torch.zeros(rows, padded.shape[1], bits, dtype=torch.int64, device=codes.device)
    for position in range(_WORD):
        word, shift = divmod(position * bits, _WORD)
        value = padded[:, :, position].to(torch.int64) << shift
        words[:, :, word] |= value & 0xFFFFFFFF
        if shift + bits > _WORD:
            words[:, :, word + 1] |= value >> _WORD
    flat = words.view(rows, -1)[:, : packed_words(length, bits)]
    return torch.where(flat >= 1 << 31, flat - (1 << 32), flat).to(torch.int32)


def unpack(words: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of :func:`pack`.

    Args:
        words: int32 [rows, ceil(length * bits / 32)].
        bits: 1 to 8.
        length: codes in a row.

    Returns:
        uint8 [rows, length].

    Raises:
        ValueError: ``words`` is not int32 of that shape, or ``bits`` is out of range.
    """
    _check_bits(bits)
    rows = words.shape[0]
    if words.dtype != torch.int32 or list(words.shape) != [rows, packed_words(length, bits)]:
        raise ValueError(
            f"packed words must be int32 [{rows}, {packed_words(length, bits)}] for {length} codes of {bits} bits, "
            f"not {words.dtype} {list(words.shape)}"
        )
    return torch.cat([_unpack(part, bits, length) for part in words.split(_rows_at_once(length))])


def _unpack(words: Tensor, bits: int, length: int) -> Tensor:
    rows = words.shape[0]
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).view(rows, -1, bits)
    codes = torch.empty(rows, padded.shape[1], _WORD, dtype=torch.uint8, device=words.device)
    for position in range(_WORD):
        word, shift = divmod(position * bits, _WORD)
        value = (padded[:, :, word].to(torch.int64) & 0xFFFFFFFF) >> shift
        if shift + bits > _WORD:
            value = value | ((padded[:, :, word + 1].to(torch.int64) & 0xFFFFFFFF) << (_WORD - shift))
        codes[:, :, position] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view(rows, -1)[:, :length].contiguous()


def unpack_rows(words: Tensor, bits: int, length: int) -> Tensor:
    """:func:`unpack` of a few rows by one expression without a loop, which torch.compile takes into its graph.

    Args:
        words: int32 [rows, ceil(length * bits / 32)], contiguous, in a little-endian machine's memory.
        bits: 1 to 8.
        length: codes in a row.

    Returns:
        uint8 [rows, length].
    """
    stream = words.view(torch.uint8)
    start = torch.arange(length, device=words.device) * bits
    low = start // _BYTE
    high = (low + 1).clamp(max=stream.shape[1] - 1)  # a code that crosses no byte takes nothing from there
    pair = stream.index_select(1, low).to(torch.int32) | stream.index_select(1, high).to(torch.int32) << _BYTE
    return ((pair >> (start % _BYTE).to(torch.int32)) & ((1 << bits) - 1)).to(torch.uint8)


def _rows_at_once(length: int) -> int:
    return max(_CODES_AT_ONCE // max(length, 1), 1)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, not {bits}")
