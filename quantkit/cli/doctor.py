"""``quantkit doctor``."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from typing import Annotated

import typer

from quantkit.cli.options import terminal


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What this machine can run, with which kernels, and why not the rest."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from quantkit.doctor import capabilities, machine

    facts, found = machine(), capabilities()
    if json:
        typer.echo(json_module.dumps({"machine": facts, "layers": [asdict(each) for each in found]}, indent=1))
        return
    console = terminal()
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", markup=False, highlight=False)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("device", "activations", "layer", "kernels"):
        table.add_column(heading, no_wrap=True)
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in found:
        table.add_row(each.device, each.dtype, each.scheme, each.backend or "none")
        for refusal in each.refusals:
            reasons.setdefault((refusal.backend, refusal.why), []).append(f"{each.scheme} {each.dtype} {each.device}")
    console.print(table)
    console.print("Refusals of the kernels that would come first:", highlight=False)
    for (backend, why), layers in reasons.items():
        more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        console.print(f"  {backend} refuses {why}  ({layers[0]}{more})", markup=False, highlight=False)
