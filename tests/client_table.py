"""What real clients gave, kept in tests/peers/clients.json and shown in docs/formats-and-loaders.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from typing import Any

from client_cases import MODELS, RECIPES, SMOLLM2, SPOILT
from peer_clients import CLIENTS
from peer_programs import REPOSITORY

RESULTS = REPOSITORY / "tests" / "peers" / "clients.json"
PAGE = REPOSITORY / "docs" / "formats-and-loaders.md"
BEGIN, END = "<!-- clients: begin -->\n", "<!-- clients: end -->\n"

Outcome = dict[str, Any]
"""``{"nll": ..., "mean": ...}``, with ``rounding`` what bfloat16 changed of quantkit's own; or ``{"refused": ...}``."""


def record(client: str, versions: Mapping[str, str], cases: Mapping[str, Mapping[str, Outcome]]) -> None:
    """Put one client's results in the place of its last ones of these models, and write the table.

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
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(head + BEGIN + render(ordered) + END + rest.split(END)[1], encoding="utf-8")


def render(results: Mapping[str, Any]) -> str:
    """One table a client, a row for each recipe, a column for each model."""
    return "\n".join(_table(client, result) for client, result in results.items())


def _table(client: str, result: Mapping[str, Any]) -> str:
    cases = result["cases"]
    models = [model for model in (*MODELS, SMOLLM2) if model in cases]
    recipes = [recipe for recipe in (*RECIPES, *SPOILT) if any(recipe in cases[model] for model in models)]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    rows = [[f"`{recipe}`", *(_cell(cases[model].get(recipe)) for model in models)] for recipe in recipes]
    heading, marks = ["checkpoint", *models], ["---", *["---:"] * len(models)]
    lines = ["| " + " | ".join(row) + " |" for row in (heading, marks, *rows)]
    return f"{client} ({versions}), {result['date']}:\n\n" + "\n".join(lines) + "\n"


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    return "refused" if "refused" in outcome else f"{abs(outcome['nll']):.3f} {outcome['mean']:.3f}"
