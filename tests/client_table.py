"""What real clients gave, kept in tests/peers/clients.json and shown in docs/formats-and-loaders.md and README.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from typing import Any

from client_cases import MODELS, RECIPES, SMOLLM2, SPOILT
from peer_clients import CLIENTS
from peer_programs import MEAN_BOUND, NLL_BOUND, REPOSITORY

RESULTS = REPOSITORY / "tests" / "peers" / "clients.json"
PAGE = REPOSITORY / "docs" / "formats-and-loaders.md"
README = REPOSITORY / "README.md"
BEGIN, END = "<!-- clients: begin -->\n", "<!-- clients: end -->\n"
# Programs that round to bfloat16, each in its way, differ by sqrt(2) times what one of them differs from float32, and
# no less can be asked. Of SmolLM2 rounded to nearest the one is 0.046 with 4 bits and 0.247 with W8A8.
OWN_ROUNDING = 1.5
# Activations are rounded in bfloat16 there, in float32 here; on a trained model, and on random ones.
INT8_BOUNDS, INT8_RANDOM_BOUNDS = (0.03, 0.25), (0.03, 0.1)

Outcome = dict[str, Any]
"""``{"nll": ..., "mean": ...}``, with ``rounding`` what bfloat16 changed of quantkit's own; or ``{"refused": ...}``."""


def is_close(found: Outcome, model: str, recipe: str) -> bool:
    """Whether a client loaded a checkpoint, and gave quantkit's log-probabilities."""
    nll, mean = (NLL_BOUND, MEAN_BOUND)
    if "w8a8" in recipe:
        nll, mean = INT8_BOUNDS if model == SMOLLM2 else INT8_RANDOM_BOUNDS
    if "rounding" in found:
        mean = max(mean, OWN_ROUNDING * found["rounding"])
    return "refused" not in found and abs(found["nll"]) < nll and found["mean"] < mean


def record(client: str, versions: Mapping[str, str], cases: Mapping[str, Mapping[str, Outcome]]) -> None:
    """Put one client's results in the place of its last ones of these models, and write the tables.

    Results of other versions go.

    Args:
        client: its name.
        versions: of its packages.
        cases: model -> recipe -> what came of it.
    """
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    before = stored.get(client, {})
    kept = before["cases"] if before.get("versions") == versions else {}
    stored[client] = {
        "date": date.today().isoformat(),
        "versions": dict(versions),
        "cases": {**kept, **{model: {**kept.get(model, {}), **found} for model, found in cases.items()}},
    }
    ordered = {one.name: stored[one.name] for one in CLIENTS if one.name in stored}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    for path, text in ((PAGE, render(ordered)), (README, summary(ordered))):
        head, rest = path.read_text(encoding="utf-8").split(BEGIN)
        path.write_text(head + BEGIN + text + END + rest.split(END)[1], encoding="utf-8")


def summary(results: Mapping[str, Any]) -> str:
    """One table: a row for each recipe, a column for each client, how many of the models that were run."""
    rows = []
    for recipe in RECIPES:
        cells = [_share(result["cases"], recipe) for result in results.values()]
        if any(cells):
            rows.append([f"`{recipe}`", *cells])
    return "\n".join(_lines(["checkpoint", *results], rows)) + "\n"


def _share(cases: Mapping[str, Mapping[str, Outcome]], recipe: str) -> str:
    found = [(model, outcomes[recipe]) for model, outcomes in cases.items() if recipe in outcomes]
    if found and all("refused" in outcome for _, outcome in found):
        return "refused"
    return f"{sum(is_close(outcome, model, recipe) for model, outcome in found)} of {len(found)}" if found else ""


def _lines(heading: list[str], rows: list[list[str]]) -> list[str]:
    marks = ["---", *["---:"] * (len(heading) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (heading, marks, *rows)]


def render(results: Mapping[str, Any]) -> str:
    """One table a client, a row for each recipe, a column for each model."""
    return "\n".join(_table(client, result) for client, result in results.items())


def _table(client: str, result: Mapping[str, Any]) -> str:
    cases = result["cases"]
    models = [model for model in (*MODELS, SMOLLM2) if model in cases]
    recipes = [recipe for recipe in (*RECIPES, *SPOILT) if any(recipe in cases[model] for model in models)]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    rows = [[f"`{recipe}`", *(_cell(cases[model].get(recipe)) for model in models)] for recipe in recipes]
    lines = _lines(["checkpoint", *models], rows)
    return f"{client} ({versions}), {result['date']}:\n\n" + "\n".join(lines) + "\n"


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    return "refused" if "refused" in outcome else f"{abs(outcome['nll']):.3f} {outcome['mean']:.3f}"
