"""From real numbers to codes and back: the only rounding code of the package."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.errors import SchemeError, message
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

# Factors of a group's range that are tried. Above 1, for a symmetric range at 1 rounds its positive extreme half a step
# down. Steps half as wide lowered the loss of real 3- and 4-bit layers by less than 0.2 %.
SHRINK = tuple((44 - step) / 40 for step in range(29))
# Factors that the best scale of an asymmetric group is multiplied by, with its zero point and those beside it.
NUDGE = (0.9, 0.95, 1.0, 1.05, 1.1)
_TILE = 2**18  # weights that are searched at once, so that they stay in the processor's cache


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


def search_qparams(
    groups: Tensor, scheme: QuantScheme, dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of least squared rounding error, among those of shrunken ranges of each group.

    For each factor of ``SHRINK`` the min-max range times the factor is tried: what it cuts off is rounded to its ends,
    and what remains is rounded more finely. A symmetric grid has one code more below its zero point than above, so
    there the range is tried with both signs of the scale; a negative one puts that code on the positive side. For
    an asymmetric grid the best scale times each of ``NUDGE`` is then tried with the zero point and those beside it.

    Args:
        groups: float [..., columns]; one scale for each leading index.
        scheme: bits and symmetry.
        dtype: floating-point dtype of the scale on disk; errors are those of scales rounded to it.
        importance: weight of each column's squared error, broadcasts to ``groups``; None: 1.

    Returns:
        scale ``dtype`` [...], zero_point uint8 [...]; the largest range where several are equally good, and where
        nothing is better, that of :func:`choose_qparams`.

    Raises:
        SchemeError: a scale that ``dtype`` cannot hold.
    """
    scale, zero_point = choose_qparams(groups, scheme, dtype)
    wide = groups.reshape(-1, *groups.shape[-2:]) if groups.ndim != 3 else groups
    weight = None if importance is None else importance.expand_as(groups).reshape(wide.shape)
    flat_scale, flat_zero = scale.view(wide.shape[:2]), zero_point.view(wide.shape[:2])
    for part in _tiles(wide.shape):
        flat_scale[part], flat_zero[part] = _search(
            wide[part], None if weight is None else weight[part], flat_scale[part], flat_zero[part], scheme
        )
    return scale, zero_point


