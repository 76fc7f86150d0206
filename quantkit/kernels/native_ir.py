"""What the writers of torch operators share: tensors come from torch's dispatcher, one is made, and given back.

By the C functions of torch's stable interface for extensions (torch/csrc/stable/c/shim.h): an operator's arguments are
64-bit words on a stack, a tensor's an owned handle, and the result takes the place of the first. Compiled code that
has no handles to give away calls the inner function, which leaves its arguments to the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantkit.kernels.jit_text import Lines

SYMBOLS = (
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dtype",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
    "torch_parallel_for",
)
"""What a module with :data:`HEADER` calls of torch's library."""

HEADER = """\
declare i32 @aoti_torch_get_data_ptr(ptr, ptr)
declare i32 @aoti_torch_get_dtype(ptr, ptr)
declare i32 @aoti_torch_empty_strided(i64, ptr, ptr, i32, i32, i32, ptr)
declare i32 @aoti_torch_delete_tensor_object(ptr)
declare i32 @torch_parallel_for(i64, i64, i64, ptr, ptr)
"""

_CPU, _NO_INDEX = 0, -1  # a device, for torch


def inner(name: str) -> str:
    """The function ``(ptr %stack)`` of an operator that lets go of nothing."""
    return f"{name}_inner"


class OperatorLines(Lines):
    """Lines of a function ``(ptr %stack, i64 %inputs, i64 %outputs)``, which torch's dispatcher calls, and its inner.

    Attributes:
        name: of the function.
    """

    def begin(self, name: str) -> None:
        """The inner function's head."""
        self.name = name
        self.lines.append(f"define void @{inner(name)}(ptr %stack) {{")

    def data(self, handle: str, place: str) -> None:
        """Writes the address of a tensor's numbers to ``place``."""
        self.let(f"call i32 @aoti_torch_get_data_ptr(ptr {handle}, ptr {place})")

    def tensors(self, places: Mapping[str, str]) -> dict[str, str]:
        """Handles of the first inputs, which are tensors, by their names; their addresses go to ``places``."""
        handles = {key: self.let(f"load ptr, ptr {self.after('%stack', 8 * i)}") for i, key in enumerate(places)}
        for key, handle in handles.items():
            self.data(handle, places[key])
        return handles

    def extents(self, places: tuple[str, str], sizes: Sequence[str], strides: Sequence[str]) -> None:
        """Writes sizes and strides of a tensor to be made, int64 each, to two places."""
        for i, extents in enumerate(zip(sizes, strides, strict=True)):
            for place, extent in zip(places, extents, strict=True):
                self.lines.append(f"  store i64 {extent}, ptr {self.after(place, 8 * i)}")

    def empty(self, kind: str, dimensions: int, places: tuple[str, str], made: str) -> str:
        """The handle of a new tensor.

        Args:
            kind: torch's number of its dtype.
            dimensions: how many sizes and strides there are.
            places: of these, see :meth:`extents`.
            made: memory of a pointer.
        """
        where = f"i32 {kind}, i32 {_CPU}, i32 {_NO_INDEX}, ptr {made}"
        self.let(f"call i32 @aoti_torch_empty_strided(i64 {dimensions}, ptr {places[0]}, ptr {places[1]}, {where})")
        return self.let(f"load ptr, ptr {made}")

    def end(self, tensors: int, output: str) -> None:
        """Gives the output back and returns; then the outer function, which lets go of the first inputs."""
        self.lines += [f"  store ptr {output}, ptr %stack", "  ret void", "}"]
        self.lines.append(f"define void @{self.name}(ptr %stack, i64 %inputs, i64 %outputs) {{")
        handles = [self.let(f"load ptr, ptr {self.after('%stack', 8 * i)}") for i in range(tensors)]
        self.lines.append(f"  call void @{inner(self.name)}(ptr %stack)")
        for handle in handles:
            self.let(f"call i32 @aoti_torch_delete_tensor_object(ptr {handle})")
        self.lines += ["  ret void", "}"]
