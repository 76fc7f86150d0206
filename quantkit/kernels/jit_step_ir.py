"""A torch operator in LLVM's intermediate representation: a just-in-time kernel's product with one row of x.

torch's dispatcher calls it as compiled code, without Python (:mod:`quantkit.kernels.native_ir`). torch's own threads
share the panels.
"""

from __future__ import annotations

from quantkit.kernels.jit_tile_ir import NUMBERS
from quantkit.kernels.native_ir import HEADER, OperatorLines

CALL = (
    "kernel",
    "words",
    "scales",
    "zeros",
    "panels",
    "groups",
    "rows",
    "scratch",  # float32 numbers that a call of the kernel writes
    "grain",  # panels that are worth a thread
)
"""What the operator's tensor ``call`` holds, int64 each: addresses and sizes of one layer."""

OPERATOR = "operator"

_PART = "panels_part"
_INPUTS = ("x", "call")  # tensors, in the operator's order


def step_ir() -> str:
    """A module with the function :data:`OPERATOR`, for torch.

    The operator's arguments: x [1, in]; call, int64 of :data:`CALL`. It gives [1, rows], in x's dtype.
    """
    return HEADER + "\n".join([*_part(), *_operator()])


class _Writer(OperatorLines):
    def field(self, name: str, kind: str) -> str:
        """A number or an address from the layer's call."""
        return self.let(f"load {kind}, ptr {self.after('%call', 8 * CALL.index(name))}")


def _part() -> list[str]:
    """The kernel's call for some panels; ``context`` has the addresses of call, x and y."""
    writer = _Writer()
    writer.lines += [
        f"define void @{_PART}(i64 %first, i64 %last, ptr %context) {{",
        "  %call = load ptr, ptr %context",
    ]
    x, y = (writer.let(f"load ptr, ptr {writer.after('%context', 8 * i)}") for i in (1, 2))
    weight = ", ".join(f"ptr {writer.field(key, 'ptr')}" for key in ("words", "scales", "zeros"))
    own = writer.let(f"alloca float, i64 {writer.field('scratch', 'i64')}, align 64")
    values = {"tiles": "1", "first": "%first", "last": "%last"}
    values |= {key: writer.field(key, "i64") for key in ("groups", "rows")}
    numbers = ", ".join(f"i64 {values[key]}" for key in NUMBERS)
    kernel = writer.field("kernel", "ptr")
    writer.lines += [f"  call void {kernel}({weight}, ptr {x}, ptr {own}, ptr {y}, {numbers})", "  ret void", "}"]
    return writer.lines


def _operator() -> list[str]:
    """Unwraps the inputs, makes the output, runs the parts, lets go of the inputs."""
    writer = _Writer()
    writer.begin(OPERATOR)
    context, sizes, strides = (writer.let(f"alloca [{n} x i64]") for n in (3, 2, 2))
    made, dtype = writer.let("alloca ptr"), writer.let("alloca i32")
    places = {"call": context, "x": writer.after(context, 8), "y": writer.after(context, 16)}
    handles = writer.tensors({key: places[key] for key in _INPUTS})
    writer.let(f"call i32 @aoti_torch_get_dtype(ptr {handles['x']}, ptr {dtype})")
    writer.lines.append(f"  %call = load ptr, ptr {context}")
    rows = writer.field("rows", "i64")
    writer.extents((sizes, strides), ("1", rows), (rows, "1"))
    output = writer.empty(writer.let(f"load i32, ptr {dtype}"), 2, (sizes, strides), made)
    writer.data(output, places["y"])
    panels, grain = writer.field("panels", "i64"), writer.field("grain", "i64")
    writer.let(f"call i32 @torch_parallel_for(i64 0, i64 {panels}, i64 {grain}, ptr @{_PART}, ptr {context})")
    writer.end(len(handles), output)
    return writer.lines
