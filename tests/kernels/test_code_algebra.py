# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The arithmetic of the Triton kernels in plain torch: every word, code and zero point, in every plane and form.

The inline assembly is not run here but read: its instructions are emulated on 32-bit integers, so what is tested is
the text that the GPU's assembler gets. What the interpreter runs instead is compared with the same definition.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from quantkit.kernels.planes import pack_words, pack_zeros, unpack_words

pytest.importorskip("triton")
import triton
import triton.language as tl

from quantkit.kernels import triton_codes
from quantkit.kernels.tiles import choose_tile
from quantkit.kernels.triton_launch import MAGIC_BFLOAT16, MAGIC_FLOAT16, SUBNORMAL, variant

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = {SUBNORMAL: torch.float16, MAGIC_FLOAT16: torch.float16, MAGIC_BFLOAT16: torch.bfloat16}
FORMS = [
    pytest.param(bits, magic, id=f"w{bits}-{name}")
    for bits in (2, 3, 4, 8)
    for name, magic in (("subnormal", SUBNORMAL), ("magic_fp16", MAGIC_FLOAT16), ("bf16", MAGIC_BFLOAT16))
]
WORDS = torch.arange(1 << 16)
AT_ONCE = 1 << (16 if DEVICE.type == "cpu" else 10)
GRID = (len(WORDS) // AT_ONCE,)


def constants(bits: int, magic: int, symmetric: bool = False) -> dict[str, float]:
    """What the kernels are compiled with."""
    tile = choose_tile(8, 128, bits, 128)
    return variant(
        tile, bits=bits, grouped=True, symmetric=symmetric, bias=False, split=False, magic=magic, interpret=True
    )


def parts(bits: int, magic: int, plane: int) -> list[tuple[int, int]]:
    """(shift, mask) of the products that one plane takes: what ``_plane_dot`` gives to ``code_values``."""
    window = int(constants(bits, magic)["WINDOW"])
    shift, at = plane // window * window * bits, plane % window * bits
    if bits == 8 and magic == MAGIC_BFLOAT16:
        return [(shift, 0x7F), (shift, 0x80)]
    return [(shift, ((1 << bits) - 1) << at)]


def emulated(text: str, register: Tensor) -> Tensor:
    """One PTX instruction of a register, 32 bits in int64: shr.b32, and.b32 or lop3.b32 by its truth table."""
    found = re.fullmatch(r"(shr|and|lop3)\.b32 \$0, \$1, (\d+)(?:, (\d+), (0x[0-9a-f]{2}))?;", text)
    assert found is not None, text
    name, second = found[1], int(found[2])
    if name == "shr":
        return register >> second
    if name == "and":
        return register & second
    third, table = int(found[3]), int(found[4], 16)
    out = torch.zeros_like(register)
    for row in range(8):  # bits (a, b, c) -> bit 4a + 2b + c of the table
        if table >> row & 1:
            terms = [register if row & 4 else ~register, torch.tensor(second if row & 2 else ~second)]
            out |= terms[0] & terms[1] & (third if row & 1 else ~third)
    return out & 0xFFFFFFFF


def as_numbers(bits16: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values of 16-bit patterns in int64."""
    signed = torch.where(bits16 >= 1 << 15, bits16 - (1 << 16), bits16).to(torch.int16)
    return signed.view(dtype).double()


def defined(bits: int, magic: int, plane: int, words: Tensor) -> Tensor:
    """offset + unit * code, from the definition alone."""
    of = constants(bits, magic)
    code = words >> (plane * bits) & ((1 << bits) - 1)
    position = plane % int(of["WINDOW"]) * bits
    return float(of["OFFSET"]) + float(of["UNIT"]) * 2.0**position * code.double()


def test_the_emulated_truth_table() -> None:
    """0xea is (a & b) | c, by the rule of the PTX manual: the table is that expression of 0xf0, 0xcc and 0xaa."""
    assert (0xF0 & 0xCC) | 0xAA == 0xEA
    a = torch.tensor([0x12345678, 0xFFFFFFFF, 0])
    assert emulated("lop3.b32 $0, $1, 983055, 1677747200, 0xea;", a).tolist() == [
        (int(x) & 983055) | 1677747200 for x in a
    ]


@pytest.mark.parametrize(("bits", "magic"), FORMS)
def test_inline_assembly_makes_the_defined_numbers(bits: int, magic: int) -> None:
    """Every 16-bit word in the lower half of a register and every one in the upper, neither disturbing the other."""
    upper = WORDS * 40503 % (1 << 16)  # an odd factor: every word once, in another order
    register = upper << 16 | WORDS
    for plane in range(16 // bits):
        numbers = []
        for shift, mask in parts(bits, magic, plane):
            shifted = emulated(triton_codes.shift_text(shift), register) if shift else register
            numbers.append(emulated(triton_codes.number_text(mask, magic), shifted))
        for half, words in ((0, WORDS), (16, upper)):
            value = sum(as_numbers(number >> half & 0xFFFF, DTYPE[magic]) for number in numbers)
            assert torch.equal(torch.as_tensor(value), defined(bits, magic, plane, words)), plane


@triton.jit
def numbers_kernel(
    words, out, SHIFT: tl.constexpr, MASK: tl.constexpr, MAGIC: tl.constexpr, INTERPRET: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    number = triton_codes.code_values(tl.load(words + at), SHIFT, MASK, MAGIC, out.dtype.element_ty, INTERPRET)
    tl.store(out + at, number)


@triton.jit
def zeros_kernel(
    words, out, ODD: tl.constexpr, J: tl.constexpr, BITS: tl.constexpr, WINDOW: tl.constexpr, MAGIC: tl.constexpr,
    OFFSET: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    word = tl.load(words + at)
    tl.store(out + at, triton_codes.zero_value(word, ODD, J, BITS, WINDOW, MAGIC, OFFSET, DTYPE, INTERPRET))


@pytest.mark.parametrize(("bits", "magic"), FORMS)
def test_what_runs_here_makes_them_too(bits: int, magic: int) -> None:
    """The plain form in the interpreter; on a GPU the inline assembly itself."""
    words = WORDS.to(torch.int16).to(DEVICE)
    for plane in range(16 // bits):
        value = torch.zeros(len(WORDS), dtype=torch.float64)
        for shift, mask in parts(bits, magic, plane):
            out = torch.empty(len(WORDS), dtype=DTYPE[magic], device=DEVICE)
            numbers_kernel[GRID](words, out, shift, mask, magic, DEVICE.type == "cpu", AT_ONCE)
            value += out.cpu().double()
        assert torch.equal(value, defined(bits, magic, plane, WORDS)), plane


@pytest.mark.parametrize(("bits", "magic"), FORMS)
def test_zero_points_are_read_as_codes_are(bits: int, magic: int) -> None:
    """Every word of an even group below every word of an odd one: v(z), exact in float32."""
    odd = WORDS * 40503 % (1 << 16)
    packed = (odd << 16 | WORDS).to(torch.int32).to(DEVICE)
    of = constants(bits, magic)
    kind = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[DTYPE[magic]]
    for plane in range(16 // bits):
        for is_odd, words in ((False, WORDS), (True, odd)):
            out = torch.empty(len(WORDS), device=DEVICE)
            arguments = (is_odd, plane, bits, of["WINDOW"], magic, of["OFFSET"], kind, DEVICE.type == "cpu", AT_ONCE)
            zeros_kernel[GRID](packed, out, *arguments)
            assert torch.equal(out.cpu().double(), defined(bits, magic, plane, words)), plane


def half_emulated(text: str, register: Tensor, dtype: torch.dtype) -> Tensor:
    """The instructions that make a half of a register float32, as float64."""
    if dtype == torch.bfloat16:  # the upper half of a float32
        found = re.fullmatch(r"(shl|and)\.b32 \$0, \$1, (\d+);", text)
        assert found is not None, text
        number = int(found[2])
        bits = register << number & 0xFFFFFFFF if found[1] == "shl" else register & number
        return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32).double()
    found = re.fullmatch(r"{ \.reg \.b16 (\w+), (\w+); mov\.b32 {\1, \2}, \$1; cvt\.f32\.f16 \$0, (\1|\2); }", text)
    assert found is not None, text
    return as_numbers(register >> 16 * (found[3] == found[2]) & 0xFFFF, dtype)


@pytest.mark.parametrize(("bits", "magic"), [form for form in FORMS if form.values != (8, MAGIC_BFLOAT16)])
def test_inline_assembly_reads_zero_points(bits: int, magic: int) -> None:
    """Every word of an even group below every word of an odd one, by the text that the GPU's assembler gets."""
    odd = WORDS * 40503 % (1 << 16)
    register = odd << 16 | WORDS
    for plane in range(16 // bits):
        ((shift, mask),) = parts(bits, magic, plane)
        shifted = emulated(triton_codes.shift_text(shift), register) if shift else register
        both = emulated(triton_codes.number_text(mask, magic), shifted)
        for is_odd, words in ((False, WORDS), (True, odd)):
            text = triton_codes.half_text(is_odd, magic == MAGIC_BFLOAT16)
            value = half_emulated(text, both, DTYPE[magic])
            assert torch.equal(value, defined(bits, magic, plane, words)), plane


def test_a_half_that_is_not_known_at_compile_time_is_refused() -> None:
    with pytest.raises(TypeError, match="not known at compile time"):
        triton_codes.half_text(torch.tensor(0), False)


@pytest.mark.parametrize(("bits", "magic"), FORMS)
def test_zero_points_go_out_by_algebra(bits: int, magic: int) -> None:
    """v(code) - v(z) is unit * (code - z) for every pair, with nothing lost in float32."""
    of = constants(bits, magic)
    every = torch.arange(1 << bits)
    for plane in range(16 // bits):
        value = defined(bits, magic, plane, every << (plane * bits)).float()
        unit = triton_codes.code_unit(plane, bits, of["WINDOW"], of["UNIT"])
        assert torch.equal(value[:, None] - value[None, :], unit * (every[:, None] - every[None, :]).float())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("magic", DTYPE)
def test_the_middle_of_a_symmetric_grid_goes_out_with_the_sum_of_x(bits: int, magic: int) -> None:
    """The constant matrix holds -v(mid) of plane 0, exact in the dtype; other planes' are a ratio of it."""
    of = constants(bits, magic, symmetric=True)
    base = -(of["OFFSET"] + of["MID"] * of["UNIT"])
    assert float(torch.tensor(base, dtype=DTYPE[magic])) == base
    for plane in range(int(of["PLANES"])):
        ratio = triton_codes.middle_ratio(plane, of["BITS"], of["WINDOW"], of["UNIT"], of["OFFSET"], of["MID"])
        exact = -defined(int(of["BITS"]), magic, plane, torch.tensor(int(of["MID"]) << plane * int(of["BITS"])))
        found = torch.tensor(ratio, dtype=torch.float32) * base
        assert abs(float(found) - float(exact)) <= abs(float(exact)) * 2.0**-24


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_planes_hold_every_code_in_every_place(bits: int) -> None:
    """One code at a time in each row of a unit; its word has that plane's bits and no other."""
    planes, every = 16 // bits, torch.arange(1 << bits, dtype=torch.uint8)
    for row in range(16 * planes):
        codes = torch.zeros(16 * planes, len(every), dtype=torch.uint8)
        codes[row] = every
        words = pack_words(codes, bits)
        flat = words.transpose(1, 2).reshape(16, -1)[:, : len(every)].long() & 0xFFFF
        expected = torch.zeros_like(flat)
        expected[row % 16] = every.long() << (row // 16 * bits)
        assert torch.equal(flat, expected)
        assert torch.equal(unpack_words(words, bits, len(codes), len(every)), codes)
        zeros = pack_zeros(codes, bits, 1, len(every)).long() & 0xFFFFFFFF
        assert torch.equal(zeros, (expected[:, 1::2] << 16 | expected[:, ::2]).T)
