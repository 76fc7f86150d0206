"""The product of a token's 8-bit codes and a weight's on a CPU, with exact sums on every processor.

oneDNN's product of unsigned and signed bytes is fast, and exact on processors with VNNI. On others it adds pairs of
products in 16 bits, which overflow. It is tried on the largest codes at the first use, and where it fails the weight
stays plain bytes, multiplied by ``torch._int_mm`` for a few rows and in blocks of float32 for more. A float32 holds
whole numbers up to 2^24 exactly, so blocks have 1023 columns (128 * 128 * 1023 < 2^24) and are added in int32.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import cast

import torch
from torch import Tensor

from quantkit.kernels.base import row_blocks

MOST_COLUMNS = (1 << 17) - 1  # 128 * 128 * columns stays below 2**31
_OFFSET = 128  # from signed codes to the unsigned ones that oneDNN multiplies fast
_EXACT_COLUMNS = 1023
# Up to so many rows torch._int_mm is faster than blocks; ms of CPU time for 4096 x 4096 on one core of an AMD Zen 3:
# 17/70 for one row, 67/107 for four, 282/121 for sixteen.
_FEW_ROWS = 4


_ONEDNN, _BYTES = "weight_onednn", "weight_packed"


def pack_bytes(signed: Tensor) -> dict[str, Tensor]:
    """A weight's codes as :func:`byte_product` reads them on this machine, under a name that says which way.

    A compiled graph cannot ask the tensor: while it is traced, oneDNN's layout looks like any other.

    Args:
        signed: int8 [out, in].

    Returns:
        ``weight_onednn``, oneDNN's layout, which serves any number of rows of x (a tensor without storage); or
        ``weight_packed``, the codes as they are.
    """
    return {_ONEDNN: _onednn_pack(signed)} if onednn_is_exact() else {_BYTES: signed}


def unpack_bytes(packed: Mapping[str, Tensor]) -> Tensor:
    """The inverse of :func:`pack_bytes`: int8 [out, in]."""
    return packed[_ONEDNN].to_dense().T.contiguous() if _ONEDNN in packed else packed[_BYTES]


def byte_product(codes: Tensor, packed: Mapping[str, Tensor], scale: Tensor) -> Tensor:
    """``scale * (codes @ signedᵀ)`` with the sums exact in int32.

    Args:
        codes: [tokens, in], whole numbers from -128 to 127 of any dtype.
        packed: holds what :func:`pack_bytes` made, of at most MOST_COLUMNS columns.
        scale: float32 [out].

    Returns:
        float32 [tokens, out].
    """
    if _ONEDNN in packed:
        return _onednn_product(codes, packed[_ONEDNN], scale)
    signed = packed[_BYTES]
    # A single column's strides do not tell a transposed weight from a plain one, and oneDNN's _int_mm takes the wrong.
    if codes.shape[0] <= _FEW_ROWS and signed.shape[1] > 1:
        return torch._int_mm(codes.to(torch.int8), signed.T) * scale
    return _blocks_product(codes, signed) * scale


def _blocks_product(codes: Tensor, signed: Tensor) -> Tensor:
    """int32 [tokens, out]; never more than a block of the weight in float32."""
    codes = codes.to(torch.int8).float()
    sums = torch.zeros(codes.shape[0], signed.shape[0], dtype=torch.int32)
    for start, stop in row_blocks(*signed.shape):
        for rows, columns in zip(
            signed[start:stop].split(_EXACT_COLUMNS, 1), codes.split(_EXACT_COLUMNS, 1), strict=True
        ):
            sums[:, start:stop] += (columns @ rows.float().T).to(torch.int32)
    return sums


@cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's product of bytes is there and exact: without VNNI it may add pairs in 16 bits, saturating."""
    signed = torch.full((16, 64), -128, dtype=torch.int8)
    codes = torch.full((2, 64), 127)
    codes[1] = -128
    try:
        found = _onednn_product(codes, _onednn_pack(signed), torch.ones(16))
    except (AttributeError, RuntimeError):  # built without oneDNN, or not for this processor
        return False
    return torch.equal(found, (codes @ signed.long().T).float())


def _onednn_pack(signed: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.onednn.qlinear_prepack(signed, None))


def _onednn_product(codes: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """By codes + 128 with zero point 128, which oneDNN takes out again: its signed product is 100 times slower."""
    # Through int8 and by the wrap-around of bytes: a tenth of the time of .to(torch.uint8) of the sum.
    shifted = codes.to(torch.int8).view(torch.uint8).add_(_OFFSET)
    if shifted.shape[0] == 0:
        return shifted.new_empty(0, packed.shape[1], dtype=torch.float32)
    zeros = torch.zeros(1, dtype=torch.int32)
    product = torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, _OFFSET, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return cast(Tensor, product)
