"""What of a layer or vector may move while a block is tuned: the real tensor, differentiable, and what ships of it.

The gradient of round(x) is taken for 1; what is learned and how is in :mod:`quantkit.tuning`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from quantkit.grid import quantize_through, range_qparams, scaled
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

_PULL = 0.5  # how far a continued rounding starts from the middle of its cell towards the original weight


class TunedWeight(Protocol):
    """A layer's quantized weight with parameters that may move.

    Attributes:
        name: of the layer within its block.
        signed: parameters that follow the sign of their gradient, with the interval that each is kept in.
        smooth: parameters that follow Adam.
    """

    name: str
    signed: list[tuple[Tensor, float, float]]
    smooth: list[Tensor]

    def weight(self) -> Tensor:
        """The real weight, float32 [out, in], differentiable."""
        ...

    def quantized(self) -> QuantizedTensor:
        """The same weight as it ships: ``dequantize(quantized())`` equals ``weight()`` bit for bit."""
        ...


class ClippedRounding:
    """Codes ``clamp(round(w/s + V) + z)``, the grid (s, z) from ``α·max(w)`` and ``β·min(w)``.

    arXiv:2309.05516, equations 3 to 5. It starts (V = 0, α = β = 1) at round to nearest.

    Args:
        name: of the layer.
        weight: float32 [out, in], the original.
        scheme: the grid.
        dtype: of the scales on disk.
        clip: whether α and β move too.
    """

    def __init__(self, name: str, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, *, clip: bool) -> None:
        self.name, self._scheme, self._dtype = name, scheme, dtype
        self._original = weight.reshape(weight.shape[0], scheme.num_groups(weight.shape[1]), -1)
        self._low = self._original.amin(-1).clamp(max=0)
        self._high = self._original.amax(-1).clamp(min=0)
        self._alpha = torch.ones_like(self._high).requires_grad_(clip)
        self._beta = torch.ones_like(self._low).requires_grad_(clip)
        self._offset = torch.zeros_like(self._original).requires_grad_()
        self.signed = [(self._offset, -0.5, 0.5)]
        if clip:
            self.signed += [(self._alpha, 0.0, 1.0), (self._beta, 0.0, 1.0)]
        self.smooth: list[Tensor] = []

    def weight(self) -> Tensor:
        """See :class:`TunedWeight`."""
        codes, scale, zero_point = self._parts()
        return ((codes - zero_point[..., None]) * scale[..., None]).flatten(1)

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        """See :class:`TunedWeight`."""
        codes, scale, zero_point = self._parts()
        return QuantizedTensor(
            codes.flatten(1).to(torch.uint8), scale.to(self._dtype), zero_point.to(torch.uint8), self._scheme
        )

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        scale, zero_point = range_qparams(self._low * self._beta, self._high * self._alpha, self._scheme, self._dtype)
        x = self._original / scale[..., None] + self._offset
        return quantize_through(x, zero_point[..., None], self._scheme), scale, zero_point


class ScaledCodes:
    """A solver's codes and zero points, with scales ``s·(1 + t)``.

    With ``original``, the codes go on from where the solver left them: ``clamp(round(u + V) + z)``, where u is the
    original ``w/s`` moved into the cell that the solver rounded it to. A weight that the solver pushed to the other
    side of an edge starts next to it, one that lies deep in its cell has a long way.

    Args:
        name: of the layer.
        start: what the solver returned.
        scales: whether t moves.
        original: float32 [out, in], the weight before it was solved; None keeps the codes.
    """

    def __init__(self, name: str, start: QuantizedTensor, *, scales: bool, original: Tensor | None = None) -> None:
        self.name, self._start = name, start
        # Columns of a group side by side, in whatever order they are on disk.
        self._order = None if start.g_idx is None else torch.argsort(start.g_idx, stable=True)
        self._inverse = None if self._order is None else torch.argsort(self._order)
        self._codes = self._grouped(start.codes)
        self._scale, self._zero_point = start.scale.float(), start.zero_point.float()
        self._factor = torch.zeros_like(self._scale).requires_grad_(scales)
        self._offset: Tensor | None = None
        self.signed: list[tuple[Tensor, float, float]] = []
        self.smooth = [self._factor] if scales else []
        if original is not None:
            centre = self._codes - self._zero_point[..., None]
            x = self._grouped(original) / self._scale[..., None]
            self._base = centre + (x - centre).clamp(-0.5, 0.5) * _PULL
            self._offset = torch.zeros_like(self._base).requires_grad_()
            self.signed = [(self._offset, -1.0, 1.0)]

    def weight(self) -> Tensor:
        """See :class:`TunedWeight`."""
        centred = self._current() - self._zero_point[..., None]
        return self._columns((centred * self._shipped().to(torch.float32)[..., None]).flatten(1))

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        """See :class:`TunedWeight`."""
        codes = self._columns(self._current().flatten(1)).to(torch.uint8)
        return QuantizedTensor(codes, self._shipped(), self._start.zero_point, self._start.scheme, self._start.g_idx)

    def _shipped(self) -> Tensor:
        return scaled(self._scale, 1 + self._factor, self._start.scale.dtype)

    def _current(self) -> Tensor:
        if self._offset is None:
            return self._codes.float()
        return quantize_through(self._base + self._offset, self._zero_point[..., None], self._start.scheme)

    def _grouped(self, matrix: Tensor) -> Tensor:
        ordered = matrix if self._order is None else matrix[:, self._order]
        return ordered.reshape(matrix.shape[0], self._start.scale.shape[1], -1)

    def _columns(self, ordered: Tensor) -> Tensor:
        return ordered if self._inverse is None else ordered[:, self._inverse]


class TunedVector:
    """A gain or bias ``v + unit·t``, unit the root mean square of v, so that one learning rate fits all.

    Args:
        name: of the parameter within its block.
        start: [n], the values and the dtype that ship.
    """

    def __init__(self, name: str, start: Tensor) -> None:
        self.name, self._dtype, self._start = name, start.dtype, start.float()
        unit = float(self._start.square().mean().sqrt())
        self._unit = unit if unit > 0 else 1.0
        self._step = torch.zeros_like(self._start).requires_grad_()
        self.smooth = [self._step]

    def value(self) -> Tensor:
        """The vector as it ships, differentiable."""
        return (self._start + self._unit * self._step).to(self._dtype)
