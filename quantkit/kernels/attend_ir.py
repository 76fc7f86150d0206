"""Attention of one row of queries in LLVM's intermediate representation: an operator of torch's, without Python.

Each head goes once through the positions that its mask leaves, 16 at a time, with a running maximum and sum of the
exponentials (arXiv:1805.02867, algorithm 3): positions that no token fills yet cost a look at the mask, heads that
share keys read them where they lie, and nothing is as large as the cache. Numbers are float32; the result is rounded
once.
"""

from __future__ import annotations

import struct

from quantkit.kernels import native_ir
from quantkit.kernels.jit_text import SIZES

LANES = 16
"""Positions that are looked at together, and what sizes are multiples of."""

OPERATOR = "attend"
SYMBOLS = (*native_ir.SYMBOLS, "aoti_torch_get_sizes")
"""What the module calls of torch's library."""

_HEADER = f"""\
{native_ir.HEADER}declare i32 @aoti_torch_get_sizes(ptr, ptr)
declare <{LANES} x float> @llvm.fma.v{LANES}f32(<{LANES} x float>, <{LANES} x float>, <{LANES} x float>)
declare <{LANES} x float> @llvm.rint.v{LANES}f32(<{LANES} x float>)
declare <{LANES} x float> @llvm.maxnum.v{LANES}f32(<{LANES} x float>, <{LANES} x float>)
declare float @llvm.maxnum.f32(float, float)
declare float @llvm.vector.reduce.fadd.v{LANES}f32(float, <{LANES} x float>)
declare float @llvm.vector.reduce.fmax.v{LANES}f32(<{LANES} x float>)
"""
_TYPES = {"half": 5, "float": 6, "bfloat": 15}  # torch's numbers for them
_INPUTS = ("q", "keys", "values", "mask")  # tensors, in the operator's order; the scale follows
_CONTEXT = (*_INPUTS, "y", "scale", "groups", "length", "size", "value_size")
_VECTOR = f"<{LANES} x float>"
_THREAD_PRODUCTS = 1 << 18  # with fewer a thread is not worth starting
_LOWEST = -1e30  # below every score; finite, so that differences are numbers
# exp2 on [-1/2, 1/2]: the Taylor series of exp(x ln 2), wrong by 2e-8 at most.
_EXP2 = (1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158, 0.009618129107628477, 0.0013333558146428443)
_EXP2_LAST = 0.00015403530393381608


def attend_ir() -> str:
    """A module with the function :data:`OPERATOR`, for torch.

    Its arguments: q [1, heads, 1, size], keys [1, kv_heads, length, size], values [1, kv_heads, length, value_size],
    all contiguous, of one dtype; mask, bool [length]; scale, of the scores. It gives [1, 1, heads, value_size].
    """
    parts = [line for kind in _TYPES for line in _part(kind)]
    return _HEADER + "\n".join([*_exponential(), *parts, *_operator()])


def number(value: float) -> str:
    """A float32 constant in LLVM's spelling: the bits of the same number in float64."""
    single = struct.unpack("f", struct.pack("f", value))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', single))[0]:016X}"


class _Writer(native_ir.OperatorLines):
    def splat_of(self, value: float) -> str:
        return f"splat (float {number(value)})"

    def binary(self, name: str, a: str, b: str) -> str:
        return self.let(f"{name} {_VECTOR} {a}, {b}")

    def call(self, name: str, *given: str) -> str:
        """An intrinsic of vectors."""
        return self.let(f"call {_VECTOR} @llvm.{name}.v{LANES}f32({', '.join(f'{_VECTOR} {each}' for each in given)})")

    def context(self, name: str, kind: str) -> str:
        return self.let(f"load {kind}, ptr {self.after('%context', 8 * _CONTEXT.index(name))}")

    def row(self, base: str, row: str, size: str, kind: str) -> str:
        """``base + row * size`` numbers."""
        return self.address(base, self.let(f"mul i64 {row}, {size}"), SIZES[kind])

    def chunk(self, base: str, index: str, kind: str) -> str:
        """The numbers from ``index`` on, as float32."""
        return self.widened(self.address(base, index, SIZES[kind]), kind, LANES, SIZES[kind])

    def halved(self, values: list[str], to: int) -> list[str]:
        """Neighbours in each vector summed, and two vectors put into one, until ``to`` are left.

        Of LANES vectors one is left, of their totals in order.
        """
        while len(values) > to:
            values = [self._pairs(*values[i : i + 2]) for i in range(0, len(values), 2)]
        return values

    def _pairs(self, one: str, other: str) -> str:
        parts = []
        for start in (0, 1):
            order = ", ".join(f"i32 {i}" for i in range(start, 2 * LANES, 2))
            parts.append(self.let(f"shufflevector {_VECTOR} {one}, {_VECTOR} {other}, <{LANES} x i32> < {order} >"))
        return self.binary("fadd", *parts)

    def total(self, value: str) -> str:
        return self.let(f"call reassoc float @llvm.vector.reduce.fadd.v{LANES}f32(float -0.0, {_VECTOR} {value})")


