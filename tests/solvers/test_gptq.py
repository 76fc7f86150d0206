"""GPTQ against the textbook form, exhaustive search, and RTN where the two must agree."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import HessianError, RecipeError
from quantkit.grid import dequantize, quantize, quantize_groups
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme
from quantkit.solvers import GPTQ, RTN
from quantkit.solvers.gptq import reversed_factor
from quantkit.stats import LayerStats, Stat

F64 = torch.float64
BLOCK_SIZES = (1, 7, 32, 128, 500)


def randn(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stats_of(x: Tensor) -> LayerStats:
    stats = LayerStats(x.shape[-1], frozenset({Stat.HESSIAN}), torch.device("cpu"))
    stats.update(x)
    return stats


def correlated(seed: int, width: int, tokens: int = 300, rank: int = 8, noise: float = 0.3) -> LayerStats:
    """Statistics of inputs that mostly lie in a subspace of ``rank`` dimensions, as activations do.

    The inputs are multiples of 1/16, so that the float32 sums are exact and the Hessian is exactly symmetric: else
    a solver that reads its upper triangle and one that reads all of it would differ in the seventh digit.
    """
    x = randn(seed, tokens, rank) @ randn(seed + 1, rank, width) + noise * randn(seed + 2, tokens, width)
    return stats_of(torch.round(x * 16) / 16)


def diagonal(seed: int, width: int) -> LayerStats:
    """Statistics with an exactly diagonal Hessian of very different entries."""
    return stats_of(torch.diag(randn(seed, width).exp()))


def damped(stats: LayerStats, damp_percent: float = 0.01) -> Tensor:
    hessian = stats.hessian.double()
    return hessian + damp_percent * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=F64)


def real(q: QuantizedTensor) -> Tensor:
    """float64 scale * (code - zero point), with the scale that ships."""
    group = torch.arange(q.in_features) // q.scheme.columns_per_group(q.in_features)
    return (q.codes.double() - q.zero_point.double()[:, group]) * q.scale.double()[:, group]


def losses(weight: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    """float64 [out]: dw H dwᵀ of each row."""
    error = approximation - weight
    return ((error @ hessian) * error).sum(1)


def textbook(weight: Tensor, hessian: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ as in arXiv:2210.17323, one column after the other: codes, scale, zero point, all float64 [out, ...].

    Takes the Cholesky factor of the inverse of the damped Hessian; shares no code with quantkit.
    """
    U = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    W, levels = weight.clone(), 2**scheme.bits
    size = scheme.group_size or W.shape[1]
    codes, scales, zeros = torch.zeros_like(W), [], []
    scale = zero = torch.zeros(len(W), dtype=F64)
    for j in range(W.shape[1]):
        if j % size == 0:
            group = W[:, j : j + size]
            if scheme.symmetric:
                raw, low = group.abs().max(1).values * 2 / (levels - 1), None
            else:
                low = torch.minimum(group.min(1).values, torch.zeros(len(W), dtype=F64))
                raw = (torch.maximum(group.max(1).values, torch.zeros(len(W), dtype=F64)) - low) / (levels - 1)
            scale = raw.to(dtype).double()
            zero = torch.full_like(scale, levels / 2) if low is None else torch.round(-low / scale).clamp(0, levels - 1)
            scales.append(scale)
            zeros.append(zero)
        codes[:, j] = torch.clamp(torch.round(W[:, j] / scale) + zero, 0, levels - 1)
        error = (W[:, j] - scale * (codes[:, j] - zero)) / U[j, j]
        W[:, j:] -= torch.outer(error, U[j, j:])
    return codes, torch.stack(scales, 1), torch.stack(zeros, 1)


def assert_equal(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.zero_point, b.zero_point)
    assert (a.scheme, a.scale.dtype, a.g_idx) == (b.scheme, b.scale.dtype, b.g_idx)


