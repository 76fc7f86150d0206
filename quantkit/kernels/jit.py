"""Compiles the just-in-time kernels with llvmlite, and calls them. llvmlite is imported at the first use."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from quantkit.kernels.jit_ir import NAME, Kind, center, dense_ir, matvec_ir
from quantkit.kernels.panels import PANEL, unit_columns

MOST_TOKENS = 16  # rows of x in one call
_SCALES = {torch.bfloat16: "bfloat", torch.float16: "half", torch.float32: "float"}
_THREAD_BYTES = 1 << 17  # of codes: with less a thread is not worth starting
_ALIGNMENT = 64


def aligned(tensor: Tensor) -> Tensor:
    """A copy that starts at a multiple of 64 bytes, as the kernels' loads require."""
    size = tensor.numel() * tensor.element_size()
    raw = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
    start = -raw.data_ptr() % _ALIGNMENT
    copy = raw[start : start + size].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def _aligned(tensor: Tensor) -> Tensor:
    """As it is, or a copy where somebody (torch.compile, a copy of a module) moved it to another address."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else aligned(tensor)


def product(x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, out_features: int) -> Tensor:
    """``x @ Wᵀ`` for a weight in panels.

    Args:
        x: bfloat16 [tokens, in], contiguous.
        words: int16 [panels, units, 16, 2], aligned, see :mod:`quantkit.kernels.panels`.
        scale: bfloat16, float16 or float32 [panels, groups, 16], aligned.
        zeros: uint8 [panels, groups, 16], aligned; None: symmetric.
        bits: of a code.
        out_features: rows of the weight.

    Returns:
        bfloat16 [tokens, out].
    """
    words, scale, zeros = _aligned(words), _aligned(scale), None if zeros is None else _aligned(zeros)
    panels, groups = scale.shape[:2]
    tokens, in_features = x.shape
    y = torch.empty(tokens, panels * PANEL, dtype=torch.bfloat16)
    sums = x if zeros is None else x.view(tokens, groups, in_features // groups).sum(-1, dtype=torch.float32)
    weight = (words.data_ptr(), scale.data_ptr(), 0 if zeros is None else zeros.data_ptr())
    for start in range(0, tokens if panels else 0, MOST_TOKENS):
        kernel = _product_kernel(
            bits, in_features // groups, min(tokens - start, MOST_TOKENS), zeros is None, scale.dtype
        )
        rows = (x[start].data_ptr(), sums[start].data_ptr(), _tables(bits).data_ptr(), y[start].data_ptr())
        _run(kernel, (*weight, *rows), panels, groups, words.nbytes)
    return y if y.shape[1] == out_features else y[:, :out_features].contiguous()


def dense(words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, panels: slice) -> Tensor:
    """The dense weight of some panels: bfloat16 [16 * panels, in]; arguments as for :func:`product`."""
    words, scale, zeros = _aligned(words), _aligned(scale), None if zeros is None else _aligned(zeros)
    groups, in_features = scale.shape[1], words.shape[1] * unit_columns(bits)
    first, last, _ = panels.indices(words.shape[0])
    if first >= last:
        return torch.empty(0, words.shape[1] * unit_columns(bits), dtype=torch.bfloat16)
    weight = torch.empty((last - first) * PANEL, in_features, dtype=torch.bfloat16)
    kernel = _dense_kernel(bits, in_features // groups, zeros is None, scale.dtype)
    pointers = (words, scale, scale if zeros is None else zeros, _tables(bits), weight)
    kernel(*[tensor.data_ptr() for tensor in pointers], first, last, groups)
    return weight


def _run(kernel: Callable[..., None], pointers: tuple[int, ...], panels: int, groups: int, nbytes: int) -> None:
    """All panels, divided among torch's number of threads."""
    threads = min(torch.get_num_threads(), panels, max(1, nbytes // _THREAD_BYTES))
    if threads == 1:
        kernel(*pointers, 0, panels, groups, panels * PANEL)
        return
    cuts = [panels * i // threads for i in range(threads + 1)]
    waiting = [
        _pool(threads - 1).submit(kernel, *pointers, first, last, groups, panels * PANEL)
        for first, last in pairwise(cuts[1:])
    ]
    kernel(*pointers, 0, cuts[1], groups, panels * PANEL)
    for each in waiting:
        each.result()


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="quantkit")


@lru_cache
def _tables(bits: int) -> Tensor:
    """bfloat16 [2, 32], aligned: what a code's low (or only) nibble stands for, and its high one, each twice."""
    nibble = torch.arange(32) % 16
    low = nibble - center(bits) if bits <= 4 else nibble
    high = 16 * nibble - center(bits)
    return aligned(torch.stack([low, high]).to(torch.bfloat16))


@cache
def _product_kernel(bits: int, group: int, tokens: int, symmetric: bool, scale: torch.dtype) -> Callable[..., None]:
    return _function(matvec_ir(Kind(bits, group, symmetric, _SCALES[scale]), tokens), pointers=7, numbers=4)


@cache
def _dense_kernel(bits: int, group: int, symmetric: bool, scale: torch.dtype) -> Callable[..., None]:
    return _function(dense_ir(Kind(bits, group, symmetric, _SCALES[scale])), pointers=5, numbers=3)


def _function(source: str, pointers: int, numbers: int) -> Callable[..., None]:
    """A module's kernel as a function that ctypes calls, without Python's lock. Takes about 20 ms."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(source)
    module.verify()
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * numbers)
    function = signature(engine.get_function_address(NAME))

    def kernel(*arguments: int, engine: object = engine) -> None:  # noqa: ARG001 - the code lives as long as its engine
        function(*arguments)

    return kernel