def _exponential() -> list[str]:
    """exp of numbers at most 0, as 2^n times a polynomial; what float32 cannot hold is 0."""
    writer = _Writer()
    writer.lines.append(f"define internal {_VECTOR} @exponential({_VECTOR} %x) alwaysinline {{")
    scaled = writer.binary("fmul", "%x", writer.splat_of(1.4426950408889634))
    power = writer.call("maxnum", scaled, writer.splat_of(-127.0))
    whole = writer.call("rint", power)
    rest = writer.binary("fsub", power, whole)
    value = writer.splat_of(_EXP2_LAST)
    for coefficient in reversed(_EXP2):
        value = writer.call("fma", value, rest, writer.splat_of(coefficient))
    exponent = writer.let(f"fptosi {_VECTOR} {whole} to <{LANES} x i32>")
    biased = writer.let(f"add <{LANES} x i32> {exponent}, splat (i32 127)")
    shifted = writer.let(f"shl <{LANES} x i32> {biased}, splat (i32 23)")
    factor = writer.let(f"bitcast <{LANES} x i32> {shifted} to {_VECTOR}")
    writer.lines += [f"  ret {_VECTOR} {writer.binary('fmul', value, factor)}", "}"]
    return writer.lines


def _part(kind: str) -> list[str]:
    """The heads from ``first`` to ``last``, for numbers of one type in memory."""
    writer = _Writer()
    writer.lines += [f"define void @heads_{kind}(i64 %first, i64 %last, ptr %context) {{", "entry:"]
    given = {name: writer.context(name, "ptr") for name in (*_INPUTS, "y")}
    sizes = {name: writer.context(name, "i64") for name in ("groups", "length", "size", "value_size")}
    scale = writer.splat(writer.context("scale", "float"), "float", LANES)
    query = writer.let(f"alloca float, i64 {sizes['size']}, align 64")
    sums = writer.let(f"alloca float, i64 {sizes['value_size']}, align 64")
    writer.loop("head", "%h", "entry", "head.last", start="%first")
    shared = writer.let(f"udiv i64 %h, {sizes['groups']}")
    own = writer.row(given["q"], "%h", sizes["size"], kind)
    first_row = writer.let(f"mul i64 {shared}, {sizes['length']}")
    keys = writer.row(given["keys"], first_row, sizes["size"], kind)
    values = writer.row(given["values"], first_row, sizes["value_size"], kind)
    _start(writer, (own, scale, query, sums), sizes, kind)
    _block(writer, (keys, values, given["mask"], query, sums), sizes, kind)
    _end(writer, writer.row(given["y"], "%h", sizes["value_size"], kind), sums, sizes["value_size"], kind)
    writer.lines += ["  br label %head.last", "head.last:"]
    writer.again("head", "%h", "%last", "done")
    writer.lines += ["  ret void", "}"]
    return writer.lines


def _start(writer: _Writer, places: tuple[str, str, str, str], sizes: dict[str, str], kind: str) -> None:
    """Queries times the scale, in float32; sums are 0."""
    own, scale, query, sums = places
    writer.loop("widen", "%w", "head", "widen")
    scaled = writer.binary("fmul", writer.chunk(own, "%w", kind), scale)
    writer.lines.append(f"  store {_VECTOR} {scaled}, ptr {writer.address(query, '%w', 4)}, align 64")
    writer.again("widen", "%w", sizes["size"], "clear.before", LANES)
    writer.loop("clear", "%c", "clear.before", "clear")
    writer.lines.append(f"  store {_VECTOR} zeroinitializer, ptr {writer.address(sums, '%c', 4)}, align 64")
    writer.again("clear", "%c", sizes["value_size"], "block.before", LANES)


