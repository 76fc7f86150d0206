"""Scales by the papers' equations, channels and grid points that have none, and options out of range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.errors import CalibrationError, RecipeError, SchemeError
from quantkit.recipe import make_recipe
from quantkit.transforms import AWQ, Rotation, SmoothQuant
from quantkit.transforms.awq import awq_scale
from quantkit.transforms.search import Point, best_of
from quantkit.transforms.smoothquant import smoothing


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_smoothing_is_equation_4(alpha: float) -> None:
    inputs, weights = torch.tensor([8.0, 0.5, 100.0]), torch.tensor([0.5, 2.0, 0.01])
    expected = [x**alpha / w ** (1 - alpha) for x, w in zip(inputs.tolist(), weights.tolist(), strict=True)]
    assert smoothing(inputs, weights, alpha).tolist() == pytest.approx(expected)


def test_balanced_channels_have_equal_ranges_at_one_half() -> None:
    """alpha = 0.5: after smoothing, each channel of the activations has the range of its column of the weights."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(50, 8, generator=generator), torch.randn(6, 8, generator=generator)
    scale = smoothing(x.abs().amax(0), w.abs().amax(0), 0.5)
    torch.testing.assert_close((x / scale).abs().amax(0), (w * scale).abs().amax(0))


def test_channels_that_are_never_seen_or_weighed_keep_their_scale() -> None:
    inputs, weights = torch.tensor([0.0, 2.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 0.0, 8.0])
    assert smoothing(inputs, weights, 0.5).tolist() == [1.0, 1.0, 1.0, 0.5]
    for magnitudes in (None, weights.double()):
        scale = awq_scale(inputs.double(), magnitudes, 0.5)
        assert bool(torch.isfinite(scale).all())
        assert float(scale[0]) == 1.0
    assert awq_scale(torch.zeros(3, dtype=torch.float64), None, 0.3).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_awq_scale_is_equation_5_up_to_a_factor(ratio: float) -> None:
    inputs = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    for magnitudes, expected in ((None, inputs**ratio), (weights, inputs**ratio / weights ** (1 - ratio))):
        scale = awq_scale(inputs, magnitudes, ratio)
        torch.testing.assert_close(scale / scale[0], expected / expected[0])
        assert float(scale.max() * scale.min()) == pytest.approx(1.0)


def points(*scales: float) -> list[Point]:
    return [Point(f"ratio {index}", torch.tensor([scale])) for index, scale in enumerate(scales)]


def test_the_smallest_loss_wins() -> None:
    found = best_of(points(1.0, 2.0, 3.0), lambda s: float((s - 2).square() + 0.1), 0.5, "here")
    assert found.scale is not None
    assert (found.scale.tolist(), found.choice, found.loss_before) == ([2.0], "ratio 1", 0.5)
    assert found.loss == pytest.approx(0.1)
    assert found.note == ""


def test_nothing_is_scaled_where_nothing_is_better() -> None:
    found = best_of(points(1.0, 2.0), lambda _: 0.5, 0.5, "here")
    assert (found.scale, found.choice, found.loss, found.loss_before) == (None, "none", 0.5, 0.5)


def test_points_that_are_not_finite_are_left_out_and_named() -> None:
    def loss(scale: Tensor) -> float:
        value = float(scale)
        if value == 4.0:
            raise SchemeError("does not fit in float16")
        return math.nan if value == 3.0 else value / 10

    found = best_of(points(math.inf, 2.0, 3.0, 4.0, 0.0), loss, 1.0, "here")
    assert found.choice == "ratio 1"
    assert found.note == "not finite and left out: ratio 0, ratio 2, ratio 3, ratio 4"
    kept = best_of(points(math.inf, 3.0), loss, 1.0, "here")
    assert (kept.scale, kept.loss) == (None, 1.0)
    assert "ratio 0, ratio 1" in kept.note
    rescued = best_of(points(2.0), loss, math.nan, "here")
    assert (rescued.choice, rescued.loss_before) == ("ratio 0", None)
    with pytest.raises(CalibrationError, match="here: quantized outputs are not finite for any scale"):
        best_of(points(math.inf, 3.0), loss, math.nan, "here")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SmoothQuant(alpha=1.5), "alpha=1.5 is out of range; choose 0 to 1"),
        (lambda: SmoothQuant(alpha=-0.1), "alpha=-0.1 is out of range"),
        (lambda: SmoothQuant(alpha=math.nan), "alpha=nan is out of range"),
        (lambda: SmoothQuant(alpha=True), "alpha=True is out of range"),
        (lambda: SmoothQuant(alpha="best"), "alpha='best' is out of range"),  # type: ignore[arg-type]
        (lambda: SmoothQuant(search_tokens=0), "search_tokens=0 is out of range"),
        (lambda: AWQ(grid=1), "grid=1 is out of range; choose at least 2"),
        (lambda: AWQ(search_tokens=0), "search_tokens=0 is out of range"),
        (lambda: AWQ(duo_scaling=1), "duo_scaling=1 is not a truth value"),  # type: ignore[arg-type]
        (lambda: Rotation(residual=False, heads=False), "rotates nothing"),
        (lambda: Rotation(seed=-1), "seed=-1 is out of range"),
        (lambda: Rotation(heads="yes"), "heads='yes' is not a truth value"),  # type: ignore[arg-type]
    ],
)
def test_options_out_of_range(make: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words.replace("(", r"\(")):
        make()


@pytest.mark.parametrize(
    ("transforms", "words"),
    [
        (["quarot"], "transforms.0"),
        ([{"grid": 3}], "the transform has no name; add name: smoothquant or awq or rotation"),
        ([{"name": "smoothquant", "alpha": 2}], "alpha=2.0 is out of range"),
        ([{"name": "smoothquant", "alpha": "some"}], "alpha"),
        (["awq", "rotation"], "rotation stands behind awq; put rotation first"),
        (["awq", "smoothquant", "awq"], "awq stands there 2 times; keep one"),
    ],
)
def test_recipes_that_do_not_compose(transforms: list[Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe({"transforms": transforms})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_with_transforms_survives_yaml() -> None:
    recipe = make_recipe(
        {"transforms": ["rotation", {"name": "smoothquant", "alpha": 0.7}, {"name": "awq", "grid": 5}]}
    )
    assert recipe.transforms == (Rotation(), SmoothQuant(alpha=0.7), AWQ(grid=5))
    assert make_recipe(recipe.to_dict()) == recipe
