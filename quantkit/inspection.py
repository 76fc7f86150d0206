"""What is in a model directory: layers, schemes, sizes, how codes and scales are used, and where outliers are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calibration import CalibrationSpec, calibration_samples
from quantkit.checkpoint import Checkpoint
from quantkit.errors import InputError, message
from quantkit.formats import format_of
from quantkit.input_outliers import input_outliers
from quantkit.outliers import Outliers, outliers_of
from quantkit.qtensor import QuantizedTensor
from quantkit.skeleton import LinearInfo, Skeleton, check_complete, open_skeleton
from quantkit.source import open_tokenizer, resolve_model
from quantkit.stored import StoredLayers, stored_layers

_AT_ONCE = 2**22  # codes
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CodeStats:
    """How a quantized layer uses its grid.

    Attributes:
        entropy: of the codes, in bits; a uniform use of all codes has as many as the width.
        clipped: share of the codes that are the smallest or the largest.
        scale_min: the smallest magnitude of a scale.
        scale_max: the largest.
        negative_scales: share of the scales.
        zero_point_min: the smallest.
        zero_point_max: the largest.
    """

    entropy: float
    clipped: float
    scale_min: float
    scale_max: float
    negative_scales: float
    zero_point_min: int
    zero_point_max: int


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """One linear layer, or a quantized embedding.

    Attributes:
        name: of the module.
        block: index of its decoder block; None outside.
        shape: (out_features, in_features).
        scheme: of a quantized layer, such as ``w4a16_g128_sym``; None of a dense one.
        dtype: of its scales, or of its dense weight.
        nbytes: of its tensors on disk, the bias left out.
        codes: of a quantized layer.
        weights: outliers of a dense layer's weight.
        inputs: outliers of what flows into it, where calibration data was given.
    """

    name: str
    block: int | None
    shape: tuple[int, int]
    scheme: str | None
    dtype: str
    nbytes: int
    codes: CodeStats | None = None
    weights: Outliers | None = None
    inputs: Outliers | None = None

    @property
    def numel(self) -> int:
        """Weights, whether quantized or not."""
        return self.shape[0] * self.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of a weight: codes, scales, zero points and the rest."""
        return 8 * self.nbytes / self.numel


