"""The output head: vocabulary x hidden, often the largest matrix of a model, solved a piece of its rows at a time.

Rows are independent of each other once the statistics of their input are given, so that neither a float32 copy of the
whole matrix nor the solver's working copies of it are ever needed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.errors import CheckpointError, HessianError, message
from quantkit.grid import dequantize
from quantkit.plan import LayerPlan, head_rows_at_once
from quantkit.qtensor import QuantizedTensor
from quantkit.report import LayerRecord, decibels
from quantkit.static_activations import static_scale
from quantkit.stats import LayerStats, Stat


def solve_in_rows(
    layer: LayerPlan, weight: Tensor, stats: LayerStats | None, device: torch.device, dtype: torch.dtype
) -> tuple[QuantizedTensor, LayerRecord]:
    """Solve a layer outside of the blocks.

    Args:
        layer: what to do.
        weight: [out, in], any floating-point dtype. Not modified.
        stats: of its input; None where nothing was measured.
        device: where it is solved.
        dtype: of the scales.

    Raises:
        HessianError: with the layer's name.
        CheckpointError: a loss that is not finite.
        CalibrationError: static activations whose input was always zero, or not finite.
    """
    started = time.perf_counter()
    measured = stats if layer.solver.needs else None
    hessian = measured.hessian if measured is not None and Stat.HESSIAN in layer.solver.needs else None
    parts: list[QuantizedTensor] = []
    notes: dict[str, None] = {}
    loss = reference = signal = error = 0.0
    for rows in _pieces(layer):
        piece = weight[rows].to(device, torch.float32)
        try:
            solution = layer.solver.solve(piece, layer.scheme.weight_only, measured, dtype)
        except HessianError as problem:
            raise HessianError(f"{layer.info.name}: {problem}") from problem
        loss += float(solution.loss.sum())
        signal += float(piece.square().sum(dtype=torch.float64))
        error += float((dequantize(solution.weight, torch.float32) - piece).square_().sum(dtype=torch.float64))
        if hessian is not None:  # tr(W H Wᵀ)
            reference += float(((piece @ hessian) * piece).sum(dtype=torch.float64))
        parts.append(solution.weight)
        notes.update(dict.fromkeys(solution.notes))
    if not loss < float("inf"):
        raise CheckpointError(
            message(layer.info.name, "its loss is not finite", "check the model in this dtype, or use --dtype float32")
        )
    act_scale = static_scale([layer.info.name], layer.scheme, stats, dtype)
    q = replace(_joined(parts), scheme=layer.scheme, act_scale=act_scale)
    reference = reference if hessian is not None else signal
    record = LayerRecord(
        name=layer.info.name,
        method=layer.solver.name,
        scheme=str(layer.scheme),
        shape=(layer.info.out_features, layer.info.in_features),
        loss=loss,
        relative_error=(loss / reference) ** 0.5 if reference > 0 else None,
        sqnr_db=decibels(signal, error),
        num_tokens=0 if measured is None else measured.num_tokens,
        seconds=time.perf_counter() - started,
        digest=q.digest(),
        notes=tuple(notes),
    )
    return q, record


def _pieces(layer: LayerPlan) -> Iterator[slice]:
    step = head_rows_at_once(layer)
    for start in range(0, layer.info.out_features, step):
        yield slice(start, min(start + step, layer.info.out_features))


def _joined(parts: list[QuantizedTensor]) -> QuantizedTensor:
    first = parts[0]
    if len(parts) == 1:
        return first
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero_point=torch.cat([part.zero_point for part in parts]),
    )
