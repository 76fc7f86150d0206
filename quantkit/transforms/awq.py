"""AWQ: channels that activations make important are scaled up before rounding, by as much as a search finds best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.errors import CalibrationError, RecipeError, message
from quantkit.stats import Stat
from quantkit.structure import ScaleGroup
from quantkit.transforms.base import BlockContext, Found
from quantkit.transforms.folding import reader_channels, to_channels
from quantkit.transforms.search import Point, best_of, never_activated
from quantkit.transforms.trial import Trial

_NOT_CLIPPED = ("q_proj", "k_proj")


@dataclass(frozen=True)
class AWQ:
    """``s = s_X^ratio``, s_X the mean magnitude of each input channel (arXiv:2306.00978, eq. 5), the ratio by a search
    for the smallest error of the whole sub-block's output (eq. 4): of attention for q/k/v, of the MLP for gate/up, of
    the layer itself elsewhere.

    Attributes:
        grid: ratios tried for each group, evenly from 0 to 1; leaving the weights as they are is always tried too.
        duo_scaling: ``s = s_X^ratio / s_W^(1 - ratio)``, s_W the mean over the rows of the weights' magnitudes, each
            relative to the largest of its quantization group.
        search_tokens: calibration tokens that outputs are compared on.
        clip: afterwards, clamp each quantization group of the weights to the range with the smallest error of the
            layer's output (section 3.2; q_proj and k_proj, whose outputs are multiplied with each other, are left out).
            It is for round-to-nearest: other methods choose ranges of their own.
    """

    name: Literal["awq"] = "awq"
    grid: int = 20
    duo_scaling: bool = True
    search_tokens: int = 2048
    clip: bool = False
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        for option, least in (("grid", 2), ("search_tokens", 1)):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RecipeError(message("awq", f"{option}={value!r} is out of range", f"choose at least {least}"))
        for option in ("duo_scaling", "clip"):
            value = getattr(self, option)
            if not isinstance(value, bool):
                raise RecipeError(message("awq", f"{option}={value!r} is not a truth value", "choose true or false"))

    @property
    def needs(self) -> frozenset[Stat]:
        """See :class:`quantkit.transforms.base.ScaleTransform`."""
        return frozenset({Stat.ABS_MEAN, Stat.HESSIAN} if self.clip else {Stat.ABS_MEAN})

    def clips(self, linear: str) -> bool:
        """Whether a quantized layer's weights are clamped; its name within the block."""
        return self.clip and linear.rpartition(".")[2] not in _NOT_CLIPPED

    def takes(self, group: ScaleGroup) -> bool:  # noqa: ARG002
        """See :class:`quantkit.transforms.base.ScaleTransform`: every group."""
        return True

    def find(self, group: ScaleGroup, context: BlockContext) -> Found:
        """See :class:`quantkit.transforms.base.ScaleTransform`."""
        means = context.stats(group.readers[0]).abs_mean.cpu().double()
        if not bool(torch.isfinite(means).all()):
            raise CalibrationError(
                message(
                    str(group),
                    "its activations are not finite",
                    "check the model in this dtype, or use --dtype float32",
                )
            )
        if not bool(means.any()):
            return never_activated()
        channels = reader_channels(group, means.numel(), context.heads)
        inputs = to_channels(means, channels, "mean")
        weights = to_channels(_relative_magnitudes(group, context), channels, "mean") if self.duo_scaling else None
        trial = Trial(group, context, group.parent, self.search_tokens)
        ratios = [step / (self.grid - 1) for step in range(self.grid)]
        points = [Point(f"ratio {ratio:.3g}", awq_scale(inputs, weights, ratio)) for ratio in ratios]
        return best_of(points, lambda scale: trial.loss(scale[channels]), trial.loss(None), str(group))


def awq_scale(inputs: Tensor, weights: Tensor | None, ratio: float) -> Tensor:
    """Equation 5, its geometric mid-range normalised to one; 1 for channels that are always zero or never weighed.

    Args:
        inputs: float64 [channels], the mean magnitude of the activations.
        weights: float64 [channels], the mean relative magnitude of the weights; None leaves it out.
        ratio: 0 to 1.
    """
    used = inputs > 0 if weights is None else (inputs > 0) & (weights > 0)
    scale = inputs**ratio if weights is None else inputs**ratio / weights ** (1 - ratio)
    if not bool(used.any()):
        return torch.ones_like(inputs)
    middle = (scale[used].max() * scale[used].min()).sqrt()
    return torch.where(used, scale / middle, 1.0)


def _relative_magnitudes(group: ScaleGroup, context: BlockContext) -> Tensor:
    """float64 [in]: the mean over all readers' rows of |w| / max |w| of its quantization group."""
    total: Tensor | None = None
    rows = 0
    for reader in group.readers:
        weight, scheme = context.tensors.weight(reader).abs(), context.scheme(reader)
        if scheme is None:
            continue
        grouped = weight.reshape(weight.shape[0], scheme.num_groups(weight.shape[1]), -1)
        largest = grouped.amax(-1, keepdim=True)
        relative = torch.where(largest > 0, grouped / largest, 0.0).reshape(weight.shape).sum(0, dtype=torch.float64)
        total, rows = relative if total is None else total + relative, rows + weight.shape[0]
    assert total is not None, "the pipeline asks only for groups of which something is quantized"
    return total / rows
