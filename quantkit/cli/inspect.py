"""``quantkit inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.options import quiet, terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from quantkit.inspection import Inspection, LayerProfile


def inspect(
    model: Annotated[str, typer.Argument(help="A model directory, dense or quantized, a hub id or the word builtin.")],
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, every layer by itself, instead of tables.")
    ] = False,
    plots: Annotated[
        Path | None, typer.Option(help="Write plots (PNG) into this directory; needs the extra quantkit[plots].")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text to send through a dense model for the outliers of its layers' inputs: the sources of "
            "quantize --calibration."
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Samples of that text.")] = 16,
    sequence_length: Annotated[int, typer.Option(help="Tokens a sample.")] = 512,
) -> None:
    """Show what is in a model: layers, schemes, sizes, how codes are used, and outliers of weights and inputs."""
    from json import dumps

    from rich.console import Console
    from rich.progress import Progress

    from quantkit.calibration import CalibrationSpec
    from quantkit.inspection import inspect as inspect_model
    from quantkit.plots import check_plots, write_plots

    quiet()
    if plots is not None:
        check_plots(plots)
    spec = None
    if calibration is not None:
        spec = CalibrationSpec(calibration, num_samples=num_samples, sequence_length=sequence_length)
    console = terminal()
    with Progress(console=Console(stderr=True), transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        found = inspect_model(
            model, calibration=spec, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    written = [] if plots is None else write_plots(found, plots)
    if json:
        typer.echo(dumps(found.to_dict(), indent=2, ensure_ascii=False))
        return
    _print(found, console)
    for path in written:
        typer.echo(f"wrote {path}")


def _print(found: Inspection, console: Console) -> None:
    """Layers of one name (but for indices), shape and scheme in one row."""
    groups: dict[tuple[Any, ...], list[LayerProfile]] = {}
    from quantkit.arch import collapsed_name

    for layer in found.layers:
        groups.setdefault((collapsed_name(layer.name), layer.shape, layer.scheme or layer.dtype), []).append(layer)
    quantized = {key: group for key, group in groups.items() if group[0].codes is not None}
    dense = {key: group for key, group in groups.items() if group[0].weights is not None}
    if quantized:
        console.print(_code_table(quantized))
    if dense:
        console.print(_outlier_table(dense))
    sizes: dict[str, tuple[int, int]] = {}
    for name, (numel, nbytes) in found.others.items():
        before = sizes.get(collapsed_name(name), (0, 0))
        sizes[collapsed_name(name)] = (before[0] + numel, before[1] + nbytes)
    largest = sorted(sizes.items(), key=lambda item: -item[1][1])
    shown = ", ".join(f"{name} {nbytes / 1e6:.1f} MB" for name, (_, nbytes) in largest[:3])
    per_weight = found.bits_per_quantized_weight
    quantization = "" if per_weight is None else f", {per_weight:.2f} per quantized weight"
    console.print(
        f"{found.path}: {found.model_type}, {found.format}; {found.num_parameters / 1e6:.2f} M parameters, "
        f"{found.num_quantized / found.num_parameters:.1%} of them quantized; {found.nbytes / 1e6:.1f} MB, "
        f"{found.bits_per_weight:.2f} bits per parameter{quantization}. Other tensors: {shown or 'none'}."
        + (f" Inputs measured on {found.calibration}." if found.calibration else ""),
        markup=False,
        highlight=False,
    )


def _table(*headings: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _code_table(groups: dict[tuple[Any, ...], list[LayerProfile]]) -> Table:
    table = _table("count", "shape", "scheme", "bits/w", "MB", "entropy", "clipped", "scales from", "to")
    for (name, shape, scheme), group in groups.items():
        codes = [layer.codes for layer in group if layer.codes is not None]
        table.add_row(
            *_start(name, shape, scheme, group),
            f"{_mean([one.entropy for one in codes]):.2f}",
            f"{_mean([one.clipped for one in codes]):.2%}",
            f"{min(one.scale_min for one in codes):.2e}",
            f"{max(one.scale_max for one in codes):.2e}",
        )
    return table


def _outlier_table(groups: dict[tuple[Any, ...], list[LayerProfile]]) -> Table:
    measured = any(layer.inputs is not None for group in groups.values() for layer in group)
    headings = ("input max σ", "input > 6σ") if measured else ()
    table = _table("count", "shape", "dtype", "bits/w", "MB", "max σ", "worst", "> 6σ", *headings)
    for (name, shape, dtype), group in groups.items():
        weights = [layer.weights for layer in group if layer.weights is not None]
        worst = max(group, key=lambda layer: layer.weights.sigmas if layer.weights is not None else 0.0)
        cells = [f"{max(one.sigmas for one in weights):.1f}", "-" if worst.block is None else f"block {worst.block}"]
        cells.append(f"{_mean([one.beyond for one in weights]):.1e}")
        inputs = [layer.inputs for layer in group if layer.inputs is not None]
        if measured and inputs:
            cells += [f"{max(one.sigmas for one in inputs):.1f}", f"{_mean([one.beyond for one in inputs]):.1e}"]
        table.add_row(*_start(name, shape, dtype, group), *cells)
    return table


def _start(name: str, shape: tuple[int, int], kind: str, group: Sequence[LayerProfile]) -> list[str]:
    nbytes = sum(layer.nbytes for layer in group)
    bits = 8 * nbytes / sum(layer.numel for layer in group)
    inside = name.partition(".*.")[2]
    return [
        f"*.{inside}" if inside else name,
        str(len(group)),
        f"{shape[0]}x{shape[1]}",
        kind,
        f"{bits:.2f}",
        f"{nbytes / 1e6:.2f}",
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
