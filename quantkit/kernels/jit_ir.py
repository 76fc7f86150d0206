"""The just-in-time kernel for CPUs, as LLVM's intermediate representation: text, and nothing else.

For each panel of 16 rows (see :mod:`quantkit.kernels.panels`) and each group of columns, codes become bfloat16 numbers
by a table look-up on nibbles (VPERMW: its index is the low 5 bits of a word, so a table that holds 16 numbers twice
needs no mask), and pairs of columns are multiplied and summed in float32 (VDPBF16PS). A code of 8 bits is two nibbles,
each with a table of its own. Integers up to 256 are exact in bfloat16, so the only roundings are those of float32 sums.
At a group's end its sum is multiplied by its scale, and an asymmetric weight's zero points come in by algebra:

    Σ (q - z) x  =  Σ (q - c) x  -  (z - c) Σ x        with the constant c in the tables.

Memory is read once, from start to end, with prefetches ahead.
"""

from __future__ import annotations

from quantkit.kernels.jit_text import NAME, PREFETCH, Kind, Lines, center
from quantkit.kernels.panels import unit_columns

_AHEAD = 4096  # bytes; measured: 87 % of a plain read's speed at 4096 x 4096, without prefetches 68 %
_UNROLL = 4  # units in one trip of the inner loop, at most
_REGISTERS = 16  # accumulators, at most: half of the vector registers

_HEADER = """\
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16>, <32 x i16>)
"""


def matvec_ir(kind: Kind, tokens: int) -> str:
    """A module with the function ``kernel(words, scales, zeros, x, sums, tables, y, first, last, groups, rows)``.

    Pointers: words, scales and zeros (uint8; unused where symmetric) of all panels; x bfloat16 [tokens, in]; sums
    float32 [tokens, groups] of x (unused where symmetric); tables 2 x 32 bfloat16; y bfloat16 [tokens, rows]. Panels
    ``first`` to ``last - 1`` are computed, at least one. The number of tokens, rows of x, is fixed.
    """
    return PREFETCH + _HEADER + "\n".join(_Writer(kind).product(tokens))


