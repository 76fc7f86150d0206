"""Operators of torch's whose code is LLVM's: torch's dispatcher calls them without Python.

How they take and give tensors is in :mod:`quantkit.kernels.native_ir`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from quantkit.kernels.jit import target_here
from quantkit.kernels.jit_compile import addresses
from quantkit.kernels.native_ir import inner

NAMESPACE = "quantkit"
_NO_TENSOR = "CompositeExplicitAutograd"  # the dispatch key where no argument is a tensor
_REGISTER = ("aoti_torch_library_init_impl", "aoti_torch_library_impl")


def torch_has(symbols: Sequence[str]) -> bool:
    """Whether torch's library has these C functions, and those that register operators: from 2.10 on."""
    library = _torch_library()
    return library is not None and all(hasattr(library, name) for name in (*symbols, *_REGISTER))


def define(schema: str, source: str, function: str, symbols: Sequence[str], fake: Callable[..., Tensor]) -> None:
    """Compiles an operator for the CPU and gives it to torch, for as long as the process lives.

    Args:
        schema: of torch's, without the namespace; it gives one tensor.
        source: of a module in LLVM's intermediate representation.
        function: the operator's name in it, written by :class:`quantkit.kernels.native_ir.OperatorLines`.
        symbols: the C functions of torch's library that it calls; torch must have them (:func:`torch_has`).
        fake: gives an empty tensor of the result's shape and dtype.
    """
    library = _torch_library()
    assert library is not None
    known = {name: cast(int, ctypes.cast(getattr(library, name), ctypes.c_void_p).value) for name in symbols}
    outer, inside = addresses(source, target_here(), (function, inner(function)), known)
    name = schema.split("(")[0]
    _register(schema, outer, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    teller = f"define void @tell(ptr %stack, i64, i64) {{\n  store i64 {inside}, ptr %stack\n  ret void\n}}\n"
    _register(f"{name}_address() -> int", addresses(teller, target_here(), ("tell",))[0], _NO_TENSOR)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    _c_functions[str(operator)] = [_c_function(operator)]


class CFunctions(dict[str, list[str]]):
    """By operators' names: Inductor asks with the operator itself, which it could not pickle for its cache."""

    def __contains__(self, operator: object) -> bool:
        return super().__contains__(str(operator))


def c_functions() -> CFunctions:
    """For each operator that was defined, C++ that calls it without torch's dispatcher: Inductor's
    ``aot_inductor.custom_ops_to_c_shims``, where a declaration may be the function itself.

    The dispatcher looks each operator up by its name and packs what it is given twice. The text is the same in every
    process, as Inductor's cache demands: it asks for the address once.
    """
    return CFunctions(_c_functions)


_c_functions = CFunctions()
_C_TYPES = {"Tensor": "AtenTensorHandle", "int": "int64_t", "float": "double"}


def _c_function(operator: torch._ops.OpOverload) -> str:
    """The function by the name and with the arguments that Inductor gives it."""
    schema = operator._schema
    name = schema.name.split("::")[1]
    given = [(_C_TYPES[str(argument.type)], argument.name) for argument in schema.arguments]
    parameters = ", ".join(f"{kind} {argument}" for kind, argument in given)
    packed = ", ".join(f"torch::stable::detail::from({argument})" for _, argument in given)
    return f"""\
inline AOTITorchError aoti_torch_cpu_{name}({parameters}, AtenTensorHandle* result) {{
    static const auto run = [] {{
        StableIValue address;
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_call_dispatcher("{NAMESPACE}::{name}_address", "", &address));
        return reinterpret_cast<void (*)(StableIValue*)>(address);
    }}();
    StableIValue stack[] = {{{packed}}};
    run(stack);
    *result = reinterpret_cast<AtenTensorHandle>(stack[0]);
    return AOTI_TORCH_SUCCESS;
}}"""


def _register(schema: str, address: int, key: str) -> None:
    """An operator whose function for a dispatch key lies there."""
    library = _torch_library()
    assert library is not None
    _fragment().define(schema)
    handle = ctypes.c_void_p()
    pointer = ctypes.c_void_p
    init, put = (getattr(library, function) for function in _REGISTER)
    init.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint32, ctypes.POINTER(pointer)]
    put.argtypes = [pointer, ctypes.c_char_p, pointer]
    failed = init(NAMESPACE.encode(), key.encode(), __file__.encode(), 0, ctypes.byref(handle))
    failed = failed or put(handle, schema.split("(")[0].encode(), address)
    assert not failed


@cache
def _torch_library() -> ctypes.CDLL | None:
    """torch's library, which is loaded already; None where it lies elsewhere."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"))
    shared = [path for path in found if path.suffix in (".so", ".dylib", ".dll")]
    return ctypes.CDLL(str(shared[0])) if shared else None


@cache
def _fragment() -> torch.library.Library:
    """Of the namespace; the operators live as long as this object."""
    return torch.library.Library(NAMESPACE, "FRAGMENT")
