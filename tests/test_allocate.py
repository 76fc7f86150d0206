"""The knapsack against brute force, its bound, and what a larger budget may not do."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.allocate import Option, allocate, smallest

options = st.builds(Option, st.integers(0, 40), st.one_of(st.integers(0, 20).map(float), st.floats(0, 10)))
instances = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


def brute_force(units: list[list[Option]], budget: int) -> float:
    losses = [
        sum(option.loss for option in choice)
        for choice in itertools.product(*units)
        if sum(option.nbytes for option in choice) <= budget
    ]
    return min(losses)


@given(instances, st.integers(0, 60))
def test_as_good_as_brute_force(units: list[list[Option]], spare: int) -> None:
    budget = smallest(units) + spare
    found = allocate(units, budget)
    chosen = [unit[index] for unit, index in zip(units, found.chosen, strict=True)]
    assert found.nbytes == sum(option.nbytes for option in chosen) <= budget
    assert found.loss == sum(option.loss for option in chosen)
    exact = brute_force(units, budget)
    assert found.loss == pytest.approx(exact, rel=1e-9, abs=1e-9)
    assert found.bound <= found.loss


@given(instances, st.integers(0, 60), st.integers(0, 60))
def test_more_bytes_never_lose_more(units: list[list[Option]], one: int, other: int) -> None:
    small, large = sorted((one, other))
    least = smallest(units)
    worse, better = allocate(units, least + small), allocate(units, least + large)
    assert better.loss <= worse.loss + 1e-9
    assert better.bound <= worse.bound + 1e-9


@given(instances)
def test_the_smallest_budget_and_none_below_it(units: list[list[Option]]) -> None:
    least = smallest(units)
    assert allocate(units, least).nbytes == least
    with pytest.raises(ValueError, match="no choice fits"):
        allocate(units, least - 1)


@given(instances)
def test_with_room_for_everything_each_unit_takes_its_best(units: list[list[Option]]) -> None:
    budget = sum(max(option.nbytes for option in unit) for unit in units)
    best = sum(min(option.loss for option in unit) for unit in units)
    assert allocate(units, budget).loss == pytest.approx(best, abs=1e-9)


def test_greedy_is_not_exact_and_this_is() -> None:
    """The steepest step first (3 bytes for 3.1) leaves 4 bytes unused; the two others use all 7 for more."""
    units = [[Option(0, 10.0), Option(4, 6.0)], [Option(0, 10.0), Option(3, 7.1)], [Option(0, 10.0), Option(5, 5.0)]]
    assert allocate(units, 7).loss == pytest.approx(23.1)
    assert allocate(units, 8).chosen == (0, 1, 1)


def test_a_model_of_many_layers() -> None:
    """128 units of 3 schemes with sizes that share no divisor: bound and optimum are close, and states stay few."""
    units = []
    for index in range(128):
        scale = 1 + (index * 37 % 101) / 10
        numel = 4096 * (1024 + 16 * (index * 53 % 977)) + index
        units.append([Option(numel * 3 // 8, scale), Option(numel // 2, scale / 5), Option(numel, scale / 900)])
    least, most = smallest(units), sum(unit[-1].nbytes for unit in units)
    found = allocate(units, least + (most - least) // 4)
    assert found.bound <= found.loss <= found.bound * 1.01
