"""quantkit eval where lm_eval is not installed, and what becomes of its results; the rest is in tests/peers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.harness import HarnessResult, TaskScore, add_to_report, evaluate_tasks


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(quantkit.InputError, match=r"pip install 'quantkit\[eval\]'"):
        evaluate_tasks("builtin", ["wikitext"])


@pytest.mark.parametrize("options", [{"limit": 0}, {"num_fewshot": -1}, {"batch_size": 0}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(quantkit.InputError, match=f"{next(iter(options))}=.* is out of range"):
        evaluate_tasks("builtin", ["wikitext"], **options)


def result(task: str, value: float) -> HarnessResult:
    return HarnessResult("m", (TaskScore(task, "acc,none", value, 0.25, True),), {"limit": 4})


def test_results_are_added_to_a_report_task_by_task(tmp_path: Path) -> None:
    assert not add_to_report(tmp_path, result("a", 0.5))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "report.json").write_text(json.dumps({"layers": [1]}))
    for task, value in (("a", 0.5), ("b", 0.75), ("a", 1.0)):
        assert add_to_report(tmp_path, result(task, value))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["layers"] == [1]
    assert {task: entry["results"] for task, entry in report["lm_eval"].items()} == {
        "a": {"acc,none": {"value": 1.0, "stderr": 0.25}},
        "b": {"acc,none": {"value": 0.75, "stderr": 0.25}},
    }
    assert report["lm_eval"]["a"]["limit"] == 4
