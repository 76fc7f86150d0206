"""Clipped ranges against a search written out weight by weight, and what the rounding that follows makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.grid import dequantize, quantize_groups
from quantkit.scheme import QuantScheme
from quantkit.transforms import clip_weight

FACTORS = [1 - step / 40 for step in range(20)]


def problem(seed: int, rows: int = 6, columns: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) ** 3  # long tails
    x = torch.randn(64, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return weight, 2 / 64 * x.T @ x


def error(weight: Tensor, rounded: Tensor, hessian: Tensor, group: int) -> Tensor:
    """[out, groups]: e H_gg eᵀ in float64."""
    parts = (weight - rounded).double().split(group, dim=1)
    blocks = [hessian[i : i + group, i : i + group].double() for i in range(0, weight.shape[1], group)]
    return torch.stack([((e @ h) * e).sum(-1) for e, h in zip(parts, blocks, strict=True)], dim=1)


@pytest.mark.parametrize("scheme", [QuantScheme(3, 8), QuantScheme(4, 16, symmetric=False), QuantScheme(2, None)])
def test_the_best_of_all_factors(scheme: QuantScheme) -> None:
    weight, hessian = problem(0)
    group = scheme.columns_per_group(32)
    best: Tensor | None = None
    for factor in FACTORS:
        clamped = torch.empty_like(weight)
        for row in range(weight.shape[0]):
            for start in range(0, 32, group):
                part = weight[row, start : start + group]
                low, high = float(part.min()), float(part.max())
                if scheme.symmetric:
                    high = max(high, -low)
                    low = -high
                clamped[row, start : start + group] = part.clamp(low * factor, high * factor)
        tried = error(weight, dequantize(quantize_groups(clamped, scheme, torch.float32)), hessian, group)
        best = tried if best is None else torch.minimum(best, tried)
    assert best is not None
    clamped, after, before = clip_weight(weight, scheme, hessian, torch.float32)
    found = error(weight, dequantize(quantize_groups(clamped, scheme, torch.float32)), hessian, group)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-6)
    signal = float(error(weight, torch.zeros_like(weight), hessian, group).sum())
    plain = error(weight, dequantize(quantize_groups(weight, scheme, torch.float32)), hessian, group)
    assert after == pytest.approx(float(best.sum()) / signal, rel=1e-4)
    assert before == pytest.approx(float(plain.sum()) / signal, rel=1e-4)
    assert after < before


def test_many_rows_are_clipped_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(1, rows=50)
    whole = clip_weight(weight, QuantScheme(3, 8), hessian, torch.bfloat16)
    monkeypatch.setattr("quantkit.transforms.clip._ROWS", 100)
    pieces = clip_weight(weight, QuantScheme(3, 8), hessian, torch.bfloat16)
    assert torch.equal(whole[0], pieces[0])
    assert whole[1:] == pytest.approx(pieces[1:])


def test_ranges_that_do_not_fit_are_left_out() -> None:
    weight, hessian = problem(2)
    scheme = QuantScheme(2, None)
    limit = 65504 * 1.5 / float(weight.abs().max())
    clip_weight(weight * (limit * 1.2), scheme, hessian, torch.float16)  # what is shrunk by more than 1.2 fits
    with pytest.raises(SchemeError, match="use a wider --dtype"):
        clip_weight(weight * (limit * 10), scheme, hessian, torch.float16)


def test_zeros() -> None:
    clamped, after, before = clip_weight(torch.zeros(3, 8), QuantScheme(4, 8), torch.eye(8), torch.float32)
    assert (float(clamped.abs().max()), after, before) == (0.0, 0.0, 0.0)
