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

NAMESPACE = "quantkit"
_REGISTER = ("aoti_torch_library_init_impl", "aoti_torch_library_impl")


def torch_has(symbols: Sequence[str]) -> bool:
    """Whether torch's library has these C functions, and those that register operators: from 2.10 on."""
    library = _torch_library()
    return library is not None and all(hasattr(library, name) for name in (*symbols, *_REGISTER))


def define(
    schema: str, source: str, names: Sequence[str], symbols: Sequence[str], fake: Callable[..., Tensor]
) -> list[int]:
    """Compiles an operator for the CPU and gives it to torch, for as long as the process lives.

    Args:
        schema: of torch's, without the namespace.
        source: of a module in LLVM's intermediate representation.
        names: of functions in it, the operator's first.
        symbols: the C functions of torch's library that it calls; torch must have them (:func:`torch_has`).
        fake: gives an empty tensor of the result's shape and dtype.

    Returns:
        The addresses of the functions.
    """
    library = _torch_library()
    assert library is not None
    known = {name: cast(int, ctypes.cast(getattr(library, name), ctypes.c_void_p).value) for name in symbols}
    places = addresses(source, target_here(), names, known)
    name = schema.split("(")[0]
    _fragment().define(schema)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    handle = ctypes.c_void_p()
    pointer = ctypes.c_void_p
    init, put = (getattr(library, function) for function in _REGISTER)
    init.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint32, ctypes.POINTER(pointer)]
    put.argtypes = [pointer, ctypes.c_char_p, pointer]
    failed = init(NAMESPACE.encode(), b"CPU", __file__.encode(), 0, ctypes.byref(handle))
    failed = failed or put(handle, name.encode(), places[0])
    assert not failed
    return places


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