def _block(writer: _Writer, places: tuple[str, str, str, str, str], sizes: dict[str, str], kind: str) -> None:
    """The loop over positions; ``%best`` is the greatest score so far, ``%total`` the sum of exponentials."""
    keys, values, mask, query, sums = places
    writer.loop("block", "%p", "block.before", "block.last")
    for name, start in (("best", number(_LOWEST)), ("total", "0.0")):
        writer.lines.append(f"  %{name} = phi float [ {start}, %block.before ], [ %{name}.next, %block.last ]")
    place = writer.address(mask, "%p", 1)
    allowed = writer.let(f"load <{LANES} x i8>, ptr {place}, align 1")
    seen = writer.let(f"icmp ne <{LANES} x i8> {allowed}, zeroinitializer")
    bits = writer.let(f"bitcast <{LANES} x i1> {seen} to i{LANES}")
    writer.lines += [
        f"  br i1 {writer.let(f'icmp eq i{LANES} {bits}, 0')}, label %block.last, label %scores.before",
        "scores.before:",
    ]
    scores = _scores(writer, writer.row(keys, "%p", sizes["size"], kind), query, sizes["size"], kind)
    left = writer.let(f"select <{LANES} x i1> {seen}, {_VECTOR} {scores}, {_VECTOR} {writer.splat_of(_LOWEST)}")
    highest = writer.let(f"call float @llvm.vector.reduce.fmax.v{LANES}f32({_VECTOR} {left})")
    best = writer.let(f"call float @llvm.maxnum.f32(float %best, float {highest})")
    spread = writer.splat(best, "float", LANES)
    weights = writer.let(f"call {_VECTOR} @exponential({_VECTOR} {writer.binary('fsub', left, spread)})")
    weights = writer.let(f"select <{LANES} x i1> {seen}, {_VECTOR} {weights}, {_VECTOR} zeroinitializer")
    before = writer.binary("fsub", writer.splat("%best", "float", LANES), spread)
    faded = writer.let(f"call {_VECTOR} @exponential({_VECTOR} {before})")
    fade = writer.let(f"extractelement {_VECTOR} {faded}, i32 0")
    total = writer.let(f"fadd float {writer.let(f'fmul float %total, {fade}')}, {writer.total(weights)}")
    _add_values(writer, writer.row(values, "%p", sizes["value_size"], kind), (weights, faded, sums), sizes, kind)
    writer.lines += ["  br label %block.last", "block.last:"]
    for name, value in (("best", best), ("total", total)):
        writer.lines.append(f"  %{name}.next = phi float [ %{name}, %block ], [ {value}, %values.after ]")
    writer.again("block", "%p", sizes["length"], "end.before", LANES)


def _scores(writer: _Writer, keys: str, query: str, size: str, kind: str) -> str:
    """Products of the query with 16 keys, four at a time, so that their sums stay in registers."""
    before, dots = "scores.before", []
    for first in range(0, LANES, 4):
        label, names = f"scores{first}", [f"%dot{first + i}" for i in range(4)]
        rows = [writer.row(keys, str(first + i), size, kind) for i in range(4)]
        writer.loop(label, f"%d{first}", before, label)
        writer.sums(names, before, label)
        own = writer.let(f"load {_VECTOR}, ptr {writer.address(query, f'%d{first}', 4)}, align 64")
        for name, row in zip(names, rows, strict=True):
            writer.fma(own, writer.chunk(row, f"%d{first}", kind), name, name=f"{name}.next")
        before = f"scores{first}.after"
        writer.again(label, f"%d{first}", size, before, LANES)
        dots.append(writer.halved([f"{name}.next" for name in names], to=1))
    return writer.halved([dot for (dot,) in dots], to=1)[0]


