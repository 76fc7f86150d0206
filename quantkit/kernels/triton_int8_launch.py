"""Launching the Triton kernels of W8A8: their grids and scratch."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import knobs

from quantkit.kernels.triton_int8 import int8_kernel, round_kernel

PADDED = 128  # columns of the packed weight are a multiple of it: one trip
_ROWS, _STAGES, _WARPS = 64, 4, 2
_CHUNK = 1024  # columns that are rounded at one time
_MOST_SPLITS = 32


def round_activations(x: Tensor, static_scale: Tensor | None, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes [tokens, padded], float32 scales [tokens], int32 sums of codes [tokens] of x [tokens, in]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = x.new_empty(x.shape[0], padded, dtype=torch.int8)
    scales = x.new_empty(x.shape[0], dtype=torch.float32)
    sums = x.new_empty(x.shape[0], dtype=torch.int32)
    round_kernel[(x.shape[0],)](
        x, codes, scales, sums, static_scale, x.shape[1], padded, x.stride(0) if len(x) > 1 else padded,
        STATIC=static_scale is not None, CHUNK=_CHUNK, num_warps=4,
    )  # fmt: skip
    return codes, scales, sums


def int8_product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    static_scale: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    *,
    sms: int,
) -> Tensor:
    """``x @ Wᵀ + bias`` with x rounded to bytes.

    Args:
        x: float16, bfloat16 or float32 [tokens, in], at least one token.
        weight: int8 [out, padded], codes minus ``2**(bits-1)``, zeros from in to padded.
        scale: float32 [out].
        offset: float32 [out], what a sum of activation codes adds: (mid - zero point) * scale; None: symmetric.
        static_scale: float32 [1], or None for dynamic scales.
        bias: [out], any floating-point dtype, or None.
        counters: int32, one for each block of rows and tokens, 0 before and after.
        sms: multiprocessors of the device.

    Returns:
        [tokens, out], x's dtype.
    """
    codes, act_scales, act_sums = round_activations(x, static_scale, weight.shape[1])
    tokens, rows = x.shape[0], weight.shape[0]
    block = token_block(tokens)
    blocks, token_blocks, trips = -(-rows // _ROWS), -(-tokens // block), weight.shape[1] // PADDED
    wanted = min(max(2 * sms // (blocks * token_blocks), 1), trips, _MOST_SPLITS)
    per_split = -(-trips // wanted)
    splits = -(-trips // per_split)
    # The interpreter's cast to bfloat16 cuts bits off where machines round, so there torch rounds.
    y = x.new_empty(tokens, rows, dtype=torch.float32 if knobs.runtime.interpret else x.dtype)
    partial = x.new_empty(token_blocks * splits * blocks * block * _ROWS if splits > 1 else 0, dtype=torch.int32)
    int8_kernel[(token_blocks, blocks, splits)](
        codes, act_scales, act_sums, weight, scale, offset, bias, y, partial, counters,
        tokens, rows, weight.shape[1], per_split, trips,
        HAS_OFFSET=offset is not None, HAS_BIAS=bias is not None, SPLIT_K=splits > 1, ROWS=_ROWS, TOKENS=block,
        COLUMNS=PADDED, STAGES=_STAGES, num_warps=_WARPS,
    )  # fmt: skip
    return y.to(x.dtype)


def token_block(tokens: int) -> int:
    """Rows of x of a program."""
    return 8 if tokens <= 8 else 16 if tokens <= 16 else 32
