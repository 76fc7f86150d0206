"""RTN: the nearest points of the min-max grid, and the loss that is reported for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.grid import quantize_groups
from quantkit.scheme import QuantScheme
from quantkit.solvers import RTN, SOLVERS
from quantkit.stats import LayerStats

SCHEMES = [QuantScheme(2, 16), QuantScheme(4, 32, symmetric=False), QuantScheme(8, None), QuantScheme(3, 96)]


def weights(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(7, 96, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64])
def test_codes_scales_and_loss(scheme: QuantScheme, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    weight = weights(weight_dtype)
    solution = RTN().solve(weight, scheme, None, dtype)
    q = solution.weight
    expected = quantize_groups(weight, scheme, dtype)
    assert q.scale.dtype == dtype
    assert q.scheme == scheme
    assert torch.equal(q.codes, expected.codes)
    assert torch.equal(q.scale, expected.scale)
    assert torch.equal(q.zero_point, expected.zero_point)
    group = torch.arange(96) // scheme.columns_per_group(96)
    real = (q.codes.double() - q.zero_point.double()[:, group]) * q.scale.double()[:, group]
    assert solution.loss.dtype == torch.float64
    torch.testing.assert_close(solution.loss, (real - weight.double()).square().sum(1), rtol=1e-5, atol=0)


def test_the_weight_is_not_changed() -> None:
    weight = weights()
    RTN().solve(weight, SCHEMES[0], None, torch.float32)
    assert torch.equal(weight, weights())


def test_statistics_are_not_read() -> None:
    empty = LayerStats(96, frozenset(), torch.device("cpu"))
    with_stats = RTN().solve(weights(), SCHEMES[1], empty, torch.bfloat16)
    assert with_stats.weight.digest() == RTN().solve(weights(), SCHEMES[1], None, torch.bfloat16).weight.digest()
    assert RTN.needs == frozenset()


def test_more_bits_and_smaller_groups_lose_less() -> None:
    def loss(scheme: QuantScheme) -> float:
        return float(RTN().solve(weights(), scheme, None, torch.float32).loss.sum())

    by_bits = [loss(QuantScheme(bits, 32)) for bits in range(2, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    by_group = [loss(QuantScheme(4, size)) for size in (8, 32, None)]
    assert by_group == sorted(by_group)


def test_rows_are_independent() -> None:
    whole = RTN().solve(weights(), SCHEMES[1], None, torch.float32)
    part = RTN().solve(weights()[2:5], SCHEMES[1], None, torch.float32)
    assert whole.weight.rows(2, 5).digest() == part.weight.digest()
    assert torch.equal(whole.loss[2:5], part.loss)


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SchemeError, match="group_size=64"):
        RTN().solve(weights(), QuantScheme(4, 64), None, torch.float32)


def test_the_names_of_the_solvers_are_different() -> None:
    names = [solver().name for solver in SOLVERS]
    assert names == ["rtn", "gptq", "autoround"]
