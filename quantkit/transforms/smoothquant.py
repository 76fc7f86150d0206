"""SmoothQuant: part of the range of activations moves into the weights, which are easier to quantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.errors import CalibrationError, RecipeError, message
from quantkit.stats import Stat
from quantkit.structure import ScaleGroup, Source
from quantkit.transforms.base import BlockContext, Found
from quantkit.transforms.folding import reader_channels, to_channels
from quantkit.transforms.search import Point, best_of, never_activated
from quantkit.transforms.trial import Trial

_ALPHAS = 20  # steps of a search


@dataclass(frozen=True)
class SmoothQuant:
    """``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` for each input channel j (arXiv:2211.10438, eq. 4).

    Attributes:
        alpha: how much of the difficulty moves into the weights, 0 to 1; ``search`` tries 0.05, 0.1, … 1 for each group
            and takes the one with the smallest error of the sub-block's output, or none where that is best.
        sources: ``norms``: channels that a norm makes, as in the paper; ``all``: also attention values and the inner
            channels of an MLP where they can be scaled.
        search_tokens: calibration tokens that a search compares outputs on.
    """

    name: Literal["smoothquant"] = "smoothquant"
    alpha: float | Literal["search"] = 0.5
    sources: Literal["norms", "all"] = "norms"
    search_tokens: int = 2048
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.ABS_MAX})
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if self.alpha != "search" and not (number and 0 <= self.alpha <= 1):
            raise RecipeError(
                message("smoothquant", f"alpha={self.alpha!r} is out of range", "choose 0 to 1, usually 0.5, or search")
            )
        if isinstance(self.search_tokens, bool) or not isinstance(self.search_tokens, int) or self.search_tokens < 1:
            raise RecipeError(
                message("smoothquant", f"search_tokens={self.search_tokens!r} is out of range", "choose at least 1")
            )

    def takes(self, group: ScaleGroup) -> bool:
        """See :class:`quantkit.transforms.base.ScaleTransform`."""
        return self.sources == "all" or group.kind is Source.NORM

    def find(self, group: ScaleGroup, context: BlockContext) -> Found:
        """See :class:`quantkit.transforms.base.ScaleTransform`."""
        channels, inputs, weights = _ranges(group, context)
        if not bool(inputs.any()):
            return never_activated()
        if self.alpha != "search":
            return Found(smoothing(inputs, weights, self.alpha), f"alpha {self.alpha:g}")
        trial = Trial(group, context, group.parent, self.search_tokens)
        alphas = [step / _ALPHAS for step in range(1, _ALPHAS + 1)]
        points = [Point(f"alpha {alpha:g}", smoothing(inputs, weights, alpha)) for alpha in alphas]
        return best_of(points, lambda scale: trial.loss(scale[channels]), trial.loss(None), str(group))


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Equation 4; 1 for channels that are always zero or that nobody weighs.

    Args:
        inputs: float [channels], ``max|X_j|``.
        weights: float [channels], ``max|W_j|`` over all readers.
        alpha: migration strength.
    """
    scale = inputs.double() ** alpha / weights.double() ** (1 - alpha)
    return torch.where((inputs > 0) & (weights > 0), scale, 1.0)


def _ranges(group: ScaleGroup, context: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
    """The channel of each column, and for each channel ``max|X_j|`` and ``max|W_j|``."""
    peaks = context.stats(group.readers[0]).abs_max.cpu()
    if not bool(torch.isfinite(peaks).all()):
        raise CalibrationError(
            message(
                str(group), "its activations are not finite", "check the model in this dtype, or use --dtype float32"
            )
        )
    channels = reader_channels(group, peaks.numel(), context.heads)
    weights = torch.stack([context.tensors.weight(reader).abs().amax(0) for reader in group.readers]).amax(0)
    return channels, to_channels(peaks, channels, "amax"), to_channels(weights.cpu(), channels, "amax")
