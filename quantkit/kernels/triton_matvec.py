"""The Triton kernels: products of a few rows of x with a weight of 2 to 8 bits, and the weight made dense.

The weight is the left operand of the tensor cores' product and x the right one, so 1 to 8 rows of x cost the same.
Codes lie in the planes of :mod:`quantkit.kernels.planes`; how a plane becomes the left operand, and a zero point its
float32 number v(z), is in :mod:`quantkit.kernels.triton_codes`. What of v(code) is not the code goes out by algebra:

    Σ unit (code - z) x  =  Σ v(code) x  -  v(z) Σ x,

the second sum is one more product, with a constant matrix. Units are taken out after the last product. All sums are
float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.triton_codes import code_unit, code_values, middle_ratio, zero_value

__all__ = ["dense_kernel", "matvec_kernel"]


@triton.jit
def _times(t, FACTOR: tl.constexpr):
    if FACTOR == 1:
        return t
    else:
        return t * FACTOR


@triton.jit
def _plane_dot(
    word,
    xt,
    sums,
    J: tl.constexpr,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    MAGIC: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """``sums + values(plane J) @ xt``; codes of eight bits, which bfloat16 does not hold, in two parts."""
    SHIFT: tl.constexpr = (J // WINDOW) * WINDOW * BITS
    MASK: tl.constexpr = ((1 << BITS) - 1) << ((J % WINDOW) * BITS)
    SPLIT: tl.constexpr = BITS == 8 and MAGIC == 0x4300
    if SPLIT:
        low = code_values(word, SHIFT, 0x7F, MAGIC, DTYPE, INTERPRET)
        sums = _dot(low, xt, sums, INTERPRET)
        high = code_values(word, SHIFT, 0x80, MAGIC, DTYPE, INTERPRET)
        return _dot(high, xt, sums, INTERPRET)
    else:
        return _dot(code_values(word, SHIFT, MASK, MAGIC, DTYPE, INTERPRET), xt, sums, INTERPRET)


@triton.jit
def _dot(a, b, sums, INTERPRET: tl.constexpr):
    """``sums + a @ b`` in float32; the interpreter would multiply the raw bits of bfloat16."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    else:
        return tl.dot(a, b, sums)


