"""Plots of an inspection: each layer at its depth, one line for each kind of layer; of experts, their mean."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

from quantkit.errors import InputError, OutputError, message
from quantkit.inspection import Inspection, LayerProfile

_Figure = Callable[[LayerProfile], "float | None"]


def check_plots(directory: Path) -> None:
    """Plots can be drawn and written, before anything is read.

    Raises:
        InputError: matplotlib is not installed.
        OutputError: the directory is a file.
    """
    if find_spec("matplotlib") is None:
        raise InputError(message("--plots", "matplotlib is not installed", "pip install 'quantkit[plots]'"))
    if directory.exists() and not directory.is_dir():
        raise OutputError(message(str(directory), "is a file", "give a directory to --plots"))


def write_plots(found: Inspection, directory: Path) -> list[Path]:
    """Write a PNG for each figure that the layers have; returns the files."""
    figures: tuple[tuple[str, str, _Figure], ...] = (
        ("weight-outliers.png", "largest weight in standard deviations", _weight_sigmas),
        ("input-outliers.png", "largest input in standard deviations", _input_sigmas),
        ("code-entropy.png", "entropy of the codes, bits", _entropy),
        ("clipped-codes.png", "share of codes at the ends of the grid", _clipped),
    )
    directory.mkdir(parents=True, exist_ok=True)
    return [directory / name for name, label, figure in figures if _draw(found, label, figure, directory / name)]


def _draw(found: Inspection, label: str, figure: _Figure, path: Path) -> bool:
    lines: dict[str, dict[int, list[float]]] = {}
    for layer in found.layers:
        value = figure(layer)
        if value is not None and layer.block is not None:
            lines.setdefault(layer.name.rpartition(".")[2], {}).setdefault(layer.block, []).append(value)
    if not lines:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    for kind, points in lines.items():
        means = [fmean(values) for values in points.values()]  # of the experts of a block
        axes.plot(list(points), means, marker="o", markersize=3, linewidth=1, label=kind)
    axes.set_xlabel("block")
    axes.set_ylabel(label)
    axes.legend(fontsize="small")
    drawing.savefig(path, dpi=150)
    return True


def _weight_sigmas(layer: LayerProfile) -> float | None:
    return None if layer.weights is None else layer.weights.sigmas


def _input_sigmas(layer: LayerProfile) -> float | None:
    return None if layer.inputs is None else layer.inputs.sigmas


def _entropy(layer: LayerProfile) -> float | None:
    return None if layer.codes is None else layer.codes.entropy


def _clipped(layer: LayerProfile) -> float | None:
    return None if layer.codes is None else layer.codes.clipped
