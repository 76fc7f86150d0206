"""AutoRound (SignRound): which way each weight is rounded is learned from the block's output.

The options are here; what they ask for is done by :mod:`quantkit.tuning`, because it looks at a whole decoder block
where a solver looks at one matrix. Within a block, layers of other methods are solved first; then all layers of this
method are tuned together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.grid import dequantize, quantize_groups
from quantkit.scheme import QuantScheme
from quantkit.solvers.base import Solution
from quantkit.solvers.options import check_flag, check_fraction, check_integer
from quantkit.stats import LayerStats, Stat


@dataclass(frozen=True)
class AutoRound:
    """Learned rounding offsets and clip factors (arXiv:2309.05516), by sign-gradient descent on the block's output.

    Attributes:
        iterations: updates of a block.
        batch: samples an update.
        learning_rate: of offsets (in steps of the grid) and clip factors, falling linearly to 0; None: 1/iterations.
        clip: learn the clip factors α and β of each group too.
        held_out: share of the calibration samples that decides which state is kept.
        seed: of the held-out samples and of the order of the others.
    """

    name: Literal["autoround"] = "autoround"
    iterations: int = 200
    batch: int = 8
    learning_rate: float | None = None
    clip: bool = True
    held_out: float = 0.0625
    seed: int = 0
    needs: ClassVar[frozenset[Stat]] = frozenset()
    writes_g_idx: ClassVar[bool] = False
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        check_integer("autoround", "iterations", self.iterations, 1, "200")
        check_integer("autoround", "batch", self.batch, 1, "8")
        check_integer("autoround", "seed", self.seed, 0, "0")
        check_flag("autoround", "clip", self.clip)
        check_fraction("autoround", "held_out", self.held_out, 0.5, "0.0625")
        if self.learning_rate is not None:
            check_fraction("autoround", "learning_rate", self.learning_rate, 1.0, "null, which is 1/iterations")

    @property
    def rate(self) -> float:
        """The first learning rate."""
        return 1 / self.iterations if self.learning_rate is None else self.learning_rate

    def solve(self, weight: Tensor, scheme: QuantScheme, stats: LayerStats | None, dtype: torch.dtype) -> Solution:  # noqa: ARG002
        """Where the tuning starts: round to nearest. The loss is the squared weight error of each row."""
        q = quantize_groups(weight, scheme, dtype)
        return Solution(q, dequantize(q, torch.float32).sub_(weight).square_().sum(-1, dtype=torch.float64))
