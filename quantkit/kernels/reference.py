"""The reference backend: packed bits in memory, dequantized block by block, then torch's own linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.kernels.base import (
    LinearSpec,
    act_scale_of,
    act_scale_tensor,
    add_bias,
    check_weight,
    linear_by_rows,
    zero_point_rows,
)
from quantkit.packing import pack, unpack
from quantkit.qtensor import QuantizedTensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class ReferenceBackend:
    """Any weight, floating-point dtype and device, with or without g_idx; every product dequantizes anew.

    Packed tensors, the same on every machine:
        weight_packed: int32 [out, ceil(in * bits / 32)], a dense bit stream (:func:`quantkit.packing.pack`).
        scale: [out, groups], the dtype that ships.
        zero_point: uint8 [out, groups]; asymmetric only.
        g_idx: int32 [in]; only where the weight has one.
        act_scale: float32 [1]; only where activations are quantized with a static scale, which only the backend
            "simulated" multiplies with. It packs as this one does.
    """

    name: ClassVar[str] = "reference"

    def why_not(self, spec: LinearSpec) -> str | None:
        """Refuses groups that do not fit, activations that are not floating point, and the meta device."""
        if spec.dtype not in _DTYPES:
            return f"activations of {spec.dtype}; it computes in float16, bfloat16, float32 or float64"
        if spec.scheme.act_bits is not None:
            return "quantized activations; it multiplies by activations in floating point"
        if spec.device_type == "meta":
            return "the meta device, whose tensors hold no values"
        return spec.scheme.why_not(spec.in_features)

    def names(self, spec: LinearSpec) -> tuple[str, ...]:
        """Which packed tensors a layer has."""
        zero_point = () if spec.scheme.symmetric else ("zero_point",)
        g_idx = ("g_idx",) if spec.has_g_idx else ()
        act_scale = ("act_scale",) if spec.scheme.act_static else ()
        return ("weight_packed", "scale", *zero_point, *g_idx, *act_scale)

    def prepack(self, q: QuantizedTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """See :class:`KernelBackend`."""
        check_weight(q, spec)
        packed = {"weight_packed": pack(q.codes, spec.scheme.bits), "scale": q.scale.clone()}
        if not spec.scheme.symmetric:
            packed["zero_point"] = q.zero_point.clone()
        if q.g_idx is not None:
            packed["g_idx"] = q.g_idx.clone()
        if q.act_scale is not None:
            packed["act_scale"] = act_scale_tensor(q)
        return packed

    def matmul(self, x: Tensor, packed: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None = None) -> Tensor:
        """See :class:`KernelBackend`."""
        flat = x.reshape(-1, spec.in_features)
        y = linear_by_rows(flat, lambda start, stop: _rows(packed, spec, start, stop), spec)
        return add_bias(y, bias).view(*x.shape[:-1], spec.out_features)

    def unpack(self, packed: Mapping[str, Tensor], spec: LinearSpec) -> QuantizedTensor:
        """See :class:`KernelBackend`.

        Raises:
            ValueError: packed tensors of other shapes or dtypes than the layer's.
        """
        return _rows(packed, spec, 0, spec.out_features)


def _rows(packed: Mapping[str, Tensor], spec: LinearSpec, start: int, stop: int) -> QuantizedTensor:
    """The quantized weight of output rows ``start:stop``."""
    codes = unpack(packed["weight_packed"][start:stop], spec.scheme.bits, spec.in_features)
    scale = packed["scale"][start:stop]
    zero_point = zero_point_rows(packed, scale, spec.scheme, start)
    act_scale = act_scale_of(packed, spec.scheme)
    return QuantizedTensor(codes, scale, zero_point, spec.scheme, packed.get("g_idx"), act_scale)
