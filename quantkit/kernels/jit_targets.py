"""What the just-in-time CPU kernels are compiled for: the best target that this CPU has, or a lesser one by request."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache

import torch

from quantkit.errors import KernelError, message
from quantkit.kernels.jit_dots_ir import Dots, FusedDots, PairedDots

VARIABLE = "QUANTKIT_CPU_TARGET"
"""Environment variable: the name of a target, for tests and for comparisons."""


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of CPU.

    Attributes:
        name: what users call it.
        needs: of :func:`torch.cpu.get_capabilities`.
        architecture: likewise.
        without: LLVM's features that it does not use even where the CPU has them.
        tile: tokens for which a weight is decoded once; their sums stay in registers.
        chains: sums of one token that do not wait for each other.
        dots: how it multiplies bytes, for few rows of x (:mod:`quantkit.kernels.jit_bytes_ir`); None: it does not.
        bfloat16: whether it multiplies pairs of bfloat16 (:mod:`quantkit.kernels.jit_ir`).
        amx: whether it multiplies matrices of bfloat16 (:mod:`quantkit.kernels.jit_amx_ir`).
        many_pairs: rows of bfloat16 x from which on torch's product with dense blocks of the weight is faster than
            those kernels, for codes of up to 4 bits (:mod:`quantkit.kernels.jit_dense`); None: it is not.
        many_rows: the same for what is multiplied in float32.
        tried: dtypes of activations whose kernels somebody has run. Others are tested before they are used.
        example: a CPU of its kind, by LLVM's name, to compile for it on another machine.
    """

    name: str
    needs: tuple[str, ...]
    architecture: str
    without: str
    tile: int
    chains: int
    dots: Dots | None
    bfloat16: bool
    amx: bool
    many_pairs: int | None
    many_rows: int | None
    tried: tuple[torch.dtype, ...]
    example: str


_AVX512 = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
_ALL = (torch.bfloat16, torch.float16, torch.float32)
_AVX2 = ("avx2", "fma3", "f16c")
# With four rows of x a unit has 24 products and 3 other instructions: matrix instructions are as fast from there on.
_VNNI, _VNNI_NARROW = FusedDots(rows=16, tokens=4), FusedDots(rows=8, tokens=1)
_X86, _ARM = "x86_64", "aarch64"
# Where many rows begin: measured with 4096 x 4096 on one core of a Xeon with AMX, as it is and without what a lesser
# target lacks. Kernels / dense blocks of W4 g64, ms of CPU time: avx512_bf16 27/31 at 64 rows, 51/51 at 128 (W8 46/32,
# 90/52); avx512 31/40 at 128, 77/72 at 256; amx, where groups are not whole tiles, 7/11 at 16, 14/13 at 32. On a Zen 3
# the kernels of avx2 take 0.6 of the time of torch's dense float32 product at 128 rows: blocks would gain nothing.
_AMX = ("amx_tile", "amx_bf16")
_PAIRS = (*_AVX512, "avx512_vnni", "avx512_bf16")
_WIDE = Target("avx512", _AVX512, _X86, "", 12, 4, None, False, False, None, 192, _ALL, "skylake-avx512")
_NARROW = Target("avx2", _AVX2, _X86, "-avx512f", 4, 2, PairedDots(), False, False, None, None, _ALL, "znver3")
TARGETS = (
    Target("amx", (*_PAIRS, *_AMX), _X86, "", 12, 4, _VNNI, True, True, 24, 192, _ALL, "sapphirerapids"),
    Target("avx512_bf16", _PAIRS, _X86, "", 12, 4, _VNNI, True, False, 96, 192, _ALL, "znver4"),
    replace(_WIDE, name="avx512_vnni", needs=_PAIRS[:-1], dots=_VNNI, example="icelake-server"),
    _WIDE,
    replace(_NARROW, name="avx_vnni", needs=(*_AVX2, "avx_vnni"), dots=_VNNI_NARROW, example="alderlake"),
    _NARROW,
    Target("neon", (), _ARM, "", 4, 2, None, False, False, None, None, (), "neoverse-n1"),
)
"""Every target, the fastest first."""


def chosen_target() -> Target | None:
    """The first target that this CPU has, or the one of the environment variable; None: it has none.

    Raises:
        KernelError: the variable names no target, or one that this CPU does not have.
    """
    return _chosen(os.environ.get(VARIABLE))


@cache
def _chosen(name: str | None) -> Target | None:
    here = available()
    if name is None:
        return here[0] if here else None
    found = [target for target in here if target.name == name]
    if not found:
        what = f"{name!r} is not a target of this CPU, which has {', '.join(t.name for t in here) or 'none'}"
        raise KernelError(message(VARIABLE, what, "name one of them, or unset the variable"))
    return found[0]


def available() -> list[Target]:
    """The targets that this CPU has."""
    capabilities = torch.cpu.get_capabilities()
    architecture = {"arm64": "aarch64", "AMD64": "x86_64"}.get(
        capabilities["architecture"], capabilities["architecture"]
    )
    return [
        target
        for target in TARGETS
        if target.architecture == architecture
        and all(capabilities.get(name) for name in target.needs)
        and (not target.amx or torch.cpu._init_amx())  # Linux gives a process these registers when it asks for them
    ]
