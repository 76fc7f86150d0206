"""The just-in-time kernel that writes the dense weight of a few panels, for products with many rows of x.

Codes come with 16 rows in the lanes of a vector (:mod:`quantkit.kernels.panels`), and a matrix has its rows one after
the other. So 16 vectors, each a column or a pair of bfloat16 columns, are transposed in registers, and each of 16 rows
gets a whole line of the cache in one store: rows of 8 kB share their places in the cache, which a few bytes at a time
would overflow (measured for 4096 x 4096: 3.5 ms instead of 30).
"""

from __future__ import annotations

from quantkit.kernels.jit_text import NAME, PREFETCH, SIZES, Kind, Lines, center
from quantkit.kernels.panels import unit_columns

_LANES = 16
_AHEAD = 2048  # bytes, of codes


def dense_ir(kind: Kind, result: str) -> str:
    """A module with ``kernel(words, scales, zeros, dense, first, last, groups)``.

    Pointers: words, scales and zeros (uint8; unused where symmetric) of all panels; dense [16 * (last - first), in]:
    ``(q - z) * scale`` in float32, rounded once. At least one panel.

    Args:
        kind: the weight.
        result: LLVM's name of the type of ``dense``: float, or bfloat where the processor rounds to it.
    """
    return PREFETCH + "\n".join(_Writer(kind, result).text())


