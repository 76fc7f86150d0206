"""Products of bytes, as instructions: four unsigned codes of each of some rows by four signed bytes, summed in 32 bits.

A sum gets a few products one after the other and is then ended; what it is meanwhile is each machine's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from quantkit.kernels.jit_text import Lines


class Dots(Protocol):
    """How a machine does it."""

    @property
    def rows(self) -> int:
        """Of the weight, in a register: 16 or 8."""

    @property
    def tokens(self) -> int:
        """Rows of x whose sums stay in registers."""

    @property
    def bits(self) -> int:
        """Of the largest codes that it takes."""

    @property
    def columns(self) -> int:
        """That a loop takes at once, where a group has as many; at most 32."""

    @property
    def declarations(self) -> str:
        """Of what the lines call."""

    def added(self, lines: Lines, running: str | None, total: str, codes: str, four: str) -> str:
        """The running value with one more product; at most 8 go into one.

        Args:
            lines: get the instructions.
            running: None at first.
            total: <rows x i32>, what it is for.
            codes: <rows x i32>, four unsigned bytes each.
            four: i32, four signed bytes, by which every row's codes are multiplied.
        """

    def ended(self, lines: Lines, running: str, total: str) -> str:
        """<rows x i32>: the total with the running value."""


@dataclass(frozen=True, slots=True)
class FusedDots:
    """One instruction for the product and the sum (VPDPBUSD); attributes as in :class:`Dots`."""

    rows: int
    tokens: int
    bits: int = 8
    columns: int = 16

    @property
    def declarations(self) -> str:
        """See :class:`Dots`."""
        kind = f"<{self.rows} x i32>"
        return f"declare {kind} {self._name}({kind}, {kind}, {kind})\n"

    def added(self, lines: Lines, running: str | None, total: str, codes: str, four: str) -> str:
        """See :class:`Dots`."""
        kind, x = f"<{self.rows} x i32>", lines.splat(four, "i32", self.rows)
        return lines.let(f"call {kind} {self._name}({kind} {running or total}, {kind} {codes}, {kind} {x})")

    def ended(self, lines: Lines, running: str, total: str) -> str:  # noqa: ARG002
        """See :class:`Dots`."""
        return running

    @property
    def _name(self) -> str:
        return f"@llvm.x86.avx512.vpdpbusd.{32 * self.rows}"


@dataclass(frozen=True, slots=True)
class PairedDots:
    """AVX2: 16 bits for the sums of products (VPMADDUBSW), which 8 of codes of 4 bits do not fill, and then 32."""

    rows: int = 8
    tokens: int = 1
    bits: int = 4
    columns: int = 32

    @property
    def declarations(self) -> str:
        """See :class:`Dots`."""
        return (
            "declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)\n"
            "declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)\n"
        )

    def added(self, lines: Lines, running: str | None, total: str, codes: str, four: str) -> str:  # noqa: ARG002
        """See :class:`Dots`; the running value is <16 x i16>."""
        own, x = (lines.let(f"bitcast <8 x i32> {v} to <32 x i8>") for v in (codes, lines.splat(four, "i32", 8)))
        product = lines.let(f"call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> {own}, <32 x i8> {x})")
        return product if running is None else lines.let(f"add <16 x i16> {running}, {product}")

    def ended(self, lines: Lines, running: str, total: str) -> str:
        """See :class:`Dots`."""
        ones = "<16 x i16> splat (i16 1)"
        wide = lines.let(f"call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> {running}, {ones})")
        return lines.let(f"add <8 x i32> {total}, {wide}")
