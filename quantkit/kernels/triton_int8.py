"""The Triton kernels of W8A8: activations rounded to bytes with one scale a token, and the product of bytes.

The weight is the left operand, as in :mod:`quantkit.kernels.triton_matvec`, so few rows of x cost as much as one. Sums
are int32 and exact, also over splits of K; scales are multiplied in float32 and the result is rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["int8_kernel", "round_kernel"]


@triton.jit
def round_kernel(x, codes, scales, sums, static_scale, K, padded, stride_x, STATIC: tl.constexpr, CHUNK: tl.constexpr):
    """One token: codes ``round(x / scale)`` from -128 to 127, zero from K to ``padded``; its scale; their sum.

    Dynamic scales are absmax / 127.5, and 1 for a token of zeros. A code cannot be NaN, so its token's scale is; see
    :func:`quantkit.grid.quantize_activations`.
    """
    token = tl.program_id(0)
    x_ptr = x + token.to(tl.int64) * stride_x
    at = tl.arange(0, CHUNK)
    if STATIC:
        scale = tl.load(static_scale)
    else:
        largest = tl.zeros((CHUNK,), tl.float32)
        for start in range(0, K, CHUNK):
            value = tl.abs(tl.load(x_ptr + start + at, mask=start + at < K, other=0.0).to(tl.float32))
            largest = tl.where(value > largest, value, largest)  # passes over NaN
        scale = tl.div_rn(tl.max(largest, 0), 127.5)
        scale = tl.where(scale == 0, 1.0, scale)
    total = tl.zeros((CHUNK,), tl.int32)
    broken = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, padded, CHUNK):
        value = tl.load(x_ptr + start + at, mask=start + at < K, other=0.0).to(tl.float32)
        value = tl.div_rn(value, tl.zeros((CHUNK,), tl.float32) + scale)
        is_number = value == value
        broken = tl.where(is_number, broken, 1)
        value = tl.where(is_number, value, 0.0)
        value = tl.minimum(tl.maximum(value, -128.0), 127.0)  # first: rounding below is for numbers up to 2^22
        code = ((value + 12582912.0) - 12582912.0).to(tl.int32)  # 1.5 * 2^23: rounds to nearest, ties to even
        total += code
        tl.store(codes + token.to(tl.int64) * padded + start + at, code.to(tl.int8), mask=start + at < padded)
    tl.store(scales + token, tl.where(tl.max(broken, 0) > 0, float("nan"), scale))
    tl.store(sums + token, tl.sum(total, 0))


@triton.jit(do_not_specialize=["M", "N", "trips_per_split", "num_trips"])
def int8_kernel(
    codes, act_scales, act_sums, weight, scale, offset, bias, y, partial, counters,
    M, N, padded, trips_per_split, num_trips,
    HAS_OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT_K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``y = act_scale * (scale * Σ codes weight + offset * Σ codes) + bias``: ROWS columns of TOKENS rows, a part of K.

    Grid: (token blocks, row blocks, splits of K); splits are added as in matvec_kernel.

    Args:
        codes: int8 [M, padded]. act_scales: float32 [M]. act_sums: int32 [M].
        weight: int8 [N, padded]. scale, offset: float32 [N]. bias: [N].
        y: [M, N].
        partial: int32 [token blocks, splits, row blocks, TOKENS, ROWS]: scratch.
        counters: int32 [token blocks, row blocks], 0 before and after.
    """
    tokens, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = split * trips_per_split
    last = tl.minimum(first + trips_per_split, num_trips)
    local_row, local_token = tl.arange(0, ROWS), tl.arange(0, TOKENS)
    row, token = block * ROWS + local_row, tokens * TOKENS + local_token
    k = tl.arange(0, COLUMNS)
    held = tl.minimum(row, N - 1)  # rows past the last are computed from its data and not stored
    w_ptr = weight + held[:, None].to(tl.int64) * padded + k[None, :] + first * COLUMNS
    x_ptr = codes + token[None, :] * padded + k[:, None] + first * COLUMNS
    mask = (token < M)[None, :]
    acc = tl.zeros((ROWS, TOKENS), tl.int32)
    for _ in tl.range(first, last, num_stages=STAGES):
        w = tl.load(w_ptr)
        xt = tl.load(x_ptr, mask=mask, other=0)
        acc = tl.dot(w, xt, acc, out_dtype=tl.int32)
        w_ptr += COLUMNS
        x_ptr += COLUMNS

    done = True
    if SPLIT_K:
        splits, blocks = tl.num_programs(2), tl.num_programs(1)
        tile = local_token[None, :] * ROWS + local_row[:, None]
        slot = partial + (tokens * splits * blocks + block) * (TOKENS * ROWS)
        stride = blocks * (TOKENS * ROWS)
        tl.store(slot + split * stride + tile, acc, mask=mask)
        tl.debug_barrier()  # the counter is raised by one thread, after the stores of all
        counter = counters + tokens * blocks + block
        done = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
        if done:
            tl.store(counter, 0)
            acc = tl.zeros((ROWS, TOKENS), tl.int32)
            for part in range(splits):
                acc += tl.load(slot + part * stride + tile, mask=mask, other=0, cache_modifier=".cg")
    if done:
        within = row < N
        out = acc.to(tl.float32) * tl.load(scale + row, mask=within, other=0.0)[:, None]
        if HAS_OFFSET:
            total = tl.load(act_sums + token, mask=token < M, other=0).to(tl.float32)
            out += total[None, :] * tl.load(offset + row, mask=within, other=0.0)[:, None]
        out *= tl.load(act_scales + token, mask=token < M, other=0.0)[None, :]
        if HAS_BIAS:
            out += tl.load(bias + row, mask=within, other=0.0).to(tl.float32)[:, None]
        where = token[None, :].to(tl.int64) * N + row[:, None]
        tl.store(y + where, out.to(y.dtype.element_ty), mask=mask & within[:, None])