def _add_values(writer: _Writer, values: str, places: tuple[str, str, str], sizes: dict[str, str], kind: str) -> None:
    """The sums, faded, and 16 values by their weights, in four chains."""
    weights, faded, sums = places
    parts = [writer.let(f"extractelement {_VECTOR} {weights}, i32 {i}") for i in range(LANES)]
    each = [writer.splat(part, "float", LANES) for part in parts]
    rows = [writer.row(values, str(i), sizes["value_size"], kind) for i in range(LANES)]
    writer.lines += ["  br label %values.before", "values.before:"]
    writer.loop("values", "%e", "values.before", "values")
    place = writer.address(sums, "%e", 4)
    chains = [writer.binary("fmul", writer.let(f"load {_VECTOR}, ptr {place}, align 64"), faded)]
    for i, (weight, row) in enumerate(zip(each, rows, strict=True)):
        value = writer.chunk(row, "%e", kind)
        if i < 3:
            chains.append(writer.binary("fmul", weight, value))
        else:
            chains[i % 4] = writer.fma(weight, value, chains[i % 4])
    halves = [writer.binary("fadd", chains[i], chains[i + 2]) for i in range(2)]
    writer.lines.append(f"  store {_VECTOR} {writer.binary('fadd', *halves)}, ptr {place}, align 64")
    writer.again("values", "%e", sizes["value_size"], "values.after", LANES)


def _end(writer: _Writer, y: str, sums: str, value_size: str, kind: str) -> None:
    total = writer.splat("%total.next", "float", LANES)
    writer.loop("end", "%o", "end.before", "end")
    value = writer.let(f"load {_VECTOR}, ptr {writer.address(sums, '%o', 4)}, align 64")
    writer.stored(writer.binary("fdiv", value, total), kind, writer.address(y, "%o", SIZES[kind]))
    writer.again("end", "%o", value_size, "end.after", LANES)


def _operator() -> list[str]:
    """Unwraps the inputs, makes the output, runs the heads, lets go of the inputs."""
    writer = _Writer()
    writer.begin(OPERATOR)
    context = writer.let(f"alloca [{len(_CONTEXT)} x i64]")
    shape, strides, asked = (writer.let(f"alloca [{n} x i64]") for n in (4, 4, 3))
    made, dtype = writer.let("alloca ptr"), writer.let("alloca i32")
    places = {name: writer.after(context, 8 * i) for i, name in enumerate(_CONTEXT)}
    handles = writer.tensors({key: places[key] for key in _INPUTS})
    dims = []
    for i, key in enumerate(_INPUTS[:3]):
        place = writer.after(asked, 8 * i)
        writer.let(f"call i32 @aoti_torch_get_sizes(ptr {handles[key]}, ptr {place})")
        sizes = writer.let(f"load ptr, ptr {place}")
        dims.append([writer.let(f"load i64, ptr {writer.after(sizes, 8 * d)}") for d in range(4)])
    (_, heads, _, size), (_, shared, length, _), (_, _, _, value_size) = dims
    groups = writer.let(f"udiv i64 {heads}, {shared}")
    given = {"groups": groups, "length": length, "size": size, "value_size": value_size}
    for name, value in given.items():
        writer.lines.append(f"  store i64 {value}, ptr {places[name]}")
    scale = writer.let(f"load double, ptr {writer.after('%stack', 8 * len(_INPUTS))}")
    writer.lines.append(f"  store float {writer.let(f'fptrunc double {scale} to float')}, ptr {places['scale']}")
    writer.let(f"call i32 @aoti_torch_get_dtype(ptr {handles['q']}, ptr {dtype})")
    whole = writer.let(f"mul i64 {heads}, {value_size}")
    writer.extents((shape, strides), ("1", "1", heads, value_size), (whole, whole, value_size, "1"))
    kind = writer.let(f"load i32, ptr {dtype}")
    output = writer.empty(kind, 4, (shape, strides), made)
    writer.data(output, places["y"])
    _run(writer, kind, heads, (length, size, value_size), context)
    writer.end(len(handles), output)
    return writer.lines


def _run(writer: _Writer, kind: str, heads: str, sizes: tuple[str, str, str], context: str) -> None:
    """All heads, on torch's threads where there is enough to do."""
    length, size, value_size = sizes
    products = writer.let(f"mul i64 {length}, {writer.let(f'add i64 {size}, {value_size}')}")
    grain = writer.let(f"add i64 {writer.let(f'udiv i64 {_THREAD_PRODUCTS}, {products}')}, 1")
    part = "@heads_float"
    for name in ("half", "bfloat"):
        is_it = writer.let(f"icmp eq i32 {kind}, {_TYPES[name]}")
        part = writer.let(f"select i1 {is_it}, ptr @heads_{name}, ptr {part}")
    writer.let(f"call i32 @torch_parallel_for(i64 0, i64 {heads}, i64 {grain}, ptr {part}, ptr {context})")
