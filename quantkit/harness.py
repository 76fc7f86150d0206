"""Tasks of lm-evaluation-harness on a model that quantkit loads; the extra ``eval`` installs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.card import markdown_table, update_card
from quantkit.checkpoint import write_json
from quantkit.errors import CalibrationError, InputError, first_line, message
from quantkit.loader import load
from quantkit.report import versions
from quantkit.run import REPORT
from quantkit.source import open_tokenizer, resolve_model
from quantkit.strict_json import read_json

if TYPE_CHECKING:
    from rich.console import Console

_WHERE = "quantkit eval"


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: as lm_eval names it.
        metric: with its filter, such as ``acc,none``.
        value: as lm_eval gives it.
        stderr: None where lm_eval has none.
        higher_is_better: None where lm_eval does not say.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True, slots=True)
class HarnessResult:
    """What lm_eval found, and how it was asked.

    Attributes:
        model: as it was named.
        scores: every metric of every task and group.
        details: plain JSON values: lm_eval's versions of the tasks, shots, samples, and the options.
    """

    model: str
    scores: tuple[TaskScore, ...]
    details: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: task -> metric -> value and error, beside the details."""
        tasks: dict[str, dict[str, Any]] = {}
        for score in self.scores:
            tasks.setdefault(score.task, {})[score.metric] = {"value": score.value, "stderr": score.stderr}
        return {"model": self.model, "results": tasks, **self.details}


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    include_path: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> HarnessResult:
    """Run tasks of lm-evaluation-harness on a model, dense or quantized, on quantkit's backends.

    Args:
        model: a local directory, a hub id or ``builtin``.
        tasks: names of tasks, groups or tags.
        num_fewshot: None: the tasks' own.
        limit: at most this many documents a task; None: all.
        batch_size: requests in one forward pass.
        include_path: a directory of task files of your own; they may name Python functions, which lm_eval runs.
        device: as ``quantkit.load`` takes it.
        dtype: as ``quantkit.load`` takes it.

    Raises:
        InputError: lm_eval is not installed, no task or an unknown one, options out of range.
        CalibrationError: a task's data cannot be had.
        CheckpointError: a model that cannot be opened.
    """
    for name, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise InputError(message(_WHERE, f"{name}={value} is out of range", f"use {least} or more"))
    manager = _task_manager(include_path)
    _check_tasks(tasks, manager)
    path = resolve_model(model)
    tokenizer = open_tokenizer(path)
    loaded = load(path, device=device, dtype=dtype)
    found = _run(loaded, tokenizer, list(tasks), manager, num_fewshot, limit, batch_size)
    details = {
        "task_versions": found.get("versions", {}),
        "num_fewshot": found.get("n-shot", {}),
        "num_samples": found.get("n-samples", {}),
        "limit": limit,
        "batch_size": batch_size,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "versions": {**versions(), "lm_eval": _version()},
    }
    return HarnessResult(model, tuple(_scores(found)), details)


def add_to_report(path: Path, result: HarnessResult) -> bool:
    """Put the results under ``lm_eval`` into a directory's report.json, task by task; whether there is one.

    Raises:
        CheckpointError: a report that is no JSON object.
        InterruptedRunError: it cannot be written.
    """
    if not (path / REPORT).is_file():
        return False
    report = read_json(path / REPORT, missing="")
    found = result.to_json()
    entries = {task: {**found, "results": values} for task, values in found["results"].items()}
    write_json(path / REPORT, {**report, "lm_eval": {**report.get("lm_eval", {}), **entries}})
    return True


def update_tasks_in_card(path: Path) -> None:
    """Put the results that stand in a directory's report.json into its model card."""
    entries = read_json(path / REPORT, missing="")["lm_eval"]
    rows = [
        [
            task,
            metric.removesuffix(",none"),
            f"{one['value']:.4f}",
            "" if one["stderr"] is None else f"{one['stderr']:.4f}",
        ]
        for task, entry in entries.items()
        for metric, one in entry["results"].items()
    ]
    update_card(path, "lm_eval", markdown_table(["task", "metric", "value", "± stderr"], rows))


def render_tasks(result: HarnessResult, console: Console) -> None:
    """Print one line a metric."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("task", "metric"):
        table.add_column(heading, no_wrap=True)
    for heading in ("value", "± stderr"):
        table.add_column(heading, justify="right", no_wrap=True)
    for score in result.scores:
        error = "-" if score.stderr is None else f"{score.stderr:.4f}"
        table.add_row(escape(score.task), escape(score.metric.removesuffix(",none")), f"{score.value:.4f}", error)
    console.print(table)


def _task_manager(include_path: Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(message(_WHERE, f"lm_eval is not here ({error})", "pip install 'quantkit[eval]'")) from error
    if include_path is not None and not include_path.is_dir():
        raise InputError(message("--include-path", f"{include_path} is no directory", "give one that holds task files"))
    return TaskManager(include_path=None if include_path is None else str(include_path))


def _check_tasks(tasks: Sequence[str], manager: Any) -> None:
    if not tasks:
        raise InputError(message("--tasks", "no task was named", "name some, separated by commas"))
    for task in tasks:
        if not manager.match_tasks([task]):
            near = get_close_matches(task, manager.all_tasks)
            fix = f"did you mean {', '.join(near)}" if near else "see lm_eval ls tasks, or give --include-path"
            raise InputError(message("--tasks", f"lm_eval has no task {task!r}", fix))


def _run(
    model: Any, tokenizer: Any, tasks: list[str], manager: Any, num_fewshot: int | None, limit: int | None, batch: int
) -> dict[str, Any]:
    from datasets.exceptions import DatasetsError
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        found: dict[str, Any] = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, backend="causal"),
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except (OSError, ConnectionError, DatasetsError) as error:
        reason = first_line(error)
        fix = "check the network, or give tasks over local files by --include-path"
        raise CalibrationError(message("--tasks", f"their data cannot be had ({reason})", fix)) from error
    return found


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    """lm_eval's ``{task: {"metric,filter": value, "metric_stderr,filter": error}}``, flat."""
    scores = []
    for task, metrics in found["results"].items():
        better = found.get("higher_is_better", {}).get(task, {})
        for key, value in metrics.items():
            metric, _, picked = key.partition(",")
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not picked
                or metric.endswith("_stderr")
            ):
                continue
            error = metrics.get(f"{metric}_stderr,{picked}")
            stderr = float(error) if isinstance(error, int | float) else None
            scores.append(TaskScore(task, key, float(value), stderr, better.get(metric)))
    return scores


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
