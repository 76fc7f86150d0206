"""What every format asks of a stranger's tensors: their shape and dtype, and scales that mean something."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import CheckpointError, message

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes that scales are read in."""


def check_tensor(where: str, tensor: Tensor | None, shape: list[int], dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse a tensor that is missing, or of another shape or dtype.

    Args:
        where: the layer and the tensor's name, for the message.
        tensor: as read; None when it is not there.
        shape: as the config and the model ask for.
        dtypes: any of them will do.

    Raises:
        CheckpointError: it is not as asked.
    """
    if tensor is None:
        raise CheckpointError(message(where, "is missing", "re-download the checkpoint"))
    if list(tensor.shape) != shape or tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise CheckpointError(message(where, f"is {got}", f"config.json asks for {allowed} {shape}"))


def check_scale(where: str, scale: Tensor) -> None:
    """Refuse scales that are NaN, infinite or zero; negative ones are legal (AutoRound writes them).

    Raises:
        CheckpointError: there is one.
    """
    if not bool(torch.isfinite(scale).all()) or bool((scale == 0).any()):
        raise CheckpointError(message(where, "holds NaN, inf or 0", "write the checkpoint again"))
