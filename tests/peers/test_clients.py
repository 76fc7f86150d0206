"""What quantkit writes, loaded and run by the real programs: their log-probabilities are quantkit's own.

Every checkpoint of client_cases.py in every client that reads its format: make test-clients. What a client does with
it is said before by ``quantkit verify --target``: where that finds no error, the log-probabilities of fixed tokens (64,
and 512 of SmolLM2) equal quantkit's within the bounds for bfloat16; where it finds one, the client refuses, or gives
others. What it notes of CPUs without AMX or VNNI is so there. A checkpoint with wrong scales exceeds the bounds.

QUANTKIT_SMOLLM2 names the model that evals/smollm2/prepare.py writes. With QUANTKIT_CLIENTS_TABLE=1, what was measured
goes to clients.json, and to the tables in docs/formats-and-loaders.md and README.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from client_cases import MODELS, RECIPES, SMOLLM2, SPOILT, Checkpoints, format_of_recipe, is_asked
from client_table import Outcome, is_close, record
from peer_clients import CLIENTS, Answers, Client, ask, own_logprobs
from peer_programs import interpreter

from quantkit.kernels.byte_product import onednn_is_exact
from quantkit.verify import verify

pytestmark = pytest.mark.peer

CASES = [
    pytest.param(client, model, recipe, id=f"{client.name}-{model}-{recipe}")
    for client in CLIENTS
    for model in (*MODELS, SMOLLM2)
    for recipe in (*RECIPES, *SPOILT)
    if format_of_recipe(recipe) in client.formats and client.only in recipe and is_asked(model, recipe)
]


@dataclass
class Session:
    """The checkpoints, and what clients said and gave so far."""

    checkpoints: Checkpoints
    chosen: dict[str, list[tuple[str, str]]]
    answers: dict[str, Answers] = field(default_factory=dict)
    outcomes: dict[str, dict[str, dict[str, Outcome]]] = field(default_factory=dict)

    def ask(self, client: Client) -> Answers:
        """Run a client once, on all that the chosen tests are about."""
        if client.name not in self.answers:
            work = {}
            for model, recipe in self.chosen[client.name]:
                if model != SMOLLM2 or "QUANTKIT_SMOLLM2" in os.environ:
                    path = self.checkpoints.written(model, recipe)
                    work[str(path.relative_to(self.checkpoints.root))] = self.checkpoints.ids(model)
            self.answers[client.name] = ask(client, work, self.checkpoints.root)
        return self.answers[client.name]

    def outcome(self, client: Client, model: str, recipe: str) -> Outcome:
        """What came of one checkpoint."""
        interpreter(client.program)
        intended = self.checkpoints.written(model, SPOILT.get(recipe, recipe))
        answers = self.ask(client)
        key = f"{model}/{recipe}"
        if key in answers.refused:
            found: Outcome = {"refused": answers.refused[key]}
        else:
            ids = self.checkpoints.ids(model)
            ours, theirs = own_logprobs(intended, ids), answers.logprobs[key]
            found = {"nll": float(ours.mean() - theirs.mean()), "mean": float((ours - theirs).abs().mean())}
            if model == SMOLLM2:
                found["rounding"] = float((ours - own_logprobs(intended, ids, "float32")).abs().mean())
        self.outcomes.setdefault(client.name, {}).setdefault(model, {})[recipe] = found
        return found


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Session]:
    chosen: dict[str, list[tuple[str, str]]] = {}
    for item in request.session.items:
        params: dict[str, Any] = (
            item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        )
        if "client" in params:
            chosen.setdefault(params["client"].name, []).append((params["model"], params["recipe"]))
    session = Session(Checkpoints(tmp_path_factory.mktemp("written")), chosen)
    yield session
    if os.environ.get("QUANTKIT_CLIENTS_TABLE"):
        for name, outcomes in session.outcomes.items():
            record(name, session.answers[name].versions, outcomes)


@pytest.mark.parametrize(("client", "model", "recipe"), CASES)
def test_it_does_what_verify_says(client: Client, model: str, recipe: str, session: Session) -> None:
    found = session.outcome(client, model, recipe)
    errors, notes = said_before(client, session.checkpoints.written(model, recipe))
    needs_amx = "cpu-experts" in notes and not torch.cpu._is_amx_tile_supported()
    if needs_amx or ("transformers-dequantize-experts" in notes and client.target is None):
        assert "refused" in found
    elif "cpu-vnni" in notes and not onednn_is_exact():
        assert "refused" not in found
    elif errors:
        assert not is_close(found, model, recipe), f"{found}, and yet {errors}"
    elif recipe in SPOILT:
        assert "refused" not in found
        assert not is_close(found, model, recipe)
    else:
        assert is_close(found, model, recipe), found


def said_before(client: Client, path: Path) -> tuple[list[str], list[str]]:
    """What quantkit finds against a checkpoint in this client, and what it notes."""
    findings = verify(path, target=client.target or client.program).findings
    # A client without a target is a program that is asked to go another way than the rules are about, but for notes.
    errors = [finding.code for finding in findings if finding.severity == "error" and client.target is not None]
    return errors, [finding.code for finding in findings if finding.severity == "note"]