@pytest.mark.parametrize(
    ("weight_dtype", "dtype"), [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (F64, torch.float32)]
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_with_a_diagonal_hessian_gptq_is_rtn(
    bits: int, symmetric: bool, weight_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """No column can make up for another's error, so nothing may move: bit for bit, with every blocking."""
    weight = randn(bits, 5, 160, dtype=weight_dtype)
    stats = diagonal(bits + 1, 160)
    for group_size in (None, 32, 80):
        scheme = QuantScheme(bits, group_size, symmetric=symmetric)
        expected = RTN().solve(weight, scheme, None, dtype).weight
        for block_size in (7, 128):
            assert_equal(GPTQ(block_size=block_size).solve(weight, scheme, stats, dtype).weight, expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [1, 8, 20, 32, 80, 160, None])
def test_gptq_is_the_textbook_algorithm(group_size: int | None, bits: int, symmetric: bool) -> None:
    """Groups narrower and wider than the blocks, one per channel, and 160 columns that 128 and 32·3 do not divide."""
    scheme = QuantScheme(bits, group_size, symmetric=symmetric)
    weight, stats = randn(1, 6, 160), correlated(2, 160)
    codes, scale, zero_point = textbook(weight, damped(stats), scheme, torch.bfloat16)
    if group_size != 1:  # a group of one has an error only where its grid lacks its sign
        assert not torch.equal(codes, quantize_groups(weight, scheme, torch.bfloat16).codes.double())
    for block_size in BLOCK_SIZES:
        q = GPTQ(block_size=block_size).solve(weight, scheme, stats, torch.bfloat16).weight
        assert torch.equal(q.codes.double(), codes), f"block_size={block_size}"
        assert torch.equal(q.scale.double(), scale)
        assert torch.equal(q.zero_point.double(), zero_point)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    columns=st.integers(1, 20),
    groups=st.integers(1, 6),
    block_size=st.integers(1, 50),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    damp_percent=st.sampled_from([0.001, 0.01, 0.1]),
)
def test_gptq_is_the_textbook_algorithm_in_any_shape(
    seed: int, columns: int, groups: int, block_size: int, bits: int, symmetric: bool, damp_percent: float
) -> None:
    scheme = QuantScheme(bits, columns, symmetric=symmetric)
    weight, stats = randn(seed, 3, columns * groups), correlated(seed + 1, columns * groups)
    codes, scale, zero_point = textbook(weight, damped(stats, damp_percent), scheme, torch.float32)
    q = GPTQ(damp_percent=damp_percent, block_size=block_size).solve(weight, scheme, stats, torch.float32).weight
    assert torch.equal(q.codes.double(), codes)
    torch.testing.assert_close(q.scale.double(), scale, rtol=2e-7, atol=0)
    assert torch.equal(q.zero_point.double(), zero_point)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [QuantScheme(3, 32), QuantScheme(4, 80, symmetric=False), QuantScheme(8, None)])
def test_the_loss_is_that_of_the_shipped_weight(scheme: QuantScheme, dtype: torch.dtype) -> None:
    """dw (H + λI) dwᵀ row by row, of codes and scales as they are written, whatever the blocks were."""
    weight, stats = randn(3, 9, 160), correlated(4, 160)
    for block_size in BLOCK_SIZES:
        solution = GPTQ(damp_percent=0.02, block_size=block_size).solve(weight, scheme, stats, dtype)
        assert solution.loss.dtype == F64
        assert solution.weight.scale.dtype == dtype
        expected = losses(weight, real(solution.weight), damped(stats, 0.02))
        torch.testing.assert_close(solution.loss, expected, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**20), st.integers(2, 8), st.booleans(), st.sampled_from([16, 32, None]))
def test_on_correlated_inputs_gptq_loses_less_than_rtn(
    seed: int, bits: int, symmetric: bool, group_size: int | None
) -> None:
    """Summed over rows. Of a single row it is not true: a greedy choice can be the worse one (seen: 2.9 times).

    Over 120 seeds a scheme the ratio of the sums never passed 0.46, so 0.8 cannot fail by chance.
    """
    scheme = QuantScheme(bits, group_size, symmetric=symmetric)
    weight, stats = randn(seed + 10**7, 8, 64), correlated(seed, 64)
    solution = GPTQ().solve(weight, scheme, stats, torch.float32)
    rtn = losses(weight, real(quantize_groups(weight, scheme, torch.float32)), damped(stats))
    assert float(solution.loss.sum()) < 0.8 * float(rtn.sum())


def candidates(q: QuantizedTensor) -> Tensor:
    """float64 [levels^in, in]: all codes of one row."""
    return torch.tensor(list(itertools.product(range(q.scheme.levels), repeat=q.in_features)), dtype=F64)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**20), st.integers(2, 4), st.booleans(), st.booleans())
