"""The just-in-time kernel for few rows of x on CPUs that multiply bytes (VNNI), as LLVM's intermediate representation.

Codes stay what they are, unsigned bytes: two masks and a shift make all of a unit's nibbles. The activations of a group
become integers, x = 2^s i with the s at which the largest has 22 bits, and these three signed bytes,

    i = d₀ + 2⁸ d₁ + 2¹⁶ d₂        with digits from -128 to 127,

so that three sums Σ q d of 32-bit integers, which are exact, hold the product (:mod:`quantkit.kernels.jit_dots_ir`).
At a group's end they are put together in float32, zero points come in by algebra, Σ (q - z) i = Σ q i - z Σ i, and the
scale is 2^s times the weight's. With the 8 digits of a bfloat16 activations lose nothing down to 2^-14 of the largest
in their group, with a float16's 11 down to 2^-11; below, no more than 2^-22 of that largest one, which is what a
float32 sum with it would lose.

Memory is read once, from start to end, with prefetches ahead. A unit takes half as long as by
:mod:`quantkit.kernels.jit_ir`: there every product of bfloat16 takes two cycles, and every number a table look-up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from quantkit.kernels.jit_dots_ir import Dots
from quantkit.kernels.jit_text import NAME, PREFETCH, SIZES, Kind, Lines, center
from quantkit.kernels.jit_tile_ir import NUMBERS, POINTERS
from quantkit.kernels.panels import PANEL, unit_columns

ACTIVATIONS = ("bfloat", "half")
"""LLVM's names of the types of x; a float32's 24 bits would not fit."""

MOST_COLUMNS = 1 << 16
"""Of a group: more products of two bytes could overflow 32 bits."""

_AHEAD = 8192  # bytes
_DIGITS = 3
_BITS = 21  # of the largest activation's integer, its first not counted: the highest digit stays below 2^6
_GROUP_BYTES = 8  # of what is kept of a group: its scale and its sum, float32 each
_EXPONENT_ONES = 255  # of infinity and NaN
# The columns of a unit in the order of its bytes, low nibbles first.
_ORDERS = {8: (0, 4, 1, 5, 2, 6, 3, 7), 4: (0, 2, 1, 3)}

_HEADER = """\
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare i32 @llvm.umax.i32(i32, i32)
"""


def bytes_ir(kind: Kind, activation: str, tokens: int, dots: Dots) -> str:
    """A module with the function of :func:`quantkit.kernels.jit_tile_ir.tile_ir`, for one tile.

    Args:
        kind: the weight.
        activation: LLVM's name of the type of x and y, one of :data:`ACTIVATIONS`.
        tokens: rows of x, at most as many as ``dots`` has registers for.
        dots: how bytes are multiplied.
    """
    digits, product = (_Writer(kind, activation, tokens, dots) for _ in range(2))
    return PREFETCH + _HEADER + digits.declarations() + "\n".join([*digits.digits(), *product.product()])


def scratch_of_bytes(tokens: int, in_features: int, groups: int) -> int:
    """float32 numbers that a call writes: for each row of x each group's scale and sum, then its digits."""
    return -(-tokens * (_DIGITS * in_features + _GROUP_BYTES * groups) // 4)


class _Writer(Lines):
    def __init__(self, kind: Kind, activation: str, tokens: int, dots: Dots) -> None:
        super().__init__()
        self.kind, self.activation, self.tokens, self.dots = kind, activation, tokens, dots
        # Sums of a digit that do not wait for each other: several rows have several, and AVX2 has few registers.
        self.turns = 2 if tokens == 1 < dots.tokens else 1
        self.unit = unit_columns(kind.bits)
        self.lanes = next(n for n in (16, 8, 4) if kind.group % n == 0)
        self.parts = PANEL // dots.rows
        self.chunks = kind.group // self.lanes
        self.columns = next(n for n in (dots.columns, self.lanes) if kind.group % n == 0)

    def declarations(self) -> str:
        """Of functions that depend on the number of lanes."""
        n = self.lanes
        return (
            f"{self.dots.declarations}"
            f"declare <{n} x i32> @llvm.umax.v{n}i32(<{n} x i32>, <{n} x i32>)\n"
            f"declare i32 @llvm.vector.reduce.umax.v{n}i32(<{n} x i32>)\n"
            f"declare float @llvm.vector.reduce.fadd.v{n}f32(float, <{n} x float>)\n"
            f"declare <{n} x float> @llvm.rint.v{n}f32(<{n} x float>)\n"
        )

    def digits(self) -> list[str]:
        """The function ``digits(x, scratch, groups)``: two passes over each group, for its largest and its bytes."""
        n, columns = self.lanes, self.kind.group
        self.lines += ["define internal void @digits(ptr noalias %x, ptr noalias %scratch, i64 %groups) {", "entry:"]
        own = self.address("%scratch", "%groups", _GROUP_BYTES)
        self.loop("group", "%g", "entry", "end")
        x = self.address("%x", "%g", columns * SIZES[self.activation])
        to = self.address(own, "%g", columns * _DIGITS)
        self.loop("largest", "%a", "group", "largest")
        self.lines.append(f"  %most = phi <{n} x i32> [ zeroinitializer, %group ], [ %most.next, %largest ]")
        bits = self.let(f"bitcast <{n} x float> {self._activations(x, '%a')} to <{n} x i32>")
        size = self.let(f"and <{n} x i32> {bits}, splat (i32 2147483647)")
        self.lines.append(f"  %most.next = call <{n} x i32> @llvm.umax.v{n}i32(<{n} x i32> %most, <{n} x i32> {size})")
        self.again("largest", "%a", str(self.chunks), "scale")
        factor, scale = self._powers()
        self.loop("chunk", "%c", "scale", "chunk")
        self.sums(["%sum"], "scale", "chunk", n)
        number = self.let(f"fmul <{n} x float> {self._activations(x, '%c')}, {self.splat(factor, 'float', n)}")
        whole = self.let(f"call <{n} x float> @llvm.rint.v{n}f32(<{n} x float> {number})")
        self.lines.append(f"  %sum.next = fadd <{n} x float> %sum, {whole}")
        self._stored_digits(self.let(f"fptosi <{n} x float> {whole} to <{n} x i32>"), self.address(to, "%c", 3 * n))
        self.again("chunk", "%c", str(self.chunks), "end")
        total = self.let(f"call reassoc float @llvm.vector.reduce.fadd.v{n}f32(float -0.0, <{n} x float> %sum.next)")
        taken = -float(center(self.kind.bits)) if self.kind.symmetric else -1.0
        kept = self.address("%scratch", "%g", _GROUP_BYTES)
        self.lines.append(f"  store float {scale}, ptr {kept}, align 4")
        self.lines.append(
            f"  store float {self.let(f'fmul float {total}, {taken}')}, ptr {self.after(kept, 4)}, align 4"
        )
        self.again("group", "%g", "%groups", "done")
        self.lines += ["  ret void", "}"]
        return self.lines

    def _activations(self, x: str, index: str) -> str:
        """float32: a chunk of x."""
        size = SIZES[self.activation]
        return self.widened(self.address(x, index, self.lanes * size), self.activation, self.lanes, size)

    def _powers(self) -> tuple[str, str]:
        """What the group's activations are multiplied by to become integers, and what undoes it: NaN, should one of
        them be infinite or NaN. Where all are below 2^-104 the powers stay in the range of float32."""
        most = self.let(f"call i32 @llvm.vector.reduce.umax.v{self.lanes}i32(<{self.lanes} x i32> %most.next)")
        exponent = self.let(f"lshr i32 {most}, 23")
        ample = self.let(f"call i32 @llvm.umax.i32(i32 {exponent}, i32 {_BITS + 1})")
        up = self.let(f"shl i32 {self.let(f'sub i32 {2 * 127 + _BITS}, {ample}')}, 23")
        down = self.let(f"shl i32 {self.let(f'sub i32 {ample}, {_BITS}')}, 23")
        finite = self.let(f"icmp ne i32 {exponent}, {_EXPONENT_ONES}")
        undone = self.let(f"bitcast i32 {down} to float")
        scale = self.let(f"select i1 {finite}, float {undone}, float 0x7FF8000000000000")
        return self.let(f"bitcast i32 {up} to float"), scale

    def _stored_digits(self, number: str, to: str) -> None:
        """Three bytes of each integer, all first ones first, in the order in which units have their columns."""
        n = self.lanes
        order = [start + column for start in range(0, n, self.unit) for column in _ORDERS[self.unit]]
        indices = ", ".join(f"i32 {column}" for column in order)
        for digit in range(_DIGITS):
            carried = sum(128 << 8 * lower for lower in range(digit))  # what is above 127 goes to the next digit
            up = self.let(f"add <{n} x i32> {number}, splat (i32 {carried})")
            byte = self.let(
                f"trunc <{n} x i32> {self.let(f'ashr <{n} x i32> {up}, splat (i32 {8 * digit})')} to <{n} x i8>"
            )
            moved = self.let(f"shufflevector <{n} x i8> {byte}, <{n} x i8> poison, <{n} x i32> < {indices} >")
            self.lines.append(f"  store <{n} x i8> {moved}, ptr {self.after(to, digit * n)}, align 1")

    def product(self) -> list[str]:
        """All lines of the product: loops over panels, groups and chunks of columns."""
        arguments = [*(f"ptr noalias %{name}" for name in POINTERS), *(f"i64 %{name}" for name in NUMBERS)]
        self.lines += [f"define void @{NAME}({', '.join(arguments)}) {{", "entry:"]
        columns = self.let(f"mul i64 %groups, {self.kind.group}")
        kept = self._of_tokens("%scratch", self.let(f"mul i64 %groups, {_GROUP_BYTES + _DIGITS * self.kind.group}"))
        rows = self._of_tokens("%x", self.let(f"mul i64 {columns}, {SIZES[self.activation]}"))
        for x, own in zip(rows, kept, strict=True):
            self.lines.append(f"  call void @digits(ptr {x}, ptr {own}, i64 %groups)")
        self.loop("panel", "%p", "entry", "store", start="%first")
        self.loop("group", "%g", "panel", "scale")
        totals = [f"%total.{token}" for token in range(self.tokens)]
        self.sums(totals, "panel", "scale")
        at = self.let(f"add i64 {self.let('mul i64 %p, %groups')}, %g")
        words = self.address("%words", at, self.kind.group // self.unit * 64)
        digits = [
            self.address(self.address(own, "%groups", _GROUP_BYTES), "%g", self.kind.group * _DIGITS) for own in kept
        ]
        sums = self._sums(words, digits)
        self.lines += ["  br label %scale", "scale:"]
        scale, zeros = self._group(at)
        for own, of_token, total in zip(kept, sums, totals, strict=True):
            self._scaled(self.address(own, "%g", _GROUP_BYTES), of_token, scale, zeros, total)
        self.again("group", "%g", "%groups", "store")
        size = SIZES[self.activation]
        first = self.address("%y", self.let("mul i64 %p, 16"), size)
        for total, y in zip(totals, self._of_tokens(first, self.let(f"mul i64 %rows, {size}")), strict=True):
            self.stored(f"{total}.next", self.activation, y)
        self.again("panel", "%p", "%last", "done")
        self.lines += ["  ret void", "}"]
        return self.lines

    def _of_tokens(self, base: str, nbytes: str) -> list[str]:
        """Where each row's part begins, so many bytes behind the one before."""
        return [base, *(self.address(base, nbytes, token) for token in range(1, self.tokens))]

    def _sums(self, words: str, digits: list[str]) -> list[list[str]]:
        """<16 x i32>: sums over a group, for each row of x and digit.

        A loop that follows the block ``group``; behind it the block ``chunks`` is open.
        """
        kind = f"<{self.dots.rows} x i32>"
        self.loop("chunk", "%c", "group", "chunk")
        self.lines += [
            f"  {name} = phi {kind} [ zeroinitializer, %group ], [ {name}.next, %chunk ]" for name in self._all_sums()
        ]
        here = self.address(words, "%c", self.columns // self.unit * 64)
        self._chunk(here, [self.address(own, "%c", _DIGITS * self.columns) for own in digits])
        self.again("chunk", "%c", str(self.kind.group // self.columns), "chunks")
        return [
            [self._joined([self._added(token, digit, part) for part in range(self.parts)]) for digit in range(_DIGITS)]
            for token in range(self.tokens)
        ]

    def _all_sums(self) -> list[str]:
        """Names of what the loop over chunks adds up."""
        kinds = (range(self.tokens), range(_DIGITS), range(self.parts), range(self.turns))
        return [_sum_of(*one) for one in itertools.product(*kinds)]

    def _chunk(self, words: str, digits: list[str]) -> None:
        """The products of a chunk's units; where a digit has several sums, codes take turns at them."""
        running: dict[str, str] = {}
        for unit in range(self.columns // self.unit):
            here = self.after(words, 64 * unit)
            self.prefetch(here, _AHEAD)
            parts = [self._codes(self.after(here, 4 * self.dots.rows * part)) for part in range(self.parts)]
            for nibble, codes in enumerate(zip(*parts, strict=True)):
                place = len(parts[0]) * unit + nibble
                for token, own in enumerate(digits):
                    self._products(codes, own, place, token, running)
        kind = f"<{self.dots.rows} x i32>"
        for total in self._all_sums():
            ended = self.dots.ended(self, running[total], total) if total in running else total
            self.lines.append(f"  {total}.next = bitcast {kind} {ended} to {kind}")

    def _products(self, codes: Sequence[str], digits: str, place: int, token: int, running: dict[str, str]) -> None:
        """Four columns' codes of all parts by each digit of a row of x, added to the running sums."""
        stored, byte = divmod(4 * place, self.lanes)  # digits lie in chunks of so many columns
        for digit in range(_DIGITS):
            at = self.after(digits, (_DIGITS * stored + digit) * self.lanes + byte)
            four = self.let(f"load i32, ptr {at}, align 1")
            for part, own in enumerate(codes):
                total = _sum_of(token, digit, part, place % self.turns)
                running[total] = self.dots.added(self, running.get(total), total, own, four)

    def _added(self, token: int, digit: int, part: int) -> str:
        """All sums of a digit, after the loop, as one."""
        whole, *others = (f"{_sum_of(token, digit, part, turn)}.next" for turn in range(self.turns))
        for other in others:
            whole = self.let(f"add <{self.dots.rows} x i32> {whole}, {other}")
        return whole

    def _joined(self, parts: list[str]) -> str:
        """<16 x i32>: what two parts of a panel have, or one has alone."""
        if len(parts) == 1:
            return parts[0]
        one, other = (f"<8 x i32> {part}" for part in parts)
        indices = ", ".join(f"i32 {row}" for row in range(PANEL))
        return self.let(f"shufflevector {one}, {other}, <16 x i32> < {indices} >")

    def _codes(self, place: str) -> list[str]:
        """A unit's codes, four bytes of each row: the low nibbles and the high ones, or the bytes as they are."""
        kind = f"<{self.dots.rows} x i32>"
        word = self.let(f"load {kind}, ptr {place}, align {4 * self.dots.rows}")
        if self.kind.bits > 4:
            return [word]
        high = self.let(f"lshr {kind} {word}, splat (i32 4)")
        return [self.let(f"and {kind} {nibbles}, splat (i32 {0x0F0F0F0F})") for nibbles in (word, high)]

    def _group(self, at: str) -> tuple[str, str | None]:
        """float32 of a group: the weight's scales, and its zero points, if it has some."""
        size = 16 * SIZES[self.kind.scale]
        scale = self.widened(self.address("%scales", at, size), self.kind.scale, 16, size)
        return scale, None if self.kind.symmetric else self.zero_points(at)

    def _scaled(self, kept: str, sums: list[str], scale: str, zeros: str | None, total: str) -> None:
        """The end of a group: a row's product, times its scales, is added to the total."""
        found = None
        for whole in reversed(sums):
            number = self.let(f"sitofp <16 x i32> {whole} to <16 x float>")
            found = number if found is None else self.fma(found, "splat (float 256.0)", number)
        assert found is not None
        taken = self.everywhere(kept, 4)
        found = self.let(f"fadd <16 x float> {found}, {taken}") if zeros is None else self.fma(zeros, taken, found)
        scale = self.let(f"fmul <16 x float> {scale}, {self.everywhere(kept, 0)}")
        self.fma(found, scale, total, name=f"{total}.next")


def _sum_of(token: int, digit: int, part: int, turn: int) -> str:
    return f"%sum.{token}.{digit}.{part}.{turn}"
