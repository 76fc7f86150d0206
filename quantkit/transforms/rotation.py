"""Rotation: outliers are spread over all channels by orthogonal matrices that are folded into the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from quantkit.errors import RecipeError, message
from quantkit.stats import Stat


@dataclass(frozen=True)
class Rotation:
    """QuaRot's and SpinQuant's rotations that cost nothing at run time (arXiv:2404.00456; arXiv:2405.16406: R1, R2).

    It needs no data and comes first: what follows sees the rotated model.

    Attributes:
        residual: rotate the residual stream. The gains of norms move into the layers behind them, so that a head
            that was tied to the embedding becomes a matrix of its own.
        heads: rotate the values of every attention head.
        seed: of the random signs (or matrices).
    """

    name: Literal["rotation"] = "rotation"
    residual: bool = True
    heads: bool = True
    seed: int = 0
    needs: ClassVar[frozenset[Stat]] = frozenset()
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        for option in ("residual", "heads"):
            if not isinstance(getattr(self, option), bool):
                raise RecipeError(
                    message(
                        "rotation", f"{option}={getattr(self, option)!r} is not a truth value", "choose true or false"
                    )
                )
        if not (self.residual or self.heads):
            raise RecipeError(message("rotation", "rotates nothing", "choose residual: true or heads: true"))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise RecipeError(message("rotation", f"seed={self.seed!r} is out of range", "choose 0 or more"))
