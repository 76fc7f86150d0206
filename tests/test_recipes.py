"""Every file in recipes/ is complete, loads, and plans on the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.recipe import load_recipe, make_recipe, parse_recipe
from quantkit.run import prepare

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
MEASURED = Path(__file__).parent.parent / "evals" / "quality" / "recipes" / "gptq-tuned.yaml"


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


@pytest.mark.parametrize("name", ["w4a16-gptq-tuned", "w4a16-gptq-asym-tuned", "w3a16-gptq-tuned"])
def test_what_is_shipped_is_what_was_measured(name: str) -> None:
    """evals/quality ran its own file, for all schemes; a tuned recipe is also the one without tuning, and tuning."""
    shipped = make_recipe(load_recipe(RECIPES[0].parent / f"{name}.yaml"))
    measured = make_recipe(load_recipe(MEASURED))
    plain = make_recipe(load_recipe(RECIPES[0].parent / f"{name.removesuffix('-tuned')}.yaml"))
    for key in ("method", "transforms", "true_sequential", "tuning"):
        assert getattr(shipped, key) == getattr(measured, key), key
    assert shipped.tuning is not None
    assert shipped.model_copy(update={"tuning": None}) == plain


def test_there_are_recipes() -> None:
    assert {"w4a16-rtn", "w4a16-gptq", "w8a16-rtn", "w8a8-rtn", "w8a8-gptq", "w8a8-static-gptq"} <= {
        path.stem for path in RECIPES
    }
