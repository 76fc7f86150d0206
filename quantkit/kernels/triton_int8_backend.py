"""The Triton backend of W8A8 on NVIDIA GPUs, and torch's operator ``quantkit::int8_linear`` behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.kernels.base import LinearSpec, act_scale_of, act_scale_tensor, check_weight, zero_point_rows
from quantkit.kernels.int8 import why_not_int8
from quantkit.kernels.triton_backend import why_not_here
from quantkit.qtensor import QuantizedTensor

MOST_TOKENS = 64
"""From one row of x more on, torch's own product of bytes (cuBLAS) is used where it takes the sizes."""

_COLUMNS = 128  # that the packed weight is filled up to a multiple of
_BLOCK = 64  # rows of the weight of a program
_LIBRARY_ROWS = 8  # rows of the weight that torch._int_mm takes multiples of
_INDEX_LIMIT = 1 << 31
_INTERPRETED_SMS = 8

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor? offset, Tensor? static_scale, Tensor? bias, "
    "Tensor counters) -> Tensor"
)


@torch.library.custom_op("quantkit::int8_linear", mutates_args=(), schema=_SCHEMA)
def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    static_scale: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
) -> Tensor:
    """``x @ Wᵀ + bias`` with x rounded to bytes; see :func:`quantkit.kernels.triton_int8_launch.int8_product`.

    The rounding is one kernel and the product with its scales another; no float copy of x is made.
    """
    from quantkit.kernels import triton_int8_launch

    tokens, rows = x.shape[0], weight.shape[0]
    if tokens == 0:
        return x.new_empty(0, rows)
    if tokens <= MOST_TOKENS or rows % _LIBRARY_ROWS or x.device.type != "cuda":
        sms = _INTERPRETED_SMS
        if x.device.type == "cuda":
            sms = torch.cuda.get_device_properties(x.device).multi_processor_count
        return triton_int8_launch.int8_product(x, weight, scale, offset, static_scale, bias, counters, sms=sms)
    codes, act_scales, act_sums = triton_int8_launch.round_activations(x, static_scale, weight.shape[1])
    y = torch._int_mm(codes, weight.T) * scale
    if offset is not None:
        y.addmm_(act_sums[:, None].float(), offset[None, :])
    y.mul_(act_scales[:, None])
    return (y if bias is None else y.add_(bias)).to(x.dtype)


@int8_linear.register_fake
def _shape(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,  # noqa: ARG001
    offset: Tensor | None,  # noqa: ARG001
    static_scale: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    counters: Tensor,  # noqa: ARG001
) -> Tensor:
    """What torch.compile needs to know: the result's shape and dtype."""
    return x.new_empty(x.shape[0], weight.shape[0])


@dataclass(frozen=True, slots=True)
class TritonInt8Backend:
    """8-bit activations, one scale per channel; the rounding of x, with its scales, is a kernel of its own.

    Packed tensors:
        weight_packed: int8 [out, in filled up to a multiple of 128], codes minus ``2**(bits-1)``.
        scale, zero_point, act_scale: as in :class:`quantkit.kernels.int8.CpuInt8Backend`.
        row_scale, row_offset: float32 [out], the scale, and (mid - zero point) * scale; the latter asymmetric only.
        counters: int32, scratch that is zero between products: a layer runs on one stream at a time.
    """

    name: ClassVar[str] = "triton_int8"

    def why_not(self, spec: LinearSpec) -> str | None:
        """Refuses what is not int8 x int8 with one scale per channel, and machines that cannot run it."""
        reason = why_not_int8(spec)
        if reason is not None:
            return reason
        if spec.device_type != "cuda":
            return f"the device {spec.device_type}; it runs on cuda"
        if spec.out_features * (spec.in_features + _COLUMNS) >= _INDEX_LIMIT:
            return "a weight of 2**31 bytes or more; it indexes with 32-bit integers"
        return why_not_here()

    def prepack(self, q: QuantizedTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """See :class:`KernelBackend`."""
        check_weight(q, spec)
        signed = (q.codes - q.scheme.mid).view(torch.int8)  # bytes wrap around
        packed = {"weight_packed": pad(signed, (0, -spec.in_features % _COLUMNS)), "scale": q.scale.clone()}
        packed["row_scale"] = q.scale[:, 0].float()
        if not spec.scheme.symmetric:
            packed["zero_point"] = q.zero_point.clone()
            packed["row_offset"] = (spec.scheme.mid - q.zero_point[:, 0].float()) * packed["row_scale"]
        if q.act_scale is not None:
            packed["act_scale"] = act_scale_tensor(q)
        blocks = -(-spec.out_features // _BLOCK) * 2  # of tokens, up to MOST_TOKENS, 32 at a time
        packed["counters"] = torch.zeros(blocks, dtype=torch.int32, device=q.codes.device)
        return packed

    def matmul(self, x: Tensor, packed: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None = None) -> Tensor:
        """See :class:`KernelBackend`."""
        flat = x.reshape(-1, spec.in_features)
        y = int8_linear(
            flat,
            packed["weight_packed"],
            packed["row_scale"],
            packed.get("row_offset"),
            packed.get("act_scale"),
            bias,
            packed["counters"],
        )
        return cast(Tensor, y).view(*x.shape[:-1], spec.out_features)

    def unpack(self, packed: Mapping[str, Tensor], spec: LinearSpec) -> QuantizedTensor:
        """See :class:`KernelBackend`."""
        scale, scheme = packed["scale"], spec.scheme
        codes = packed["weight_packed"][:, : spec.in_features].contiguous().view(torch.uint8) + scheme.mid
        zero_point = zero_point_rows(packed, scale, scheme, 0)
        return QuantizedTensor(codes, scale, zero_point, scheme, act_scale=act_scale_of(packed, scheme))
