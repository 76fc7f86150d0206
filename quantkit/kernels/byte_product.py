"""The product of a token's 8-bit codes and a weight's on a CPU, with the sums that integers have on every processor.

oneDNN's product of unsigned and signed bytes is fast, and exact on processors with VNNI. On others it adds pairs of
products in 16 bits, which overflow. It is tried on the largest codes at the first use, and where it fails the codes are
multiplied in float32, which holds whole numbers up to 2^24 exactly:

- in panels, by the just-in-time kernels that decode them as they multiply (:mod:`quantkit.kernels.jit_backend`);
- without those kernels, or where the columns do not fall into parts of at most 1024 and a multiple of 4, the weight
  stays plain bytes, multiplied by ``torch._int_mm`` for a few rows and in blocks for more.

Parts and blocks have at most 1024 columns (128 * 128 * 1024 = 2^24) and are added in int32.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import cast

import torch
from torch import Tensor

from quantkit.kernels.base import LinearSpec, row_blocks
from quantkit.kernels.jit import aligned
from quantkit.kernels.jit_backend import JitBackend
from quantkit.kernels.jit_step import layer_call
from quantkit.kernels.panels import pack_codes, pack_groups, unit_columns, unpack_codes
from quantkit.scheme import QuantScheme

MOST_COLUMNS = (1 << 17) - 1  # 128 * 128 * columns stays below 2**31
_OFFSET = 128  # from signed codes to the unsigned ones that oneDNN multiplies fast
_EXACT_COLUMNS = 1024
# Up to so many rows torch._int_mm is faster than blocks; ms of CPU time for 4096 x 4096 on one core of an AMD Zen 3:
# 17/70 for one row, 67/107 for four, 282/121 for sixteen. In panels 1.1, 2.2 and 7.8.
_FEW_ROWS = 4
_BITS = 8
_FEWEST_COLUMNS = 256  # of a part of several: each is a call
_PANELS = JitBackend()
_ONEDNN, _BYTES, _WORDS = "weight_onednn", "weight_packed", "words"


def pack_bytes(signed: Tensor) -> dict[str, Tensor]:
    """A weight's codes as :func:`byte_product` reads them on this machine, under names that say which way.

    A compiled graph cannot ask the tensor: while it is traced, oneDNN's layout looks like any other.

    Args:
        signed: int8 [out, in].

    Returns:
        ``weight_onednn``, oneDNN's layout, which serves any number of rows of x (a tensor without storage); or
        ``words`` int16 [parts, panels, units, 16, 2], ``panel_scale`` float32 [panels, 1, 16], all 1, and where torch
        takes it ``call`` int64 [parts, 9] (see :class:`quantkit.kernels.jit_backend.JitBackend`); or
        ``weight_packed``, the codes as they are.
    """
    if onednn_is_exact():
        return {_ONEDNN: _onednn_pack(signed)}
    size = _part_columns(signed.shape[1])
    if size and _PANELS.why_not(_in_panels(signed.shape[0], size)) is None:
        return _pack_panels(signed, size)
    return {_BYTES: signed}


def unpack_bytes(packed: Mapping[str, Tensor], out_features: int) -> Tensor:
    """The inverse of :func:`pack_bytes`: int8 [out, in]."""
    if _ONEDNN in packed:
        return packed[_ONEDNN].to_dense().T.contiguous()
    if _BYTES in packed:
        return packed[_BYTES]
    codes = [unpack_codes(words, _BITS, out_features) for words in packed[_WORDS]]
    return (torch.cat(codes, 1) - _OFFSET).view(torch.int8)


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
    if _WORDS in packed:
        return _panels_product(codes, packed, scale.shape[0]) * scale
    signed = packed[_BYTES]
    # A single column's strides do not tell a transposed weight from a plain one, and oneDNN's _int_mm takes the wrong.
    if codes.shape[0] <= _FEW_ROWS and signed.shape[1] > 1:
        return torch._int_mm(codes.to(torch.int8), signed.T) * scale
    return _blocks_product(codes, signed) * scale


def _part_columns(columns: int) -> int:
    """Of each of the fewest equal parts that the kernels take and float32 sums are exact for; 0: there are none."""
    unit = unit_columns(_BITS)
    sizes = range(min(columns, _EXACT_COLUMNS) // unit * unit, _FEWEST_COLUMNS - 1, -unit)
    return next((size for size in sizes if columns % size == 0), columns if columns < _FEWEST_COLUMNS else 0)


def _in_panels(out_features: int, columns: int) -> LinearSpec:
    """The layer that a part is, with scales of 1."""
    return LinearSpec(columns, out_features, QuantScheme(_BITS, None), torch.float32, "cpu")


def _pack_panels(signed: Tensor, size: int) -> dict[str, Tensor]:
    codes = signed.view(torch.uint8) + _OFFSET
    words = aligned(torch.stack([pack_codes(part.contiguous(), _BITS) for part in codes.split(size, 1)]))
    ones = aligned(pack_groups(torch.ones(signed.shape[0], 1)))
    calls = [layer_call(part, ones, None, _BITS, torch.float32) for part in words]
    packed = {_WORDS: words, "panel_scale": ones}
    known = [call for call in calls if call is not None]
    return {**packed, "call": torch.stack(known)} if known else packed


def _panels_product(codes: Tensor, packed: Mapping[str, Tensor], out_features: int) -> Tensor:
    """int32 [tokens, out]."""
    parts, spec = packed[_WORDS], _in_panels(out_features, codes.shape[1] // packed[_WORDS].shape[0])
    sums = torch.zeros(codes.shape[0], out_features, dtype=torch.int32)
    for index, columns in enumerate(codes.float().split(spec.in_features, 1)):
        own = {"words": parts[index], "panel_scale": packed["panel_scale"]}
        if "call" in packed:
            own["call"] = packed["call"][index]
        sums += _PANELS.matmul(columns, own, spec).to(torch.int32)
    return sums


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
