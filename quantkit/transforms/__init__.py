"""Transforms: changes of the dense model before the solver that leave its function as it is."""

from __future__ import annotations

from quantkit.transforms.awq import AWQ
from quantkit.transforms.base import (
    BlockContext,
    BlockTensors,
    Call,
    Found,
    ScaleTransform,
    TransformRecord,
)
from quantkit.transforms.changes import changed_in_block, changed_outside
from quantkit.transforms.clip import clip_weight
from quantkit.transforms.refusals import check_model, check_order
from quantkit.transforms.rotation import Rotation
from quantkit.transforms.smoothquant import SmoothQuant

Transform = SmoothQuant | AWQ | Rotation
TRANSFORMS: tuple[type[SmoothQuant | AWQ | Rotation], ...] = (SmoothQuant, AWQ, Rotation)

__all__ = [
    "AWQ",
    "TRANSFORMS",
    "BlockContext",
    "BlockTensors",
    "Call",
    "Found",
    "Rotation",
    "ScaleTransform",
    "SmoothQuant",
    "Transform",
    "TransformRecord",
    "changed_in_block",
    "changed_outside",
    "check_model",
    "check_order",
    "clip_weight",
]
