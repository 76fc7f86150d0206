"""The static scale of quantized activations, from what calibration saw."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantkit.errors import CalibrationError, message
from quantkit.grid import activation_scale
from quantkit.scheme import QuantScheme
from quantkit.stats import LayerStats


def static_scale(
    names: Sequence[str], scheme: QuantScheme, stats: LayerStats | None, dtype: torch.dtype
) -> float | None:
    """The activation scale of layers that read one input; None where activations are dynamic or not quantized.

    Args:
        names: of the layers, for the error.
        scheme: of the layers.
        stats: of their input, with ``Stat.ABS_MAX``.
        dtype: of the scales on disk.

    Raises:
        CalibrationError: the input was always zero, or not finite.
    """
    if not scheme.act_static:
        return None
    assert stats is not None, "layers with static activations are measured"
    largest = float(stats.abs_max.max())
    if 0 < largest < float("inf"):
        return activation_scale(largest, dtype)
    what = "the calibration data never activates its input" if largest == 0 else "its input is not finite (NaN or inf)"
    fix = "use other data, --dtype float32, or dynamic activations (w8a8)"
    raise CalibrationError(message(", ".join(names), what, fix))
