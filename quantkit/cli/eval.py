"""``quantkit eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.options import Device, Dtype, quiet, terminal


def evaluate(
    model: Annotated[str, typer.Argument(help="A model directory (dense or quantized), a hub id or builtin.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, separated by commas.")],
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question.  [default: the task's]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many documents a task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests in one forward pass.")] = 1,
    include_path: Annotated[
        Path | None,
        typer.Option(help="A directory of task files of your own. They may name Python functions, which lm_eval runs."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Tasks of lm-evaluation-harness; results also go into the report.json that quantize wrote beside the model."""
    from quantkit.card import is_quantkit_card
    from quantkit.checkpoint import write_json
    from quantkit.harness import add_to_report, evaluate_tasks, render_tasks, update_tasks_in_card
    from quantkit.source import resolve_model

    quiet()
    named = [task.strip() for task in tasks.split(",") if task.strip()]
    found = evaluate_tasks(
        model,
        named,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        include_path=include_path,
        device=device,
        dtype=dtype,
    )
    path = resolve_model(model)
    if output is not None:
        write_json(output, found.to_json())
    render_tasks(found, terminal())
    if add_to_report(path, found):
        if is_quantkit_card(path):
            update_tasks_in_card(path)
        typer.echo(f"added to {path / 'report.json'}")
