"""How the Triton kernels make numbers of packed codes and zero points: one logical operation for a pair of words.

    value = offset + unit * code

where the code's bits are mantissa bits of float16 subnormals (offset 0, unit 2^(position - 24)) or, where the tensor
cores were not seen to keep those, of float16 numbers from 1024 on, or of bfloat16 numbers from 128 on (unit
2^position). The text of inline assembly comes from functions, so that a test reads what the GPU's assembler gets.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["code_unit", "code_values", "half_text", "middle_ratio", "number_text", "shift_text", "zero_value"]


@triton.constexpr_function
def code_unit(j, bits, window, unit):
    """The value that one code step has in plane ``j``."""
    return unit * 2 ** (j % window * bits)


@triton.constexpr_function
def middle_ratio(j, bits, window, unit, offset, mid):
    """The middle of the grid as a value of plane ``j``, over that of plane 0."""
    return (offset + mid * code_unit(j, bits, window, unit)) / (offset + mid * unit)


@triton.constexpr_function
def shift_text(shift):
    """PTX: a pair of 16-bit words shifted right."""
    return f"shr.b32 $0, $1, {shift};"


@triton.constexpr_function
def number_text(mask, magic):
    """PTX: ``(pair & mask) | magic`` in one instruction, mask and magic for each half of the pair."""
    if magic:
        return f"lop3.b32 $0, $1, {mask * 65537}, {magic * 65537}, 0xea;"
    return f"and.b32 $0, $1, {mask * 65537};"


@triton.constexpr_function
def half_text(odd, is_bfloat16):
    """PTX: the lower or the upper half of a register, a 16-bit number, in float32."""
    if not isinstance(odd, int):  # Triton makes tensors of constants that are given a name, and those are all true
        raise TypeError(f"odd is {odd!r}, not known at compile time")
    if is_bfloat16:
        return f"and.b32 $0, $1, {0xFFFF0000};" if odd else "shl.b32 $0, $1, 16;"
    half = "upper" if odd else "lower"
    return "{ .reg .b16 lower, upper; mov.b32 {lower, upper}, $1; cvt.f32.f16 $0, " + half + "; }"


@triton.jit
def code_values(
    word, SHIFT: tl.constexpr, MASK: tl.constexpr, MAGIC: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr
):
    """``((word >> SHIFT) & MASK) | MAGIC`` of int16 words, read as DTYPE: two at a time, but for the interpreter.

    Bits of the upper word that a shift of the pair moves into the lower one are masked out: MASK << SHIFT < 2^16.
    """
    if INTERPRET:
        bits = (((word.to(tl.uint16, bitcast=True) >> SHIFT) & MASK) | MAGIC).to(tl.uint16)
    else:
        bits = _pairs(word, SHIFT, MASK, MAGIC)
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def _pairs(word, SHIFT: tl.constexpr, MASK: tl.constexpr, MAGIC: tl.constexpr):
    """The bits of :func:`code_values` by inline assembly: words of 16 bits two at a time, of 32 bits as a pair each."""
    KIND: tl.constexpr = word.dtype
    PACK: tl.constexpr = 32 // KIND.primitive_bitwidth
    if SHIFT > 0:
        word = tl.inline_asm_elementwise(shift_text(SHIFT), "=r,r", [word], dtype=word.dtype, is_pure=True, pack=PACK)
    text: tl.constexpr = number_text(MASK, MAGIC)
    return tl.inline_asm_elementwise(text, "=r,r", [word], dtype=word.dtype, is_pure=True, pack=PACK)


@triton.jit
def zero_value(
    word,
    ODD: tl.constexpr,
    J: tl.constexpr,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    MAGIC: tl.constexpr,
    OFFSET: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """float32 v(z) of plane J, from int32 words that hold the zero points of an even group and, above, of an odd one.

    In inline assembly: from plain operations LLVM makes two more instructions for each.
    """
    SHIFT: tl.constexpr = (J // WINDOW) * WINDOW * BITS
    MASK: tl.constexpr = ((1 << BITS) - 1) << ((J % WINDOW) * BITS)
    SPLIT: tl.constexpr = BITS == 8 and MAGIC == 0x4300
    if SPLIT:
        # A byte below the bits of float32 2^23 is 2^23 + z: two instructions, where the codes' two parts take five.
        number = ((word >> (SHIFT + 16 * ODD)) & 0xFF) | 0x4B000000
        return number.to(tl.float32, bitcast=True) - (8388608.0 - OFFSET)
    else:
        if INTERPRET:
            both = ((word >> SHIFT) & (MASK * 65537)) | (MAGIC * 65537)
            return (both >> (16 * ODD)).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        else:
            text: tl.constexpr = half_text(ODD, MAGIC == 0x4300)
            both = _pairs(word, SHIFT, MASK, MAGIC)
            return tl.inline_asm_elementwise(text, "=f,r", [both], dtype=tl.float32, is_pure=True, pack=1)
