"""lm-evaluation-harness: its tasks on quantkit's models, and its perplexities against quantkit's own.

Run where it is installed: ``python -m pytest -m peer tests/peers/test_lm_eval_peer.py``. Seen with lm_eval 0.4.13.
Tasks and data are local files: there is no hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import quantkit
from quantkit.builtin_text import builtin_documents
from quantkit.cli import app
from quantkit.document_evaluation import evaluate_documents
from quantkit.harness import evaluate_tasks

pytestmark = pytest.mark.peer
pytest.importorskip("lm_eval")

_ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: byte_perplexity}}
  - {{metric: bits_per_byte}}
"""
_CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
QUESTIONS = [
    {"question": "The function returns a", "choices": [" list", " zebra"], "answer": 0},
    {"question": "If the argument is", "choices": [" volcano", " omitted"], "answer": 1},
    {"question": "A dictionary has", "choices": [" keys", " oysters"], "answer": 0},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks: documents of all lengths (empty lines at the ends, longer than a window), and questions."""
    path = tmp_path_factory.mktemp("tasks")
    texts = [builtin_documents("evaluation")[0][:9000], "One line.", "\n  Ünïcode, and white space \n\n", "a" * 300]
    (path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (path / "rolling.yaml").write_text(_ROLLING.format(data=path / "documents.jsonl"))
    (path / "choice.yaml").write_text(_CHOICE.format(data=path / "questions.jsonl"))
    return path


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "q"
    quantkit.quantize("builtin", path, recipe={"scheme": "w4a16_g64", "method": "rtn"})
    return path


@pytest.mark.parametrize("model", ["builtin", "quantized"])
def test_the_same_perplexities(model: str, quantized: Path, tasks: Path) -> None:
    """To 1e-4 of each figure, in float32; the first document has more tokens than the model's 2048."""
    name = "builtin" if model == "builtin" else str(quantized)
    theirs = evaluate_tasks(name, ["local_rolling"], include_path=tasks, dtype="float32")
    (ours,) = evaluate_documents([name], str(tasks / "documents.jsonl"), dtype="float32").results
    assert ours.num_tokens > 2500
    found = {score.metric: score.value for score in theirs.scores}
    assert found["word_perplexity,none"] == pytest.approx(ours.word_perplexity, rel=1e-4)
    assert found["byte_perplexity,none"] == pytest.approx(ours.byte_perplexity, rel=1e-4)
    assert found["bits_per_byte,none"] == pytest.approx(ours.bits_per_byte, rel=1e-4)


def test_the_command(quantized: Path, tasks: Path, tmp_path: Path) -> None:
    arguments = ["eval", str(quantized), "--tasks", "local_choice,local_rolling", "--include-path", str(tasks)]
    arguments += ["--num-fewshot", "0", "--limit", "2", "--output", str(tmp_path / "found.json")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["results"]["local_choice"]["acc,none"]["value"] in (0.0, 0.5, 1.0)
    assert written["results"].keys() == {"local_choice", "local_rolling"}
    report: dict[str, Any] = json.loads((quantized / "report.json").read_text())
    assert report["lm_eval"]["local_choice"]["results"] == written["results"]["local_choice"]
    assert len(report["layers"]) == 56
    assert "| local_choice | acc |" in (quantized / "README.md").read_text()
    assert "local_rolling" in done.output


def test_questions_are_answered(tasks: Path) -> None:
    """Better than a coin: the embedded model was trained on this kind of text."""
    (score,) = evaluate_tasks("builtin", ["local_choice"], num_fewshot=1, include_path=tasks).scores
    assert (score.metric, score.value, score.higher_is_better) == ("acc,none", 1.0, True)


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        (["local_choise"], quantkit.InputError, "no task 'local_choise'; did you mean local_choice"),
        ([], quantkit.InputError, "no task was named"),
        (["wikitext"], quantkit.CalibrationError, "their data cannot be had"),
    ],
)
def test_refusals(
    names: list[str], error: type[Exception], text: str, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=text):
        evaluate_tasks("builtin", names, include_path=tasks)
