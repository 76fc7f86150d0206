"""From LLVM's intermediate representation to functions, by llvmlite, which is imported at the first use."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

from quantkit.kernels.jit_targets import Target
from quantkit.kernels.jit_text import NAME


def function(source: str, target: Target, pointers: int, numbers: int) -> Callable[..., None]:
    """A module's kernel as a function that ctypes calls, without Python's lock. Takes about 20 ms.

    Args:
        source: of the module.
        target: one that this CPU has.
        pointers: how many of its arguments are addresses, which come first.
        numbers: how many are 64-bit integers.
    """
    engine = _engine(source, target)
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * numbers)
    compiled = signature(engine.get_function_address(NAME))

    def kernel(*arguments: int, engine: object = engine) -> None:  # noqa: ARG001 - the code lives as long as its engine
        compiled(*arguments)

    return kernel


def addresses(
    source: str, target: Target, names: Sequence[str], symbols: Mapping[str, int] = MappingProxyType({})
) -> list[int]:
    """Where a module's functions are, from now on as long as the process lives.

    Args:
        source: of the module.
        target: one that this CPU has.
        names: of its functions.
        symbols: addresses of what it calls of other libraries.
    """
    engine = _engine(source, target, tuple(symbols.items()))
    return [engine.get_function_address(name) for name in names]


@cache
def _engine(source: str, target: Target, symbols: tuple[tuple[str, int], ...] = ()) -> Any:
    """The module's machine code."""
    import llvmlite.binding as llvm

    for name, address in symbols:
        llvm.add_symbol(name, address)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = ",".join(filter(None, [llvm.get_host_cpu_features().flatten(), target.without]))
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3
    )
    engine = llvm.create_mcjit_compiler(_module(source), machine)
    engine.finalize_object()
    return engine


def assembly(source: str, target: Target) -> str:
    """What a module becomes on a target's example CPU, which need not be this one."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = llvm.Target.from_triple(f"{target.architecture}-unknown-linux-gnu")
    machine = triple.create_target_machine(cpu=target.example, opt=3)
    return str(machine.emit_assembly(_module(source)))


def _module(source: str) -> Any:
    import llvmlite.binding as llvm

    module = llvm.parse_assembly(source)
    module.verify()
    return module
