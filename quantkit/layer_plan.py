"""What is done to one layer, and the bytes that it takes to do it and to store it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.arch import input_group
from quantkit.formats import CheckpointFormat
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme
from quantkit.skeleton import LinearInfo
from quantkit.solvers import Solver
from quantkit.stats import Stat

_FLOAT32 = 4
_SOLVE_COPIES = 4  # in float32: the weights, transposed, their errors, and what is reported of them
_HEAD_WEIGHTS_AT_ONCE = 2**24  # the head is solved in pieces of about so many weights


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer to quantize.

    Attributes:
        info: the layer.
        scheme: its grid.
        solver: what finds its codes.
        fallback: why ``solver`` is not the recipe's; None where it is.
        shares: the embedding whose codes this tied head has; None: it has its own.
    """

    info: LinearInfo
    scheme: QuantScheme
    solver: Solver
    fallback: str | None = None
    shares: str | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.info.out_features * self.info.in_features

    @property
    def needs(self) -> frozenset[Stat]:
        """The statistics of its input that its solver and its activations need."""
        return self.solver.needs | (frozenset({Stat.ABS_MAX}) if self.scheme.act_static else frozenset())


def solving_bytes(layers: tuple[LayerPlan, ...], transform_needs: frozenset[Stat]) -> int:
    """A block's Hessians (and drifts), one for each input, a factor, and the matrices of the largest solve.

    Experts are measured one at a time: of theirs, those of one expert count.
    """
    rows: dict[str, int] = {}
    squares: dict[str, int] = {}
    matrices: dict[str, int] = {}
    owners: dict[str, tuple[str, int] | None] = {}
    for layer in layers:
        key, slot = input_group(layer.info.name), layer.info.expert
        rows[key] = rows.get(key, 0) + layer.numel
        squares[key] = _FLOAT32 * layer.info.in_features**2
        needs = layer.solver.needs | transform_needs
        matrices[key] = max(matrices.get(key, 0), len({Stat.HESSIAN, Stat.DRIFT} & needs))
        owners[key] = None if slot is None else (slot.module, slot.index)
    held: dict[tuple[str, int] | None, int] = {}
    for key, count in matrices.items():
        held[owners[key]] = held.get(owners[key], 0) + squares[key] * count
    gathered = held.pop(None, 0) + max(held.values(), default=0)
    factor = max((squares[key] for key, count in matrices.items() if count), default=0)
    return gathered + factor + _SOLVE_COPIES * _FLOAT32 * max(rows.values(), default=0)


def head_rows_at_once(layer: LayerPlan) -> int:
    """Rows of a layer outside of the blocks that are solved at once."""
    return max(_HEAD_WEIGHTS_AT_ONCE // layer.info.in_features, 1)


def head_bytes(fmt: CheckpointFormat, layer: LayerPlan, dtype: torch.dtype) -> int:
    """The codes of the whole layer twice (in pieces, then joined), what is written of it, and one piece's solve."""
    if layer.shares is not None:
        return 0
    piece = min(head_rows_at_once(layer), layer.info.out_features) * layer.info.in_features
    hessian = 2 * _FLOAT32 * layer.info.in_features**2 if layer.solver.needs else 0
    return 2 * layer.numel + 2 * encoded_bytes(fmt, layer, dtype) + hessian + _SOLVE_COPIES * _FLOAT32 * piece


def encoded_bytes(fmt: CheckpointFormat, layer: LayerPlan, dtype: torch.dtype) -> int:
    """Bytes of a quantized layer's tensors, by the code that will write them."""
    rows, columns = layer.info.out_features, layer.info.in_features
    groups = layer.scheme.num_groups(columns)
    q = QuantizedTensor(
        torch.empty(rows, columns, dtype=torch.uint8, device="meta"),
        torch.empty(rows, groups, dtype=dtype, device="meta"),
        torch.empty(rows, groups, dtype=torch.uint8, device="meta"),
        layer.scheme,
        act_scale=1.0 if layer.scheme.act_static else None,
    )
    return sum(t.numel() * t.element_size() for t in fmt.encode(q).values())