def test_gptq_against_exhaustive_search(seed: int, columns: int, symmetric: bool, is_diagonal: bool) -> None:
    """2 bits, one scale per row, so that the grid is fixed before the first column: all 4^columns rows are tried."""
    weight, scheme = randn(seed, 4, columns), QuantScheme(2, None, symmetric=symmetric)
    stats = diagonal(seed + 1, columns) if is_diagonal else correlated(seed + 1, columns, rank=1, noise=0.5)
    solution = GPTQ().solve(weight, scheme, stats, torch.float32)
    hessian = damped(stats)
    for row in range(4):
        q = solution.weight.rows(row, row + 1)
        points = (candidates(q) - q.zero_point.double()) * q.scale.double()
        best = losses(weight[row : row + 1].expand_as(points), points, hessian).min()
        assert float(solution.loss[row]) >= float(best) * (1 - 1e-9)
        if is_diagonal:
            assert float(solution.loss[row]) == pytest.approx(float(best), rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**20), st.integers(2, 5), st.booleans(), st.integers(1, 40))
def test_no_other_last_code_is_better(seed: int, bits: int, symmetric: bool, block_size: int) -> None:
    """When the last column is rounded all else is fixed, so its code is the best one there is."""
    scheme = QuantScheme(bits, 12, symmetric=symmetric)
    weight, stats = randn(seed, 5, 36), correlated(seed + 1, 36)
    solution = GPTQ(block_size=block_size).solve(weight, scheme, stats, torch.float32)
    found = real(solution.weight)
    for code in range(scheme.levels):
        other = found.clone()
        other[:, -1] = (code - solution.weight.zero_point[:, -1].double()) * solution.weight.scale[:, -1].double()
        assert bool((losses(weight, other, damped(stats)) >= solution.loss * (1 - 1e-9)).all())


@pytest.mark.parametrize("group_size", [16, None])
def test_rows_are_independent(group_size: int | None) -> None:
    """Layers that read the same input are solved as one matrix."""
    first, second = randn(5, 7, 96), 3 * randn(6, 4, 96)
    scheme, stats = QuantScheme(4, group_size, symmetric=False), correlated(7, 96)
    together = GPTQ(block_size=40).solve(torch.cat([first, second]), scheme, stats, torch.bfloat16)
    for rows, weight in ((slice(0, 7), first), (slice(7, 11), second)):
        alone = GPTQ(block_size=40).solve(weight, scheme, stats, torch.bfloat16)
        assert_equal(together.weight.rows(rows.start, rows.stop), alone.weight)
        torch.testing.assert_close(together.loss[rows], alone.loss, rtol=1e-9, atol=0)


