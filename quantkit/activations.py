"""The hidden states between two blocks: in memory, or in a memory-mapped file when they are over a budget."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from quantkit.errors import InterruptedRunError, message


class Activations:
    """One hidden state for each sample; a block's outputs replace its inputs, so there is never a second copy.

    Args:
        shapes: of each sample's hidden state, such as [1, length, hidden].
        dtype: floating point.
        budget: bytes that may lie in memory; above it a file is mapped.
        directory: where that file goes.
        name: of that file; two stores in one directory have different ones.

    Raises:
        InterruptedRunError: the disk has no room for the file.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        budget: int,
        directory: Path,
        name: str = "activations.bin",
    ) -> None:
        self._shapes = list(shapes)
        self._starts = [0]
        for shape in self._shapes:
            self._starts.append(self._starts[-1] + math.prod(shape))
        self.nbytes = self._starts[-1] * dtype.itemsize
        self.path = directory / name if self.nbytes > budget else None
        if self.path is None:
            self._flat = torch.empty(self._starts[-1], dtype=dtype)
        else:
            _reserve(self.path, self.nbytes)
            self._flat = torch.from_file(str(self.path), shared=True, size=self._starts[-1], dtype=dtype)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> Tensor:
        return self._flat[self._starts[index] : self._starts[index + 1]].view(self._shapes[index])

    def __setitem__(self, index: int, value: Tensor) -> None:
        self[index].copy_(value)

    def close(self) -> None:
        """Forget everything and remove the file."""
        self._flat = torch.empty(0)
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _reserve(path: Path, nbytes: int) -> None:
    """Give the file its blocks now: a full disk found while writing to mapped memory would kill the process."""
    try:
        with path.open("wb") as handle:
            os.posix_fallocate(handle.fileno(), 0, nbytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise InterruptedRunError(
            message(
                str(path),
                f"no room for {nbytes} bytes of activations ({error})",
                "free disk space, or raise --activation-memory",
            )
        ) from error