class _Writer(Lines):
    def __init__(self, kind: Kind, result: str) -> None:
        super().__init__()
        self.kind, self.result = kind, result
        self.per_lane = 4 // SIZES[result]  # columns in 32 bits
        vectors = kind.group // self.per_lane
        self.vectors = next(n for n in (16, 8, 4, 2) if vectors % n == 0)  # transposed at a time
        self.columns = self.vectors * self.per_lane

    def text(self) -> list[str]:
        """All lines: loops over panels, groups and the columns that are transposed at a time."""
        kind, size = self.kind, SIZES[self.result]
        pointers = ", ".join(f"ptr noalias %{name}" for name in ("words", "scales", "zeros", "dense"))
        self.lines += [f"define void @{NAME}({pointers}, i64 %first, i64 %last, i64 %groups) {{", "entry:"]
        row_bytes = self.let(f"mul i64 %groups, {size * kind.group}")
        self.loop("panel", "%p", "entry", "after", start="%first")
        panel = self.let(f"mul i64 {self.let('sub i64 %p, %first')}, {row_bytes}")
        panel = self.address("%dense", panel, _LANES)
        start = self.let("mul i64 %p, %groups")
        self.loop("group", "%g", "panel", "end")
        at = self.let(f"add i64 {start}, %g")
        scale = self.widened(self.address("%scales", at, 16 * SIZES[kind.scale]), kind.scale, 16, 16)
        zero_point = self._zero_points(at)
        units = kind.group // unit_columns(kind.bits)
        words, target = self.address("%words", at, 64 * units), self.address(panel, "%g", size * kind.group)
        self.loop("part", "%c", "group", "part")
        units = self.columns // unit_columns(kind.bits)
        here = self.address(words, "%c", 64 * units)
        numbers = [number for unit in range(units) for number in self._unit(self.after(here, 64 * unit))]
        numbers = [self.let(f"fmul <16 x float> {self._less(number, zero_point)}, {scale}") for number in numbers]
        self._rows(self._lanes(numbers), self.address(target, "%c", size * self.columns), row_bytes)
        self.again("part", "%c", str(kind.group // self.columns), "end")
        self.again("group", "%g", "%groups", "after")
        self.again("panel", "%p", "%last", "done")
        self.lines += ["  ret void", "}"]
        return self.lines

    def _zero_points(self, at: str) -> str:
        if self.kind.symmetric:
            return f"splat (float {float(center(self.kind.bits))})"
        return self.zero_points(at)

    def _less(self, number: str, zero_point: str) -> str:
        return self.let(f"fsub <16 x float> {number}, {zero_point}")

    def _unit(self, place: str) -> list[str]:
        """The codes of a unit's columns as float32."""
        self.prefetch(place, _AHEAD)
        pairs = self.let(f"load <16 x i32>, ptr {place}, align 64")  # of words: even columns below, odd ones above
        width = 4 if self.kind.bits <= 4 else 8
        numbers = []
        for shift in (word + field for field in range(0, 16, width) for word in (0, 16)):
            moved = self.let(f"lshr <16 x i32> {pairs}, splat (i32 {shift})") if shift else pairs
            code = self.let(f"and <16 x i32> {moved}, splat (i32 {2**width - 1})")
            numbers.append(self.let(f"sitofp <16 x i32> {code} to <16 x float>"))
        return numbers

    def _lanes(self, numbers: list[str]) -> list[str]:
        """<16 x i32> each: a column of float32, or two of bfloat16, the first in the low half."""
        if self.result == "float":
            return [self.let(f"bitcast <16 x float> {number} to <16 x i32>") for number in numbers]
        both = []
        for even, odd in zip(numbers[::2], numbers[1::2], strict=True):
            joined = self._picked(even, odd, "float", list(range(32)))
            rounded = self.let(f"fptrunc <32 x float> {joined} to <32 x bfloat>")
            halves = [lane + half for lane in range(16) for half in (0, 16)]
            pairs = self._picked(rounded, "poison", "bfloat", halves, 32)
            both.append(self.let(f"bitcast <32 x bfloat> {pairs} to <16 x i32>"))
        return both

    def _rows(self, vectors: list[str], target: str, row_bytes: str) -> None:
        """Stores the vectors as columns of 16 rows."""
        kind = f"<{len(vectors)} x i32>"
        for row, value in enumerate(self._transposed(vectors)):
            self.lines.append(f"  store {kind} {value}, ptr {self.address(target, row_bytes, row)}, align 4")

    def _transposed(self, vectors: list[str]) -> list[str]:
        """n times <16 x i32> to 16 times <n x i32>, by the shuffles that processors have: within 128 bits first."""
        if len(vectors) == 2:
            first, second = vectors
            return [self._picked(first, second, "i32", [row, 16 + row]) for row in range(16)]
        # quads[q][j], 128 bits of lane l: of row 4 l + j, the columns 4 q to 4 q + 3.
        quads = [self._quad(vectors[start : start + 4]) for start in range(0, len(vectors), 4)]
        return [self._row(quads, *divmod(row, 4)) for row in range(16)]

    def _quad(self, vectors: list[str]) -> list[str]:
        a, b, c, d = vectors
        low = self._within(a, b, [0, 16, 1, 17]), self._within(c, d, [0, 16, 1, 17])
        high = self._within(a, b, [2, 18, 3, 19]), self._within(c, d, [2, 18, 3, 19])
        first, second = [0, 1, 16, 17], [2, 3, 18, 19]
        return [self._within(one, other, lanes) for one, other in (low, high) for lanes in (first, second)]

    def _within(self, a: str, b: str, lanes: list[int]) -> str:
        """The same lanes of two vectors, in each 128 bits."""
        return self._picked(a, b, "i32", [start + lane for start in range(0, 16, 4) for lane in lanes])

    def _row(self, quads: list[list[str]], lane: int, j: int) -> str:
        own = [quad[j] for quad in quads]
        part = list(range(4 * lane, 4 * lane + 4))
        if len(own) == 1:
            return self._picked(own[0], "poison", "i32", part)
        both = part + [16 + place for place in part]
        halves = [self._picked(a, b, "i32", both) for a, b in zip(own[::2], own[1::2], strict=True)]
        return halves[0] if len(halves) == 1 else self._picked(halves[0], halves[1], "i32", list(range(16)), 8)

    def _picked(self, a: str, b: str, kind: str, lanes: list[int], size: int = 16) -> str:
        """These lanes of two vectors of ``size`` lanes, one after the other."""
        mask = ", ".join(f"i32 {lane}" for lane in lanes)
        return self.let(f"shufflevector <{size} x {kind}> {a}, <{size} x {kind}> {b}, <{len(lanes)} x i32> < {mask} >")
