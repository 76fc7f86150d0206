"""The Triton backend: weights of 2 to 8 bits times float16 or bfloat16 activations on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import ClassVar, cast

import torch
from torch import Tensor

from quantkit.kernels.base import LinearSpec, check_weight, middle_zero_point
from quantkit.kernels.order import UNEVEN, in_order, out_of_order
from quantkit.kernels.planes import (
    COLUMNS,
    ROWS,
    num_atoms,
    num_units,
    pack_scale,
    pack_words,
    pack_zeros,
    unpack_scale,
    unpack_words,
    unpack_zeros,
)
from quantkit.kernels.tiles import kernel_group, num_counters, why_not_group
from quantkit.kernels.triton_op import planes_linear
from quantkit.qtensor import QuantizedTensor

_DTYPES = (torch.float16, torch.bfloat16)
_OLDEST = (8, 0)  # compute capability: asynchronous copies, and bfloat16 on tensor cores
_INDEX_LIMIT = 1 << 31


@dataclass(frozen=True, slots=True)
class TritonBackend:
    """Any weight-only scheme with groups of a multiple of 32 columns, or one scale per channel; with or without g_idx.

    Up to 64 rows of x are multiplied by the packed weight; for more, a part of the weight at a time is made dense.
    Packed tensors (:mod:`quantkit.kernels.planes`): words, scale; zeros where asymmetric; and
        order: int32 [in]; only with g_idx: the column of x for each packed column. x is permuted once a product.
        counters: int32, scratch that is zero between products: a layer runs on one stream at a time.
    """

    name: ClassVar[str] = "triton"

    def why_not(self, spec: LinearSpec) -> str | None:
        """Refuses what the kernels cannot do, and machines that cannot run them."""
        reason = self._why_not_layer(spec)
        if reason is not None:
            return reason
        if spec.device_type != "cuda":
            return f"the device {spec.device_type}; it runs on cuda"
        return why_not_here()

    def _why_not_layer(self, spec: LinearSpec) -> str | None:
        if spec.scheme.act_bits is not None:
            return "quantized activations; it multiplies by activations in floating point"
        if spec.dtype not in _DTYPES:
            return f"activations of {spec.dtype}; its tensor cores multiply float16 and bfloat16"
        if spec.in_features < 1 or spec.out_features < 1:
            return f"sizes {spec.in_features} x {spec.out_features}; it takes at least one row and column"
        if (
            num_units(spec.out_features, spec.scheme.bits) * num_atoms(spec.in_features) * ROWS * COLUMNS
            >= _INDEX_LIMIT
        ):
            return "a weight of 2**31 words or more; it indexes with 32-bit integers"
        if spec.uneven_groups:
            return UNEVEN
        return spec.scheme.why_not(spec.in_features) or why_not_group(spec.scheme.group_size)

    def prepack(self, q: QuantizedTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """See :class:`KernelBackend`. On a GPU the kernels that will run are first tested there, once a process.

        Raises:
            KernelError: also where the kernels are wrong on this GPU.
        """
        check_weight(q, spec)
        bits, device = spec.scheme.bits, q.codes.device
        group, repeats, groups = _grouping(spec)
        if device.type == "cuda":
            from quantkit.kernels import triton_check

            triton_check.magic_for(device, spec.dtype, bits, group, spec.in_features, spec.scheme.symmetric)
        codes, order = in_order(q)
        packed = {} if order is None else {"order": order}
        packed["words"] = pack_words(codes, bits)
        packed["scale"] = pack_scale(q.scale, bits, repeats, groups)
        if not spec.scheme.symmetric:
            packed["zeros"] = pack_zeros(q.zero_point, bits, repeats, groups)
        packed["counters"] = torch.zeros(num_counters(packed["words"].shape[0]), dtype=torch.int32, device=device)
        return packed

    def matmul(self, x: Tensor, packed: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None = None) -> Tensor:
        """See :class:`KernelBackend`."""
        y = planes_linear(
            x.reshape(-1, spec.in_features),
            packed["words"],
            packed["scale"],
            packed.get("zeros"),
            packed.get("order"),
            bias,
            packed["counters"],
            spec.scheme.bits,
            kernel_group(spec.scheme.group_size),
            spec.out_features,
        )
        return cast(Tensor, y).view(*x.shape[:-1], spec.out_features)

    def unpack(self, packed: Mapping[str, Tensor], spec: LinearSpec) -> QuantizedTensor:
        """See :class:`KernelBackend`."""
        bits, rows, columns = spec.scheme.bits, spec.out_features, spec.scheme.num_groups(spec.in_features)
        _, repeats, _ = _grouping(spec)
        codes = unpack_words(packed["words"], bits, rows, spec.in_features)
        scale = unpack_scale(packed["scale"], bits, repeats, rows, columns)
        if spec.scheme.symmetric:
            zero_point = middle_zero_point(scale, spec.scheme)
        else:
            zero_point = unpack_zeros(packed["zeros"], bits, repeats, rows, columns)
        g_idx = None
        if spec.has_g_idx:
            codes, g_idx = out_of_order(codes, packed["order"], spec.scheme.columns_per_group(spec.in_features))
        return QuantizedTensor(codes, scale, zero_point, spec.scheme, g_idx)


def _grouping(spec: LinearSpec) -> tuple[int, int, int]:
    """Columns of a packed group (0: all), how often a scale repeats, packed groups."""
    group = kernel_group(spec.scheme.group_size)
    if not group:
        return 0, 1, 1
    columns = num_atoms(spec.in_features) * COLUMNS
    return group, spec.scheme.columns_per_group(spec.in_features) // group, -(-columns // group)


@cache
def why_not_here() -> str | None:
    """Why this machine cannot run Triton kernels; None when it can."""
    if find_spec("triton") is None:
        return "this machine, where triton is not installed"
    if not torch.cuda.is_available():
        return "this machine, where torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST:
        return f"compute capability {capability[0]}.{capability[1]}; it needs {_OLDEST[0]}.{_OLDEST[1]}"
    return None
