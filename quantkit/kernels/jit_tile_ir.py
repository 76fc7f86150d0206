"""The just-in-time kernel for CPUs without products of bfloat16, as LLVM's intermediate representation.

It is written once, in vectors of 16 lanes, one for each row of a panel (see :mod:`quantkit.kernels.panels`); LLVM
makes of each as many registers as the machine needs: 2 with AVX2, 1 with AVX-512, 4 with NEON. For each column of a
panel codes become float32 numbers (:mod:`quantkit.kernels.jit_codes_ir`) and are multiplied by each token's activation;
at the end of a block, a group or a part of it, sums are multiplied by scales. Memory is read once, from start to end,
with prefetches ahead.

A tile is a fixed number of tokens, for which a weight is decoded once. A panel meets all tiles while it is cached.
"""

from __future__ import annotations

from quantkit.kernels.jit_activations_ir import activations_ir
from quantkit.kernels.jit_codes_ir import Codes
from quantkit.kernels.jit_text import NAME, PREFETCH, SIZES, Kind, Lines
from quantkit.kernels.panels import unit_columns

POINTERS = ("words", "scales", "zeros", "x", "scratch", "y")
NUMBERS = ("tiles", "first", "last", "groups", "rows")
"""The arguments of the compiled function, see :func:`tile_ir`: addresses, then 64-bit integers."""

_AHEAD = 4096  # bytes; measured: 75 % of a plain read's speed at 4096 x 4096, without prefetches 60 %
_BLOCK = 128  # columns that are summed without a scale between, at most: long sums of float32 lose digits
_UNROLL = 2  # units in one trip of the inner loop, at most

_HEADER = """\
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
declare float @llvm.vector.reduce.fadd.v8f32(float, <8 x float>)
declare float @llvm.vector.reduce.fadd.v4f32(float, <4 x float>)
"""


def tile_ir(kind: Kind, activation: str, tokens: int, chains: int) -> str:
    """A module with the function ``kernel(words, scales, zeros, x, scratch, y, tiles, first, last, groups, rows)``.

    Pointers: words, scales and zeros (uint8; unused where symmetric) of all panels; x [tokens * tiles, in]; scratch
    for :func:`scratch_numbers` float32; y [tokens * tiles, rows], in x's type. Panels ``first`` to ``last - 1`` are
    computed; at least one, and at least one tile. Calls at the same time need a scratch of their own.

    Args:
        kind: the weight.
        activation: LLVM's name of the type of x and y: bfloat, half or float.
        tokens: rows of x in a tile.
        chains: sums that do not wait for each other, added at a block's end; more tokens have fewer each.
    """
    codes = Codes(kind.bits, centered=activation == "float")
    writer = _Writer(kind, codes, activation, tokens, chains)
    return (
        PREFETCH
        + _HEADER
        + "\n".join([*activations_ir(kind, codes, activation, tokens, writer.block), *writer.product()])
    )


