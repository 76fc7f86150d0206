"""The just-in-time kernel for CPUs that multiply matrices (AMX), as LLVM's intermediate representation.

As in :mod:`quantkit.kernels.jit_ir` codes become bfloat16 numbers by look-ups, and zero points come in by algebra. The
16 rows and two columns that one look-up gives are a row of a tile of the weight: 16 of them, 32 columns, are written to
the stack and multiplied by 16 rows of x in one instruction (TDPBF16PS), so up to 64 rows of x share the decoding. Tiles
cannot be scaled: at a group's end sums go through memory, are scaled there and added to totals.

A code of 8 bits is two nibbles, each with a tile of its own.
"""

from __future__ import annotations

from quantkit.kernels.jit_text import NAME, PREFETCH, SIZES, Kind, Lines, center
from quantkit.kernels.panels import unit_columns

TILE_ROWS = 16
TILE_COLUMNS = 32  # bfloat16 numbers in a row of 64 bytes
MOST_TILES = 4  # of x in one call
_BLOCK = 4  # tiles of the weight that are decoded before they are multiplied, at most: writing takes time to settle
_AHEAD = 4096  # bytes
_WEIGHT, _X = 6, 7  # tile registers; sums have those from 0 on

_HEADER = """\
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.sttilecfg(ptr)
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8, i8, i8)
declare <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16>, <32 x i16>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
"""


def takes(group: int) -> bool:
    """Whether groups of so many columns are whole tiles."""
    return group % TILE_COLUMNS == 0


def amx_ir(kind: Kind, tiles: int) -> str:
    """A module with the function ``kernel(words, scales, zeros, x, sums, tables, y, first, last, groups, rows)``.

    Pointers: words, scales and zeros (uint8; unused where symmetric) of all panels; x bfloat16 [in / 32, tiles, 16,
    32]; sums float32 [16 * tiles, groups] of x (unused where symmetric); tables 2 x 32 bfloat16; y bfloat16
    [16 * tiles, rows]. Panels ``first`` to ``last - 1`` are computed, at least one.

    Args:
        kind: the weight; its groups are whole tiles.
        tiles: of 16 rows of x, at most :data:`MOST_TILES`.
    """
    return PREFETCH + _HEADER + "\n".join(_Writer(kind, tiles).text())


