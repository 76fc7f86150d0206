"""Codes as float32 numbers, and what activations and sums owe for it: both sides of one algebra.

Of a column, 16 rows' codes q become numbers r, and activations x become x', such that with known constants

    Σ r x'  =  Σ (q - s) x  +  Σ o x'.

Bytes: a lane of 32 bits holds 4; ``lane & 0xff`` and ``lane & 0xff00``, converted, are q and 256 q; x' is x or x / 256,
and the upper half of the lane is shifted once. o is 0.

Nibbles: conversions are slow (one a cycle on Zen 3). ``word & 15 | 0x4300`` is the bfloat16 128 + q, twice in a lane of
32 bits. Shifted up by 16, the lane is the float32 128 + q of its lower word. Unshifted it is that of its upper word,
and the lower one is its fraction: 128 + q + (0x4300 + q_lower) / 2^16. Nothing is masked: the lower column's activation
takes the last term back, x'_lower = x_lower - x_upper / 2^16. So o is 128 and 128 + 0x4300 / 2^16.

An offset costs float32 sums about 4 bits. Where activations come in 16 bits, which the result is rounded to as well,
that is lost in rounding. Otherwise numbers are ``centered``: s = 2^(bits-1) and o are subtracted at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.kernels.jit_text import Lines, center, constant
from quantkit.kernels.panels import unit_columns

_MAGIC = 0x4300  # bfloat16 128, whose last bit is worth 1
_LOWER = 2.0**-16  # what the lower word's last bit is worth, seen from the upper one


@dataclass(frozen=True, slots=True)
class Codes:
    """How codes of a width are turned to numbers.

    Attributes:
        bits: of a code.
        centered: whether a symmetric scheme's zero point is subtracted from each number.
    """

    bits: int
    centered: bool

    @property
    def columns(self) -> int:
        """Of a unit."""
        return unit_columns(self.bits)

    @property
    def subtracted(self) -> int:
        """s: what each code has lost in its number."""
        return center(self.bits) if self.centered else 0

    @property
    def offsets(self) -> tuple[float, ...] | None:
        """o, for each column of a unit; None: 0."""
        if self.centered or self.columns == 4:
            return None
        return (128.0, 128.0 + _MAGIC * _LOWER) * 4

    def numbers(self, out: Lines, place: str) -> Iterator[tuple[int, str]]:
        """Each column of the unit at ``place``, and r: <16 x float>."""
        return self._nibbles(out, place) if self.columns == 8 else self._bytes(out, place)

    def fitted(self, out: Lines, x: str) -> str:
        """x' of the columns of a unit."""
        if self.columns == 4:
            return out.let(f"fmul <4 x float> {x}, {constant((1.0, 1.0, 2.0**-8, 2.0**-8))}")
        upper = out.let(
            f"shufflevector <8 x float> {x}, <8 x float> poison, "
            "<8 x i32> < i32 1, i32 1, i32 3, i32 3, i32 5, i32 5, i32 7, i32 7 >"
        )
        return out.fma(upper, constant((-_LOWER, 0.0) * 4), x, lanes=8)

    def _nibbles(self, out: Lines, place: str) -> Iterator[tuple[int, str]]:
        words = out.let(f"load <32 x i16>, ptr {place}, align 64")
        middle = self.subtracted
        for pair in range(4):
            nibble = out.let(f"lshr <32 x i16> {words}, splat (i16 {4 * pair})") if pair else words
            code = out.let(f"and <32 x i16> {nibble}, splat (i16 15)")
            both = out.let(f"bitcast <32 x i16> {out.let(f'or <32 x i16> {code}, splat (i16 {_MAGIC})')} to <16 x i32>")
            lower = out.let(f"shl <16 x i32> {both}, splat (i32 16)")
            # The lower column's number times x' takes middle * x_upper / 2^16 too much back, so the upper one keeps it.
            yield 2 * pair, self._number(out, lower, 128.0 + middle)
            yield 2 * pair + 1, self._number(out, both, 128.0 + middle + (_MAGIC + middle) * _LOWER)

    def _bytes(self, out: Lines, place: str) -> Iterator[tuple[int, str]]:
        lanes = out.let(f"load <16 x i32>, ptr {place}, align 64")
        for half in (0, 1):
            shifted = out.let(f"lshr <16 x i32> {lanes}, splat (i32 16)") if half else lanes
            for field in (0, 1):
                code = out.let(f"and <16 x i32> {shifted}, splat (i32 {255 << 8 * field})")
                number = out.let(f"sitofp <16 x i32> {code} to <16 x float>")
                if self.centered:
                    number = out.let(f"fsub <16 x float> {number}, splat (float {256.0**field * self.subtracted})")
                yield 2 * field + half, number

    def _number(self, out: Lines, bits: str, offset: float) -> str:
        number = out.let(f"bitcast <16 x i32> {bits} to <16 x float>")
        return out.let(f"fsub <16 x float> {number}, splat (float {offset})") if self.centered else number
