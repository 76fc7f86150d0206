"""The int8 backends: activations are rounded to 8-bit codes, multiplied by the weight's codes, and summed in int32.

With x ~ s (a) for a token's codes a and scale s, and W ~ t (c - z) for a row's codes c, zero point z and scale t,

    x Wᵀ  =  s t ( Σ a (c - mid)  +  (mid - z) Σ a ),    mid = 2^(bits-1).

The first sum is the integer product; the second term is there for asymmetric weights only. All sums are exact: of
int8 codes in int32, for up to 131071 columns. Scales are multiplied in float32 and the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.errors import KernelError, message
from quantkit.grid import quantize_activations
from quantkit.kernels.base import LinearSpec, act_scale_of, act_scale_tensor, add_bias, check_weight, zero_point_rows
from quantkit.kernels.byte_product import MOST_COLUMNS, byte_product, pack_bytes, unpack_bytes
from quantkit.qtensor import QuantizedTensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class CpuInt8Backend:
    """Quantized activations on a CPU, through oneDNN's product of bytes where that is exact, else in float32.

    See :mod:`quantkit.kernels.byte_product`. Checked with torch 2.13.

    Packed tensors:
        weight_onednn: int8 in oneDNN's own layout (a tensor without storage); where that is exact.
        words, panel_scale, call: elsewhere, of :class:`quantkit.kernels.jit_backend.JitBackend`; or
        weight_packed: int8 [out, in], where that cannot run.
        scale: [out, 1], the dtype that ships.
        zero_point: uint8 [out, 1]; asymmetric only.
        act_scale: float32 [1]; static activations only.
    """

    name: ClassVar[str] = "cpu_int8"

    def why_not(self, spec: LinearSpec) -> str | None:
        """Refuses what is not int8 x int8 with one scale per channel."""
        if spec.device_type != "cpu":
            return f"the device {spec.device_type}; it runs on cpu"
        return why_not_int8(spec)

    def prepack(self, q: QuantizedTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """See :class:`KernelBackend`. oneDNN's layout is its own business, so it is proved here to be undone.

        Raises:
            KernelError: also when :meth:`unpack` would not give the codes back.
        """
        check_weight(q, spec)
        packed = {**pack_bytes(_signed(q)), **_scales(q)}
        if not torch.equal(unpack_bytes(packed, spec.out_features), _signed(q)):
            what = "its packed form does not give the codes back"
            raise KernelError(message(str(spec), what, "choose backend='simulated' and report this"))
        return packed

    def matmul(self, x: Tensor, packed: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None = None) -> Tensor:
        """See :class:`KernelBackend`."""
        flat = x.reshape(-1, spec.in_features)
        codes, act_scale = quantize_activations(flat, packed.get("act_scale"))
        y = byte_product(codes, packed, packed["scale"].view(-1).float())
        finished = _finished(y, codes, act_scale, packed, spec)
        return add_bias(finished, bias).view(*x.shape[:-1], spec.out_features)

    def unpack(self, packed: Mapping[str, Tensor], spec: LinearSpec) -> QuantizedTensor:
        """See :class:`KernelBackend`."""
        return _unpacked(unpack_bytes(packed, spec.out_features), packed, spec)


@dataclass(frozen=True, slots=True)
class CudaInt8Backend:
    """Quantized activations on a CUDA device, through ``torch._int_mm``.

    Its arithmetic is tested on the CPU, whose ``torch._int_mm`` is the same function; no GPU has run it yet.

    Packed tensors:
        weight_packed: int8 [out, in], codes minus ``2**(bits-1)``.
        scale, zero_point, act_scale: as in :class:`CpuInt8Backend`.
    """

    name: ClassVar[str] = "cuda_int8"
    fewest_rows: ClassVar[int] = 17  # of x, by torch's check; fewer are padded
    multiple: ClassVar[int] = 8  # of columns and rows of the weight, by torch's check

    def why_not(self, spec: LinearSpec) -> str | None:
        """Refuses what is not int8 x int8 with one scale per channel, and sizes that cuBLAS does not take."""
        if spec.device_type != "cuda":
            return f"the device {spec.device_type}; it runs on cuda"
        for what, size in (("in_features", spec.in_features), ("out_features", spec.out_features)):
            if size % self.multiple:
                return f"{what}={size}; torch._int_mm takes multiples of {self.multiple}"
        return why_not_int8(spec)

    def prepack(self, q: QuantizedTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """See :class:`KernelBackend`."""
        check_weight(q, spec)
        return {"weight_packed": _signed(q), **_scales(q)}

    def matmul(self, x: Tensor, packed: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None = None) -> Tensor:
        """See :class:`KernelBackend`."""
        flat = x.reshape(-1, spec.in_features)
        codes, act_scale = quantize_activations(flat, packed.get("act_scale"))
        missing = max(self.fewest_rows - flat.shape[0], 0)
        rows = torch.nn.functional.pad(codes.to(torch.int8), (0, 0, 0, missing))
        sums = torch._int_mm(rows, packed["weight_packed"].T)[: flat.shape[0]]
        y = sums * packed["scale"].view(1, -1).float()
        finished = _finished(y, codes, act_scale, packed, spec)
        return add_bias(finished, bias).view(*x.shape[:-1], spec.out_features)

    def unpack(self, packed: Mapping[str, Tensor], spec: LinearSpec) -> QuantizedTensor:
        """See :class:`KernelBackend`."""
        return _unpacked(packed["weight_packed"], packed, spec)


def why_not_int8(spec: LinearSpec) -> str | None:
    """Why a layer is not a product of bytes with one scale per row; None when it is."""
    if spec.scheme.act_bits is None:
        return "activations in floating point; it multiplies 8-bit activations"
    if spec.scheme.columns_per_group(spec.in_features) != spec.in_features:
        return f"groups of {spec.scheme.group_size} columns; integer sums run over whole rows: one scale per channel"
    if spec.has_g_idx:
        return "a g_idx; its groups are contiguous"
    if spec.dtype not in _DTYPES:
        return f"activations of {spec.dtype}; it computes in float32, for bfloat16, float16 and float32"
    if spec.out_features < 1 or not 1 <= spec.in_features <= MOST_COLUMNS:
        sizes = f"{spec.in_features} x {spec.out_features}"
        return f"sizes {sizes}; it takes at least one row, and 1 to {MOST_COLUMNS} columns, which int32 sums hold"
    return None


def _signed(q: QuantizedTensor) -> Tensor:
    """int8 [out, in]: codes minus ``2**(bits-1)``, by the wrap-around of bytes."""
    return (q.codes - q.scheme.mid).view(torch.int8)


def _scales(q: QuantizedTensor) -> dict[str, Tensor]:
    scales = {"scale": q.scale.clone()}
    if not q.scheme.symmetric:
        scales["zero_point"] = q.zero_point.clone()
    if q.act_scale is not None:
        scales["act_scale"] = act_scale_tensor(q)
    return scales


def _unpacked(signed: Tensor, packed: Mapping[str, Tensor], spec: LinearSpec) -> QuantizedTensor:
    scale, scheme = packed["scale"], spec.scheme
    zero_point = zero_point_rows(packed, scale, scheme, 0)
    codes = signed.view(torch.uint8) + scheme.mid
    return QuantizedTensor(codes, scale, zero_point, scheme, act_scale=act_scale_of(packed, scheme))


def _finished(y: Tensor, codes: Tensor, act_scale: Tensor, packed: Mapping[str, Tensor], spec: LinearSpec) -> Tensor:
    """The term of the zero points, the scale of each token, and the only rounding.

    Args:
        y: float32 [tokens, out], t Σ a (c - mid). Overwritten.
        codes: float32 [tokens, in], whole numbers.
        act_scale: float32 [tokens, 1].
        packed: holds the zero points.
        spec: the layer.
    """
    if not spec.scheme.symmetric:
        offset = (spec.scheme.mid - packed["zero_point"].float()) * packed["scale"].float()
        y.addmm_(codes.sum(-1, keepdim=True), offset.view(1, -1))
    return y.mul_(act_scale).to(spec.dtype)
