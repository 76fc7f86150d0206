"""AutoRound's options and its starting point; what is learned is tested in tests/test_tuning.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import normal

from quantkit.errors import RecipeError
from quantkit.recipe import make_recipe
from quantkit.scheme import QuantScheme
from quantkit.solvers import RTN, AutoRound


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 0},
        {"iterations": 2.0},
        {"iterations": True},
        {"batch": 0},
        {"learning_rate": 0},
        {"learning_rate": 1.01},
        {"learning_rate": float("inf")},
        {"learning_rate": "0.1"},
        {"clip": 1},
        {"held_out": 0},
        {"held_out": 0.51},
        {"seed": -1},
    ],
    ids=str,
)
def test_options_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="autoround: "):
        AutoRound(**options)


def test_learning_rate() -> None:
    assert AutoRound(iterations=50).rate == 1 / 50
    assert AutoRound(iterations=50, learning_rate=0.25).rate == 0.25


def test_in_a_recipe() -> None:
    recipe = make_recipe({"method": "autoround"})
    assert recipe.method == AutoRound()
    assert make_recipe(recipe.to_dict()) == recipe
    with pytest.raises(RecipeError, match="did you mean iterations"):
        make_recipe({"method": {"name": "autoround", "iteration": 3}})
    with pytest.raises(RecipeError, match="did you mean epochs"):
        make_recipe({"tuning": {"epoch": 3}})
    with pytest.raises(RecipeError, match=r"tuning.*epochs=0"):
        make_recipe({"tuning": {"epochs": 0}})


def test_starts_at_round_to_nearest() -> None:
    w, scheme = normal(4, 32), QuantScheme(3, 8, symmetric=False)
    nearest = RTN().solve(w, scheme, None, torch.bfloat16)
    start = AutoRound().solve(w, scheme, None, torch.bfloat16)
    assert start.weight.digest() == nearest.weight.digest()
    assert torch.equal(start.loss, nearest.loss)
