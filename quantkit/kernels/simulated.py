"""The simulated backend: quantized activations on any device, rounded to their grid but multiplied as floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from quantkit.grid import fake_quantize_activations
from quantkit.kernels.base import LinearSpec
from quantkit.kernels.reference import ReferenceBackend
from quantkit.qtensor import QuantizedTensor

_WEIGHT_ONLY = ReferenceBackend()


@dataclass(frozen=True, slots=True)
class SimulatedBackend:
    """Any scheme with quantized activations, floating-point dtype and device.

    No product of integers takes place: activations are rounded to their grid and back to ``spec.dtype``, and the
    reference backend multiplies. The result is that of the integer product to the rounding of ``spec.dtype``; the time
    is more than that of a dense layer. Packed tensors: those of the reference backend.
    """

    name: ClassVar[str] = "simulated"

    def why_not(self, spec: LinearSpec) -> str | None:
        """Refuses activations in floating point, and what the reference backend refuses."""
        if spec.scheme.act_bits is None:
            return "activations in floating point; it rounds activations to 8 bits"
        return _WEIGHT_ONLY.why_not(replace(spec, scheme=spec.scheme.weight_only))

    def prepack(self, q: QuantizedTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """See :class:`KernelBackend`."""
        return _WEIGHT_ONLY.prepack(q, spec)

    def matmul(self, x: Tensor, packed: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None = None) -> Tensor:
        """See :class:`KernelBackend`."""
        return _WEIGHT_ONLY.matmul(fake_quantize_activations(x, packed.get("act_scale")), packed, spec, bias)

    def unpack(self, packed: Mapping[str, Tensor], spec: LinearSpec) -> QuantizedTensor:
        """See :class:`KernelBackend`."""
        return _WEIGHT_ONLY.unpack(packed, spec)
