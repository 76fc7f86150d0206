"""What a just-in-time kernel does first: activations as float32 in the order in which it reads them, and their sums."""

from __future__ import annotations

from quantkit.kernels.jit_codes_ir import Codes
from quantkit.kernels.jit_text import SIZES, Kind, Lines, center, constant


def activations_ir(kind: Kind, codes: Codes, activation: str, tokens: int, block: int) -> list[str]:
    """The function ``activations(x, to, sums, tiles, blocks)``, for a module that declares what it calls.

    x is [tiles * tokens, in], of LLVM's type ``activation``; ``to`` float32 [tiles, in, tokens] gets x' of
    :mod:`quantkit.kernels.jit_codes_ir`. ``sums`` float32 [tiles, blocks, tokens, 2] gets what a block's sum starts at,
    and the negative sum of its x, by which each row multiplies its zero point: together they take offsets back.
    """
    return _Writer(kind, codes, activation, tokens, block).text()


class _Writer(Lines):
    def __init__(self, kind: Kind, codes: Codes, activation: str, tokens: int, block: int) -> None:
        super().__init__()
        self.kind, self.codes, self.activation, self.tokens, self.block = kind, codes, activation, tokens, block
        self.lanes = codes.columns

    def text(self) -> list[str]:
        """All lines: loops over tiles, blocks and units."""
        tokens, size = self.tokens, SIZES[self.activation]
        self.lines += [
            "define internal void @activations("
            "ptr noalias %x, ptr noalias %to, ptr noalias %sums, i64 %tiles, i64 %blocks) {",
            "entry:",
        ]
        columns = self.let(f"mul i64 %blocks, {self.block}")
        self.loop("tile", "%i", "entry", "next")
        first = self.let(f"mul i64 {columns}, {self.let(f'mul i64 %i, {tokens}')}")
        to, x = self.address("%to", first, 4), self.address("%x", first, size)
        rows = [self.address(x, columns, size * t) for t in range(tokens)]
        sums = self.address("%sums", self.let("mul i64 %i, %blocks"), 8 * tokens)
        self.loop("block", "%b", "tile", "end")
        start = self.let(f"mul i64 %b, {self.block}")
        self.loop("unit", "%u", "block", "unit")
        self.sums([f"%{name}.{t}" for t in range(tokens) for name in ("sum", "offset")], "block", "unit", self.lanes)
        column = self.let(f"add i64 {start}, {self.let(f'mul i64 %u, {self.lanes}')}")
        target = self.address(to, column, 4 * tokens)
        for token, row in enumerate(rows):
            self._unit(token, self.address(row, column, size), target)
        self.again("unit", "%u", str(self.block // self.lanes), "end")
        self._ends(self.address(sums, "%b", 8 * tokens))
        self.again("block", "%b", "%blocks", "next")
        self.again("tile", "%i", "%tiles", "done")
        self.lines += ["  ret void", "}"]
        return self.lines

    def _unit(self, token: int, place: str, target: str) -> None:
        """A token's next columns: to their places, and added to the sums."""
        lanes, kind = self.lanes, f"<{self.lanes} x float>"
        x = self.widened(place, self.activation, lanes, SIZES[self.activation])
        self.lines.append(f"  %sum.{token}.next = fadd {kind} %sum.{token}, {x}")
        fitted = self.codes.fitted(self, x)
        if self.codes.offsets is None:
            self.lines.append(f"  %offset.{token}.next = bitcast {kind} %offset.{token} to {kind}")
        else:
            self.fma(fitted, constant(self.codes.offsets), f"%offset.{token}", lanes, f"%offset.{token}.next")
        if self.tokens == 1:
            self.lines.append(f"  store {kind} {fitted}, ptr {target}, align 4")
            return
        for column in range(lanes):
            value = self.let(f"extractelement {kind} {fitted}, i32 {column}")
            place = self.after(target, 4 * (column * self.tokens + token))
            self.lines.append(f"  store float {value}, ptr {place}, align 4")

    def _ends(self, sums: str) -> None:
        """The end of a block: Σ (q - z) x = Σ r x' - Σ o x' - (z - s) Σ x."""
        known = (center(self.kind.bits) if self.kind.symmetric else 0) - self.codes.subtracted  # of z - s
        for token in range(self.tokens):
            of_x, start = (self._total(f"%{name}.{token}.next") for name in ("sum", "offset"))
            if known:
                start = self.let(f"fadd float {start}, {self.let(f'fmul float {of_x}, {float(known)}')}")
            for at, value in enumerate((start, of_x)):
                place = self.after(sums, 4 * (2 * token + at))
                self.lines.append(f"  store float {self.let(f'fneg float {value}')}, ptr {place}, align 4")

    def _total(self, value: str) -> str:
        kind = f"<{self.lanes} x float>"
        return self.let(f"call reassoc float @llvm.vector.reduce.fadd.v{self.lanes}f32(float -0.0, {kind} {value})")
