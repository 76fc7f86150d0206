"""Every file in recipes/ is complete, loads, and plans on the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.recipe import load_recipe, make_recipe, parse_recipe
from quantkit.run import prepare

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe(path: Path, tmp_path: Path) -> None:
    recipe = make_recipe(load_recipe(path))
    scheme = str(recipe.scheme).partition("_")[0]
    assert path.stem.startswith((f"{scheme}-", "mixed"))
    assert recipe.scheme.act_static == ("-static-" in path.stem)
    names = {recipe.method.name, *(transform.name for transform in recipe.transforms)}
    assert any(name in path.stem for name in names) or path.stem.startswith("mixed")
    assert make_recipe(parse_recipe(recipe.to_yaml(), "again")) == recipe
    plan = prepare("builtin", tmp_path / "out", recipe=path).plan
    assert plan.num_quantized > 0.8 * plan.num_parameters


def test_there_are_recipes() -> None:
    assert {"w4a16-rtn", "w4a16-gptq", "w8a16-rtn", "w8a8-rtn", "w8a8-gptq", "w8a8-static-gptq"} <= {
        path.stem for path in RECIPES
    }
