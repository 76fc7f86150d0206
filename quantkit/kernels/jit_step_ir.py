"""A torch operator in LLVM's intermediate representation: a just-in-time kernel's product with one row of x.

torch's dispatcher calls it as compiled code, without Python. It takes and gives tensors by the C functions of torch's
stable interface for extensions (torch/csrc/stable/c/shim.h): its arguments are 64-bit words on a stack, a tensor's an
owned handle, and the result takes the place of the first. torch's own threads share the panels.
"""

from __future__ import annotations

from quantkit.kernels.jit_text import Lines
from quantkit.kernels.jit_tile_ir import NUMBERS, POINTERS

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

SYMBOLS = (
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dtype",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
    "torch_parallel_for",
)
"""What the module calls of torch's library."""

_HEADER = """\
declare i32 @aoti_torch_get_data_ptr(ptr, ptr)
declare i32 @aoti_torch_get_dtype(ptr, ptr)
declare i32 @aoti_torch_empty_strided(i64, ptr, ptr, i32, i32, i32, ptr)
declare i32 @aoti_torch_delete_tensor_object(ptr)
declare i32 @torch_parallel_for(i64, i64, i64, ptr, ptr)
"""
_INPUTS = ("x", "sums", "call")  # tensors, in the operator's order
_CPU, _NO_INDEX = 0, -1  # a device, for torch


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
    return _HEADER + "\n".join([*parts, *_operator()])


class _Writer(Lines):
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
    writer.lines.append(f"define void @{OPERATOR}(ptr %stack, i64 %inputs, i64 %outputs) {{")
    context, sizes, strides = (writer.let(f"alloca [{n} x i64]") for n in (4, 2, 2))
    made, dtype = writer.let("alloca ptr"), writer.let("alloca i32")
    places = {"call": context, **{key: writer.after(context, 8 * i) for i, key in _context()}}
    handles = {key: writer.let(f"load ptr, ptr {writer.after('%stack', 8 * i)}") for i, key in enumerate(_INPUTS)}
    for key, handle in handles.items():
        writer.let(f"call i32 @aoti_torch_get_data_ptr(ptr {handle}, ptr {places[key]})")
    writer.let(f"call i32 @aoti_torch_get_dtype(ptr {handles['x']}, ptr {dtype})")
    writer.lines.append(f"  %call = load ptr, ptr {context}")
    rows = writer.field("rows", "i64")
    for place, first, second in ((sizes, "1", rows), (strides, rows, "1")):
        writer.lines.append(f"  store i64 {first}, ptr {place}")
        writer.lines.append(f"  store i64 {second}, ptr {writer.after(place, 8)}")
    kind = writer.let(f"load i32, ptr {dtype}")
    where = f"i32 {kind}, i32 {_CPU}, i32 {_NO_INDEX}, ptr {made}"
    writer.let(f"call i32 @aoti_torch_empty_strided(i64 2, ptr {sizes}, ptr {strides}, {where})")
    output = writer.let(f"load ptr, ptr {made}")
    writer.let(f"call i32 @aoti_torch_get_data_ptr(ptr {output}, ptr {places['y']})")
    panels, grain, part = writer.field("panels", "i64"), writer.field("grain", "i64"), writer.field("part", "ptr")
    writer.let(f"call i32 @torch_parallel_for(i64 0, i64 {panels}, i64 {grain}, ptr {part}, ptr {context})")
    for handle in handles.values():
        writer.let(f"call i32 @aoti_torch_delete_tensor_object(ptr {handle})")
    writer.lines += [f"  store ptr {output}, ptr %stack", "  ret void", "}"]
    return writer.lines
