"""``quantkit perplexity``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.options import Device, Dtype, quiet, terminal


def perplexity(
    models: Annotated[
        list[str],
        typer.Argument(help="Model directories (dense or quantized), hub ids or builtin; compared with the first."),
    ],
    data: Annotated[str, typer.Option(help="Text to score: the sources of quantize --calibration.")] = "builtin",
    column: Annotated[str | None, typer.Option(help="The text column of a table.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens a window.  [default: 2048, or the models' limit if shorter]")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between two windows.  [default: the sequence length]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many windows.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Annotated[Path | None, typer.Option(help="Write results and protocol to this file.")] = None,
) -> None:
    """Perplexity of models on a text, and what quantizing lost: KL divergence and changed top-1 tokens."""
    from rich.console import Console
    from rich.progress import Progress

    from quantkit.checkpoint import write_json
    from quantkit.evaluation import EvalSpec, evaluate, render

    quiet()
    spec = EvalSpec(data, sequence_length, stride, limit, batch_size, column)
    console = terminal()
    with Progress(console=Console(stderr=True), transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scoring", total=None)
        found = evaluate(
            models,
            spec,
            device=device,
            dtype=dtype,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if json is not None:
        write_json(json, found.to_json())
    render(found, console)
