"""``quantkit bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.options import Device, Dtype, HeadBits, quiet, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from quantkit.bench import BenchResult


def bench(
    models: Annotated[list[str], typer.Argument(help="Model directories (dense or quantized), hub ids or builtin.")],
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Decoding steps that are timed.")] = 64,
    rounds: Annotated[int, typer.Option(help="Measurements of each model, in turn; medians are shown.")] = 3,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the decoding step.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Annotated[str | None, typer.Option(help="Kernel backend, see quantkit doctor.")] = None,
    head_bits: HeadBits = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Prefill and decode speed, time to the first token, peak memory and bytes read per token, in one table."""
    from rich.console import Console
    from rich.progress import Progress

    from quantkit.bench import BenchSpec
    from quantkit.bench import bench as measured
    from quantkit.checkpoint import write_json
    from quantkit.source import resolve_device, resolve_model

    quiet()
    spec = BenchSpec(prompt_tokens, new_tokens, rounds, compiled, device, dtype, backend, head_bits)
    resolve_device(device)
    for model in models:
        resolve_model(model)
    console = terminal()
    with Progress(console=Console(stderr=True), transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("measuring", total=None)
        results = measured(models, spec, lambda done, total: bar.update(task, completed=done, total=total))
    if json is not None:
        write_json(json, {"spec": spec.to_dict(), "results": [result.to_dict() for result in results]})
    _print(results, console)


def _print(results: list[BenchResult], console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model")
    for heading in ("prefill tok/s", "first token", "decode tok/s", "ratio", "peak memory", "read/token", "MBU"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            escape(result.model),
            f"{result.prefill_tokens_per_second:.0f}",
            f"{result.first_token_seconds * 1e3:.1f} ms",
            f"{result.decode_tokens_per_second:.1f}",
            f"{result.decode_tokens_per_second / results[0].decode_tokens_per_second:.2f}",
            f"{result.peak_bytes / 1e6:.0f} MB",
            f"{result.bytes_per_token / 1e6:.1f} MB",
            f"{result.mbu:.0%}",
        )
    console.print(table)
    for result in results:
        for note in result.notes:
            console.print(f"{result.model}: {note}.", highlight=False, markup=False)
    console.print(
        f"MBU: of a plain read of memory, {results[0].bandwidth / 1e9:.1f} GB/s here. Ratio: to the first model.",
        highlight=False,
    )
