"""The C library's heap: freed tensors go back to the system, or the memory of a long run would be a matter of luck.

glibc maps a large block by itself and unmaps it when it is freed; but what counts as large grows with every such block
that is freed, from 128 KiB up to 32 MiB. From then on all smaller tensors share one heap, and the holes that they leave
in it stay resident: with weights of 9 to 25 MB runs peaked 150 to 350 MB higher, and higher the longer they ran.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 2**22  # bytes


def use_huge_pages() -> None:
    """Let torch ask for huge pages, which makes fresh memory cheap; before torch makes its first tensor.

    A THP_MEM_ALLOC_ENABLE that the user has set is left as it is.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def map_large_blocks() -> None:
    """From now on, in this process, every block of 4 MiB or more is mapped by itself and unmapped when it is freed."""
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def trim() -> None:
    """Give the holes that smaller blocks left in the heap back to the system."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(name: str) -> ctypes._NamedFuncPointer | None:
    """A function that only glibc has; None with other C libraries (musl, macOS, Windows)."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
