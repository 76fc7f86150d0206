"""evaluate_documents() on the embedded model: protocol, refusals, and the figures against one forward by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app
from quantkit.document_evaluation import evaluate_documents
from quantkit.source import BUILTIN_PATH, open_tokenizer

DOCUMENTS = ["The list is sorted.", "A dictionary maps keys to values;\nkeys are hashable."]


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return str(path)


def log_likelihood(text: str) -> float:
    """One forward over a document that fits, the beginning-of-text token in front once more."""
    tokenizer = open_tokenizer(BUILTIN_PATH)
    ids = tokenizer.encode(text)
    model: Any = quantkit.load("builtin", dtype="float32")
    inputs = torch.tensor([[tokenizer.bos_token_id, *ids[:-1]]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(inputs).logits[0].double(), -1)
    return float(logprobs.gather(-1, torch.tensor(ids)[:, None]).sum())


def test_figures(data: str) -> None:
    found = evaluate_documents(["builtin"], data, dtype="float32")
    (result,) = found.results
    total = sum(map(log_likelihood, DOCUMENTS))
    assert result.log_likelihood == pytest.approx(total, rel=1e-5)
    assert result.word_perplexity == pytest.approx(math.exp(-total / (4 + 9)), rel=1e-4)
    assert found.protocol["text_documents"] == 2
    assert found.protocol["sequence_length"] == 2048
    shorter = evaluate_documents(["builtin"], data, dtype="float32", limit=1).results[0]
    assert shorter.log_likelihood == pytest.approx(log_likelihood(DOCUMENTS[0]), rel=1e-5)


def test_the_command(data: str, tmp_path: Path) -> None:
    arguments = ["perplexity", "builtin", "--protocol", "lm-eval", "--data", data, "--json", str(tmp_path / "f.json")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "bits/byte" in done.output
    assert "2 documents" in done.output
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["protocol"]["protocol"] == "lm-eval"
    assert f"{written['results'][0]['word_perplexity']:.3f}" in done.output


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"limit": 0}, "limit=0"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"sequence_length": 9999}, "max_position_embeddings=2048"),
    ],
)
def test_refusals(options: dict[str, Any], text: str, data: str) -> None:
    with pytest.raises(quantkit.InputError, match=text):
        evaluate_documents(["builtin"], data, **options)


@pytest.mark.parametrize("options", [["--stride", "8"], ["--batch-size", "2"], ["--card"], ["--protocol", "bleu"]])
def test_options_of_the_other_protocol(options: list[str], data: str) -> None:
    done = CliRunner().invoke(app, ["perplexity", "builtin", "--data", data, "--protocol", "lm-eval", *options])
    assert isinstance(done.exception, quantkit.InputError)
