"""Launching the Triton kernels: what they are compiled for, their grids and scratch. The one place that does.

`variant()` says what a kernel is compiled for, as plain numbers; the launch and the ahead-of-time compiler
(:mod:`quantkit.kernels.triton_compile`) both take it, so what is inspected is what runs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from quantkit.kernels.planes import COLUMNS, ROWS, num_planes, num_slots, stored_bits
from quantkit.kernels.tiles import Tile, choose_splits, choose_tile, trips_of
from quantkit.kernels.triton_matvec import dense_kernel, matvec_kernel
from quantkit.kernels.tuned import Product, lookup

SUBNORMAL, MAGIC_FLOAT16, MAGIC_BFLOAT16 = 0, 0x6400, 0x4300
"""What codes are joined with: nothing, float16 1024, bfloat16 128."""

_MANTISSA = {SUBNORMAL: 10, MAGIC_FLOAT16: 10, MAGIC_BFLOAT16: 7}  # bits
_OFFSET = {SUBNORMAL: 0.0, MAGIC_FLOAT16: 1024.0, MAGIC_BFLOAT16: 128.0}
_DENSE_COLUMNS = 32
_INTERPRETED_SMS = 8


def variant(
    tile: Tile, *, bits: int, grouped: bool, symmetric: bool, bias: bool, split: bool, magic: int, interpret: bool
) -> dict[str, Any]:
    """The compile-time arguments of :func:`quantkit.kernels.triton_matvec.matvec_kernel`."""
    width = stored_bits(bits)
    two_parts = magic == MAGIC_BFLOAT16 and width == 8  # each part adds the offset
    return {
        "BITS": width,
        "PLANES": num_planes(bits),
        "SLOTS": num_slots(bits),
        "WINDOW": max(_MANTISSA[magic] // width, 1),
        "MAGIC": magic,
        "OFFSET": _OFFSET[magic] * (2 if two_parts else 1),
        "UNIT": 2.0**-24 if magic == SUBNORMAL else 1.0,
        "MID": float(1 << (bits - 1)),
        "GROUPED": grouped,
        "SYMMETRIC": symmetric,
        "HAS_BIAS": bias,
        "SPLIT_K": split,
        "ROWS": tile.rows,
        "TILE_K": tile.tile_k,
        "TILES": tile.tiles,
        "REPEAT": tile.repeat,
        "TOKENS": tile.tokens,
        "STAGES": tile.stages,
        "INTERPRET": interpret,
    }


def matvec(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    *,
    bits: int,
    group: int,
    out_features: int,
    tile: Tile,
    splits: int,
    magic: int,
) -> Tensor:
    """``x @ Wᵀ + bias``; see the kernel for the packed tensors.

    Args:
        x: float16 or bfloat16 [tokens, in].
        words, scale, zeros: the packed weight; ``zeros`` is None where it is symmetric.
        bias: [out] or None.
        counters: int32, one for each block of rows and tokens, 0 before and after.
        bits: of the codes; the zero point of a symmetric weight is ``2**(bits-1)``.
        group: columns that share a packed scale; 0 is all.
        out_features: rows of the weight.
        tile, splits: see :mod:`quantkit.kernels.tiles`.
        magic: SUBNORMAL, MAGIC_FLOAT16 or MAGIC_BFLOAT16.

    Returns:
        [tokens, out], x's dtype.
    """
    tokens, in_features = x.shape
    units, atoms = words.shape[0], words.shape[1]
    x = _aligned(x, atoms * COLUMNS)
    trips, per_split = trips_of(tile, in_features, splits)
    splits = -(-trips // per_split)
    blocks, token_blocks = -(-units * ROWS // tile.rows), -(-tokens // tile.tokens)
    interpret = knobs.runtime.interpret
    # The interpreter's cast to bfloat16 cuts bits off where machines round, so there torch rounds.
    y = x.new_empty(tokens, out_features, dtype=torch.float32 if interpret else x.dtype)
    size = tile.rows * tile.tokens * num_planes(bits)
    partial = x.new_empty(token_blocks * splits * blocks * size if splits > 1 else 0, dtype=torch.float32)
    constants = variant(
        tile,
        bits=bits,
        grouped=group != 0,
        symmetric=zeros is None,
        bias=bias is not None,
        split=splits > 1,
        magic=magic,
        interpret=interpret,
    )
    # Token blocks first: programs that read the same words run together, and all but one find them in the cache.
    matvec_kernel[(token_blocks, blocks, splits)](
        x, words, scale, zeros, bias, y, partial, counters,
        tokens, out_features, x.shape[1], units, atoms, per_split, trips,
        **constants, num_warps=tile.warps, maxnreg=tile.most_registers,
    )  # fmt: skip
    return y.to(x.dtype)


def dense(
    words: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group: int,
    rows: tuple[int, int],
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows ``start:stop`` of the dense weight: ``dtype`` [stop - start, in]; ``start`` begins a unit."""
    units, atoms = words.shape[0], words.shape[1]
    start, stop = rows
    unit_rows = ROWS * num_planes(bits)
    out = torch.empty(stop - start, in_features, dtype=dtype, device=words.device)
    columns = atoms * COLUMNS
    dense_kernel[(-(-(stop - start) // unit_rows), columns // _DENSE_COLUMNS)](
        words, scale, zeros, out, stop - start, in_features, start // unit_rows, units, atoms,
        (group or columns) // _DENSE_COLUMNS,
        BITS=stored_bits(bits), PLANES=num_planes(bits), SLOTS=num_slots(bits), MID=1 << (bits - 1),
        SYMMETRIC=zeros is None, TILE_K=_DENSE_COLUMNS, num_warps=2,
    )  # fmt: skip
    return out


@lru_cache(maxsize=4096)  # asked at every product
def choice_on(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    shape: tuple[int, int],
    bits: int,
    group: int,
    symmetric: bool,
) -> tuple[Tile, int]:
    """The tile and the splits of K: what `quantkit tune` found on such a GPU, or the static choice for its SMs.

    Args:
        device: a GPU, or the CPU where the interpreter runs, which is taken for a small GPU.
        dtype: of x.
        tokens: rows of x, at most MOST_TOKENS.
        shape: out_features and in_features.
        bits, group, symmetric: the weight.
    """
    tile, sms = choose_tile(tokens, shape[1], bits, group), _INTERPRETED_SMS
    if device.type == "cuda":
        product = Product(*shape, bits, group, symmetric, str(dtype).removeprefix("torch."), tile.tokens)
        tuned = lookup(torch.cuda.get_device_name(device), product)
        if tuned is not None:
            return tuned.tile, tuned.splits
        sms = torch.cuda.get_device_properties(device).multi_processor_count
    return tile, choose_splits(tile, tokens, *shape, bits, sms)


def _aligned(x: Tensor, columns: int) -> Tensor:
    """x with rows that 16-byte copies can read: contiguous, aligned, zeros up to ``columns``.

    The stride of a single row says nothing (torch calls any contiguous): rows are ``columns`` apart.
    """
    if x.shape[1] != columns:
        return torch.nn.functional.pad(x, (0, columns - x.shape[1]))
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