@triton.jit
def _columns(t, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """The columns of [ROWS, SLOTS] as a tuple of float32 [ROWS]."""
    if SLOTS == 2:
        a, b = tl.split(t)
        return a.to(tl.float32), b.to(tl.float32)
    else:
        even, odd = tl.split(tl.reshape(t, (ROWS, SLOTS // 2, 2)))
        evens = _columns(even, ROWS, SLOTS // 2)
        odds = _columns(odd, ROWS, SLOTS // 2)
        out = ()
        for j in tl.static_range(SLOTS // 2):
            out = out + (evens[j], odds[j])
        return out


@triton.jit(do_not_specialize=["M", "N", "units", "k_atoms", "trips_per_split", "num_trips"])
def matvec_kernel(
    x,
    words,
    scale,
    zeros,
    bias,
    y,
    partial,
    counters,
    M,
    N,
    stride_x,
    units,
    k_atoms,
    trips_per_split,
    num_trips,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    SLOTS: tl.constexpr,
    WINDOW: tl.constexpr,
    MAGIC: tl.constexpr,
    OFFSET: tl.constexpr,
    UNIT: tl.constexpr,
    MID: tl.constexpr,
    GROUPED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_K: tl.constexpr,
    TILES: tl.constexpr,
    REPEAT: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """``y = x @ Wᵀ + bias``: one program makes ROWS * PLANES columns of TOKENS rows of y, over a part of K.

    Grid: (token blocks, row blocks, splits of K). The last program of a block to arrive adds up the parts of all splits
    in their order, so results do not depend on timing, and sets the block's counter back to 0.

    Args:
        x: DTYPE [M, >= 64 * k_atoms], rows ``stride_x`` apart, 16-byte aligned; columns beyond the weight's are 0.
        words: int16 [units, k_atoms, 16, 64].
        scale: [groups, 16 * units, SLOTS], one group where not GROUPED; a group is REPEAT * TILE_K columns.
        zeros: int32 [ceil(groups / 2), 16 * units], zero points of an even group in the low half; asymmetric only.
        bias: [N].
        y: [M, N].
        partial: float32 [token blocks, splits, row blocks, PLANES, TOKENS, ROWS]: scratch; only SPLIT_K.
        counters: int32 [token blocks, row blocks], 0 before and after; only SPLIT_K.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    PAIRED: tl.constexpr = TILES % 2 == 0 and REPEAT == 1  # a trip has both groups of a word of zero points
    tokens = tl.program_id(0)
    block = tl.program_id(1)
    split = tl.program_id(2)
    first = split * trips_per_split
    last = tl.minimum(first + trips_per_split, num_trips)

    row = tl.arange(0, ROWS)
    k = tl.arange(0, TILE_K)
    token = tokens * TOKENS + tl.arange(0, TOKENS)
    unit = block * (ROWS // 16) + row // 16
    held = tl.minimum(unit, units - 1)  # units past the last are computed from its data and not stored
    w_ptr = words + held[:, None] * (k_atoms * 1024) + ((row % 16) * 64)[:, None] + ((k // 64) * 1024 + k % 64)[None, :]
    w_ptr += first * (TILES * TILE_K // 64) * 1024
    x_ptr = x + token[None, :] * stride_x + k[:, None] + first * (TILES * TILE_K)
    x_mask = (token < M)[None, :]
    scale_row = held * 16 + row % 16
    slot_of = tl.arange(0, SLOTS)
    s_ptr = scale + scale_row[:, None] * SLOTS + slot_of[None, :]
    group_stride = units * 16
    STEPPING: tl.constexpr = GROUPED and TILES > 1 and REPEAT == 1  # a group a tile: the pointer steps
    if STEPPING:
        s_ptr += first * (TILES * group_stride * SLOTS)
    base = -(OFFSET + MID * UNIT) if SYMMETRIC else 1.0
    ones = tl.full((ROWS, TILE_K), base, DTYPE)

    acc = ()
    for _ in tl.static_range(PLANES):
        acc = acc + (tl.zeros((ROWS, TOKENS), tl.float32),)
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for trip in tl.range(first, last, num_stages=STAGES):
        for t in tl.static_range(TILES):
            word = tl.load(w_ptr + ((t * TILE_K // 64) * 1024 + (t * TILE_K) % 64))
            xt = tl.load(x_ptr + t * TILE_K, mask=x_mask, other=0.0)
            if GROUPED:
                index = (trip * TILES + t) // REPEAT
                s_at = s_ptr + (t if STEPPING else index) * (group_stride * SLOTS)
                group = _columns(tl.load(s_at), ROWS, SLOTS)
                if not SYMMETRIC:
                    if PAIRED:
                        if t % 2 == 0:
                            zero = tl.load(zeros + (index >> 1) * group_stride + scale_row)
                    else:
                        zero = tl.load(zeros + (index >> 1) * group_stride + scale_row) >> ((index & 1) * 16)
                sums = _dot(ones, xt, tl.zeros((ROWS, TOKENS), tl.float32), INTERPRET)
                new = ()
                for j in tl.static_range(PLANES):
                    if SYMMETRIC:
                        start = _times(sums, middle_ratio(j, BITS, WINDOW, UNIT, OFFSET, MID))
                        part = _plane_dot(word, xt, start, j, BITS, WINDOW, MAGIC, DTYPE, INTERPRET)
                    else:
                        start = tl.zeros((ROWS, TOKENS), tl.float32)
                        part = _plane_dot(word, xt, start, j, BITS, WINDOW, MAGIC, DTYPE, INTERPRET)
                        value = zero_value(zero, PAIRED and t % 2, j, BITS, WINDOW, MAGIC, OFFSET, DTYPE, INTERPRET)
                        part -= value[:, None] * sums
                    new = new + (acc[j] + part * group[j][:, None],)
                acc = new
            else:
                sums = _dot(ones, xt, sums, INTERPRET)
                new = ()
                for j in tl.static_range(PLANES):
                    new = new + (_plane_dot(word, xt, acc[j], j, BITS, WINDOW, MAGIC, DTYPE, INTERPRET),)
                acc = new
        w_ptr += (TILES * TILE_K // 64) * 1024
        x_ptr += TILES * TILE_K
        if STEPPING:
            s_ptr += TILES * group_stride * SLOTS

    if not GROUPED:
        group = _columns(tl.load(s_ptr), ROWS, SLOTS)
        if not SYMMETRIC:
            zero = tl.load(zeros + scale_row)
        new = ()
        for j in tl.static_range(PLANES):
            if SYMMETRIC:
                part = acc[j] + _times(sums, middle_ratio(j, BITS, WINDOW, UNIT, OFFSET, MID))
            else:
                value = zero_value(zero, False, j, BITS, WINDOW, MAGIC, OFFSET, DTYPE, INTERPRET)
                part = acc[j] - value[:, None] * sums
            new = new + (part * group[j][:, None],)
        acc = new

    local = tl.arange(0, TOKENS)
    if SPLIT_K:
        splits = tl.num_programs(2)
        blocks = tl.num_programs(1)
        tile = local[None, :] * ROWS + row[:, None]
        slot = partial + (tokens * splits * blocks + block) * (PLANES * TOKENS * ROWS)
        stride = blocks * (PLANES * TOKENS * ROWS)
        for j in tl.static_range(PLANES):
            tl.store(slot + split * stride + j * TOKENS * ROWS + tile, acc[j], mask=x_mask)
        tl.debug_barrier()  # the counter is raised by one thread, after the stores of all
        counter = counters + tokens * blocks + block
        if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
            tl.store(counter, 0)
            for j in tl.static_range(PLANES):
                total = tl.zeros((ROWS, TOKENS), tl.float32)
                for part_of in range(splits):
                    part_ptr = slot + part_of * stride + j * TOKENS * ROWS + tile
                    total += tl.load(part_ptr, mask=x_mask, other=0.0, cache_modifier=".cg")
                _store(total, y, bias, unit, row, token, M, N, j, BITS, PLANES, WINDOW, UNIT, HAS_BIAS)
    else:
        for j in tl.static_range(PLANES):
            _store(acc[j], y, bias, unit, row, token, M, N, j, BITS, PLANES, WINDOW, UNIT, HAS_BIAS)


@triton.jit
def _store(
    sums,
    y,
    bias,
    unit,
    row,
    token,
    M,
    N,
    J: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    WINDOW: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Take plane J's unit out, add the bias, round once and store."""
    n = unit * (16 * PLANES) + 16 * J + row % 16
    out = sums * (1.0 / code_unit(J, BITS, WINDOW, UNIT))
    if HAS_BIAS:
        out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    where = token[None, :].to(tl.int64) * N + n[:, None]
    tl.store(y + where, out.to(y.dtype.element_ty), mask=(token < M)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["N", "K", "first_unit", "units", "k_atoms", "group_tiles"])
def dense_kernel(
    words,
    scale,
    zeros,
    out,
    N,
    K,
    first_unit,
    units,
    k_atoms,
    group_tiles,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    SLOTS: tl.constexpr,
    MID: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Rows of the dense weight from unit ``first_unit`` on: one program makes 16 * PLANES rows of TILE_K columns.

    Args:
        words, scale, zeros: as in :func:`matvec_kernel`.
        out: [N, K], N rows of the weight; any floating-point dtype; rounded once from float32.
        group_tiles: tiles of TILE_K columns that share a scale.
    """
    out_unit = tl.program_id(0)
    unit = first_unit + out_unit
    tile = tl.program_id(1)
    row = tl.arange(0, 16)
    k = tile * TILE_K + tl.arange(0, TILE_K)
    word = tl.load(words + (unit * k_atoms + k // 64)[None, :] * 1024 + row[:, None] * 64 + (k % 64)[None, :]).to(
        tl.int32
    )
    group = tile // group_tiles
    scale_row = group * (units * 16) + unit * 16 + row
    for j in tl.static_range(PLANES):
        code = (word >> (j * BITS)) & ((1 << BITS) - 1)
        if SYMMETRIC:
            zero = tl.full((16,), MID, tl.int32)
        else:
            packed = tl.load(zeros + (group // 2) * (units * 16) + unit * 16 + row) >> ((group % 2) * 16)
            zero = (packed >> (j * BITS)) & ((1 << BITS) - 1)
        s = tl.load(scale + scale_row * SLOTS + j).to(tl.float32)
        value = (code - zero[:, None]).to(tl.float32) * s[:, None]
        n = out_unit * (16 * PLANES) + 16 * j + row
        where = n[:, None].to(tl.int64) * K + k[None, :]
        tl.store(out + where, value.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