def _tiles(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Pieces of the leading two of three dimensions, of at most _TILE elements where a group is no larger."""
    inner = max(min(_TILE // shape[2], shape[1]), 1)
    outer = max(_TILE // (inner * shape[2]), 1)
    for i in range(0, shape[0], outer):
        for j in range(0, shape[1], inner):
            yield slice(i, i + outer), slice(j, j + inner)


def _search(
    groups: Tensor, importance: Tensor | None, scale: Tensor, zero_point: Tensor, scheme: QuantScheme
) -> tuple[Tensor, Tensor]:
    """The search over one tile [a, b, columns]; ``scale`` and ``zero_point`` [a, b] are those of the whole range."""
    search = _Search(groups, importance, scale, zero_point, scheme)
    full, low = scale.to(groups.dtype), groups.amin(-1).clamp_(max=0)
    for factor in SHRINK:
        tried = _shippable(full * factor, scale.dtype)
        if scheme.symmetric:
            search.consider(tried, zero_point)
            search.consider(-tried, zero_point)
        else:
            search.consider(tried, torch.round(-factor * low / tried.to(low.dtype)))
    if not scheme.symmetric:
        # The two ends need not shrink alike: one step of the zero point to either side.
        best, zero = search.scale.to(groups.dtype), search.zero_point.to(groups.dtype)
        for shift, factor in itertools.product((-1, 0, 1), NUDGE):
            search.consider(_shippable(best * factor, scale.dtype), zero + shift)
    return search.scale, search.zero_point


class _Search:
    """The best grids so far of the groups [a, b, columns]: ``scale`` and ``zero_point`` [a, b]."""

    def __init__(
        self, groups: Tensor, importance: Tensor | None, scale: Tensor, zero_point: Tensor, scheme: QuantScheme
    ) -> None:
        self.groups, self.importance, self.scheme = groups, importance, scheme
        self.scale, self.zero_point = scale, zero_point
        self.error = _squared_errors(groups, importance, scale.to(groups.dtype), zero_point.to(groups.dtype), scheme)

    def consider(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take these grids where they are better; a zero point that is no code is moved to the nearest code."""
        zero_point = zero_point.to(self.groups.dtype).clamp(0, self.scheme.levels - 1)
        error = _squared_errors(self.groups, self.importance, scale.to(self.groups.dtype), zero_point, self.scheme)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero_point = torch.where(better, zero_point.to(torch.uint8), self.zero_point)


def _squared_errors(
    groups: Tensor, importance: Tensor | None, scale: Tensor, zero_point: Tensor, scheme: QuantScheme
) -> Tensor:
    """[a, b]: Σ importance · (w - ŵ)² of each group [a, b, columns] on its grid [a, b]."""
    steps = groups / scale[..., None]
    lowest = -zero_point[..., None]
    error = torch.round(steps).clamp_(lowest, lowest + (scheme.levels - 1)).sub_(steps).square_()
    if importance is not None:
        error.mul_(importance)
    return error.sum(-1).mul_(scale.square())


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
        self._bounds = (-scheme.mid, scheme.mid - 1) if scheme.symmetric else None

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

    def set_rows(self, rows: slice, grid: tuple[Tensor, Tensor]) -> None:
        """Set scale ``dtype`` and zero point uint8 of all groups of some rows, [groups, rows]."""
        self.scale[:, rows], self.zero_point[:, rows] = grid
        self[:] = self.scale, self.zero_point

    def nearest(self, weight: Tensor, group: int, out: Tensor) -> Tensor:
        """Nearest codes less the zero point, as :func:`quantize` would choose them; returns the scale.

        Args:
            weight: float [out], one column.
            group: its group.
            out: where the codes less the zero point go, float [out].
        """
        scale = self._scales[group]
        torch.div(weight, scale, out=out).round_()
        if self._bounds is not None:
            out.clamp_(*self._bounds)
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


def dequantize_groups(codes: Tensor, scale: Tensor, zero_point: Tensor | int, dtype: torch.dtype) -> Tensor:
    """The real rows ``scale * (codes - zero_point)`` of contiguous groups, in float32 and rounded once to ``dtype``.

    Args:
        codes: uint8 [rows, columns].
        scale: [rows, groups].
        zero_point: uint8 [rows, groups], or one number for all.
        dtype: floating point.
    """
    zeros = zero_point[..., None].float() if isinstance(zero_point, Tensor) else float(zero_point)
    columns = codes.shape[-1] // scale.shape[-1]
    centred = codes.reshape(*scale.shape, columns).float() - zeros
    return (centred * scale[..., None].float()).reshape(codes.shape).to(dtype)


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The real weight ``scale * (codes - zero_point)`` [out, in], computed in float32 and rounded once to ``dtype``.

    Args:
        q: the quantized weight.
        dtype: floating point; None is the scale's own dtype.
    """
    target = dtype or q.scale.dtype
    if q.g_idx is None:
        return dequantize_groups(q.codes, q.scale, q.zero_point, target)
    index = q.g_idx.long()
    return ((q.codes.float() - q.zero_point[:, index].float()) * q.scale[:, index].float()).to(target)


ACT_MIN, ACT_MAX = -128, 127
"""The codes of quantized activations."""
_ACT_RANGE = (ACT_MAX - ACT_MIN) / 2  # as compressed-tensors has it: the largest magnitude is 127.5 steps


def activation_scale(abs_max: float, dtype: torch.dtype) -> float:
    """The static scale of activations up to ``abs_max``: ``abs_max / 127.5``, rounded to ``dtype``, which ships.

    Raises:
        SchemeError: not finite, or nothing that ``dtype`` can hold.
    """
    return float(_shippable(torch.tensor([abs_max], dtype=torch.float64) / _ACT_RANGE, dtype))


def quantize_activations(x: Tensor, static_scale: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
    """Codes ``clamp(round(x / scale), -128, 127)`` of activations, with one scale for each token.

    Dynamic: ``scale = absmax / 127.5`` of the token, the formula of compressed-tensors (its ``calculate_qparams``);
    computed in at least float32, where it computes in the dtype of x. A token of zeros has scale 1. Codes that become
    integers cannot hold a NaN, so a NaN is in the scale of its token too. An infinity makes a dynamic scale infinite,
    and with a static one it is the last code, like all that is out of range.

    Args:
        x: floating point [..., in].
        static_scale: positive, one number or a tensor [1]; None is dynamic.

    Returns:
        codes [..., in], whole numbers in at least float32; scale [..., 1] in the same dtype.
    """
    real = x.to(torch.promote_types(x.dtype, torch.float32))
    if static_scale is None:
        # Not vector_norm(inf), which is 20 times slower on the CPU.
        scale = real.abs().amax(-1, keepdim=True).div_(_ACT_RANGE)
        codes = torch.div(real, scale.masked_fill_(scale == 0, 1.0)).round_().clamp_(ACT_MIN, ACT_MAX)
        return codes, scale
    codes = torch.div(real, static_scale).round_().clamp_(ACT_MIN, ACT_MAX)
    # Zero for every finite token; the sum of codes is NaN where one of them is.
    return codes, codes.sum(-1, keepdim=True).mul_(0.0).add_(static_scale)


def fake_quantize_activations(x: Tensor, static_scale: Tensor | float | None = None) -> Tensor:
    """Activations rounded to their grid and back, in the dtype of x: what a simulation multiplies by.

    Args:
        x: floating point [..., in].
        static_scale: see :func:`quantize_activations`.
    """
    codes, scale = quantize_activations(x, static_scale)
    return codes.mul_(scale).to(x.dtype)


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


def round_through(x: Tensor) -> Tensor:
    """``round(x)``, with the gradient of x (straight-through estimator, arXiv:1308.3432)."""
    return x + (torch.round(x) - x).detach()


def quantize_through(x: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """:func:`quantize` of weights that are divided by their scale already, differentiable: codes as float.

    The gradient is 1 within the grid and 0 for what is clamped.

    Args:
        x: float [...], ``w / scale``.
        zero_point: float, broadcasts to ``x``.
        scheme: gives the number of levels.
    """
    return (round_through(x) + zero_point).clamp(0, scheme.levels - 1)


def scaled(scale: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale·factor`` rounded to ``dtype``, which ships; differentiable. A scale keeps its sign, whatever the factor.

    Raises:
        SchemeError: a scale that ``dtype`` cannot hold.
    """
    size = _shippable(scale.abs() * factor, dtype)
    return torch.where(scale < 0, -size, size)


def range_qparams(low: Tensor, high: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`choose_qparams` for given extremes, differentiable.

    Args:
        low: float32 [...], at most 0.
        high: float32 [...], at least 0.
        scheme: bits and symmetry.
        dtype: that the scale ships in.

    Returns:
        scale float32 [...] with a value of ``dtype``, and zero point float32 [...].

    Raises:
        SchemeError: a scale that ``dtype`` cannot hold.
    """
    if scheme.symmetric:
        scale = _shippable(torch.maximum(high, -low) / ((scheme.levels - 1) / 2), dtype).to(low.dtype)
        return scale, torch.full_like(scale, scheme.mid)
    scale = _shippable((high - low) / (scheme.levels - 1), dtype).to(low.dtype)
    return scale, round_through(-low / scale).clamp(0, scheme.levels - 1)
