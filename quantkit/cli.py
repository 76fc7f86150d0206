"""The command line: ``quantkit quantize``, ``plan`` and ``perplexity``. Heavy imports wait until a command runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.errors import QuantkitError
from quantkit.heap import use_huge_pages

if TYPE_CHECKING:
    from rich.console import Console

    from quantkit.mixed import MixedPlan
    from quantkit.run import Prepared, Result

EXIT_BAD_INPUT = 2
_PAGE_WIDTH = 120

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make a causal language model small and fast without retraining. "
    "Start with: quantkit quantize builtin --output out",
)

_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
_Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16: of the forward passes (and of the scales).")
]


def main() -> None:
    """Run the command line; an error that quantkit raises on purpose is one line and exit code 2."""
    use_huge_pages()
    try:
        app()
    except QuantkitError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_BAD_INPUT)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"quantkit {version('quantkit')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make a causal language model small and fast without retraining."""


@app.command()
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
    format: Annotated[str | None, typer.Option(help="compressed-tensors.")] = None,
    device: _Device = "auto",
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
) -> None:
    """Quantize a model into a packed checkpoint that vLLM, SGLang, transformers and quantkit load."""
    from quantkit.progress import shown
    from quantkit.recipe import merged
    from quantkit.run import execute, prepare, recipe_values

    _quiet()
    stated = recipe_values(recipe)
    calibrating = {"source": calibration, "num_samples": num_samples, "sequence_length": sequence_length, "seed": seed}
    flags: dict[str, Any] = {"format": format, "dtype": dtype, "activation_memory": activation_memory}
    flags["calibration"] = {key: value for key, value in calibrating.items() if value is not None}
    over = {key: value for key, value in flags.items() if value not in (None, {})}
    if scheme is not None or group_size is not None or symmetric is not None:
        over["scheme"] = _scheme(stated, scheme, group_size, symmetric)
    if method is not None and method != _method_name(stated):
        stated = {key: value for key, value in stated.items() if key != "method"}
        over["method"] = method
    console = _console()
    values = merged(stated, over)
    with shown(console, log_json) as observer:
        prepared = prepare(model, output, recipe=values, device=device, resume=resume, overwrite=overwrite)
        if not dry_run:
            result = execute(prepared, resume=resume, observer=observer)
    if dry_run:
        _print_plan(prepared)
    else:
        console.print(_last_line(prepared, result), markup=False, highlight=False, soft_wrap=True)


@app.command()
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
    device: _Device = "auto",
    dtype: _Dtype = "auto",
    json: Annotated[Path | None, typer.Option(help="Write results and protocol to this file.")] = None,
) -> None:
    """Perplexity of models on a text, and what quantizing lost: KL divergence and changed top-1 tokens."""
    from rich.console import Console
    from rich.progress import Progress

    from quantkit.checkpoint import write_json
    from quantkit.evaluation import EvalSpec, evaluate, render

    _quiet()
    spec = EvalSpec(data, sequence_length, stride, limit, batch_size, column)
    console = _console()
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


@app.command()
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
    device: _Device = "auto",
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

    _quiet()
    check_recipe_output(output, overwrite=overwrite)
    stated = recipe_values(recipe)
    if method is not None and method != _method_name(stated):
        stated = {**stated, "method": method}
    calibrating = {key: value for key, value in {"source": calibration, "seed": seed}.items() if value is not None}
    flags = {"calibration": calibrating, "dtype": dtype, "activation_memory": activation_memory}
    values = merged(stated, {key: value for key, value in flags.items() if value not in (None, {})})
    console = _console()
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


def _console() -> Console:
    """The terminal, or a wide page where the output goes to a file or a pipe."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_PAGE_WIDTH)


def _quiet() -> None:
    """Keep the libraries' own progress bars and warnings out of the display."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


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


def _method_name(stated: dict[str, Any]) -> str:
    from quantkit.recipe import make_recipe

    return make_recipe(stated).method.name


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
