"""Float32 matrix products by a processor's bfloat16 instructions, where that is exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


@contextmanager
def products_in_bfloat16(factors: Tensor) -> Iterator[None]:
    """Inside, float32 products of matrices whose numbers all come from ``factors`` may use bfloat16 instructions.

    Only where that changes nothing but the order of summation: bfloat16 factors are not rounded again, and the product
    of two is exact in float32, in which they are summed. Where ``factors`` have another dtype or lie elsewhere than on
    the CPU, or where the CPU has no such instructions, nothing changes. Measured on one core (AMD Zen 5): the outer
    product of 512 x 1536 takes 6.1 ms in place of 12.5.

    torch's switch is one for the whole process; it stands as before afterwards.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if factors.dtype == torch.bfloat16 and factors.device.type == "cpu" and _has_bfloat16():
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def _has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
