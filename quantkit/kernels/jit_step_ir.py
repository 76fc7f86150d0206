"""A torch operator in LLVM's intermediate representation: a just-in-time kernel's product with one row of x.

torch's dispatcher calls it as compiled code, without Python (:mod:`quantkit.kernels.native_ir`). torch's own threads
share the panels.
"""

from __future__ import annotations

from quantkit.kernels.jit_tile_ir import NUMBERS, POINTERS
from quantkit.kernels.native_ir import HEADER, OperatorLines

CALL = (
    "part",  # address of the function below that calls the kernel
    "kernel",
    "words",
    "scales",
    "zeros",
    "tables",
    "panels",
    "groups",
    "rows",
    "scratch",  # float32 numbers that a call of the kernel writes
    "grain",  # panels that are worth a thread
)
"""What the operator's tensor ``call`` holds, int64 each: addresses and sizes of one layer."""

OPERATOR = "operator"
PARTS = {"tiles": "by_tiles", "pairs": "by_pairs"}
"""The functions for the kernels of :mod:`quantkit.kernels.jit_tile_ir` and :mod:`quantkit.kernels.jit_ir`."""

_INPUTS = ("x", "sums", "call")  # tensors, in the operator's order


def step_ir() -> str:
    """A module with the function :data:`OPERATOR`, for torch, and those of :data:`PARTS`.

    The operator's arguments: x [1, in]; sums, float32 [groups] of x, or anything where the kernel needs none; call,
    int64 of :data:`CALL`. It gives [1, rows], in x's dtype.
    """
    tiles = ("words", "scales", "zeros", "x", "own", "y")
    pairs = ("words", "scales", "zeros", "x", "sums", "tables", "y")
    assert len(tiles) == len(POINTERS)
    assert len(NUMBERS) == 5
    parts = [*_part(PARTS["tiles"], tiles, "i64 1, "), *_part(PARTS["pairs"], pairs, "")]
    return HEADER + "\n".join([*parts, *_operator()])


class _Writer(OperatorLines):
    def field(self, name: str, kind: str) -> str:
        """A number or an address from the layer's call."""
        return self.let(f"load {kind}, ptr {self.after('%call', 8 * CALL.index(name))}")


def _part(name: str, pointers: tuple[str, ...], tiles: str) -> list[str]:
    """A kernel's call for some panels; ``context`` has the addresses of call, x, sums and y."""
    writer = _Writer()
    writer.lines += [f"define void @{name}(i64 %first, i64 %last, ptr %context) {{", "  %call = load ptr, ptr %context"]
    values = {key: writer.let(f"load ptr, ptr {writer.after('%context', 8 * i)}") for i, key in _context()}
    values |= {key: writer.field(key, "ptr") for key in ("words", "scales", "zeros", "tables")}
    if "own" in pointers:
        values["own"] = writer.let(f"alloca float, i64 {writer.field('scratch', 'i64')}, align 64")
    kernel, groups, rows = writer.field("kernel", "ptr"), writer.field("groups", "i64"), writer.field("rows", "i64")
    given = ", ".join(f"ptr {values[key]}" for key in pointers)
    writer.lines += [
        f"  call void {kernel}({given}, {tiles}i64 %first, i64 %last, i64 {groups}, i64 {rows})",
        "  ret void",
        "}",
    ]
    return writer.lines


def _context() -> list[tuple[int, str]]:
    return [(1, "x"), (2, "sums"), (3, "y")]


def _operator() -> list[str]:
    """Unwraps the inputs, makes the output, runs the parts, lets go of the inputs."""
    writer = _Writer()
    writer.begin(OPERATOR)
    context, sizes, strides = (writer.let(f"alloca [{n} x i64]") for n in (4, 2, 2))
    made, dtype = writer.let("alloca ptr"), writer.let("alloca i32")
    places = {"call": context, **{key: writer.after(context, 8 * i) for i, key in _context()}}
    handles = writer.tensors({key: places[key] for key in _INPUTS})
    writer.let(f"call i32 @aoti_torch_get_dtype(ptr {handles['x']}, ptr {dtype})")
    writer.lines.append(f"  %call = load ptr, ptr {context}")
    rows = writer.field("rows", "i64")
    writer.extents((sizes, strides), ("1", rows), (rows, "1"))
    output = writer.empty(writer.let(f"load i32, ptr {dtype}"), 2, (sizes, strides), made)
    writer.data(output, places["y"])
    panels, grain, part = writer.field("panels", "i64"), writer.field("grain", "i64"), writer.field("part", "ptr")
    writer.let(f"call i32 @torch_parallel_for(i64 0, i64 {panels}, i64 {grain}, ptr {part}, ptr {context})")
    writer.end(handles.values(), output)
    return writer.lines
