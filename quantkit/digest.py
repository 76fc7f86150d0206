"""The bytes of a tensor, hashed: equal digests mean equal tensors, to the last bit."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on any device, row by row; of one in memory that is contiguous not a copy."""
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes; neither shape nor dtype is part of it."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()
