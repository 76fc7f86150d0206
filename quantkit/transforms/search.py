"""The best of some scales: what AWQ and SmoothQuant do with a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import CalibrationError, SchemeError, message
from quantkit.transforms.base import Found


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One scale of a grid.

    Attributes:
        choice: how the report calls it.
        scale: float [channels].
    """

    choice: str
    scale: Tensor


def best_of(points: Sequence[Point], loss_of: Callable[[Tensor], float], unscaled: float, where: str) -> Found:
    """The point of the smallest loss, or none where no point is better than leaving the weights as they are.

    Args:
        points: the grid.
        loss_of: the loss of a scale.
        unscaled: the loss without any scale.
        where: the group, for messages.

    Returns:
        With a note on grid points that were left out: scales or losses that are not finite.

    Raises:
        CalibrationError: no loss is finite, not even that without a scale.
    """
    losses = [_loss(point.scale, loss_of) for point in points]
    left_out = [point.choice for point, loss in zip(points, losses, strict=True) if not math.isfinite(loss)]
    note = f"not finite and left out: {', '.join(left_out)}" if left_out else ""
    finite = [index for index, loss in enumerate(losses) if math.isfinite(loss)]
    best = min(finite, key=lambda index: losses[index], default=None)
    if not math.isfinite(unscaled) and best is None:
        raise CalibrationError(
            message(where, "quantized outputs are not finite for any scale", "use --dtype float32 or bfloat16")
        )
    if best is None or losses[best] >= unscaled:
        return Found(None, "none", unscaled, unscaled, note)
    before = unscaled if math.isfinite(unscaled) else None
    return Found(points[best].scale, points[best].choice, losses[best], before, note)


def never_activated() -> Found:
    """Of a group whose input is zero for all calibration data: nothing tells scales apart, so it stays, and the report
    says so."""
    return Found(None, "none", note="the calibration data never activates it: left as it is")


def _loss(scale: Tensor, loss_of: Callable[[Tensor], float]) -> float:
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        return math.nan
    try:
        return loss_of(scale)
    except SchemeError:  # the scale of a quantized weight does not fit its dtype
        return math.inf
