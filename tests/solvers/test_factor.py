"""The triangular factor: exact, in any order, and refused where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.errors import HessianError
from quantkit.solvers.factor import check_finite, factorize

F64 = torch.float64


def spd(seed: int, size: int) -> Tensor:
    root = torch.randn(size, size + 5, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return root @ root.T


def orders(size: int) -> list[Tensor]:
    shuffled = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    return [torch.arange(size), torch.arange(size).flip(0), shuffled]


@pytest.mark.parametrize("size", [1, 2, 40, 600])
def test_the_factor_gives_back_the_damped_hessian(size: int) -> None:
    hessian = spd(0, size)
    before = hessian.clone()
    for positions in orders(size):
        factor = factorize(hessian, positions, 0.05, 1.0)
        assert torch.equal(factor.unit, factor.unit.tril())
        assert bool((factor.unit.diagonal() == 1).all())
        wanted = (hessian + 0.05 * hessian.diagonal().mean() * torch.eye(size, dtype=F64))[positions][:, positions]
        lower = factor.unit * factor.diagonal
        torch.testing.assert_close(lower @ lower.T, wanted, rtol=1e-12, atol=1e-10)
        right = torch.randn(size, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
        torch.testing.assert_close(wanted @ factor.solve(right), right, rtol=1e-9, atol=1e-9)
        assert factor.damping == pytest.approx(0.05 * float(hessian.diagonal().mean()), rel=1e-12)
        assert factor.notes == ()
    assert torch.equal(hessian, before)


@pytest.mark.parametrize(("row", "column", "value"), [(0, 1, 5.0), (3, 2, float("nan")), (2, 1, float("inf"))])
def test_hessians_that_are_not_positive_definite(row: int, column: int, value: float) -> None:
    hessian = torch.eye(4, dtype=F64)
    hessian[row, column] = hessian[column, row] = value
    for positions in orders(4):
        with pytest.raises(HessianError, match=r"not positive definite with damp_percent=1; .*damp_percent"):
            factorize(hessian, positions, 0.01, 1.0)


def test_a_negative_diagonal() -> None:
    with pytest.raises(HessianError, match="not positive definite"):
        factorize(-torch.eye(4, dtype=F64), torch.arange(4), 0.01, 1.0)


def test_a_zero_hessian() -> None:
    with pytest.raises(HessianError, match="never activates"):
        factorize(torch.zeros(4, 4), torch.arange(4), 0.01, 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_as_such(bad: float) -> None:
    hessian = torch.eye(3)
    check_finite(hessian)
    hessian[1, 1] = bad
    with pytest.raises(HessianError, match="not finite"):
        check_finite(hessian)
