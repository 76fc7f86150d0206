"""A layer is solved: its quantized weight, and the record of what that cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.errors import CheckpointError, HessianError, message
from quantkit.grid import dequantize
from quantkit.layer_plan import LayerPlan
from quantkit.qtensor import QuantizedTensor
from quantkit.report import LayerRecord, decibels
from quantkit.static_activations import static_scale
from quantkit.stats import LayerStats, Stat, output_energy


@dataclass(frozen=True, slots=True)
class SolvedLayer:
    """A layer's quantized weight and what is reported of it."""

    weight: QuantizedTensor
    record: LayerRecord


@dataclass(frozen=True, slots=True)
class Errors:
    """Sums over a layer's rows, of which those of pieces can be added.

    Attributes:
        loss: the solver's.
        signal: Σ w².
        error: Σ (w - ŵ)².
        reference: what the loss is a share of, see :func:`reference`; None: the signal.
    """

    loss: float
    signal: float
    error: float
    reference: float | None


def solved_layer(
    layer: LayerPlan, weight: QuantizedTensor, errors: Errors, tokens: int, seconds: float, notes: tuple[str, ...]
) -> SolvedLayer:
    """A layer with its record.

    Args:
        layer: what was asked for.
        weight: what came of it.
        errors: of the weight.
        tokens: calibration tokens that the layer saw.
        seconds: time spent.
        notes: the solver's.

    Raises:
        CheckpointError: a loss that is not finite.
    """
    if not errors.loss < float("inf"):
        raise CheckpointError(
            message(layer.info.name, "its loss is not finite", "check the model in this dtype, or use --dtype float32")
        )
    whole = errors.signal if errors.reference is None else errors.reference
    record = LayerRecord(
        name=layer.info.name,
        method=layer.solver.name,
        scheme=str(layer.scheme),
        shape=(layer.info.out_features, layer.info.in_features),
        loss=errors.loss,
        relative_error=(errors.loss / whole) ** 0.5 if whole > 0 else None,
        sqnr_db=decibels(errors.signal, errors.error),
        num_tokens=tokens,
        seconds=seconds,
        digest=weight.digest(),
        notes=notes if layer.fallback is None else (layer.fallback, *notes),
    )
    return SolvedLayer(weight, record)


def weight_errors(weight: QuantizedTensor, exact: Tensor) -> tuple[float, float]:
    """Σ w² and Σ (w - ŵ)², summed in float64.

    Args:
        weight: ŵ.
        exact: float32 [out, in], w; where ``weight`` lies.
    """
    error = float((dequantize(weight, torch.float32) - exact).square_().sum(dtype=torch.float64))
    return float(exact.square().sum(dtype=torch.float64)), error


def reference(layer: LayerPlan, exact: Tensor, stats: LayerStats | None) -> float | None:
    """What the loss of these rows is a share of: their outputs' energy by the solver's Hessian; None: it has none.

    Args:
        layer: says what its solver reads.
        exact: float32 [out, in].
        stats: of the layer's input.
    """
    if stats is None or Stat.HESSIAN not in layer.solver.needs:
        return None
    return output_energy(exact, stats.hessian)


def solve_group(
    group: Sequence[LayerPlan],
    weights: Sequence[Tensor],
    stats: LayerStats | None,
    device: torch.device,
    dtype: torch.dtype,
) -> list[SolvedLayer]:
    """Solve layers that read the same input with the same scheme and solver at once, as the rows of one matrix.

    Args:
        group: the layers.
        weights: [out, in] each, any floating-point dtype.
        stats: of their common input.
        device: where they are solved.
        dtype: of the scales.

    Raises:
        HessianError: with the names of the layers.
        CheckpointError: a loss that is not finite.
        CalibrationError: static activations whose input was always zero, or not finite.
    """
    started = time.perf_counter()
    stacked = torch.cat([weight.to(device, torch.float32) for weight in weights])
    first = group[0]
    try:
        used = stats if first.solver.needs else None
        solution = first.solver.solve(stacked, first.scheme.weight_only, used, dtype)
    except HessianError as error:
        raise HessianError(f"{', '.join(layer.info.name for layer in group)}: {error}") from error
    act_scale = static_scale([layer.info.name for layer in group], first.scheme, stats, dtype)
    whole = replace(solution.weight, scheme=first.scheme, act_scale=act_scale)
    seconds = (time.perf_counter() - started) / len(group)
    counted = stats is not None and bool(first.solver.needs or first.fallback)
    tokens = stats.num_tokens if stats is not None and counted else 0
    solved, row = [], 0
    for layer in group:
        rows = slice(row, row + layer.info.out_features)
        row = rows.stop
        q = whole.rows(rows.start, rows.stop)
        errors = Errors(
            float(solution.loss[rows].sum()), *weight_errors(q, stacked[rows]), reference(layer, stacked[rows], stats)
        )
        solved.append(solved_layer(layer, q, errors, tokens, seconds, solution.notes))
    return solved
