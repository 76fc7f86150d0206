"""``quantkit perplexity``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.options import Device, Dtype, HeadBits, quiet, terminal
from quantkit.errors import InputError, message


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
    protocol: Annotated[
        str,
        typer.Option(
            help="gptq: windows of the joined text. lm-eval: each document by itself, per word and per byte, as "
            "lm-evaluation-harness defines it (--limit counts documents)."
        ),
    ] = "gptq",
    card: Annotated[
        bool, typer.Option("--card", help="Write the figures into the model cards of directories that quantize wrote.")
    ] = False,
    head_bits: HeadBits = None,
) -> None:
    """Perplexity of models on a text, and what quantizing lost: KL divergence and changed top-1 tokens."""
    from rich.console import Console
    from rich.progress import Progress

    from quantkit.card import CARD
    from quantkit.checkpoint import write_json
    from quantkit.evaluation import EvalSpec, evaluate, render, update_cards
    from quantkit.source import resolve_model

    quiet()
    if protocol not in ("gptq", "lm-eval"):
        raise InputError(message("--protocol", f"{protocol!r} is none", "use gptq or lm-eval"))
    if protocol == "lm-eval":
        if stride is not None or batch_size != 1 or card or head_bits is not None:
            what = "--stride, --batch-size, --head-bits and --card belong to the protocol gptq"
            raise InputError(message("--protocol lm-eval", what, "leave them out"))
        _by_documents(models, data, column, sequence_length, limit, device, dtype, json)
        return
    if card and head_bits is not None:
        what = "a card tells what the checkpoint itself scores, and --head-bits rounds a head that it does not"
        raise InputError(message("--card", what, "leave one of them out"))
    spec = EvalSpec(data, sequence_length, stride, limit, batch_size, column, head_bits)
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
    if card:
        for path in update_cards(found, [resolve_model(model) for model in models]):
            typer.echo(f"written to {path / CARD}")


def _by_documents(
    models: list[str],
    data: str,
    column: str | None,
    sequence_length: int | None,
    limit: int | None,
    device: str,
    dtype: str,
    json: Path | None,
) -> None:
    from quantkit.checkpoint import write_json
    from quantkit.document_evaluation import evaluate_documents, render_documents

    found = evaluate_documents(
        models, data, column=column, sequence_length=sequence_length, limit=limit, device=device, dtype=dtype
    )
    if json is not None:
        write_json(json, found.to_json())
    render_documents(found, terminal())
