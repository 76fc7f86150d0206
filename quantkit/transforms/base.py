"""What every transform is: a change of the dense model that leaves its function as it is and its weights easier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantkit.precision import forward_products
from quantkit.scheme import QuantScheme
from quantkit.stats import LayerStats, Stat
from quantkit.structure import Heads, ScaleGroup


class BlockTensors:
    """The tensors of one block, by name within the block; linears are seen as [out, in] whichever way they lie.

    What a transform writes is held wide (float32, or float64 where it was), and is rounded once, when it ships.

    Args:
        tensors: as read; the mapping is not modified.
        transposed: linears whose weight lies as [in, out].
    """

    def __init__(self, tensors: Mapping[str, Tensor], transposed: frozenset[str] = frozenset()) -> None:
        self._tensors = dict(tensors)
        self._transposed = transposed
        self._dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self.changed: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def shipped(self, name: str) -> torch.dtype:
        """The dtype that this tensor is written in while it is dense."""
        return self._dtypes[name]

    def wide(self, name: str) -> Tensor:
        """A tensor, at least in float32."""
        tensor = self._tensors[name]
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    def weight(self, linear: str) -> Tensor:
        """A linear's weight [out, in], at least in float32; to be changed only by :meth:`put_weight`."""
        weight = self.wide(f"{linear}.weight")
        return weight.T if linear in self._transposed else weight

    def put(self, name: str, value: Tensor) -> None:
        """Replace a tensor; ``value`` is narrowed to float32 unless the tensor was float64."""
        width = torch.float64 if self._dtypes[name] == torch.float64 else torch.float32
        self._tensors[name] = value.to(width)
        self.changed.add(name)

    def put_weight(self, linear: str, weight: Tensor) -> None:
        """Replace a linear's weight [out, in]."""
        self.put(f"{linear}.weight", weight.T.contiguous() if linear in self._transposed else weight)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, those that were changed wide."""
        return dict(self._tensors)


@dataclass(frozen=True, slots=True)
class Call:
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, module: nn.Module) -> Tensor:
        """The module's output; the first one where there are several."""
        with forward_products(next(module.parameters()).device):
            output = module(*self.args, **self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


class BlockContext(Protocol):
    """A block while scales are found for it: its function is the original's at any time."""

    @property
    def heads(self) -> Heads:
        """Of its attention."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the forward passes and of the scales of quantized weights."""
        ...

    @property
    def tensors(self) -> BlockTensors:
        """The weights as they are by now."""
        ...

    def stats(self, linear: str) -> LayerStats:
        """What was seen at a linear's input, in the scale that the input has by now."""
        ...

    def scheme(self, linear: str) -> QuantScheme | None:
        """How a linear will be quantized; None: it stays dense."""
        ...

    def module(self, name: str) -> nn.Module:
        """A submodule, its weights in place."""
        ...

    def calls(self, name: str, num_tokens: int) -> Sequence[Call]:
        """What a submodule is called with by as many calibration samples as have this many tokens, at least one."""
        ...


@dataclass(frozen=True, slots=True)
class TransformRecord:
    """What was done to one group of layers.

    Attributes:
        transform: its name.
        source: what the scale was folded into (module name).
        readers: whose columns were multiplied by it.
        choice: the option that was chosen, such as ``ratio 0.45``; ``none`` where the weights stayed.
        loss: Σ (y - ŷ)² / Σ y² of the outputs compared, after; None where nothing was compared.
        loss_before: the same without this transform.
        note: what else happened, such as grid points that were left out.
    """

    transform: str
    source: str
    readers: tuple[str, ...]
    choice: str
    loss: float | None = None
    loss_before: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The scale that a transform found for a group.

    Attributes:
        scale: float [channels], positive and finite: the channels are divided by it and the readers' columns
            multiplied; None leaves the group as it is.
        choice: see :class:`TransformRecord`, as are the others.
    """

    scale: Tensor | None
    choice: str
    loss: float | None = None
    loss_before: float | None = None
    note: str = ""


class ScaleTransform(Protocol):
    """A transform that scales channels, from what calibration data shows; a frozen dataclass like every solver."""

    @property
    def name(self) -> str:
        """The recipe's word for this transform."""
        ...

    @property
    def needs(self) -> frozenset[Stat]:
        """The statistics that it reads with these options."""
        ...

    def takes(self, group: ScaleGroup) -> bool:
        """Whether it scales groups of this kind."""
        ...

    def find(self, group: ScaleGroup, context: BlockContext) -> Found:
        """The scale for one group; nothing is changed yet.

        Raises:
            CalibrationError: activations that are not finite.
        """
        ...
