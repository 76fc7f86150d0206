"""The rounding code: nearest points, exact zeros, and scales that the shipped dtype can hold."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.grid import (
    NUDGE,
    SHRINK,
    Grids,
    activation_scale,
    choose_qparams,
    dequantize,
    fake_quantize_activations,
    quantize,
    quantize_activations,
    quantize_groups,
    search_qparams,
)
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = st.integers(2, 8)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, QuantScheme, torch.dtype]:
    """A float64 weight of ragged shape and very different row sizes, a scheme that fits it, a scale dtype."""
    columns, groups = draw(st.integers(1, 33)), draw(st.integers(1, 4))
    rows = draw(st.integers(1, 5))
    grouped = groups > 1 or draw(st.booleans())
    scheme = QuantScheme(draw(BITS), columns if grouped else None, symmetric=draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    weight = torch.randn(rows, columns * groups, generator=generator, dtype=torch.float64)
    weight *= 10.0 ** torch.randint(-1, 3, (rows, 1), generator=generator)
    weight += draw(st.sampled_from([0.0, 0.0, 1.0, -1.0])) * weight.abs().amax(1, keepdim=True)
    return weight, scheme, draw(st.sampled_from(DTYPES))


def grids(q: QuantizedTensor) -> Tensor:
    """float64 [out, in, levels]: every point that each weight could have been rounded to."""
    group = torch.arange(q.in_features) // q.scheme.columns_per_group(q.in_features)
    scale, zero_point = q.scale.double()[:, group], q.zero_point.double()[:, group]
    levels = torch.arange(q.scheme.levels, dtype=torch.float64)
    return (levels - zero_point[..., None]) * scale[..., None]


@settings(deadline=None)
@given(cases())
def test_no_other_code_is_nearer(case: tuple[Tensor, QuantScheme, torch.dtype]) -> None:
    weight, scheme, dtype = case
    q = quantize_groups(weight, scheme, dtype)
    points = grids(q)
    chosen = points.gather(-1, q.codes.long()[..., None])[..., 0]
    nearest = (points - weight[..., None]).abs().amin(-1)
    slack = 1e-9 * (points[..., -1] - points[..., 0])
    assert bool(((chosen - weight).abs() <= nearest + slack).all())


@settings(deadline=None)
@given(cases())
def test_the_scale_is_the_min_max_scale_in_the_shipped_dtype(case: tuple[Tensor, QuantScheme, torch.dtype]) -> None:
    weight, scheme, dtype = case
    q = quantize_groups(weight, scheme, dtype)
    assert q.scale.dtype == dtype
    for row in range(q.out_features):
        for index, group in enumerate(weight[row].split(scheme.columns_per_group(q.in_features))):
            values = group.tolist()
            if scheme.symmetric:
                expected, zero = max(map(abs, values)) / ((2**scheme.bits - 1) / 2), scheme.mid
            else:
                low, high = min(0.0, *values), max(0.0, *values)
                expected = (high - low) / (2**scheme.bits - 1)
                zero = round(-low / float(q.scale[row, index]))
            if expected < torch.finfo(dtype).tiny:
                continue  # zeros and underflow have tests of their own
            assert float(q.scale[row, index]) == float(torch.tensor(expected, dtype=torch.float64).to(dtype))
            assert int(q.zero_point[row, index]) == min(zero, scheme.levels - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zero_points_are_those_of_the_rounded_scale(dtype: torch.dtype) -> None:
    """In 8 bits the rounding of a bfloat16 scale moves the zero point by up to half a level."""
    weight = torch.rand(300, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1.4
    q = quantize_groups(weight, QuantScheme(8, 16, symmetric=False), dtype)
    expected = torch.round(-weight.amin(1, keepdim=True) / q.scale.float())
    assert torch.equal(q.zero_point.float(), expected)


@settings(deadline=None)
@given(cases())
def test_the_error_is_bounded_by_the_step(case: tuple[Tensor, QuantScheme, torch.dtype]) -> None:
    """Half a step, and half a step more where the zero point was rounded; plus what rounding the scale clips."""
    weight, scheme, dtype = case
    q = quantize_groups(weight, scheme, dtype)
    step = q.scale.double().repeat_interleave(scheme.columns_per_group(q.in_features), 1)
    clipped = scheme.levels * torch.finfo(dtype).eps
    allowed = (0.5 if scheme.symmetric else 1.0) + clipped
    assert bool(((dequantize(q, torch.float64) - weight).abs() <= step * allowed + 1e-12).all())


@settings(deadline=None)
@given(cases())
def test_dequantized_weights_keep_their_codes(case: tuple[Tensor, QuantScheme, torch.dtype]) -> None:
    weight, scheme, dtype = case
    q = quantize_groups(weight, scheme, dtype)
    columns = scheme.columns_per_group(q.in_features)
    groups = dequantize(q, torch.float32).reshape(q.out_features, -1, columns)
    again = quantize(groups, q.scale[..., None], q.zero_point[..., None], scheme)
    assert torch.equal(again.to(torch.uint8).reshape(q.codes.shape), q.codes)


@settings(deadline=None)
@given(cases(), st.integers(0, 2**16))
def test_zero_is_exactly_zero(case: tuple[Tensor, QuantScheme, torch.dtype], seed: int) -> None:
    weight, scheme, dtype = case
    zeros = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    weight[zeros] = 0.0
    for target in (None, torch.float32):
        assert bool((dequantize(quantize_groups(weight, scheme, dtype), target)[zeros] == 0).all())


@settings(deadline=None)
@given(cases())
def test_codes_lie_within_the_levels(case: tuple[Tensor, QuantScheme, torch.dtype]) -> None:
    weight, scheme, dtype = case
    q = quantize_groups(weight * 1.0, scheme, dtype)
    assert int(q.codes.max()) < scheme.levels
    assert int(q.zero_point.max()) < scheme.levels
    assert not scheme.symmetric or bool((q.zero_point == scheme.mid).all())


@settings(deadline=None)
@given(cases(), st.integers(0, 2**16))
def test_reordered_groups_are_the_plain_form_permuted(case: tuple[Tensor, QuantScheme, torch.dtype], seed: int) -> None:
    weight, scheme, dtype = case
    q = quantize_groups(weight, scheme, dtype)
    order = torch.randperm(q.in_features, generator=torch.Generator().manual_seed(seed))
    g_idx = (torch.arange(q.in_features) // scheme.columns_per_group(q.in_features)).to(torch.int32)
    permuted = QuantizedTensor(q.codes[:, order], q.scale, q.zero_point, scheme, g_idx[order])
    for target in (None, torch.float32):
        assert torch.equal(dequantize(permuted, target), dequantize(q, target)[:, order])


@settings(deadline=None)
@given(cases(), st.sampled_from(DTYPES))
def test_dequantize_rounds_once(case: tuple[Tensor, QuantScheme, torch.dtype], target: torch.dtype) -> None:
    """(code - zero) * scale is exact in float64; the result is that number, rounded to float32 and to the target."""
    weight, scheme, dtype = case
    q = quantize_groups(weight, scheme, dtype)
    exact = grids(q).gather(-1, q.codes.long()[..., None])[..., 0]
    found = dequantize(q, target)
    assert found.dtype == target
    assert torch.equal(found, exact.to(torch.float32).to(target))
    assert dequantize(q).dtype == dtype
    assert torch.equal(dequantize(q), exact.to(torch.float32).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_group_of_zeros(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 32:] = 1.0  # other groups are not touched by it
    q = quantize_groups(weight, QuantScheme(bits, 32, symmetric=symmetric), dtype)
    assert q.scale.flatten()[:3].tolist() == [1, 1, 1]
    assert torch.equal(dequantize(q, torch.float32)[0], torch.zeros(64))
    assert torch.equal(dequantize(q, torch.float32)[1, :32], torch.zeros(32))
    assert float(dequantize(q, torch.float32)[1, 32]) == pytest.approx(1.0, rel=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_tiny_groups_have_a_finite_scale_that_is_not_zero(symmetric: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1e-5, 1e-8, 1e-12, 1e-37, 1e-44):
        weight = torch.randn(3, 16, generator=generator) * size
        q = quantize_groups(weight, QuantScheme(4, 16, symmetric=symmetric), dtype)
        assert bool(torch.isfinite(q.scale).all())
        assert bool((q.scale > 0).all())
        error = (dequantize(q, torch.float32) - weight).abs().amax()
        assert float(error) <= max(float(q.scale.max()), 8 * size)


@pytest.mark.parametrize("symmetric", [True, False])
def test_small_groups_keep_their_resolution_in_float16(symmetric: bool) -> None:
    """Weights of 0.001 are common, and 8 bits of them need a scale of 8e-6: within 0.4 % a float16 number."""
    weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) * 2e-3 - 1e-3
    scheme = QuantScheme(8, 64, symmetric=symmetric)
    errors = {
        dtype: float((dequantize(quantize_groups(weight, scheme, dtype), torch.float32) - weight).square().sum())
        for dtype in (torch.float16, torch.float32)
    }
    assert errors[torch.float16] < 2 * errors[torch.float32]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_that_does_not_fit_is_refused(symmetric: bool) -> None:
    scheme = QuantScheme(2, 16, symmetric=symmetric)
    weight = torch.full((2, 16), 1e6)
    with pytest.raises(SchemeError, match=r"does not fit in torch\.float16.*6\.55e\+04.*--dtype") as caught:
        quantize_groups(weight, scheme, torch.float16)
    assert "\n" not in str(caught.value)
    assert bool(torch.isfinite(quantize_groups(weight, scheme, torch.bfloat16).scale).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_that_are_not_finite_are_refused(symmetric: bool, bad: float) -> None:
    weight = torch.ones(2, 16)
    weight[1, 3] = bad
    with pytest.raises(SchemeError):
        quantize_groups(weight, QuantScheme(4, 16, symmetric=symmetric), torch.float32)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_of_one_sign_use_the_whole_asymmetric_range(bits: int) -> None:
    scheme = QuantScheme(bits, 32, symmetric=False)
    positive = torch.linspace(0.5, 1.0, 32)[None]
    q = quantize_groups(positive, scheme, torch.float32)
    assert q.zero_point.tolist() == [[0]]
    assert int(q.codes[0, -1]) == scheme.levels - 1
    mirrored = quantize_groups(-positive, scheme, torch.float32)
    assert mirrored.zero_point.tolist() == [[scheme.levels - 1]]
    assert torch.equal(mirrored.codes, scheme.levels - 1 - q.codes)
    assert torch.equal(dequantize(mirrored), -dequantize(q))


def test_worked_example() -> None:
    """By hand: 2 bits, codes 0..3. Symmetric: scale 3 / 1.5 = 2, points -4 -2 0 2. Asymmetric: scale 6 / 3 = 2."""
    weight = torch.tensor([[-3.0, -0.9, 1.1, 3.0]])
    q = quantize_groups(weight, QuantScheme(2, 4), torch.float32)
    assert (q.scale.tolist(), q.zero_point.tolist()) == ([[2.0]], [[2]])
    assert q.codes.tolist() == [[0, 2, 3, 3]]  # -3 / 2 is a tie and goes to the even -2; 3 / 2 is clamped to 1
    assert dequantize(q).tolist() == [[-4.0, 0.0, 2.0, 2.0]]
    q = quantize_groups(weight + 1, QuantScheme(2, 4, symmetric=False), torch.float32)
    assert (q.scale.tolist(), q.zero_point.tolist()) == ([[2.0]], [[1]])
    assert dequantize(q).tolist() == [[-2.0, 0.0, 2.0, 4.0]]


def test_leading_dimensions_and_dtypes_of_choose_qparams() -> None:
    groups = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for symmetric in (True, False):
        scheme = QuantScheme(4, 7, symmetric=symmetric)
        scale, zero_point = choose_qparams(groups, scheme, torch.bfloat16)
        assert (list(scale.shape), scale.dtype) == ([2, 3, 5], torch.bfloat16)
        assert (list(zero_point.shape), zero_point.dtype) == ([2, 3, 5], torch.uint8)
        alone = choose_qparams(groups[1, 2, 3], scheme, torch.bfloat16)
        assert (float(scale[1, 2, 3]), int(zero_point[1, 2, 3])) == (float(alone[0]), int(alone[1]))


def test_the_weight_is_not_changed() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    for symmetric in (True, False):
        q = quantize_groups(weight, QuantScheme(4, 16, symmetric=symmetric), torch.float32)
        codes = q.codes.clone()
        dequantize(q).zero_()
        assert torch.equal(q.codes, codes)
    assert torch.equal(weight, before)


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"in_features=96.*group_size=64"):
        quantize_groups(torch.zeros(2, 96), QuantScheme(4, 64), torch.float32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_solvers_grids_round_like_quantize(bits: int, symmetric: bool) -> None:
    """Column by column, with grids that are set one group at a time and all at once, and negative scales."""
    scheme = QuantScheme(bits, 8, symmetric=symmetric)
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    scale, zero_point = choose_qparams(weight.reshape(5, 3, 8).transpose(0, 1), scheme, torch.bfloat16)
    scale[1] = -scale[1]
    expected = torch.stack([quantize(weight[:, j], scale[j // 8], zero_point[j // 8], scheme) for j in range(24)])
    for at_once in (True, False):
        grids = Grids.empty(3, 5, scheme, torch.bfloat16, torch.float64, torch.device("cpu"))
        if at_once:
            grids[:] = scale, zero_point
        else:
            for group in (2, 0, 1):
                grids[group] = scale[group], zero_point[group]
        found = torch.empty(24, 5, dtype=torch.float64)
        for column in range(24):
            used = grids.nearest(weight[:, column], column // 8, out=found[column])
            assert torch.equal(used, scale[column // 8].double())
        assert torch.equal(found + grids.zero_points(torch.arange(24) // 8), expected)
        assert torch.equal(grids.scale, scale)
        assert torch.equal(grids.zero_point, zero_point)


def squared_error(group: torch.Tensor, importance: torch.Tensor, scale: float, zero: int, levels: int) -> float:
    """Of one group on one grid, by the definition."""
    error = 0.0
    for weight, counts in zip(group.tolist(), importance.tolist(), strict=True):
        code = min(max(round(weight / scale) + zero, 0), levels - 1)
        error += counts * (weight - scale * (code - zero)) ** 2
    return error


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_finds_the_best_of_its_ranges(bits: int, symmetric: bool, weighted: bool) -> None:
    """Against all of them tried one by one in Python."""
    scheme, random = QuantScheme(bits, 12, symmetric=symmetric), torch.Generator().manual_seed(bits)
    groups = torch.randn(3, 4, 12, generator=random, dtype=torch.float64)
    groups[0, 0] = groups[0, 0].abs()
    groups[0, 1, 3] = 9
    importance = torch.rand(4, 12, generator=random) if weighted else torch.ones(4, 12)
    full, _ = choose_qparams(groups, scheme, torch.bfloat16)
    scale, zero_point = search_qparams(groups, scheme, torch.bfloat16, importance if weighted else None)
    assert bool((scale != full).any())
    assert bool((scale < 0).any()) == symmetric
    for i, j in itertools.product(range(3), range(4)):
        wanted, best = math.inf, (0.0, 0)
        low = min(float(groups[i, j].min()), 0.0)
        for factor, sign in itertools.product((1.0, *SHRINK), (1, -1) if symmetric else (1,)):
            tried = float((full[i, j].double() * factor).to(torch.bfloat16)) * sign
            zero = scheme.mid if symmetric else min(max(round(-factor * low / tried), 0), scheme.levels - 1)
            error = squared_error(groups[i, j], importance[j], tried, zero, scheme.levels)
            if error < wanted:
                wanted, best = error, (tried, zero)
        for shift, factor in itertools.product((-1, 0, 1), () if symmetric else NUDGE):
            nudged = float(torch.tensor(best[0] * factor).to(torch.bfloat16))
            zero = min(max(best[1] + shift, 0), scheme.levels - 1)
            wanted = min(wanted, squared_error(groups[i, j], importance[j], nudged, zero, scheme.levels))
        found = squared_error(groups[i, j], importance[j], float(scale[i, j]), int(zero_point[i, j]), scheme.levels)
        assert found == pytest.approx(wanted, rel=1e-12)


def test_the_search_in_pieces_and_in_any_layout() -> None:
    """A weight of several tiles, its transpose, and one group after the other give the same grids."""
    weight = torch.randn(700, 1024, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(1024, generator=torch.Generator().manual_seed(1))
    for symmetric in (True, False):
        scheme = QuantScheme(4, 64, symmetric=symmetric)
        rows = search_qparams(weight.unflatten(1, (16, 64)), scheme, torch.bfloat16, importance.view(16, 64))
        columns = search_qparams(
            weight.T.contiguous().unflatten(0, (16, 64)).mT, scheme, torch.bfloat16, importance.view(16, 1, 64)
        )
        group = search_qparams(weight[:, 64:128], scheme, torch.bfloat16, importance[64:128])
        for whole, other, part in zip(rows, columns, group, strict=True):
            assert torch.equal(whole, other.T)
            assert torch.equal(whole[:, 1], part)


def test_the_search_keeps_what_cannot_be_bettered() -> None:
    """Zeros, weights that lie on the grid, and groups where nothing counts keep the range of their extremes."""
    scheme = QuantScheme(4, 4, symmetric=False)
    groups = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 3.0, 7.0, 15.0]])
    for importance in (None, torch.zeros(4)):
        scale, zero_point = search_qparams(groups, scheme, torch.float32, importance)
        assert (scale.tolist(), zero_point.tolist()) == ([1.0, 1.0], [0, 0])


# Activations


def tokens(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tokens of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.randint(-6, 4, (*shape[:-1], 1), generator=generator)
    return (torch.randn(shape, generator=generator) * size).to(dtype)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**20), st.integers(1, 9), st.integers(1, 70), st.sampled_from((*DTYPES, torch.float64)))
def test_dynamic_activations(seed: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Every value lies within half a step of its code, and the largest of a token is 127.5 steps."""
    x = tokens(seed, rows, columns, dtype=dtype)
    codes, scale = quantize_activations(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (codes.dtype, scale.dtype, codes.shape, scale.shape) == (wide, wide, x.shape, (rows, 1))
    assert torch.equal(codes, codes.round())
    assert int(codes.min()) >= -128
    assert int(codes.max()) <= 127
    exact = x.double()
    largest = exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale.double(), (largest / 127.5).where(largest > 0, 1.0), rtol=1e-6, atol=1e-45)
    assert bool(((codes.double() * scale.double() - exact).abs() <= scale.double() * (0.5 + 1e-4)).all())
    torch.testing.assert_close(fake_quantize_activations(x), (codes * scale).to(dtype), rtol=0, atol=0)