class _Writer(Lines):
    """Writes the kernel."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.units = kind.group // unit_columns(kind.bits)
        self.unroll = next(n for n in range(min(_UNROLL, self.units), 0, -1) if self.units % n == 0)

    def product(self, num_tokens: int) -> list[str]:
        """All lines of the product."""
        kind, tokens = self.kind, range(num_tokens)
        num_chains = max(1, min(4, _REGISTERS // num_tokens))  # independent sums of a token, added at the end
        pointers = ", ".join(
            f"ptr noalias %{name}" for name in ("words", "scales", "zeros", "x", "sums", "tables", "y")
        )
        self.lines += [f"define void @{NAME}({pointers}, i64 %first, i64 %last, i64 %groups, i64 %rows) {{", "entry:"]
        tables = self._tables()
        columns = self.let(f"mul i64 %groups, {kind.group}")
        self.lines += ["  br label %panel", "panel:", "  %p = phi i64 [ %first, %entry ], [ %p.next, %store ]"]
        start = self.let("mul i64 %p, %groups")
        totals = [f"%total.{t}" for t in tokens]
        self.lines += ["  br label %group", "group:", "  %g = phi i64 [ 0, %panel ], [ %g.next, %scale ]"]
        self.sums(totals, "panel", "scale")
        at = self.let(f"add i64 {start}, %g")
        group_words = self.address("%words", at, self.units * 64)
        x_group = self.address("%x", "%g", kind.group * 2)
        x_tokens = [self.address(x_group, columns, 2 * t) for t in tokens]
        self.lines += ["  br label %unit", "unit:", "  %u = phi i64 [ 0, %group ], [ %u.next, %unit ]"]
        chains = [[f"%sum.{t}.{c}" for c in range(num_chains)] for t in tokens]
        self.sums([name for chain in chains for name in chain], "group", "unit")
        sums = self._units(group_words, x_tokens, tables, [list(chain) for chain in chains])
        for chain, finals in zip(chains, sums, strict=True):
            for name, final in zip(chain, finals, strict=True):
                self.lines.append(f"  {name}.next = bitcast <16 x float> {final} to <16 x float>")
        self.lines.append(f"  %u.next = add i64 %u, {self.unroll}")
        more = self.let(f"icmp ult i64 %u.next, {self.units}")
        self.lines += [f"  br i1 {more}, label %unit, label %scale", "scale:"]
        self._scaled([[f"{name}.next" for name in chain] for chain in chains], totals, at)
        self.lines.append("  %g.next = add i64 %g, 1")
        more = self.let("icmp ult i64 %g.next, %groups")
        self.lines += [f"  br i1 {more}, label %group, label %store", "store:"]
        self._stored([f"{name}.next" for name in totals])
        self.lines.append("  %p.next = add i64 %p, 1")
        more = self.let("icmp ult i64 %p.next, %last")
        self.lines += [f"  br i1 {more}, label %panel, label %done", "done:", "  ret void", "}"]
        return self.lines

    def _tables(self) -> tuple[str, str]:
        low = self.let("load <32 x i16>, ptr %tables, align 64")
        place = self.let("getelementptr i8, ptr %tables, i64 64")
        return low, self.let(f"load <32 x i16>, ptr {place}, align 64")

    def _looked_up(self, word: str, nibble: int, tables: tuple[str, str]) -> str:
        """<32 x i16>: the bfloat16 numbers that a nibble of each word stands for."""
        index = word if nibble == 0 else self.let(f"lshr <32 x i16> {word}, splat (i16 {4 * nibble})")
        table = tables[0] if self.kind.bits <= 4 else tables[nibble % 2]
        return self.let(f"call <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16> {table}, <32 x i16> {index})")

    def _scale(self, at: str) -> str:
        """float32: the scales of a group."""
        size = 4 if self.kind.scale == "float" else 2
        place = self.address("%scales", at, 16 * size)
        stored = self.let(f"load <16 x {self.kind.scale}>, ptr {place}, align {16 * size}")
        return stored if size == 4 else self.let(f"fpext <16 x {self.kind.scale}> {stored} to <16 x float>")

    def _units(self, words: str, x: list[str], tables: tuple[str, str], sums: list[list[str]]) -> list[list[str]]:
        """The products of the next units; returns the sums after them."""
        first = self.address(words, "%u", 64)
        pairs = [self.address(base, "%u", 2 * unit_columns(self.kind.bits)) for base in x]
        turn = 0
        for unit in range(self.unroll):
            here = self.let(f"getelementptr i8, ptr {first}, i64 {unit * 64}")
            self.prefetch(here, _AHEAD)
            word = self.let(f"load <32 x i16>, ptr {here}, align 64")
            for nibble in range(4):
                column = unit * 8 + nibble * 2 if self.kind.bits <= 4 else unit * 4 + nibble // 2 * 2
                weight = self.let(f"bitcast <32 x i16> {self._looked_up(word, nibble, tables)} to <32 x bfloat>")
                for token, base in enumerate(pairs):
                    place = self.let(f"getelementptr i8, ptr {base}, i64 {2 * column}")
                    both = self.splat(self.let(f"load i32, ptr {place}, align 2"), "i32", 16)
                    pair = self.let(f"bitcast <16 x i32> {both} to <32 x bfloat>")
                    chain = turn % len(sums[token])
                    sums[token][chain] = self.let(
                        f"call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> {sums[token][chain]}, "
                        f"<32 x bfloat> {weight}, <32 x bfloat> {pair})"
                    )
                turn += 1
        return sums

    def _scaled(self, sums: list[list[str]], totals: list[str], at: str) -> None:
        """The end of a group: its sums, times its scales, are added to the totals."""
        scale = self._scale(at)
        shift = None if self.kind.symmetric else self._zero_points(at)
        for token, (chain, total) in enumerate(zip(sums, totals, strict=True)):
            summed = chain[0]
            for other in chain[1:]:
                summed = self.let(f"fadd <16 x float> {summed}, {other}")
            if shift is not None:
                place = self.let(f"mul i64 %groups, {token}")
                place = self.address("%sums", self.let(f"add i64 {place}, %g"), 4)
                of_x = self.splat(self.let(f"load float, ptr {place}, align 4"), "float", 16)
                summed = self.let(
                    f"fsub contract <16 x float> {summed}, {self.let(f'fmul contract <16 x float> {shift}, {of_x}')}"
                )
            product = self.let(f"fmul contract <16 x float> {summed}, {scale}")
            self.lines.append(f"  {total}.next = fadd contract <16 x float> {total}, {product}")

    def _zero_points(self, at: str) -> str:
        """float32: the group's zero points minus the constant of the tables."""
        middle = f"splat (float {float(center(self.kind.bits))})"
        return self.let(f"fsub <16 x float> {self.zero_points(at)}, {middle}")

    def _stored(self, totals: list[str]) -> None:
        for token, total in enumerate(totals):
            rounded = self.let(f"fptrunc <16 x float> {total} to <16 x bfloat>")
            place = self.let(f"mul i64 %rows, {token}")
            panel = self.let("mul i64 %p, 16")
            target = self.address("%y", self.let(f"add i64 {place}, {panel}"), 2)
            self.lines.append(f"  store <16 x bfloat> {rounded}, ptr {target}, align 2")