@pytest.mark.parametrize("weight_dtype", [torch.float32, F64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [QuantScheme(2, 16), QuantScheme(4, 32, symmetric=False), QuantScheme(8, None)])
def test_codes_and_shipped_scales_agree(scheme: QuantScheme, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Rounding the dequantized weight with the stored scales gives the stored codes."""
    q = GPTQ().solve(randn(8, 6, 160, dtype=weight_dtype), scheme, correlated(9, 160), dtype).weight
    assert q.scale.dtype == dtype
    groups = dequantize(q, torch.float32).reshape(6, -1, scheme.columns_per_group(160))
    codes = quantize(groups, q.scale[..., None], q.zero_point[..., None], scheme)
    assert torch.equal(codes.reshape(6, 160).to(torch.uint8), q.codes)


def test_float32_is_as_good_as_float64() -> None:
    """Fewer tokens than columns: without damping the Hessian is singular, and float32 has to bear that."""
    weight, stats = randn(10, 24, 256), correlated(11, 256, tokens=100, rank=30, noise=0.1)
    for scheme in (QuantScheme(4, 64), QuantScheme(3, None, symmetric=False)):
        exact = GPTQ().solve(weight, scheme, stats, torch.float32)
        single = GPTQ().solve(weight.float(), scheme, stats, torch.float32)
        torch.testing.assert_close(single.loss.sum(), exact.loss.sum(), rtol=0.02, atol=0)
        recomputed = losses(weight, real(single.weight), damped(stats))
        torch.testing.assert_close(single.loss, recomputed, rtol=1e-3, atol=0)


def test_inputs_are_not_changed_and_results_repeat() -> None:
    weight, stats = randn(12, 4, 64), correlated(13, 64)
    before, hessian = weight.clone(), stats.hessian.clone()
    scheme = QuantScheme(4, 16)
    first = GPTQ().solve(weight, scheme, stats, torch.float32)
    second = GPTQ().solve(weight, scheme, stats, torch.float32)
    assert_equal(first.weight, second.weight)
    assert torch.equal(weight, before)
    assert torch.equal(stats.hessian, hessian)


@pytest.mark.parametrize(
    "group_size",
    [
        16,
        None,
    ],
)
def test_the_result_has_a_digest(group_size: int | None) -> None:
    """The pipeline takes it of every layer, and of its rows where layers were solved together."""
    q = GPTQ().solve(randn(24, 8, 64), QuantScheme(4, group_size), correlated(25, 64), torch.float32).weight
    assert q.rows(0, 4).digest() != q.rows(4, 8).digest()


def test_strided_weights() -> None:
    """A Conv1D's weight comes as a transposed view."""
    weight, stats, scheme = randn(14, 64, 5), correlated(15, 64), QuantScheme(4, 16)
    assert_equal(
        GPTQ().solve(weight.T, scheme, stats, torch.float32).weight,
        GPTQ().solve(weight.T.contiguous(), scheme, stats, torch.float32).weight,
    )


def test_columns_that_never_were_active() -> None:
    """Their weights cost nothing, make up for nothing, and are rounded to nearest."""
    x = randn(16, 200, 4) @ randn(17, 4, 48)
    x[:, [0, 13, 47]] = 0
    weight, scheme = randn(18, 5, 48), QuantScheme(4, None)
    q = GPTQ().solve(weight, scheme, stats_of(x), torch.float32).weight
    nearest = quantize_groups(weight, scheme, torch.float32)
    assert torch.equal(q.codes[:, [0, 13, 47]], nearest.codes[:, [0, 13, 47]])
    assert not torch.equal(q.codes, nearest.codes)


def test_the_factor_is_upper_triangular_and_inverse_to_the_textbooks() -> None:
    stats = correlated(19, 40)
    factor = reversed_factor(stats.hessian.double(), 0.05).flip(0, 1)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.T, damped(stats, 0.05), rtol=1e-12, atol=1e-12)
    U = torch.linalg.cholesky(torch.linalg.inv(damped(stats, 0.05)), upper=True)
    torch.testing.assert_close(torch.linalg.inv(factor), U, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(bad: float) -> None:
    x = randn(20, 30, 16)
    x[4, 7] = bad
    with pytest.raises(HessianError, match="not finite") as caught:
        GPTQ().solve(randn(21, 3, 16), QuantScheme(4, None), stats_of(x), torch.float32)
    assert "\n" not in str(caught.value)


def test_activations_that_are_all_zero() -> None:
    with pytest.raises(HessianError, match="never activates"):
        GPTQ().solve(randn(22, 3, 16), QuantScheme(4, None), stats_of(torch.zeros(9, 16)), torch.float32)


@pytest.mark.parametrize(("row", "column", "value"), [(0, 1, 5.0), (3, 2, float("nan")), (2, 1, float("inf"))])
def test_hessians_that_are_not_positive_definite(row: int, column: int, value: float) -> None:
    hessian = torch.eye(4, dtype=F64)
    hessian[row, column] = hessian[column, row] = value
    with pytest.raises(HessianError, match=r"not positive definite.*damp_percent"):
        reversed_factor(hessian, 0.01)


def test_a_negative_diagonal() -> None:
    with pytest.raises(HessianError):
        reversed_factor(-torch.eye(4, dtype=F64), 0.01)


def test_no_statistics() -> None:
    with pytest.raises(HessianError, match="calibration"):
        GPTQ().solve(randn(23, 3, 16), QuantScheme(4, None), None, torch.float32)


@pytest.mark.parametrize("damp_percent", [0, 0.0, -0.01, 1, 1.5, float("nan"), float("inf")])
def test_damping_out_of_range(damp_percent: float) -> None:
    with pytest.raises(RecipeError, match=r"damp_percent=.*between 0 and 1"):
        GPTQ(damp_percent=damp_percent)


@pytest.mark.parametrize("block_size", [0, -1])
def test_block_size_out_of_range(block_size: int) -> None:
    with pytest.raises(RecipeError, match=r"block_size=.*at least 1"):
        GPTQ(block_size=block_size)


@pytest.mark.parametrize("options", [{"block_size": 1.5}, {"block_size": True}, {"damp_percent": "0.01"}])
def test_options_of_a_wrong_type(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        GPTQ(**options)


def test_what_a_solver_says_of_itself() -> None:
    assert (GPTQ().name, GPTQ().needs) == ("gptq", frozenset({Stat.HESSIAN}))
    assert GPTQ() == GPTQ(damp_percent=0.01, block_size=128)
    assert len({GPTQ(), GPTQ(), GPTQ(block_size=64)}) == 2
