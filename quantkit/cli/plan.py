"""``quantkit plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.options import Device, method_name, quiet, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from quantkit.mixed import MixedPlan


def plan(
    model: Annotated[str, typer.Argument(help="A model directory, a hub id such as org/name, or the word builtin.")],
    bits: Annotated[
        float, typer.Option(help="At most so many stored bits per quantized weight, scales and zero points counted.")
    ],
    output: Annotated[Path, typer.Option(help="The recipe to write, for quantize --recipe.")],
    schemes: Annotated[
        str, typer.Option(help="What a layer may have, separated by commas.")
    ] = "w3a16_g64_asym,w4a16_g64_asym,w8a16_g64_sym",
    metric: Annotated[
        str,
        typer.Option(
            help="hessian: the estimated effect of each layer on the output (one pass forward, one back). "
            "kl: the effect measured, by a pass of everything behind the layer for each scheme."
        ),
    ] = "hessian",
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe in YAML for everything but the schemes: method, skipped layers.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="rtn or gptq.  [default: gptq]")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text to measure with: the sources of quantize --calibration.  [default: builtin]"),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Samples to measure with.")] = 32,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens a sample.  [default: 512, or the model's limit if shorter]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draw of the samples.  [default: 0]")] = None,
    device: Device = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.  [default: auto, the model's own]")
    ] = None,
    activation_memory: Annotated[
        str | None, typer.Option(help="Hidden states above this go to files, such as 512MiB.  [default: 2GiB]")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    log_json: Annotated[Path | None, typer.Option(help="Append one JSON object an event to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output.")] = False,
) -> None:
    """Choose a scheme for each layer by its effect on the model's output, for a size budget; writes a recipe."""
    from quantkit.checkpoint import write_json
    from quantkit.mixed import check_recipe_output, plan_mixed, write_recipe
    from quantkit.progress import shown
    from quantkit.recipe import merged
    from quantkit.run import recipe_values

    quiet()
    check_recipe_output(output, overwrite=overwrite)
    stated = recipe_values(recipe)
    if method is not None and method != method_name(stated):
        stated = {**stated, "method": method}
    calibrating = {key: value for key, value in {"source": calibration, "seed": seed}.items() if value is not None}
    flags = {"calibration": calibrating, "dtype": dtype, "activation_memory": activation_memory}
    values = merged(stated, {key: value for key, value in flags.items() if value not in (None, {})})
    console = terminal()
    with shown(console, log_json) as observer:
        found = plan_mixed(
            model,
            bits=bits,
            schemes=[name for name in schemes.split(",") if name.strip()],
            metric=metric,
            recipe=values,
            num_samples=num_samples,
            sequence_length=sequence_length,
            device=device,
            directory=output.expanduser().absolute().parent,
            observer=observer,
        )
    write_recipe(found, output, model)
    if json is not None:
        write_json(json, found.to_dict())
    _print_choice(found, console)
    last = f"{output}: {found.bits:.4f} bits per weight. Next: quantkit quantize {model} --recipe {output} --output DIR"
    console.print(last, markup=False, highlight=False, soft_wrap=True)


def _print_choice(found: MixedPlan, console: Console) -> None:
    """The chosen scheme of each unit, with what each scheme would cost, and how good the choice is."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("unit", no_wrap=True)
    table.add_column("scheme", no_wrap=True)
    for heading in ("bytes", *(f"loss {scheme}" for scheme in found.schemes)):
        table.add_column(heading, justify="right")
    for unit, options, chosen in zip(found.units, found.options, found.allocation.chosen, strict=True):
        losses = (f"{option.loss:.2e}" for option in options)
        table.add_row(escape(unit.name), str(found.schemes[chosen]), f"{options[chosen].nbytes:,}", *losses)
    console.print(table)
    console.print(
        f"{found.bits:.4f} bits per quantized weight of {found.budget_bits:g} asked for: {found.allocation.nbytes:,} "
        f"bytes for {found.numel:,} weights.\nLoss {found.allocation.loss:.4e} nats of KL divergence a token "
        f"({found.metric}), the smallest for this size; Lagrangian bound {found.allocation.bound:.4e} "
        f"({found.gap:.2%} below).\nMeasured on {found.measured_on}.",
        highlight=False,
        markup=False,
    )