@dataclass(frozen=True)
class Inspection:
    """A model directory.

    Attributes:
        path: the directory.
        model_type: the family.
        format: of the quantized layers; ``dense`` without any.
        num_parameters: of the model, quantized ones counted as weights, tied ones once.
        nbytes: of all tensors on disk.
        layers: every linear layer that has a tensor of its own, in the model's order, then quantized embeddings. A
            tied head that has its embedding's codes has none of its own.
        others: all other tensors: name -> (values, bytes).
        calibration: what the inputs were measured on; None: nothing.
    """

    path: Path
    model_type: str
    format: str
    num_parameters: int
    nbytes: int
    layers: tuple[LayerProfile, ...]
    others: dict[str, tuple[int, int]]
    calibration: str | None = None

    @property
    def num_quantized(self) -> int:
        """Weights that are quantized."""
        return sum(layer.numel for layer in self.layers if layer.scheme is not None)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter of the whole directory."""
        return 8 * self.nbytes / self.num_parameters

    @property
    def bits_per_quantized_weight(self) -> float | None:
        """Stored bits per quantized weight; None without any."""
        stored = sum(layer.nbytes for layer in self.layers if layer.scheme is not None)
        return 8 * stored / self.num_quantized if self.num_quantized else None

    def to_dict(self) -> dict[str, Any]:
        """The schema of ``quantkit inspect --json``."""
        layers = []
        for layer in self.layers:
            row = {key: value for key, value in asdict(layer).items() if value is not None}
            row["bits_per_weight"] = layer.bits_per_weight
            for key, found in (("weights", layer.weights), ("inputs", layer.inputs)):
                if found is not None:
                    row[key]["sigmas"] = found.sigmas
            layers.append(row)
        return {
            "path": str(self.path),
            "model_type": self.model_type,
            "format": self.format,
            "num_parameters": self.num_parameters,
            "num_quantized": self.num_quantized,
            "share_quantized": self.num_quantized / self.num_parameters,
            "nbytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_quantized_weight": self.bits_per_quantized_weight,
            "calibration": self.calibration,
            "layers": layers,
            "others": {name: {"numel": numel, "nbytes": size} for name, (numel, size) in self.others.items()},
        }


def inspect(
    model: str | Path, *, calibration: CalibrationSpec | None = None, progress: Progress | None = None
) -> Inspection:
    """Read a model directory through, one layer at a time.

    Args:
        model: ``builtin``, a directory or a hub id; dense or quantized.
        calibration: text to send through a dense model, to see the outliers of its layers' inputs.
        progress: is told how many layers (then blocks) of how many are done.

    Raises:
        CheckpointError: the directory is broken; ``quantkit verify`` tells all that is wrong with it.
        InputError: calibration of a quantized model.
    """
    path = resolve_model(model)
    checkpoint = Checkpoint(path)
    config = checkpoint.quantization
    layout = None if config is None else (format_of(config), config)
    if config is not None and calibration is not None:
        what = "is quantized, and inputs are measured in full-precision models"
        raise InputError(message(str(path), what, "leave --calibration out, or give the original model"))
    skeleton = open_skeleton(checkpoint, checkpoint.float_dtype)
    stored = None
    if layout is None:
        check_complete(skeleton, skeleton.checkpoint)
    else:
        stored = stored_layers(skeleton, *layout)
    layers = _profiles(skeleton, stored, progress)
    if calibration is not None:
        samples = calibration_samples(calibration, open_tokenizer(path), vocab_size=skeleton.model.config.vocab_size)
        inputs = input_outliers(skeleton, samples.samples, checkpoint.float_dtype, progress)
        experts = {info.name: info.expert.module for info in skeleton.linears if info.expert is not None}
        layers = [replace(layer, inputs=inputs.get(_fed_by(layer.name, experts))) for layer in layers]
    return _summed(skeleton, stored, layers, None if calibration is None else samples.source)


def _profiles(skeleton: Skeleton, stored: StoredLayers | None, progress: Progress | None) -> list[LayerProfile]:
    found = []
    shared = {info.stem for info in skeleton.embeddings}
    for done, info in enumerate(skeleton.layers):
        if info.tied and info.stem in shared:
            continue
        if stored is not None and info.name in stored.schemes:
            found.append(_quantized(stored, info))
        elif not info.embedding and f"{info.stem}.weight" in skeleton.checkpoint.tensors:
            found.append(_dense(skeleton, info))
        if progress is not None:
            progress(done + 1, len(skeleton.layers))
    return found


def _quantized(stored: StoredLayers, info: LinearInfo) -> LayerProfile:
    q, _ = stored.read(info)
    names = [name for name in stored.names(info) if not name.endswith(".bias")]
    nbytes = sum(stored.checkpoint.tensors[name].nbytes for name in names)
    shape, dtype = (info.out_features, info.in_features), str(q.scale.dtype).removeprefix("torch.")
    return LayerProfile(info.name, info.block, shape, str(q.scheme), dtype, nbytes, codes=code_stats(q))


def _dense(skeleton: Skeleton, info: LinearInfo) -> LayerProfile:
    name = f"{info.stem}.weight"
    about = skeleton.checkpoint.tensors[name]
    weight = skeleton.checkpoint.read([name])[name]
    shape, dtype = (info.out_features, info.in_features), str(about.dtype).removeprefix("torch.")
    return LayerProfile(info.name, info.block, shape, None, dtype, about.nbytes, weights=outliers_of(weight))


def code_stats(q: QuantizedTensor) -> CodeStats:
    """How a quantized weight uses its grid."""
    counts = torch.zeros(q.scheme.levels, dtype=torch.int64)
    for piece in q.codes.reshape(-1).split(_AT_ONCE):
        counts += torch.bincount(piece.to(torch.int64), minlength=q.scheme.levels).cpu()
    scale = q.scale.float()
    return CodeStats(
        entropy_bits(counts),
        float(counts[0] + counts[-1]) / q.codes.numel(),
        float(scale.abs().min()),
        float(scale.abs().max()),
        float((scale < 0).float().mean()),
        int(q.zero_point.min()),
        int(q.zero_point.max()),
    )


def entropy_bits(counts: Tensor) -> float:
    """Shannon's entropy of what was counted, in bits."""
    total = float(counts.sum())
    shares = [count / total for count in counts.tolist() if count]
    return -math.fsum(share * math.log2(share) for share in shares)


def _fed_by(name: str, experts: dict[str, str]) -> str:
    """Whose input was measured for a layer: its own, or of an expert's gate and up that of all experts together."""
    return name if name not in experts or name.endswith(".down_proj") else experts[name]


def _summed(
    skeleton: Skeleton, stored: StoredLayers | None, layers: list[LayerProfile], calibration: str | None
) -> Inspection:
    """The figures of the whole directory."""
    tensors = skeleton.checkpoint.tensors
    in_layers = {f"{info.stem}.weight" for info in skeleton.linears}
    if stored is not None:
        for info in skeleton.layers:
            if info.name in stored.schemes:
                in_layers.update(name for name in stored.names(info) if not name.endswith(".bias"))
    others = {name: (about.numel, about.nbytes) for name, about in tensors.items() if name not in in_layers}
    return Inspection(
        skeleton.checkpoint.path,
        str(skeleton.model.config.model_type),
        "dense" if stored is None else stored.format.name,
        sum(layer.numel for layer in layers) + sum(numel for numel, _ in others.values()),
        skeleton.checkpoint.nbytes,
        tuple(layers),
        others,
        calibration,
    )
