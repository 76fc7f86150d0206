"""The C library's heap: freed tensors go back to the system, or the memory of a long run would be a matter of luck.

glibc maps a large block by itself and unmaps it when it is freed; but what counts as large grows with every such block
that is freed, from 128 KiB up to 32 MiB. From then on all smaller tensors share one heap, and the holes that they leave
in it stay resident: with weights of 9 to 25 MB runs peaked 150 to 350 MB higher, and higher the longer they ran.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 2**22  # bytes
_MADV_HUGEPAGE = 14  # mman.h of Linux

HUGE_PAGE = 2**21
"""Bytes, on x86 and on most of ARM."""


def use_huge_pages() -> None:
    """Let torch ask for huge pages, which makes fresh memory cheap; before torch makes its first tensor.

    A THP_MEM_ALLOC_ENABLE that the user has set is left as it is.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def ask_for_huge_pages(memory: Tensor) -> None:
    """Let Linux put the whole huge pages of this memory, which is fresh and starts at one, in huge pages.

    A kernel that streams through weights then misses fewer addresses. Without effect where Linux has none to give.
    """
    whole = memory.nbytes // HUGE_PAGE * HUGE_PAGE
    madvise = _libc("madvise")
    if madvise is not None and whole and memory.data_ptr() % HUGE_PAGE == 0:
        madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(whole), _MADV_HUGEPAGE)


def map_large_blocks() -> None:
    """From now on, in this process, every block of 4 MiB or more is mapped by itself and unmapped when it is freed."""
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def trim() -> None:
    """Give the holes that smaller blocks left in the heap back to the system."""
    malloc_trim = _libc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _libc(name: str) -> ctypes._NamedFuncPointer | None:
    """A function of Linux's C library; None where it has none of that name (musl), and elsewhere (macOS, Windows)."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
