"""What the writers of just-in-time kernels share: the weight's kind, and lines of LLVM's intermediate language."""

from __future__ import annotations

from dataclasses import dataclass

NAME = "kernel"
"""Of the function in every module."""

PREFETCH = "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)\n"
"""What a module declares for :meth:`Lines.prefetch`."""

_ALL_LEVELS = 3  # LLVM's number of a prefetch into all caches

SIZES = {"bfloat": 2, "half": 2, "float": 4}
"""Bytes of a number, by LLVM's names."""


@dataclass(frozen=True, slots=True)
class Kind:
    """The weights that a compiled kernel reads.

    Attributes:
        bits: of a code; up to 4 are stored as nibbles, up to 8 as bytes.
        group: columns that share a scale, a multiple of the unit's; the number of groups is an argument.
        symmetric: whether there are no zero points.
        scale: LLVM's name of the scales' type: bfloat, half or float.
    """

    bits: int
    group: int
    symmetric: bool
    scale: str


class Lines:
    """Builds the text line by line; each value has a name of its own."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0

    def let(self, expression: str) -> str:
        """A new value."""
        self.count += 1
        name = f"%v{self.count}"
        self.lines.append(f"  {name} = {expression}")
        return name

    def address(self, base: str, index: str, size: int) -> str:
        """``base + index * size`` bytes."""
        return self.let(f"getelementptr i8, ptr {base}, i64 {self.let(f'mul i64 {index}, {size}')}")

    def after(self, base: str, size: int) -> str:
        """``base + size`` bytes."""
        return self.let(f"getelementptr i8, ptr {base}, i64 {size}")

    def prefetch(self, place: str, ahead: int) -> None:
        """Asks for the line of memory that lies so many bytes behind ``place``.

        Into all caches. As data that is read once (PREFETCHNTA) it comes late: on an Emerald Rapids the kernel of
        :mod:`quantkit.kernels.jit_bytes_ir` read 4-bit codes at 4.9 GB/s so and at 8.7 by this, a plain read being 9.0.
        """
        self.lines.append(
            f"  call void @llvm.prefetch.p0(ptr {self.after(place, ahead)}, i32 0, i32 {_ALL_LEVELS}, i32 1)"
        )

    def splat(self, value: str, kind: str, lanes: int) -> str:
        """A scalar in all lanes."""
        first = self.let(f"insertelement <{lanes} x {kind}> poison, {kind} {value}, i32 0")
        return self.let(
            f"shufflevector <{lanes} x {kind}> {first}, <{lanes} x {kind}> poison, <{lanes} x i32> zeroinitializer"
        )

    def everywhere(self, base: str, offset: int) -> str:
        """A float32 from memory in all of 16 lanes."""
        return self.splat(self.let(f"load float, ptr {self.after(base, offset)}, align 4"), "float", 16)

    def zero_points(self, at: str) -> str:
        """float32: those of a panel's 16 rows, for the group of this number."""
        stored = self.let(f"load <16 x i8>, ptr {self.address('%zeros', at, 16)}, align 16")
        return self.let(f"uitofp <16 x i8> {stored} to <16 x float>")

    def sums(self, names: list[str], before: str, last: str, lanes: int = 16) -> None:
        """Sums that are 0 when block ``before`` enters this loop, and ``NAME.next`` after its block ``last``."""
        self.lines += [
            f"  {name} = phi <{lanes} x float> [ zeroinitializer, %{before} ], [ {name}.next, %{last} ]"
            for name in names
        ]

    def fma(self, a: str, b: str, c: str, lanes: int = 16, name: str | None = None) -> str:
        """``a * b + c``, rounded once; a name that is given already is written as it is."""
        kind = f"<{lanes} x float>"
        text = f"call {kind} @llvm.fma.v{lanes}f32({kind} {a}, {kind} {b}, {kind} {c})"
        if name is None:
            return self.let(text)
        self.lines.append(f"  {name} = {text}")
        return name

    def loop(self, label: str, index: str, before: str, last: str, start: str = "0") -> None:
        """Opens a loop over ``index``, which its block ``last`` ends by :meth:`again`."""
        self.lines += [
            f"  br label %{label}",
            f"{label}:",
            f"  {index} = phi i64 [ {start}, %{before} ], [ {index}.next, %{last} ]",
        ]

    def again(self, label: str, index: str, limit: str, to: str, step: int = 1) -> None:
        """Ends a loop, and opens the block ``to`` behind it."""
        self.lines.append(f"  {index}.next = add i64 {index}, {step}")
        more = self.let(f"icmp ult i64 {index}.next, {limit}")
        self.lines += [f"  br i1 {more}, label %{label}, label %{to}", f"{to}:"]

    def widened(self, place: str, kind: str, lanes: int, align: int) -> str:
        """float32 from numbers in memory, bfloat16 without asking the processor for it."""
        if kind != "bfloat":
            value = self.let(f"load <{lanes} x {kind}>, ptr {place}, align {align}")
            return value if kind == "float" else self.let(f"fpext <{lanes} x {kind}> {value} to <{lanes} x float>")
        stored = self.let(f"load <{lanes} x i16>, ptr {place}, align {align}")
        wide = self.let(f"zext <{lanes} x i16> {stored} to <{lanes} x i32>")
        high = self.let(f"shl <{lanes} x i32> {wide}, splat (i32 16)")
        return self.let(f"bitcast <{lanes} x i32> {high} to <{lanes} x float>")

    def stored(self, value: str, kind: str, place: str) -> None:
        """16 float32 numbers to memory, rounded to nearest, ties to even; NaN stays NaN."""
        if kind == "half":
            value = self.let(f"fptrunc <16 x float> {value} to <16 x half>")
        elif kind == "bfloat":
            value, kind = self._bfloat(value), "i16"
        self.lines.append(f"  store <16 x {kind}> {value}, ptr {place}, align {2 if kind != 'float' else 4}")

    def _bfloat(self, value: str) -> str:
        bits = self.let(f"bitcast <16 x float> {value} to <16 x i32>")
        odd = self.let(f"and <16 x i32> {self.let(f'lshr <16 x i32> {bits}, splat (i32 16)')}, splat (i32 1)")
        up = self.let(f"add <16 x i32> {self.let(f'add <16 x i32> {bits}, splat (i32 32767)')}, {odd}")
        quiet = self.let(f"or <16 x i32> {bits}, splat (i32 4194304)")
        is_nan = self.let(f"fcmp uno <16 x float> {value}, zeroinitializer")
        chosen = self.let(f"select <16 x i1> {is_nan}, <16 x i32> {quiet}, <16 x i32> {up}")
        high = self.let(f"lshr <16 x i32> {chosen}, splat (i32 16)")
        return self.let(f"trunc <16 x i32> {high} to <16 x i16>")


def center(bits: int) -> int:
    """A symmetric scheme's zero point."""
    return 1 << (bits - 1)


def constant(values: tuple[float, ...]) -> str:
    """float32 numbers as a vector."""
    return f"< {', '.join(f'float {value}' for value in values)} >"
