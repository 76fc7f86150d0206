"""The refit: the least-squares optimum where scales are exact, never a higher loss where they are rounded."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import F64, correlated, damped, losses, randn, real
from torch import Tensor

from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme
from quantkit.solvers import GPTQ
from quantkit.solvers.gptq import ActOrder

ORDERS = st.sampled_from(["none", "static", "group"])
SEEDS = st.integers(0, 2**20)


def best_scales(weight: Tensor, q: QuantizedTensor, hessian: Tensor) -> Tensor:
    """float64 [out, groups]: by least squares of Rᵀ(w - Σ s_g q_g), H = R Rᵀ, row by row."""
    root = torch.linalg.cholesky(hessian).T
    group = torch.arange(q.in_features) // q.scheme.columns_per_group(q.in_features)
    group = group if q.g_idx is None else q.g_idx.long()
    levels = q.codes.double() - q.zero_point.double()[:, group]
    rows = []
    for level, row in zip(levels, weight, strict=True):
        design = root @ (level[:, None] * torch.nn.functional.one_hot(group, q.scale.shape[1]))
        rows.append(torch.linalg.lstsq(design, (root @ row)[:, None], driver="gelsd").solution[:, 0])
    return torch.stack(rows)


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.integers(2, 5), st.booleans(), ORDERS, st.sampled_from([8, 20, 40, None]))
def test_the_scales_are_those_of_least_squares(
    seed: int, bits: int, symmetric: bool, act_order: ActOrder, group_size: int | None
) -> None:
    scheme = QuantScheme(bits, group_size, symmetric=symmetric)
    weight, stats = randn(seed, 5, 40), correlated(seed + 1, 40)
    before = GPTQ(act_order=act_order).solve(weight, scheme, stats, F64)
    after = GPTQ(act_order=act_order, refit=True).solve(weight, scheme, stats, F64)
    assert torch.equal(after.weight.codes, before.weight.codes)
    assert torch.equal(after.weight.zero_point, before.weight.zero_point)
    scales = best_scales(weight, after.weight, damped(stats))
    torch.testing.assert_close(after.weight.scale, scales, rtol=1e-5, atol=1e-7 * float(scales.abs().max()))
    torch.testing.assert_close(after.loss, losses(weight, real(after.weight), damped(stats)), rtol=1e-8, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.integers(2, 8), st.booleans(), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_it_never_raises_the_loss_of_any_row(seed: int, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    """In the dtype that ships: at 8 bits the rounding of bfloat16 scales is as large as what there is to gain."""
    scheme = QuantScheme(bits, 8, symmetric=symmetric)
    weight, stats = randn(seed, 6, 40), correlated(seed + 1, 40)
    before = GPTQ().solve(weight, scheme, stats, dtype)
    after = GPTQ(refit=True).solve(weight, scheme, stats, dtype)
    assert after.weight.scale.dtype == dtype
    assert bool((after.loss <= before.loss).all())
    kept = after.loss == before.loss
    assert torch.equal(after.weight.scale[kept], before.weight.scale[kept])
    torch.testing.assert_close(after.loss, losses(weight, real(after.weight), damped(stats)), rtol=1e-8, atol=1e-9)


def test_many_rows_are_fitted_in_pieces() -> None:
    """The pieces do not change the result, and a group of zeros keeps its scale."""
    weight, stats, scheme = randn(1, 9000, 64), correlated(2, 64), QuantScheme(3, 16)
    weight[:, 16:32] = 0
    weight[7] = 0
    solver = GPTQ(act_order="none", refit=True)
    whole = solver.solve(weight, scheme, stats, torch.bfloat16)
    for rows in (slice(0, 5000), slice(5000, 9000)):
        part = solver.solve(weight[rows], scheme, stats, torch.bfloat16)
        assert part.weight.digest() == whole.weight.rows(rows.start, rows.stop).digest()
    assert bool((whole.weight.scale[7] == 1).all())
    assert bool((real(whole.weight)[7] == 0).all())
