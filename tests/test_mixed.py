"""Planned recipes: their size, their round trip, what they keep of a base recipe, and that the choice is a good one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.allocate import allocate
from quantkit.calibration import CalibrationSpec
from quantkit.checkpoint import Checkpoint
from quantkit.measuring_room import METRICS
from quantkit.mixed import MixedPlan, plan_mixed, write_recipe
from quantkit.planning import make_plan
from quantkit.recipe import Recipe, load_recipe, make_recipe
from quantkit.report import ignore
from quantkit.scheme import QuantScheme
from quantkit.sensitivity import Sensitivity
from quantkit.source import BUILTIN_PATH
from quantkit.units import find_units

SCHEMES = ("w3a16_g64_asym", "w4a16_g64_asym", "w8a16_g64_sym")
CALIBRATION = {"num_samples": 8, "sequence_length": 128}


@pytest.fixture(scope="module")
def planned() -> MixedPlan:
    """The embedded model at 4.5 bits, measured on little."""
    recipe = {"calibration": CALIBRATION, "method": "rtn"}
    return plan_mixed("builtin", bits=4.5, schemes=SCHEMES, recipe=recipe, num_samples=4, sequence_length=64)


def test_recipe_round_trips_and_has_the_planned_size(planned: MixedPlan, tmp_path: Path) -> None:
    write_recipe(planned, tmp_path / "r.yaml", "builtin")
    loaded = make_recipe(load_recipe(tmp_path / "r.yaml"))
    assert loaded == planned.recipe
    plan = make_plan(Checkpoint(BUILTIN_PATH), loaded)
    assert plan.quantized_bytes == planned.allocation.nbytes
    assert plan.bits_per_quantized_weight == planned.bits <= 4.5
    assert plan.num_quantized == planned.numel
    assert not any("share one matrix" in note for note in plan.notes)
    text = (tmp_path / "r.yaml").read_text()
    for unit, options in zip(planned.units, planned.options, strict=True):
        (line,) = [line for line in text.splitlines() if line.startswith(f"# {unit.name}: ")]
        for scheme, option in zip(planned.schemes, options, strict=True):
            assert f"{scheme} {option.loss:.3g} ({option.nbytes / 1e6:.3f} MB)" in line


def test_quantize_gives_the_planned_bits(planned: MixedPlan, tmp_path: Path) -> None:
    report = quantkit.quantize("builtin", tmp_path / "q", recipe=planned.recipe).report
    assert report["bits_per_quantized_weight"] == planned.bits
    schemes = {layer["name"]: layer["scheme"] for layer in report["layers"]}
    for unit, chosen in zip(planned.units, planned.allocation.chosen, strict=True):
        assert {schemes[layer.info.name] for layer in unit.layers} == {str(planned.schemes[chosen])}


def test_budgets_are_monotone(planned: MixedPlan) -> None:
    losses = [allocate(planned.options, int(bits * planned.numel / 8)).loss for bits in (3.4, 3.8, 4.5, 6.0, 8.3)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 100 * losses[-1]
    assert planned.allocation.bound <= planned.allocation.loss
    assert 0 <= planned.gap < 0.1


def test_a_budget_that_nothing_fits_says_the_smallest(planned: MixedPlan) -> None:
    recipe = {"calibration": CALIBRATION, "method": "rtn"}
    arguments: dict[str, Any] = {"schemes": SCHEMES, "recipe": recipe, "num_samples": 2, "sequence_length": 32}
    with pytest.raises(quantkit.RecipeError, match=r"3.1 bits per weight are fewer .*; ask for at least") as refusal:
        plan_mixed("builtin", bits=3.1, **arguments)
    least = float(str(refusal.value).partition("at least ")[2].partition(",")[0])
    assert 3 + 19 / 64 <= least < 3.31  # code, scale and zero point
    found = plan_mixed("builtin", bits=least, **arguments)
    assert {str(found.schemes[chosen]) for chosen in found.allocation.chosen} == {"w3a16_g64_asym"}
    with pytest.raises(quantkit.RecipeError, match="at least"):
        plan_mixed("builtin", bits=least - 1e-3, **arguments)


def test_more_bits_than_anything_needs(tiny: Callable[[str], Path], planned: MixedPlan) -> None:
    found = allocate(planned.options, int(16 * planned.numel / 8))
    assert found.nbytes == sum(options[-1].nbytes for options in planned.options)


def test_base_recipe_is_kept(tmp_path: Path) -> None:
    """Layers that a rule skips or states a scheme for stay out of the choice and of the budget; the rest stays."""
    base = {
        "method": {"name": "gptq", "damp_percent": 0.05},
        "rules": [
            {"match": "*.0.*", "skip": True},
            {"match": "lm_head", "scheme": "w8a16_g64"},
            {"match": "*.1.mlp.down_proj", "scheme": "w5a16_g64"},
        ],
        "calibration": CALIBRATION,
        "min_share": 0.5,
    }
    found = plan_mixed("builtin", bits=4.5, schemes=SCHEMES, recipe=base, num_samples=2, sequence_length=32)
    assert len(found.units) == 27
    assert found.recipe.method == quantkit.GPTQ(damp_percent=0.05)
    assert found.recipe.calibration == CalibrationSpec("builtin", 8, 128)
    assert found.recipe.min_share == 0.5
    plan = make_plan(Checkpoint(BUILTIN_PATH), found.recipe)
    inside = [layer for layer in plan.layers if layer.info.block is not None]
    assert {layer.info.block for layer in inside} == set(range(1, 8))
    schemes = {layer.info.name: str(layer.scheme) for layer in plan.layers}
    assert schemes["lm_head"] == "w8a16_g64_sym"
    assert schemes["model.layers.1.mlp.down_proj"] == "w5a16_g64_sym"
    assert found.bits <= 4.5
    write_recipe(found, tmp_path / "r.yaml", "builtin")
    assert make_recipe(load_recipe(tmp_path / "r.yaml")) == found.recipe


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"schemes": []}, quantkit.SchemeError, "no schemes leaves nothing to choose"),
        ({"schemes": ["w4a16", "w4a16_g128_sym"]}, quantkit.SchemeError, "w4a16_g128_sym alone leaves nothing"),
        ({"schemes": ["w4a16", "w5"]}, quantkit.SchemeError, "'w5' is not a scheme"),
        ({"schemes": ["w4a16_g64", "w4a16_g96"]}, quantkit.SchemeError, "not a multiple of group_size=96"),
        ({"schemes": ["w8a8", "w4a16_g64"]}, quantkit.SchemeError, "quantized activations is not measured"),
        ({"metric": "trace"}, quantkit.RecipeError, "'trace' is not a measure; use hessian or kl"),
        ({"bits": -1.0}, quantkit.RecipeError, "not a number of bits"),
        ({"bits": float("nan")}, quantkit.RecipeError, "not a number of bits"),
        ({"bits": float("inf")}, quantkit.RecipeError, "not a number of bits"),
        ({"bits": 2.0}, quantkit.RecipeError, "ask for at least 4.25"),
        ({"num_samples": 0}, quantkit.RecipeError, "num_samples=0"),
        ({"sequence_length": 10**6}, quantkit.CalibrationError, "more than the model's 2048 positions"),
        ({"recipe": {"rules": [{"match": "*", "scheme": "w8a16"}]}}, quantkit.RecipeError, "no layer is left"),
        ({"recipe": {"rules": [{"match": "*", "skip": True}]}}, quantkit.RecipeError, "nothing is left"),
        ({"recipe": {"transforms": ["rotation"]}}, quantkit.RecipeError, "transforms: the effect of each layer"),
        ({"device": "tpu"}, quantkit.RecipeError, "tpu"),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    arguments: dict[str, Any] = {"bits": 4.5, "schemes": ["w4a16_g64", "w8a16_g64"]}
    with pytest.raises(error, match=said):
        plan_mixed("builtin", **{**arguments, **changes})


def test_experts_of_a_block_are_one_unit(tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path) -> None:
    """Engines run them with one scheme; a rule may state it, and then nothing of them is measured."""
    recipe: dict[str, Any] = {"scheme": "w8a16_g32", "method": "rtn"}
    names = []
    for rules in ([], [{"match": "*.experts.*", "scheme": "w4a16_g32"}]):
        plan = make_plan(Checkpoint(tiny("mixtral")), make_recipe({**recipe, "rules": rules}))
        units = find_units(plan)
        names.append([unit.name for unit in units if unit.name.startswith("model.layers.1.")])
        run = Sensitivity(plan, units, [QuantScheme(4, 32)], tokens, torch.device("cpu"), tmp_path, ignore)
        estimated, divergence = (torch.tensor(run.measure(metric, seed=0)) for metric in METRICS)
        assert float(divergence.min()) > 0
        # A random model's few tokens: of the same size, which weights misplaced or left empty would not give.
        assert 0.3 < float(estimated.sum() / divergence.sum()) < 3
    attention = ["model.layers.1.self_attn.q_proj+k_proj+v_proj", "model.layers.1.self_attn.o_proj"]
    assert names == [[*attention, "model.layers.1.mlp.experts.*"], attention]


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["hessian", "kl"])
def test_mixed_beats_uniform_and_naive_mixtures_of_its_size(metric: str, tmp_path: Path) -> None:
    """On held-out text: 4.5 bits beat uniform 4 bits, the size of uniform 4 bits is used better, and
    no mixture of the size that gives 8 bits to the first blocks, the last blocks or the down projections is better.
    """
    recipe: dict[str, Any] = {"calibration": {"num_samples": 32, "sequence_length": 256}}

    def chosen(bits: float) -> MixedPlan:
        return plan_mixed("builtin", bits=bits, schemes=SCHEMES, metric=metric, recipe=recipe, num_samples=16,
                          sequence_length=256)  # fmt: skip

    best, small = chosen(4.5), chosen(4.3131)
    budget = int(4.5 * best.numel / 8)
    uniform = {**recipe, "scheme": "w4a16_g64_asym"}
    recipes: dict[str, Recipe | dict[str, Any]] = {"uniform": uniform, "best": best.recipe, "small": small.recipe}
    numbers = range(len(best.units))
    orders = {
        "first": (list(numbers), 1),
        "last": (list(reversed(numbers)), 1),
        "down": ([n for n in numbers if "down_proj" in best.units[n].name], 0),
    }
    for name, (order, base) in orders.items():
        recipes[name] = {**recipe, "scheme": SCHEMES[base], "rules": _upgraded(best, order, base, budget)}
    for name, values in recipes.items():
        quantkit.quantize("builtin", tmp_path / name, recipe=values)
    # In float32: the forward passes' own rounding in bfloat16 is a tenth of these divergences.
    spec = quantkit.EvalSpec(sequence_length=256, limit=60)
    found = quantkit.evaluate(["builtin", *(str(tmp_path / name) for name in recipes)], spec, dtype="float32")
    kl = {Path(result.model).name: result.kl for result in found.results}
    assert kl["best"] < 0.9 * kl["uniform"]  # measured: 0.81
    assert kl["small"] < kl["uniform"]  # measured: 0.91
    assert all(kl["best"] <= kl[name] for name in orders)  # by kl it is the mixture "first" itself


def _upgraded(plan: MixedPlan, order: list[int], base: int, budget: int) -> list[dict[str, str]]:
    """8 bits for units in this order while they fit the budget, the base scheme for the others."""
    taken = [base] * len(plan.units)
    nbytes = sum(options[base].nbytes for options in plan.options)
    for number in order:
        more = plan.options[number][2].nbytes - plan.options[number][base].nbytes
        if nbytes + more <= budget:
            taken[number], nbytes = 2, nbytes + more
    return [{"match": u.match, "scheme": SCHEMES[t]} for u, t in zip(plan.units, taken, strict=True) if t == 2]
