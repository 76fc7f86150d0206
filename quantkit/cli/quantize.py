"""``quantkit quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.options import Device, method_name, quiet, terminal

if TYPE_CHECKING:
    from quantkit.run import Prepared, Result


def quantize(
    model: Annotated[str, typer.Argument(help="A model directory, a hub id such as org/name, or the word builtin.")],
    output: Annotated[Path, typer.Option(help="The directory to write. It appears when everything is verified.")],
    recipe: Annotated[Path | None, typer.Option(help="A recipe in YAML; the options below override it.")] = None,
    scheme: Annotated[
        str | None,
        typer.Option(help="w<bits>a16[_g<size>|_channel][_sym|_asym], w8a8 or w8a8_static.  [default: w4a16]"),
    ] = None,
    method: Annotated[str | None, typer.Option(help="rtn or gptq.  [default: gptq]")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Columns that share a scale; -1 is one scale per output channel.  [default: 128 below 8 bits]"
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--asymmetric", help="Whether the zero point is fixed.  [default: symmetric]"),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="builtin, a file or directory (.txt .jsonl .json .parquet), or hf:NAME[/CONFIG][:SPLIT[:COLUMN]].  "
            "[default: builtin]"
        ),
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Calibration samples.  [default: 128]")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens a sample.  [default: 2048, or the model's limit if shorter]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draw of the samples.  [default: 0]")] = None,
    format: Annotated[
        str | None, typer.Option(help="compressed-tensors, gptq, gptq_v2 or awq.  [default: compressed-tensors]")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.  [default: auto, the model's own]")
    ] = None,
    activation_memory: Annotated[
        str | None,
        typer.Option(help="Hidden states between blocks above this go to a file, such as 512MiB.  [default: 2GiB]"),
    ] = None,
    log_json: Annotated[Path | None, typer.Option(help="Append one JSON object an event to this file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan and stop.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run of the same model and options.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is at --output, at the end of the run.")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the verified output to this repository of the Hugging Face hub.")
    ] = None,
) -> None:
    """Quantize a model into a packed checkpoint that vLLM, SGLang, transformers and quantkit load."""
    from quantkit.hub import check_push, push
    from quantkit.progress import shown
    from quantkit.recipe import merged
    from quantkit.run import execute, prepare, recipe_values

    quiet()
    if push_to_hub is not None:
        check_push(push_to_hub)
    stated = recipe_values(recipe)
    calibrating = {"source": calibration, "num_samples": num_samples, "sequence_length": sequence_length, "seed": seed}
    flags: dict[str, Any] = {"format": format, "dtype": dtype, "activation_memory": activation_memory}
    flags["calibration"] = {key: value for key, value in calibrating.items() if value is not None}
    over = {key: value for key, value in flags.items() if value not in (None, {})}
    if scheme is not None or group_size is not None or symmetric is not None:
        over["scheme"] = _scheme(stated, scheme, group_size, symmetric)
    if method is not None and method != method_name(stated):
        stated = {key: value for key, value in stated.items() if key != "method"}
        over["method"] = method
    console = terminal()
    values = merged(stated, over)
    with shown(console, log_json) as observer:
        prepared = prepare(model, output, recipe=values, device=device, resume=resume, overwrite=overwrite)
        if not dry_run:
            result = execute(prepared, resume=resume, observer=observer)
    if dry_run:
        _print_plan(prepared)
    else:
        console.print(_last_line(prepared, result), markup=False, highlight=False, soft_wrap=True)
        if push_to_hub is not None:
            typer.echo(f"pushed to {push(result.path, push_to_hub)}")


def _scheme(stated: dict[str, Any], name: str | None, group_size: int | None, symmetric: bool | None) -> dict[str, Any]:
    from dataclasses import asdict, replace

    from quantkit.recipe import make_recipe
    from quantkit.scheme import parse_scheme

    base = make_recipe(stated).scheme if name is None else parse_scheme(name)
    if group_size is not None:
        base = replace(base, group_size=None if group_size == -1 else group_size)
    if symmetric is not None:
        base = replace(base, symmetric=symmetric)
    return asdict(base)


def _print_plan(prepared: Prepared) -> None:
    """The plan, layers of equal shape and treatment in one line."""
    from quantkit.arch import collapsed_name

    plan = prepared.plan
    rows: dict[tuple[str, str], int] = {}
    for layer in plan.layers:
        shape = f"[{layer.info.out_features}, {layer.info.in_features}]"
        key = (collapsed_name(layer.info.name), f"{shape}  {layer.scheme}  {layer.solver.name}")
        rows[key] = rows.get(key, 0) + 1
    for (name, what), count in rows.items():
        typer.echo(f"{name}  x{count}  {what}")
    for name, reason in plan.skipped:
        typer.echo(f"{name}  kept: {reason}")
    for note in plan.notes:
        typer.echo(f"note: {note}")
    for figure, value in _figures(prepared).items():
        typer.echo(f"{figure.replace('_', ' ')}: {value}")


def _figures(prepared: Prepared) -> dict[str, Any]:
    figures = prepared.to_dict()
    figures["share_quantized"] = f"{figures['share_quantized']:.1%}"
    for key in ("bits_per_quantized_weight", "bits_per_weight"):
        figures[key] = f"{figures[key]:.3f}"
    figures["training_passes_per_block"] = f"{figures['training_passes_per_block']:.3g}"
    for key in ("size_before", "size_after", "projected_peak_memory"):
        figures[key] = f"{figures[key] / 1e6:.1f} MB"
    return figures


def _last_line(prepared: Prepared, result: Result) -> str:
    from quantkit.source import BUILTIN, BUILTIN_PATH

    plan = prepared.plan
    source = BUILTIN if plan.checkpoint.path == BUILTIN_PATH else plan.checkpoint.path
    return (
        f"{result.path}: quantized {plan.num_quantized / plan.num_parameters:.1%} of "
        f"{plan.num_parameters / 1e6:.1f} M parameters to {plan.bits_per_quantized_weight:.2f} bits per weight "
        f"({plan.bits_per_weight:.2f} over the whole checkpoint); "
        f"{plan.checkpoint.nbytes / 1e6:.1f} MB -> {plan.size_after / 1e6:.1f} MB. "
        f"Next: quantkit perplexity {source} {result.path}"
    )
