"""QuantizedTensor: the one logical form of a quantized weight. Formats and kernels convert to and from it."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.digest import tensor_bytes
from quantkit.scheme import QuantScheme


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """A weight ``W[o, i] = scale[o, g(i)] * (codes[o, i] - zero_point[o, g(i)])``.

    Attributes:
        codes: uint8 [out, in], unsigned, below ``2**bits``.
        scale: [out, groups], in the floating-point dtype that ships.
        zero_point: uint8 [out, groups]; symmetric: ``2**(bits-1)``.
        scheme: bits, group size, symmetry, activations.
        g_idx: int32 [in], the group of each column; None: contiguous groups, ``g(i) = i // group_size``.
        act_scale: of static activations: what the input is divided by before it is rounded to codes of
            ``act_bits``; positive, and a float32 number exactly. None for all other schemes.

    Raises:
        ValueError: shapes or dtypes that contradict each other.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    scheme: QuantScheme
    g_idx: Tensor | None = None
    act_scale: float | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.ndim != 2:
            raise ValueError(f"codes must be uint8 [out, in], not {self.codes.dtype} {list(self.codes.shape)}")
        expected = [self.out_features, self.scheme.num_groups(self.in_features)]
        if list(self.scale.shape) != expected or not self.scale.dtype.is_floating_point:
            raise ValueError(
                f"scale must be floating point {expected}, not {self.scale.dtype} {list(self.scale.shape)}"
            )
        if list(self.zero_point.shape) != expected or self.zero_point.dtype != torch.uint8:
            raise ValueError(
                f"zero_point must be uint8 {expected}, not {self.zero_point.dtype} {list(self.zero_point.shape)}"
            )
        if self.g_idx is not None and (self.g_idx.dtype != torch.int32 or list(self.g_idx.shape) != [self.in_features]):
            raise ValueError(
                f"g_idx must be int32 [{self.in_features}], not {self.g_idx.dtype} {list(self.g_idx.shape)}"
            )
        if (self.act_scale is not None) != self.scheme.act_static:
            raise ValueError(f"act_scale={self.act_scale} does not go with {self.scheme}: static activations have one")
        if self.act_scale is not None and not _is_scale(self.act_scale):
            raise ValueError(f"act_scale must be positive, finite and a float32 number, not {self.act_scale!r}")

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return int(self.codes.shape[1])

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """The quantized weight of output rows ``start:stop`` (rows are independent of each other)."""
        return replace(
            self, codes=self.codes[start:stop], scale=self.scale[start:stop], zero_point=self.zero_point[start:stop]
        )

    def digest(self) -> str:
        """sha256 over scheme, codes, scales and zero points: equal digests mean equal decoded layers."""
        sha = hashlib.sha256(f"{self.scheme} {list(self.codes.shape)} {self.scale.dtype}".encode())
        for part in (self.codes, self.scale, self.zero_point, self.g_idx):
            if part is not None:
                sha.update(tensor_bytes(part))
        if self.act_scale is not None:
            sha.update(struct.pack("<f", self.act_scale))
        return sha.hexdigest()


def join_rows(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """The weight whose output rows are those of the parts, one after another.

    Args:
        parts: at least one, all of one scheme, dtype of scales, number of columns, order of groups and activation
            scale: only codes, scales and zero points are joined, the rest is the first one's.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero_point=torch.cat([part.zero_point for part in parts]),
    )


def _is_scale(value: float) -> bool:
    """Whether this is a positive float32 number. Others would not come back from a tensor as they were."""
    return 0 < value < math.inf and float(torch.tensor(value, dtype=torch.float32)) == value
