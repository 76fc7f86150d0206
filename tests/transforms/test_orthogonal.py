"""Orthogonal matrices: exact Hadamard ones where a construction exists, orthogonal ones elsewhere, the same by seed."""

from __future__ import annotations

import pytest
import torch

from quantkit.transforms.orthogonal import Orthogonal, hadamard_factors, rotation_of

# hidden sizes and head dimensions of models: 576 = 36 x 16, 896 = 28 x 32, 960 = 60 x 16, 80 = 20 x 4 and so on
SIZES = (1, 2, 4, 12, 20, 28, 36, 60, 64, 80, 96, 128, 256, 288, 576, 768, 896, 960, 1152)


def eye(size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
def test_hadamard(size: int) -> None:
    factors = hadamard_factors(size)
    assert factors is not None
    for factor in factors:
        assert torch.equal(factor.abs(), torch.ones_like(factor))
        assert torch.equal(factor @ factor.T, factor.shape[0] * eye(factor.shape[0]))  # in whole numbers: exact
    matrix = rotation_of(size, seed=0).matrix()
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5), rtol=1e-12, atol=0)
    torch.testing.assert_close(matrix @ matrix.T, eye(size), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [3, 6, 7, 50, 63, 100 + 2])
def test_sizes_without_a_hadamard_matrix(size: int) -> None:
    assert hadamard_factors(size) is None
    matrix = rotation_of(size, seed=0).matrix()
    torch.testing.assert_close(matrix @ matrix.T, eye(size), rtol=0, atol=1e-12)
    assert float(matrix.abs().max()) < 1


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65])
def test_keeping_ones(size: int) -> None:
    """The mean of the channels stays, and everything else is turned."""
    matrix = rotation_of(size, seed=2, keep_ones=True).matrix()
    torch.testing.assert_close(matrix @ matrix.T, eye(size), rtol=0, atol=1e-12)
    ones = torch.ones(size, dtype=torch.float64)
    torch.testing.assert_close(ones @ matrix, ones, rtol=0, atol=1e-12)
    x = torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotated = rotation_of(size, seed=2, keep_ones=True).apply(x)
    torch.testing.assert_close(rotated.mean(-1), x.mean(-1), rtol=0, atol=1e-12)
    if size > 2:
        assert float((rotated - x).abs().max()) > 1e-2


def test_apply_is_the_product_with_the_kronecker_product() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = tuple(torch.randn(n, n, dtype=torch.float64, generator=generator) for n in (2, 3, 4))
    signs = torch.tensor([1.0, -1.0, 1.0] * 8, dtype=torch.float64)
    dense = torch.diag(signs) @ torch.kron(torch.kron(factors[0], factors[1]), factors[2])
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(Orthogonal(signs, factors).apply(x), x @ dense)


@pytest.mark.parametrize("keep_ones", [False, True])
@pytest.mark.parametrize("size", [36, 63])
def test_the_seed_decides(size: int, keep_ones: bool) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (rotation_of(size, seed, keep_ones).matrix() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)
