"""The CPU backend: torch's own weight-packed operators, for bfloat16 activations.

W2 to W4 run on ``aten::_weight_int4pack_mm_for_cpu``, W5 to W8 on ``aten::_weight_int8pack_mm``. Both multiply in
float32 and round once. What is said of them here was read in torch's aten/src/ATen/native/cpu/int4mm_kernel.cpp
and int8mm_kernel.cpp and checked with torch 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor

from quantkit.errors import KernelError, message
from quantkit.kernels.base import LinearSpec, add_bias, check_weight, linear_by_rows, row_blocks, zero_point_rows
from quantkit.qtensor import QuantizedTensor

_INDEX_LIMIT = 1 << 31  # the operators index the weight with 32-bit integers

_INT4_MAX_BITS = 4
_INT4_MID = 8  # the code that stands for zero
_INT4_GROUPS = (256, 128, 64, 32)  # columns that may share a scale
_INT4_ROWS = 16  # out_features must be a multiple of it
_INT4_BLOCK = 64  # the most rows that the operator interleaves
_INNER_K_TILES = 2  # belongs to the CUDA layout; the CPU operator takes it and ignores it

_INT8_COLUMNS = 16  # read at one time, past the end of a row where they do not divide in_features

# From so many rows of x on, dequantizing for a dense product is faster than the operator. Milliseconds of process
# CPU time for 4096 x 4096 on one core with AVX-512 and bf16, operator / dequantizing:
#   W4 g64: 58/65 at 128 rows, 87/85 at 192, 118/93 at 256, 226/142 at 512 (576 x 1536 crosses at 192 to 384)
#   W8:     37/32 at  64 rows, 72/46 at 128, 135/73 at 256, 280/102 at 512 (576 x 1536 crosses at 64 to 128)
_INT4_DENSE_FROM = 192
_INT8_DENSE_FROM = 64


@dataclass(frozen=True, slots=True)
class CpuBackend:
    """bfloat16 activations on a CPU, contiguous groups.

    Beside the operator's packed tensors it keeps what :meth:`unpack` needs to be exact:
        scale: [out, groups]; only where the dtype that ships is not bfloat16.
        zero_point: uint8 [out, groups]; asymmetric only.
    """

    name: ClassVar[str] = "cpu"

    def why_not(self, spec: LinearSpec) -> str | None:
        """Refuses what the operators cannot do, do wrong, or do slower than a dense layer."""
        num_weights = spec.in_features * spec.out_features
        if spec.device_type != "cpu":
            return f"the device {spec.device_type}; it runs on cpu"
        if spec.scheme.act_bits is not None:
            return "quantized activations; it multiplies by activations in floating point"
        if spec.dtype != torch.bfloat16:
            return f"activations of {spec.dtype}; torch's operators are slow in all but bfloat16"
        if spec.has_g_idx:
            return "a g_idx; its groups are contiguous"
        if not 0 < num_weights < _INDEX_LIMIT:
            return f"{num_weights} weights; torch's operators take 1 to 2**31 - 1"
        return spec.scheme.why_not(spec.in_features) or _operator(spec).why_not(spec)

    def prepack(self, q: QuantizedTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """See :class:`KernelBackend`. Torch's layout is its own business, so it is proved here to be undone.

        Raises:
            KernelError: also when :meth:`unpack` would not give the codes back.
        """
        check_weight(q, spec)
        operator = _operator(spec)
        packed = operator.prepack(q, spec)
        if q.scale.dtype != torch.bfloat16:
            packed["scale"] = q.scale.clone()
        if not spec.scheme.symmetric:
            packed["zero_point"] = q.zero_point.clone()
        for start, stop in row_blocks(spec.out_features, spec.in_features, _INT4_BLOCK):
            if not torch.equal(operator.codes(packed, spec, start, stop), q.codes[start:stop]):
                what = "torch's packed layout is not understood on this CPU"
                raise KernelError(message(str(spec), what, "choose backend='reference' and report this"))
        return packed

    def matmul(self, x: Tensor, packed: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None = None) -> Tensor:
        """See :class:`KernelBackend`."""
        operator = _operator(spec)
        flat = x.reshape(-1, spec.in_features)
        if flat.shape[0] < operator.dense_from:
            y = operator.matmul(flat, packed, spec)
        else:
            y = linear_by_rows(flat, lambda start, stop: _rows(packed, spec, start, stop), spec, _INT4_BLOCK)
        return add_bias(y, bias).view(*x.shape[:-1], spec.out_features)

    def unpack(self, packed: Mapping[str, Tensor], spec: LinearSpec) -> QuantizedTensor:
        """See :class:`KernelBackend`."""
        return _rows(packed, spec, 0, spec.out_features)


class _Operator(Protocol):
    """One of torch's weight-packed operators. Rows ``start:stop`` start at a multiple of 64."""

    dense_from: ClassVar[int]

    def why_not(self, spec: LinearSpec) -> str | None: ...

    def prepack(self, q: QuantizedTensor, spec: LinearSpec) -> dict[str, Tensor]: ...

    def matmul(self, x: Tensor, packed: Mapping[str, Tensor], spec: LinearSpec) -> Tensor: ...

    def codes(self, packed: Mapping[str, Tensor], spec: LinearSpec, start: int, stop: int) -> Tensor: ...

    def scale(self, packed: Mapping[str, Tensor], spec: LinearSpec, start: int, stop: int) -> Tensor: ...


