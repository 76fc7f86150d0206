"""LayerStats: the Hessian is 2/n XᵀX, maxima and means are per channel, however the tokens were cut into batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.stats import LayerStats, Stat, output_energy

HESSIAN = frozenset({Stat.HESSIAN})
CPU = torch.device("cpu")


def inputs(seed: int, tokens: int, width: int) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def expected(x: Tensor) -> Tensor:
    """float64 2/n Σ x xᵀ, summed token by token."""
    total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
    for token in x.double():
        total += torch.outer(token, token)
    return 2 * total / len(x)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.diagonal().mean()))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**16), st.integers(1, 19), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_any_split_into_batches_gives_the_same_hessian(seed: int, width: int, batches: list[int]) -> None:
    x = inputs(seed, sum(batches), width)
    stats = LayerStats(width, HESSIAN, CPU)
    for batch in x.split(batches):
        stats.update(batch)
    assert stats.num_tokens == sum(batches)
    assert_close(stats.hessian, expected(x))


def test_leading_dimensions_are_tokens() -> None:
    x = inputs(0, 24, 5)
    stats = LayerStats(5, HESSIAN, CPU)
    stats.update(x[:12].reshape(2, 3, 2, 5))
    stats.update(x[12])
    stats.update(x[13:].reshape(1, 11, 5).transpose(0, 1))
    assert stats.num_tokens == 24
    assert_close(stats.hessian, expected(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_summed_in_float32(dtype: torch.dtype) -> None:
    """A sum of 2000 products in bfloat16 would be wrong in the second digit."""
    x = inputs(1, 2000, 6).to(dtype)
    stats = LayerStats(6, HESSIAN, CPU)
    for batch in x.split(100):
        stats.update(batch)
    assert_close(stats.hessian, expected(x))


def test_products_beyond_float16_do_not_overflow() -> None:
    stats = LayerStats(2, HESSIAN, CPU)
    stats.update(torch.full((4, 2), 1000.0, dtype=torch.float16))
    assert stats.hessian.tolist() == [[2e6, 2e6], [2e6, 2e6]]


def test_reading_does_not_end_the_gathering() -> None:
    x = inputs(2, 20, 3)
    stats = LayerStats(3, HESSIAN, CPU)
    stats.update(x[:7])
    assert_close(stats.hessian, expected(x[:7]))
    stats.update(x[7:])
    assert_close(stats.hessian, expected(x))
    assert torch.equal(stats.hessian, stats.hessian)


def test_inputs_are_neither_changed_nor_tracked() -> None:
    x = inputs(3, 8, 3).requires_grad_()
    before = x.detach().clone()
    stats = LayerStats(3, HESSIAN, CPU)
    stats.update(x)
    assert not stats.hessian.requires_grad
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("width", [1, 9, 128, 129, 300])
def test_the_hessian_is_exactly_symmetric(width: int) -> None:
    """One triangle is summed, in tiles of 128 columns, and mirrored when read; reading goes on to be right after."""
    x = inputs(width, 33, width)
    stats = LayerStats(width, HESSIAN, CPU)
    for seen, batch in enumerate(x.split(11), 1):
        stats.update(batch)
        assert torch.equal(stats.hessian, stats.hessian.T)
        assert_close(stats.hessian, expected(x[: 11 * seen]))


def test_what_was_not_asked_for_is_an_error() -> None:
    stats = LayerStats(3, frozenset(), CPU)
    stats.update(inputs(0, 4, 3))
    assert stats.num_tokens == 4
    with pytest.raises(ValueError, match="no Hessian was gathered"):
        _ = stats.hessian


def test_no_token_is_an_error_and_not_a_division_by_zero() -> None:
    stats = LayerStats(3, HESSIAN, CPU)
    with pytest.raises(ValueError, match="at least one token"):
        _ = stats.hessian
    stats.update(torch.empty(0, 3))
    with pytest.raises(ValueError, match="at least one token"):
        _ = stats.hessian


@pytest.mark.parametrize("width", [2, 4])
def test_inputs_of_another_width_are_refused(width: int) -> None:
    stats = LayerStats(3, HESSIAN, CPU)
    with pytest.raises(RuntimeError):
        stats.update(inputs(0, 4, width))


def test_drift_against_the_full_precision_input() -> None:
    """Two unequal batches: 2/n Σ (x̃ - x) xᵀ, with the same divisor as the Hessian, whichever is read first."""
    x, reference = torch.randn(12, 6, dtype=torch.float64), torch.randn(12, 6, dtype=torch.float64)
    stats = LayerStats(6, frozenset({Stat.HESSIAN, Stat.DRIFT}), torch.device("cpu"))
    stats.update(x[:5].view(1, 5, 6), reference[:5].view(1, 5, 6))
    torch.testing.assert_close(stats.hessian.double(), 2 / 5 * x[:5].T @ x[:5], rtol=1e-5, atol=1e-6)
    stats.update(x[5:], reference[5:])
    torch.testing.assert_close(stats.drift.double(), 2 / 12 * (reference - x).T @ x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.hessian.double(), 2 / 12 * x.T @ x, rtol=1e-5, atol=1e-6)


def test_drift_needs_a_reference() -> None:
    stats = LayerStats(6, frozenset({Stat.DRIFT}), torch.device("cpu"))
    with pytest.raises(ValueError, match="full-precision"):
        stats.update(torch.randn(3, 6))
    with pytest.raises(ValueError, match=r"Stat\.DRIFT"):
        _ = LayerStats(6, frozenset({Stat.HESSIAN}), torch.device("cpu")).drift


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**16), st.integers(1, 19), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_any_split_into_batches_gives_the_same_maxima_and_means(seed: int, width: int, batches: list[int]) -> None:
    x = inputs(seed, sum(batches), width)
    stats = LayerStats(width, frozenset({Stat.ABS_MAX, Stat.ABS_MEAN}), CPU)
    for batch in x.split(batches):
        stats.update(batch)
    magnitudes = [[abs(float(value)) for value in channel] for channel in x.T]
    assert stats.abs_max.tolist() == [max(channel) for channel in magnitudes]
    assert stats.abs_max.dtype == stats.abs_mean.dtype == torch.float32
    means = torch.tensor([sum(channel) / len(channel) for channel in magnitudes], dtype=torch.float64)
    torch.testing.assert_close(stats.abs_mean.double(), means, rtol=1e-6, atol=0)


def test_maxima_and_means_of_bfloat16_are_gathered_in_wider_numbers() -> None:
    """4096 ones in bfloat16 would stop growing at 256."""
    stats = LayerStats(2, frozenset({Stat.ABS_MAX, Stat.ABS_MEAN}), CPU)
    for _ in range(4):
        stats.update(torch.tensor([[-1.0, 3.0]], dtype=torch.bfloat16).expand(1, 1024, 2))
    stats.update(torch.zeros(0, 2))
    assert stats.num_tokens == 4096
    assert stats.abs_mean.tolist() == [1.0, 3.0]
    assert stats.abs_max.tolist() == [1.0, 3.0]


def test_a_nan_stays_in_the_maximum() -> None:
    stats = LayerStats(2, frozenset({Stat.ABS_MAX}), CPU)
    stats.update(torch.tensor([[1.0, float("nan")]]))
    stats.update(torch.tensor([[2.0, 5.0]]))
    assert float(stats.abs_max[0]) == 2.0
    assert bool(stats.abs_max[1].isnan())


@pytest.mark.parametrize(("name", "stat"), [("abs_max", Stat.ABS_MAX), ("abs_mean", Stat.ABS_MEAN)])
def test_maxima_and_means_are_there_only_when_asked_for_and_seen(name: str, stat: Stat) -> None:
    other = LayerStats(3, HESSIAN, CPU)
    other.update(inputs(0, 4, 3))
    with pytest.raises(ValueError, match=f"Stat.{stat.name}"):
        getattr(other, name)
    with pytest.raises(ValueError, match="at least one token"):
        getattr(LayerStats(3, frozenset({stat}), CPU), name)


@pytest.mark.parametrize("read_before", [False, True])
def test_rescaled_statistics_are_those_of_the_scaled_input(read_before: bool) -> None:
    """Whether or not the sums were divided and mirrored before; what is added afterwards is in the new scale."""
    x, reference = inputs(0, 40, 6), inputs(1, 40, 6)
    factors = torch.exp(inputs(2, 1, 6)[0].double())
    stats, scaled = LayerStats(6, frozenset(Stat), CPU), LayerStats(6, frozenset(Stat), CPU)
    stats.update(x[:30], reference[:30])
    if read_before:
        assert stats.hessian.shape == stats.drift.shape == (6, 6)
    stats.rescale(factors)
    stats.update((x[30:] * factors).float(), (reference[30:] * factors).float())
    scaled.update((x * factors).float(), (reference * factors).float())
    assert torch.equal(stats.hessian, stats.hessian.T)
    for name in ("hessian", "drift", "abs_max", "abs_mean"):
        torch.testing.assert_close(getattr(stats, name), getattr(scaled, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_hessian_of_half_precision_inputs_is_as_exact_as_of_float32_ones(dtype: torch.dtype) -> None:
    """Means far from zero, as activations have them: an input rounded once more would show."""
    x = (inputs(5, 300, 200) + 3).to(dtype)
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    stats = LayerStats(200, HESSIAN, CPU)
    stats.update(x)
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
    wanted = 2 / 300 * x.double().T @ x.double()
    assert float((stats.hessian - wanted).abs().max() / wanted.abs().max()) < 4e-6


@pytest.mark.parametrize(("out_features", "in_features"), [(3, 5), (7, 128), (40, 300)])
def test_output_energy_is_that_of_the_outputs(out_features: int, in_features: int) -> None:
    x, weight = inputs(1, 50, in_features), inputs(2, out_features, in_features)
    stats = LayerStats(in_features, HESSIAN, CPU)
    stats.update(x)
    y = x.double() @ weight.double().T
    assert output_energy(weight, stats.hessian) == pytest.approx(2 / 50 * float(y.square().sum()), rel=1e-5)
