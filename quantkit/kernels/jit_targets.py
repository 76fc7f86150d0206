"""What the just-in-time CPU kernels are compiled for: the best target that this CPU has, or a lesser one by request."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch

from quantkit.errors import KernelError, message

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
        bfloat16: whether it multiplies pairs of bfloat16 (:mod:`quantkit.kernels.jit_ir`).
        tried: dtypes of activations whose kernels somebody has run. Others are tested before they are used.
        example: a CPU of its kind, by LLVM's name, to compile for it on another machine.
    """

    name: str
    needs: tuple[str, ...]
    architecture: str
    without: str
    tile: int
    chains: int
    bfloat16: bool
    tried: tuple[torch.dtype, ...]
    example: str


_AVX512 = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
_ALL = (torch.bfloat16, torch.float16, torch.float32)
_X86, _ARM = "x86_64", "aarch64"
TARGETS = (
    Target("avx512_bf16", (*_AVX512, "avx512_bf16"), _X86, "", 12, 4, True, (torch.bfloat16,), "znver4"),
    Target("avx512", _AVX512, _X86, "", 12, 4, False, (), "skylake-avx512"),
    Target("avx2", ("avx2", "fma3", "f16c"), _X86, "-avx512f", 4, 2, False, _ALL, "znver3"),
    Target("neon", (), _ARM, "", 4, 2, False, (), "neoverse-n1"),
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
        if target.architecture == architecture and all(capabilities.get(name) for name in target.needs)
    ]
