"""The just-in-time CPU backend: its own kernels, compiled by llvmlite when a layer first runs; no compiler needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.kernels.base import LinearSpec, add_bias, check_weight, middle_zero_point
from quantkit.kernels.jit import aligned
from quantkit.kernels.jit_check import why_not_here
from quantkit.kernels.jit_op import panels_linear
from quantkit.kernels.jit_step import layer_call, step
from quantkit.kernels.jit_targets import TARGETS, chosen_target
from quantkit.kernels.order import UNEVEN, in_order, out_of_order, reordered
from quantkit.kernels.panels import pack_codes, pack_groups, unit_columns, unpack_codes, unpack_groups
from quantkit.qtensor import QuantizedTensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class JitBackend:
    """Weights only, on a CPU of :mod:`quantkit.kernels.jit_targets`: any bits and rows, with or without g_idx.

    Products are summed in float32 and rounded once.

    Packed tensors:
        words: int16 [panels, units, 16, 2], see :mod:`quantkit.kernels.panels`.
        panel_scale: [panels, groups, 16], the dtype that ships.
        panel_zero: uint8 [panels, groups, 16]; asymmetric only.
        order: int32 [in]; only with g_idx: the column of x for each packed column. x is permuted once a product.
        call: int64 [9], addresses of the others, see :mod:`quantkit.kernels.jit_step`; not with torch below 2.10.
    """

    name: ClassVar[str] = "cpu_jit"

    def why_not(self, spec: LinearSpec) -> str | None:
        """See :class:`KernelBackend`."""
        if spec.device_type != "cpu":
            return f"the device {spec.device_type}; it runs on cpu"
        if find_spec("llvmlite") is None:
            return "to run without llvmlite; pip install 'quantkit[cpu]'"
        if chosen_target() is None:
            return f"this CPU; its kernels are for {', '.join(target.name for target in TARGETS)}"
        if spec.scheme.act_bits is not None:
            return "quantized activations; it multiplies by activations in floating point"
        if spec.dtype not in _DTYPES:
            return f"activations of {spec.dtype}; its kernels take bfloat16, float16 and float32"
        if spec.uneven_groups:
            return UNEVEN
        why = spec.scheme.why_not(spec.in_features)
        if why is not None:
            return why
        columns, unit = spec.scheme.columns_per_group(spec.in_features), unit_columns(spec.scheme.bits)
        if columns % unit or not spec.in_features * spec.out_features:
            return f"groups of {columns} columns; its kernels take multiples of {unit}"
        return why_not_here(spec.dtype)

    def prepack(self, q: QuantizedTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """See :class:`KernelBackend`."""
        check_weight(q, spec)
        codes, order = in_order(q)
        packed = {} if order is None else {"order": order}
        packed["words"] = aligned(pack_codes(codes, spec.scheme.bits))
        packed["panel_scale"] = aligned(pack_groups(q.scale))
        if not spec.scheme.symmetric:
            packed["panel_zero"] = aligned(pack_groups(q.zero_point))
        bits, zeros = spec.scheme.bits, packed.get("panel_zero")
        call = layer_call(packed["words"], packed["panel_scale"], zeros, bits, spec.dtype)
        return packed if call is None else {**packed, "call": call}

    def matmul(self, x: Tensor, packed: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None = None) -> Tensor:
        """See :class:`KernelBackend`."""
        flat, order = x.reshape(-1, spec.in_features), packed.get("order")
        zeros, call = packed.get("panel_zero"), packed.get("call")
        words, scale = packed["words"], packed["panel_scale"]
        if call is None or flat.shape[0] != 1 or torch.compiler.is_exporting():
            y = panels_linear(flat, words, scale, zeros, order, spec.scheme.bits, spec.out_features)
        else:
            y = step(reordered(flat, order).contiguous(), scale.shape[0], call)[:, : spec.out_features]
        return add_bias(y, bias).view(*x.shape[:-1], spec.out_features)

    def unpack(self, packed: Mapping[str, Tensor], spec: LinearSpec) -> QuantizedTensor:
        """See :class:`KernelBackend`."""
        scale = unpack_groups(packed["panel_scale"], spec.out_features)
        codes = unpack_codes(packed["words"], spec.scheme.bits, spec.out_features)
        if spec.scheme.symmetric:
            zero_point = middle_zero_point(scale, spec.scheme)
        else:
            zero_point = unpack_groups(packed["panel_zero"], spec.out_features)
        g_idx = None
        if spec.has_g_idx:
            codes, g_idx = out_of_order(codes, packed["order"], spec.scheme.columns_per_group(spec.in_features))
        return QuantizedTensor(codes, scale, zero_point, spec.scheme, g_idx)