def test_one_token_is_one_row_however_tokens_are_arranged() -> None:
    x = tokens(3, 2, 3, 5)
    codes, scale = quantize_activations(x)
    for i in range(2):
        for j in range(3):
            own, own_scale = quantize_activations(x[i, j])
            assert torch.equal(own, codes[i, j])
            assert torch.equal(own_scale, scale[i, j])


def test_static_activations_saturate() -> None:
    x = torch.tensor([[0.26, -0.24, 63.4, 63.6, 1e9, -64.1, -1e9, float("inf")]])
    codes, scale = quantize_activations(x, 0.5)
    assert codes.tolist() == [[1, 0, 127, 127, 127, -128, -128, 127]]
    assert scale.tolist() == [[0.5]]
    assert x[0, 0] == 0.26  # not changed
    same, _ = quantize_activations(x, torch.tensor([0.5]))
    assert torch.equal(same, codes)


def test_halves_are_rounded_to_even_as_by_the_clients() -> None:
    codes, _ = quantize_activations(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), 1.0)
    assert codes.tolist() == [0, 2, 2, 0, -2]


def test_a_token_of_zeros_and_no_token() -> None:
    codes, scale = quantize_activations(torch.tensor([[0.0, 0.0], [1.0, -127.5]]))
    assert codes.tolist() == [[0, 0], [1, -128]]
    assert scale.tolist() == [[1.0], [1.0]]
    assert fake_quantize_activations(torch.zeros(0, 3)).shape == (0, 3)
    assert fake_quantize_activations(torch.zeros(0, 3), 0.5).shape == (0, 3)


@pytest.mark.parametrize("static_scale", [None, 0.5])
def test_a_nan_spoils_its_token_and_no_other(static_scale: float | None) -> None:
    """Integers hold no NaN, so the scale must."""
    x = torch.tensor([[1.0, float("nan"), 2.0], [1.0, 2.0, 3.0]])
    _, scale = quantize_activations(x, static_scale)
    assert bool(scale[0].isnan())
    assert bool(scale[1].isfinite())
    if static_scale is None:
        _, scale = quantize_activations(torch.tensor([[1.0, float("-inf")]]))
        assert not bool(scale.isfinite())


def test_the_static_scale_is_one_that_ships() -> None:
    assert activation_scale(127.5, torch.float32) == 1.0
    assert activation_scale(100.0, torch.bfloat16) == float(torch.tensor(100 / 127.5).bfloat16())
    assert activation_scale(1e-12, torch.float16) > 0
    with pytest.raises(SchemeError, match=r"does not fit in torch\.float16"):
        activation_scale(1e8, torch.float16)
