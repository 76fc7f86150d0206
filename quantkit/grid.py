"""From real numbers to codes and back: the only rounding code of the package."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import SchemeError, message
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme


def choose_qparams(groups: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point from the extremes of each group (min-max).

    The scale is rounded to ``dtype``, the dtype that ships, before anything is quantized with it. A group of zeros
    gets scale 1, and a scale that ``dtype`` would flush to zero gets its smallest (normal) number.

    Args:
        groups: float [..., columns]; one scale for each leading index.
        scheme: bits and symmetry. Symmetric: ``scale = amax / ((2^b - 1) / 2)``, zero point ``2^(b-1)``.
            Asymmetric: ``scale = (max - min) / (2^b - 1)`` over a range that includes 0.
        dtype: floating-point dtype of the scale on disk.

    Returns:
        scale ``dtype`` [...], zero_point uint8 [...].

    Raises:
        SchemeError: a scale that ``dtype`` cannot hold.
    """
    if scheme.symmetric:
        raw = groups.abs().amax(-1) / ((scheme.levels - 1) / 2)
        scale = _shippable(raw, dtype)
        return scale, torch.full(scale.shape, scheme.mid, dtype=torch.uint8, device=scale.device)
    low = groups.amin(-1).clamp(max=0)
    scale = _shippable((groups.amax(-1).clamp(min=0) - low) / (scheme.levels - 1), dtype)
    zero_point = torch.round(-low / scale.to(low.dtype)).clamp_(0, scheme.levels - 1)
    return scale, zero_point.to(torch.uint8)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """Nearest codes: ``clamp(round(w / scale) + zero_point, 0, 2^b - 1)``, as float in ``weight``'s dtype.

    Args:
        weight: float [...].
        scale: broadcasts to ``weight``; the dtype that ships.
        zero_point: broadcasts to ``weight``.
        scheme: gives the number of levels.
    """
    return torch.round(weight / scale.to(weight.dtype)).add_(zero_point).clamp_(0, scheme.levels - 1)


class Grids:
    """The grids of a weight while it is solved: scales and zero points a group at a time, and the work of rounding.

    Attributes:
        scale: ``dtype`` [groups, out], the dtype that ships.
        zero_point: uint8 [groups, out].
    """

    def __init__(self, scale: Tensor, zero_point: Tensor, scheme: QuantScheme, compute: torch.dtype) -> None:
        self.scale, self.zero_point, self._scheme = scale, zero_point, scheme
        self._scale = scale.to(compute, copy=True)
        self._low = zero_point.to(compute).neg_()
        # Lines once and for all: an index costs as much as the arithmetic on a short line.
        self._scales, self._lows = self._scale.unbind(), self._low.unbind()
        self._high = self._low + (scheme.levels - 1)
        self._highs = self._high.unbind()

    @classmethod
    def empty(
        cls,
        groups: int,
        out_features: int,
        scheme: QuantScheme,
        dtype: torch.dtype,
        compute: torch.dtype,
        device: torch.device,
    ) -> Grids:
        """Grids that are yet to be set: scale 1, zero point in the middle.

        Args:
            groups, out_features: one grid each.
            scheme: bits and symmetry.
            dtype: floating-point dtype of the scale on disk.
            compute: dtype of the weights that are rounded.
            device: where they are.
        """
        scale = torch.ones(groups, out_features, dtype=dtype, device=device)
        zero_point = torch.full((groups, out_features), scheme.mid, dtype=torch.uint8, device=device)
        return cls(scale, zero_point, scheme, compute)

    def __setitem__(self, group: int | slice, grid: tuple[Tensor, Tensor]) -> None:
        """Set scale ``dtype`` and zero point uint8 of one group [out], or of several [groups, out]."""
        self.scale[group], self.zero_point[group] = grid
        self._scale[group] = self.scale[group].to(self._scale.dtype)
        self._low[group] = self.zero_point[group].to(self._low.dtype).neg_()
        self._high[group] = self._low[group] + (self._scheme.levels - 1)

    def nearest(self, weight: Tensor, group: int, out: Tensor) -> Tensor:
        """Nearest codes less the zero point, as :func:`quantize` would choose them; returns the scale.

        Args:
            weight: float [out], one column.
            group: its group.
            out: where the codes less the zero point go, float [out].
        """
        scale = self._scales[group]
        torch.div(weight, scale, out=out).round_()
        if self._scheme.symmetric:
            out.clamp_(-self._scheme.mid, self._scheme.mid - 1)
        else:
            torch.clamp(out, self._lows[group], self._highs[group], out=out)
        return scale

    def zero_points(self, groups: Tensor) -> Tensor | int:
        """What turns :meth:`nearest` of columns of these groups into codes: uint8 [columns, out], or a number."""
        return self._scheme.mid if self._scheme.symmetric else self.zero_point[groups]


def quantize_groups(weight: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> QuantizedTensor:
    """Round a whole weight to the nearest point of its min-max grids.

    Args:
        weight: float [out, in].
        scheme: the grid.
        dtype: floating-point dtype of the scale on disk.

    Raises:
        SchemeError: the group size does not divide ``in``, or a scale does not fit ``dtype``.
    """
    out_features, in_features = weight.shape
    groups = weight.reshape(out_features, scheme.num_groups(in_features), -1)
    scale, zero_point = choose_qparams(groups, scheme, dtype)
    codes = quantize(groups, scale[..., None], zero_point[..., None], scheme)
    return QuantizedTensor(codes.to(torch.uint8).reshape(out_features, in_features), scale, zero_point, scheme)


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The real weight ``scale * (codes - zero_point)`` [out, in], computed in float32 and rounded once to ``dtype``.

    Args:
        q: the quantized weight.
        dtype: floating point; None is the scale's own dtype.
    """
    target = dtype or q.scale.dtype
    if q.g_idx is None:
        centred = q.codes.reshape(q.out_features, q.scale.shape[1], -1).float() - q.zero_point[..., None].float()
        return (centred * q.scale[..., None].float()).reshape(q.codes.shape).to(target)
    index = q.g_idx.long()
    return ((q.codes.float() - q.zero_point[:, index].float()) * q.scale[:, index].float()).to(target)


def _shippable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` rounded to ``dtype``: 1 for groups of zeros, never zero, never infinite."""
    limits = torch.finfo(dtype)
    if scale.numel() and not bool((scale <= limits.max).all()):
        raise SchemeError(
            message(
                "scale",
                f"{float(scale.max()):.3g} does not fit in {dtype}, whose largest number is {limits.max:.3g}",
                "use a wider --dtype (bfloat16 or float32)",
            )
        )
    # float16 has no room to waste: below its normal numbers it still holds multiples of 2^-24.
    smallest = limits.tiny * limits.eps if dtype == torch.float16 else limits.tiny
    return torch.where(scale == 0, 1.0, scale.clamp(min=smallest)).to(dtype)