class _Int4:
    """``W = (code - 8) * scale + zero``, scale and zero in bfloat16, codes shifted so that their middle is 8.

    Packed tensors:
        weight_packed: uint8 [out, in / 2], in a layout that depends on the CPU's vector width.
        scale_zero: bfloat16 [in / g, out, 2], g the operator's group size.
        zero_low: bfloat16 [groups, out], what the zeros lost in rounding to bfloat16; asymmetric only.
    """

    dense_from: ClassVar[int] = _INT4_DENSE_FROM

    def why_not(self, spec: LinearSpec) -> str | None:
        columns = spec.scheme.columns_per_group(spec.in_features)
        if columns % _INT4_GROUPS[-1]:
            return f"groups of {columns} columns; torch's int4 operator takes multiples of {_INT4_GROUPS[-1]}"
        if spec.out_features % _INT4_ROWS:
            return f"out_features={spec.out_features}; torch's int4 operator takes multiples of {_INT4_ROWS}"
        return None

    def prepack(self, q: QuantizedTensor, spec: LinearSpec) -> dict[str, Tensor]:
        # By blocks of rows, because the operator packs from int32, eight times the size of the result.
        blocks = [
            _int4_rows(q.rows(start, stop))
            for start, stop in row_blocks(spec.out_features, spec.in_features, _INT4_BLOCK)
        ]
        weight, scale, zero, zero_low = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        scale_zero = torch.stack([scale, zero], -1).transpose(0, 1)
        packed = {
            "weight_packed": weight,
            "scale_zero": scale_zero.repeat_interleave(_int4_repeats(spec), 0).contiguous(),
        }
        if not spec.scheme.symmetric:
            packed["zero_low"] = zero_low.T.contiguous()
        return packed

    def matmul(self, x: Tensor, packed: Mapping[str, Tensor], spec: LinearSpec) -> Tensor:
        x, scale_zero = x.contiguous(), packed["scale_zero"]
        group = spec.in_features // scale_zero.shape[0]
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed["weight_packed"], group, scale_zero)
        if not spec.scheme.symmetric:
            # A large mean of x would magnify what the zeros lost. In float32, which is faster for one row of x.
            columns = spec.scheme.columns_per_group(spec.in_features)
            sums = x.view(x.shape[0], spec.in_features // columns, columns).sum(-1, dtype=torch.float32)
            y += sums @ packed["zero_low"].float()
        return cast(Tensor, y)

    def codes(self, packed: Mapping[str, Tensor], spec: LinearSpec, start: int, stop: int) -> Tensor:
        return _int4_unpack(packed["weight_packed"][start:stop]) - (_INT4_MID - spec.scheme.mid)

    def scale(self, packed: Mapping[str, Tensor], spec: LinearSpec, start: int, stop: int) -> Tensor:
        return packed["scale_zero"][:: _int4_repeats(spec), start:stop, 0].T.contiguous()


class _Int8:
    """``W = weight * scale``, one scale per channel.

    Packed tensors:
        weight_packed: int8 [out, in], the codes minus the symmetric zero point.
        channel_scale: bfloat16 [out]. The operator reads no other, so scales of another dtype are rounded: by up to
            2^-9 of a whole row, where the rounded weights of a dense layer err both ways.
    """

    dense_from: ClassVar[int] = _INT8_DENSE_FROM

    def why_not(self, spec: LinearSpec) -> str | None:
        if not spec.scheme.symmetric or spec.scheme.num_groups(spec.in_features) != 1:
            return f"{spec.scheme}; torch's int8 operator is symmetric with one scale per channel"
        if spec.in_features % _INT8_COLUMNS:
            return f"in_features={spec.in_features}; torch's int8 operator takes multiples of {_INT8_COLUMNS}"
        return None

    def prepack(self, q: QuantizedTensor, spec: LinearSpec) -> dict[str, Tensor]:
        weight = (q.codes - spec.scheme.mid).view(torch.int8)  # uint8 wraps around: 255 is int8 -1
        return {"weight_packed": weight, "channel_scale": q.scale[:, 0].to(torch.bfloat16, copy=True)}

    def matmul(self, x: Tensor, packed: Mapping[str, Tensor], spec: LinearSpec) -> Tensor:  # noqa: ARG002
        # A copy even of contiguous rows, because the operator loads 32 aligned bytes at a time: with an x that
        # starts anywhere in its storage it is a segmentation fault.
        x = x.clone(memory_format=torch.contiguous_format)
        y = torch.ops.aten._weight_int8pack_mm(x, packed["weight_packed"], packed["channel_scale"])
        return cast(Tensor, y)

    def codes(self, packed: Mapping[str, Tensor], spec: LinearSpec, start: int, stop: int) -> Tensor:
        return packed["weight_packed"][start:stop].view(torch.uint8) + spec.scheme.mid

    def scale(self, packed: Mapping[str, Tensor], spec: LinearSpec, start: int, stop: int) -> Tensor:  # noqa: ARG002
        return packed["channel_scale"][start:stop, None]


def _operator(spec: LinearSpec) -> _Operator:
    return _Int4() if spec.scheme.bits <= _INT4_MAX_BITS else _Int8()


def _rows(packed: Mapping[str, Tensor], spec: LinearSpec, start: int, stop: int) -> QuantizedTensor:
    """The quantized weight of output rows ``start:stop``; ``start`` is a multiple of 64."""
    operator = _operator(spec)
    scale = packed["scale"][start:stop] if "scale" in packed else operator.scale(packed, spec, start, stop)
    zero_point = zero_point_rows(packed, scale, spec.scheme, start)
    return QuantizedTensor(operator.codes(packed, spec, start, stop), scale, zero_point, spec.scheme)


def _int4_repeats(spec: LinearSpec) -> int:
    """How often a scale is repeated, because the operator's groups are shorter than the layer's."""
    columns = spec.scheme.columns_per_group(spec.in_features)
    return columns // next(size for size in _INT4_GROUPS if columns % size == 0)


def _int4_rows(q: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed codes, then scales, zeros and what the zeros lost: bfloat16 [out, groups].

    ``(code - zero_point) * scale`` is ``(code - mid) * scale + zero`` with ``zero = (mid - zero_point) * scale``.
    Where the scale itself loses bits in bfloat16, the zero makes up for it on average over the group, so that a
    large mean of x does not magnify them.
    """
    scale = q.scale.float()
    rounded = scale.to(torch.bfloat16)
    mean = q.codes.view(*scale.shape, -1).float().mean(-1) - q.scheme.mid
    zero = (q.scheme.mid - q.zero_point.float()) * scale + mean * (scale - rounded.float())
    zero_high = zero.to(torch.bfloat16)
    zero_low = (zero - zero_high.float()).to(torch.bfloat16)
    return _int4_pack(q.codes + (_INT4_MID - q.scheme.mid)), rounded, zero_high, zero_low


def _int4_pack(codes: Tensor) -> Tensor:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), _INNER_K_TILES)
    return cast(Tensor, packed)


def _int4_unpack(packed: Tensor) -> Tensor:
    """The inverse of :func:`_int4_pack` for rows that start at a multiple of 64: uint8 [rows, in]."""
    block = _int4_block()
    whole = packed.shape[0] // block * block
    parts = [(packed[:whole], block), (packed[whole:], packed.shape[0] - whole)]
    return torch.cat([_int4_unpack_blocks(part, rows) for part, rows in parts if len(part)])


def _int4_unpack_blocks(packed: Tensor, block: int) -> Tensor:
    """Undo blocks of ``block`` rows: each holds column after column, a column its rows in a certain order."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    # Transposed as bytes, which is four times faster than moving single nibbles.
    pairs = packed.view(rows // block, columns, block // 2).transpose(1, 2).contiguous()
    order = _int4_row_order(block)
    codes = torch.empty(rows // block, block, columns, dtype=torch.uint8)
    codes[:, order[0::2]] = pairs & 15
    codes[:, order[1::2]] = pairs >> 4
    return codes.view(rows, columns)


def _int4_block() -> int:
    """How many rows the operator interleaves on this CPU, seen from where the second of two columns goes."""
    probe = torch.tensor([[0, 1]]).expand(_INT4_BLOCK, 2)
    return 2 * int(_int4_pack(probe).flatten().nonzero()[0])


def _int4_row_order(block: int) -> Tensor:
    """int64 [block]: the row behind each nibble of a column, seen from the packed digits of row numbers."""
    row = torch.arange(block)[:, None].expand(block, 2)
    low, high = (_int4_pack(digit).flatten()[: block // 2].long() for digit in (row % 16, row // 16))
    return torch.stack([(low & 15) + 16 * (high & 15), (low >> 4) + 16 * (high >> 4)], -1).flatten()