class _Writer(Lines):
    def __init__(self, kind: Kind, tiles: int) -> None:
        super().__init__()
        self.kind, self.tiles, self.tokens = kind, tiles, TILE_ROWS * tiles
        self.planes = 1 if kind.bits <= 4 else 2  # nibbles of a code
        chunks = kind.group // TILE_COLUMNS
        self.chunks = next(n for n in range(min(_BLOCK, chunks), 0, -1) if chunks % n == 0)  # of a block
        self.units = TILE_COLUMNS // unit_columns(kind.bits)  # of a chunk

    def text(self) -> list[str]:
        """All lines: loops over panels, groups and blocks."""
        blocks = self.kind.group // TILE_COLUMNS // self.chunks
        pointers = [f"ptr noalias %{name}" for name in ("words", "scales", "zeros", "x", "sums", "tables", "y")]
        numbers = [f"i64 %{name}" for name in ("first", "last", "groups", "rows")]
        self.lines += [f"define void @{NAME}({', '.join([*pointers, *numbers])}) {{", "entry:"]
        before = self._configured()
        tables = [self.let(f"load <32 x i16>, ptr {self.after('%tables', 64 * i)}, align 64") for i in (0, 1)]
        weight = self._memory(1024 * self.planes * self.chunks)
        found, totals = self._memory(1024), self._memory(64 * self.tokens)
        self.loop("panel", "%p", "entry", "store", start="%first")
        for token in range(self.tokens):
            self.lines.append(f"  store <16 x float> zeroinitializer, ptr {self.after(totals, 64 * token)}, align 64")
        start = self.let("mul i64 %p, %groups")
        self.loop("group", "%g", "panel", "scale")
        at = self.let(f"add i64 {start}, %g")
        words = self.address("%words", at, 64 * self.units * self.chunks * blocks)
        x = self.address("%x", "%g", 1024 * self.tiles * self.chunks * blocks)
        self.lines += [f"  call void @llvm.x86.tilezero(i8 {tile})" for tile in range(self.tiles)]
        self.loop("block", "%b", "group", "block")
        self._decoded(self.address(words, "%b", 64 * self.units * self.chunks), tables, weight)
        self._multiplied(self.address(x, "%b", 1024 * self.tiles * self.chunks), weight)
        self.again("block", "%b", str(blocks), "scale")
        self._scaled(at, found, totals)
        self.again("group", "%g", "%groups", "store")
        self._stored(totals)
        self.again("panel", "%p", "%last", "done")
        self.lines += [f"  call void @llvm.x86.ldtilecfg(ptr {before})", "  ret void", "}"]
        return self.lines

    def _memory(self, size: int) -> str:
        return self.let(f"alloca [{size} x i8], align 64")

    def _configured(self) -> str:
        """All tiles are 16 rows of 64 bytes; where the configuration before lies, which is put back at the end."""
        before, own = self._memory(64), self._memory(64)
        self.lines.append(f"  call void @llvm.x86.sttilecfg(ptr {before})")
        shape = [1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8]
        values = ", ".join(f"i8 {value}" for value in shape)
        self.lines.append(f"  store <64 x i8> < {values} >, ptr {own}, align 64")
        self.lines.append(f"  call void @llvm.x86.ldtilecfg(ptr {own})")
        return before

    def _decoded(self, words: str, tables: list[str], weight: str) -> None:
        """A block's codes as tiles in memory: for each chunk and nibble of a code, 16 pairs of columns."""
        for chunk in range(self.chunks):
            for unit in range(self.units):
                here = self.after(words, 64 * (chunk * self.units + unit))
                self.prefetch(here, _AHEAD)
                word = self.let(f"load <32 x i16>, ptr {here}, align 64")
                for nibble in range(4):
                    pair, plane = divmod(nibble, self.planes)
                    index = self.let(f"lshr <32 x i16> {word}, splat (i16 {4 * nibble})") if nibble else word
                    table = f"<32 x i16> {tables[plane]}, <32 x i16> {index}"
                    value = self.let(f"call <32 x i16> @llvm.x86.avx512.permvar.hi.512({table})")
                    row = unit * unit_columns(self.kind.bits) // 2 + pair
                    place = self.after(weight, 1024 * (chunk * self.planes + plane) + 64 * row)
                    self.lines.append(f"  store <32 x i16> {value}, ptr {place}, align 64")

    def _multiplied(self, x: str, weight: str) -> None:
        for chunk in range(self.chunks):
            for plane in range(self.planes):
                self._load(_WEIGHT, self.after(weight, 1024 * (chunk * self.planes + plane)))
                for tile in range(self.tiles):
                    self._load(_X, self.after(x, 1024 * (chunk * self.tiles + tile)))
                    self.lines.append(f"  call void @llvm.x86.tdpbf16ps(i8 {tile}, i8 {_X}, i8 {_WEIGHT})")

    def _load(self, tile: int, place: str) -> None:
        self.lines.append(f"  call void @llvm.x86.tileloadd64(i8 {tile}, ptr {place}, i64 64)")

    def _scaled(self, at: str, found: str, totals: str) -> None:
        """The end of a group: its sums, less what zero points owe, times its scales, are added to the totals."""
        size = 16 * SIZES[self.kind.scale]
        scale = self.widened(self.address("%scales", at, size), self.kind.scale, 16, size)
        owed = None if self.kind.symmetric else self._owed(at, scale)
        for tile in range(self.tiles):
            self.lines.append(f"  call void @llvm.x86.tilestored64(i8 {tile}, ptr {found}, i64 64)")
            for row in range(TILE_ROWS):
                token = TILE_ROWS * tile + row
                place = self.after(totals, 64 * token)
                total = self.let(f"load <16 x float>, ptr {place}, align 64")
                summed = self.let(f"load <16 x float>, ptr {self.after(found, 64 * row)}, align 64")
                total = self.fma(summed, scale, total)
                if owed is not None:
                    index = self.let(f"add i64 {self.let(f'mul i64 %groups, {token}')}, %g")
                    of_x = self.let(f"load float, ptr {self.address('%sums', index, 4)}, align 4")
                    total = self.fma(owed, self.splat(of_x, "float", 16), total)
                self.lines.append(f"  store <16 x float> {total}, ptr {place}, align 64")

    def _owed(self, at: str, scale: str) -> str:
        """(c - z) times scale, by which the sum of x is multiplied; c is what the tables subtracted."""
        middle = f"splat (float {float(center(self.kind.bits))})"
        shift = self.let(f"fsub <16 x float> {middle}, {self.zero_points(at)}")
        return self.let(f"fmul <16 x float> {shift}, {scale}")

    def _stored(self, totals: str) -> None:
        """A panel's rows of the result."""
        panel = self.let("mul i64 %p, 16")
        for token in range(self.tokens):
            total = self.let(f"load <16 x float>, ptr {self.after(totals, 64 * token)}, align 64")
            rounded = self.let(f"fptrunc <16 x float> {total} to <16 x bfloat>")
            row = self.let(f"add i64 {self.let(f'mul i64 %rows, {token}')}, {panel}")
            self.lines.append(f"  store <16 x bfloat> {rounded}, ptr {self.address('%y', row, 2)}, align 2")
