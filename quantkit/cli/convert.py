"""``quantkit convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.options import quiet, terminal

if TYPE_CHECKING:
    from quantkit.converting import Conversion


def convert(
    model: Annotated[str, typer.Argument(help="A quantized model: a directory, or a hub id such as org/name.")],
    to: Annotated[str, typer.Option(help="compressed-tensors, gptq, gptq_v2 or awq.")],
    output: Annotated[Path, typer.Option(help="The directory to write. It appears when everything is verified.")],
    log_json: Annotated[Path | None, typer.Option(help="Append one JSON object an event to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output, at the end.")] = False,
) -> None:
    """Write a quantized checkpoint in another format: the same codes, scales and zero points, or a refusal."""
    from quantkit.converting import convert as run
    from quantkit.progress import shown

    quiet()
    console = terminal()
    with shown(console, log_json) as observer:
        done = run(model, output, to, overwrite=overwrite, observer=observer)
    console.print(_summary(done), markup=False, highlight=False, soft_wrap=True)


def _summary(done: Conversion) -> str:
    layers = ", ".join(f"{count} layers {scheme}" for scheme, count in done.schemes.items())
    sizes = f"{done.bytes_before / 1e6:.1f} MB -> {done.bytes_after / 1e6:.1f} MB"
    return f"{done.path}: {done.source} -> {done.target}: {layers}; {done.copied} tensors copied; {sizes}"
