"""Outliers against their definition."""

from __future__ import annotations

import pytest
import torch
from layers import normal

from quantkit.outliers import Outliers, StreamedOutliers, outliers_of


def expected(values: torch.Tensor) -> Outliers:
    wide = values.double()
    std = float(wide.std(correction=0))
    return Outliers(values.numel(), std, float(wide.abs().max()), float((wide.abs() > 6 * std).double().mean()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_tensor(dtype: torch.dtype) -> None:
    values = normal(300, 70)
    values[::50, 3] = 40.0
    values += 0.5
    found, wanted = outliers_of(values.to(dtype)), expected(values.to(dtype))
    assert found.numel == wanted.numel
    assert found.std == pytest.approx(wanted.std, rel=1e-5)
    assert (found.abs_max, found.beyond) == (wanted.abs_max, wanted.beyond)
    assert found.beyond == pytest.approx(6 / 21000)
    assert found.sigmas == pytest.approx(wanted.abs_max / wanted.std, rel=1e-5)


def test_streamed_batches_give_what_the_whole_gives() -> None:
    values = normal(50, 400, seed=3)
    values[7] *= 30
    stream = StreamedOutliers()
    for piece in values.split(7):
        stream.update(piece[None])
    found, wanted = stream.result(), expected(values)
    assert (found.numel, found.abs_max) == (wanted.numel, wanted.abs_max)
    assert found.std == pytest.approx(wanted.std, rel=1e-5)
    # The limit is met to 1 %: so many values lie within 1 % of it.
    at = values.abs().double() / (6 * wanted.std)
    near = float(((at > 0.99) & (at < 1.02)).double().mean())
    assert abs(found.beyond - wanted.beyond) <= near
    assert found.beyond > 0


def test_constants() -> None:
    assert outliers_of(torch.full((4, 4), 2.0)).sigmas == 0.0
    stream = StreamedOutliers()
    stream.update(torch.zeros(3))
    assert stream.result() == Outliers(3, 0.0, 0.0, 0.0)
