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

from quantkit.errors import HessianError
from quantkit.layer_plan import LayerPlan, head_rows_at_once
from quantkit.qtensor import QuantizedTensor, join_rows
from quantkit.solving import Errors, SolvedLayer, reference, solved_layer, weight_errors
from quantkit.static_activations import static_scale
from quantkit.stats import LayerStats


def solve_in_rows(
    layer: LayerPlan, weight: Tensor, stats: LayerStats | None, device: torch.device, dtype: torch.dtype
) -> SolvedLayer:
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
    parts: list[QuantizedTensor] = []
    notes: dict[str, None] = {}
    loss = signal = error = 0.0
    energy: float | None = None
    for rows in _pieces(layer):
        piece = weight[rows].to(device, torch.float32)
        try:
            solution = layer.solver.solve(piece, layer.scheme.weight_only, measured, dtype)
        except HessianError as problem:
            raise HessianError(f"{layer.info.name}: {problem}") from problem
        loss += float(solution.loss.sum())
        of_piece = weight_errors(solution.weight, piece)
        signal, error = signal + of_piece[0], error + of_piece[1]
        of_rows = reference(layer, piece, measured)
        energy = of_rows if of_rows is None else of_rows + (energy or 0.0)
        parts.append(solution.weight)
        notes.update(dict.fromkeys(solution.notes))
    act_scale = static_scale([layer.info.name], layer.scheme, stats, dtype)
    q = replace(join_rows(parts), scheme=layer.scheme, act_scale=act_scale)
    errors = Errors(loss, signal, error, energy)
    tokens = 0 if measured is None else measured.num_tokens
    return solved_layer(layer, q, errors, tokens, time.perf_counter() - started, tuple(notes))


def _pieces(layer: LayerPlan) -> Iterator[slice]:
    step = head_rows_at_once(layer)
    for start in range(0, layer.info.out_features, step):
        yield slice(start, min(start + step, layer.info.out_features))