def scratch_numbers(tokens: int, in_features: int, groups: int, bits: int) -> int:
    """float32 numbers that a call with so many rows of x in all its tiles writes: x, and two sums of each block."""
    return tokens * (in_features + 2 * (in_features // block_of(in_features // groups, bits)))


def block_of(group: int, bits: int) -> int:
    """Columns of a block: the most units that divide a group of so many, at most 128; all, where only a few would."""
    sizes = range(min(group, _BLOCK), _BLOCK // 4, -1)
    return next((size for size in sizes if group % size == size % unit_columns(bits) == 0), group)


class _Writer(Lines):
    def __init__(self, kind: Kind, codes: Codes, activation: str, tokens: int, chains: int) -> None:
        super().__init__()
        self.kind, self.codes, self.activation, self.tokens = kind, codes, activation, tokens
        self.block = block_of(kind.group, kind.bits)
        self.units = self.block // codes.columns
        self.unroll = next(n for n in range(min(_UNROLL, self.units), 0, -1) if self.units % n == 0)
        self.chains = [[f"%sum.{t}.{c}" for c in range(max(1, chains // tokens))] for t in range(tokens)]

    def product(self) -> list[str]:
        """All lines of the product: loops over panels, tiles, blocks and units."""
        kind, tokens = self.kind, self.tokens
        arguments = [*(f"ptr noalias %{name}" for name in POINTERS), *(f"i64 %{name}" for name in NUMBERS)]
        self.lines += [f"define void @{NAME}({', '.join(arguments)}) {{", "entry:"]
        columns = self.let(f"mul i64 %groups, {kind.group}")
        sums = self.address("%scratch", self.let(f"mul i64 {columns}, {self.let(f'mul i64 %tiles, {tokens}')}"), 4)
        blocks = self.let(f"mul i64 %groups, {kind.group // self.block}")
        self.lines.append(f"  call void @activations(ptr %x, ptr %scratch, ptr {sums}, i64 %tiles, i64 {blocks})")
        self.loop("panel", "%p", "entry", "next", start="%first")
        self.loop("tile", "%i", "panel", "store")
        x_tile = self.address("%scratch", self.let(f"mul i64 {columns}, %i"), 4 * tokens)
        sums_tile = self.address(sums, self.let(f"mul i64 %i, {blocks}"), 8 * tokens)
        self.loop("block", "%b", "tile", "scale")
        totals = [f"%total.{t}" for t in range(tokens)]
        self.sums(totals, "tile", "scale")
        group = self.let(f"udiv i64 %b, {kind.group // self.block}")
        at = self.let(f"add i64 {self.let('mul i64 %p, %groups')}, {group}")
        of_block = self.let(f"add i64 {self.let(f'mul i64 %p, {blocks}')}, %b")
        words = self.address("%words", of_block, self.units * 64)
        x = self.address(x_tile, "%b", self.block * 4 * tokens)
        starts = self._starts(self.address(sums_tile, "%b", 8 * tokens), at)
        self.loop("unit", "%u", "block", "unit")
        self._units(words, x, starts)
        self.again("unit", "%u", str(self.units), "scale", step=self.unroll)
        self._scaled(totals, at)
        self.again("block", "%b", blocks, "store")
        self._rows(totals)
        self.again("tile", "%i", "%tiles", "next")
        self.again("panel", "%p", "%last", "done")
        self.lines += ["  ret void", "}"]
        return self.lines

    def _starts(self, sums: str, at: str) -> list[str]:
        """Of each token, what the block's sum starts at: the offsets of its codes, taken back."""
        zeros = None if self.kind.symmetric else self.zero_points(at)
        found = []
        for token in range(self.tokens):
            start = self.everywhere(sums, 8 * token)
            found.append(start if zeros is None else self.fma(zeros, self.everywhere(sums, 8 * token + 4), start))
        return found

    def _units(self, words: str, x: str, starts: list[str]) -> None:
        """The products of the next units."""
        for chain, start in zip(self.chains, starts, strict=True):
            self.lines.append(f"  {chain[0]} = phi <16 x float> [ {start}, %block ], [ {chain[0]}.next, %unit ]")
            self.sums(chain[1:], "block", "unit")
        sums = [list(chain) for chain in self.chains]
        columns = self.codes.columns
        words, x = self.address(words, "%u", 64), self.address(x, "%u", 4 * columns * self.tokens)
        turn = 0
        for unit in range(self.unroll):
            here = self.after(words, 64 * unit)
            self.prefetch(here, _AHEAD)
            for column, number in self.codes.numbers(self, here):
                for token, own in enumerate(sums):
                    value = self.everywhere(x, 4 * ((unit * columns + column) * self.tokens + token))
                    own[turn % len(own)] = self.fma(number, value, own[turn % len(own)])
                turn += 1
        for chain, finals in zip(self.chains, sums, strict=True):
            for name, final in zip(chain, finals, strict=True):
                self.lines.append(f"  {name}.next = bitcast <16 x float> {final} to <16 x float>")

    def _scaled(self, totals: list[str], at: str) -> None:
        """The end of a block: its sums, times its scales, are added to the totals."""
        size = 16 * SIZES[self.kind.scale]
        scale = self.widened(self.address("%scales", at, size), self.kind.scale, 16, size)
        for chain, total in zip(self.chains, totals, strict=True):
            summed = f"{chain[0]}.next"
            for other in chain[1:]:
                summed = self.let(f"fadd <16 x float> {summed}, {other}.next")
            self.fma(summed, scale, total, name=f"{total}.next")

    def _rows(self, totals: list[str]) -> None:
        """A panel's rows of the result, for the tokens of a tile."""
        token = self.let(f"mul i64 %i, {self.tokens}")
        for t, total in enumerate(totals):
            row = self.let(f"mul i64 %rows, {self.let(f'add i64 {token}, {t}')}")
            start = self.let(f"add i64 {row}, {self.let('mul i64 %p, 16')}")
            self.stored(f"{total}.next", self.activation, self.address("%y", start, SIZES[self.activation]))
