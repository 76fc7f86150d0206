"""The plan of a run: everything that can be known and checked from the config and the headers, before any work."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch

from quantkit.arch import input_group, unequal_fused
from quantkit.checkpoint import Checkpoint
from quantkit.errors import CheckpointError, OutputError, RecipeError, SchemeError, message
from quantkit.formats import CheckpointFormat, format_named
from quantkit.qtensor import QuantizedTensor
from quantkit.recipe import Recipe
from quantkit.scheme import QuantScheme
from quantkit.skeleton import LinearInfo, Skeleton, check_complete, open_skeleton
from quantkit.solvers import Solver
from quantkit.source import resolve_dtype
from quantkit.stats import Stat

_FLOAT32 = 4
_SOLVE_COPIES = 4  # in float32: the weights, transposed, their errors, and what is reported of them
_MIB = 2**20
_DISK_MARGIN = 16 * _MIB  # config, tokenizer, report


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer to quantize."""

    info: LinearInfo
    scheme: QuantScheme
    solver: Solver

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.info.out_features * self.info.in_features


@dataclass(frozen=True)
class Plan:
    """What a run will do; nothing here is a tensor with values.

    Attributes:
        checkpoint: the source.
        skeleton: the model on the meta device.
        recipe: with nothing left to choose but ``auto`` dtype, which ``dtype`` resolves.
        format: the output format.
        dtype: of the forward passes and the scales.
        layers: what is quantized, in the model's order.
        skipped: linear layers that stay as they are, and why.
        notes: what the user should know, one sentence each.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    recipe: Recipe
    format: CheckpointFormat
    dtype: torch.dtype
    layers: tuple[LayerPlan, ...]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @cached_property
    def needs(self) -> frozenset[Stat]:
        """The statistics that some layer's solver needs."""
        return frozenset().union(*(layer.solver.needs for layer in self.layers))

    @cached_property
    def num_parameters(self) -> int:
        """Parameters of the checkpoint, tied ones once."""
        return sum(info.numel for info in self.checkpoint.tensors.values())

    @cached_property
    def num_quantized(self) -> int:
        """Parameters that will be quantized."""
        return sum(layer.numel for layer in self.layers)

    @cached_property
    def quantized_bytes(self) -> int:
        """Bytes of the quantized layers' tensors, by the code that will write them."""
        return sum(_encoded_bytes(self.format, layer, self.dtype) for layer in self.layers)

    @cached_property
    def size_after(self) -> int:
        """Bytes of all tensors of the output."""
        dense = sum(self.checkpoint.tensors[f"{layer.info.stem}.weight"].nbytes for layer in self.layers)
        return self.checkpoint.nbytes - dense + self.quantized_bytes

    @property
    def bits_per_quantized_weight(self) -> float:
        """Stored bits per quantized weight, scales and zero points counted."""
        return 8 * self.quantized_bytes / self.num_quantized

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter of the whole checkpoint, whether quantized or not."""
        return 8 * self.size_after / self.num_parameters

    @property
    def forward_passes(self) -> int:
        """Passes of every calibration sample through every block: one to measure, one to hand on."""
        return 2 if self.needs else 0

    @property
    def num_shards(self) -> int:
        """One for each block, and one for everything else."""
        return len(self.skeleton.blocks) + 1

    def block_layers(self, block: int | None) -> tuple[LayerPlan, ...]:
        """The layers to quantize in a block; None: outside of the blocks."""
        return tuple(layer for layer in self.layers if layer.info.block == block)

    def activation_bytes(self, num_tokens: int) -> int:
        """Bytes of the hidden states between two blocks."""
        return num_tokens * self._hidden_size * self.dtype.itemsize if self.needs else 0

    def peak_memory(self, num_tokens: int, sequence_length: int) -> int:
        """Projected peak of resident memory in bytes, above what the process holds now: it does not grow with blocks.

        The largest block as it is read and in the compute dtype, its Hessians, the working copies of the largest group
        of layers that is solved at once, one sample's activations, and the hidden states between blocks as far as
        they may lie in memory.
        """
        peak = 0
        for index in range(len(self.skeleton.blocks)):
            infos = [self.checkpoint.tensors[n] for n in self.skeleton.block_tensors(index).values()]
            block = sum(info.nbytes + info.numel * self.dtype.itemsize for info in infos)
            peak = max(peak, block + _solving_bytes(self.block_layers(index)))
        outside = sum(self.checkpoint.tensors[n].nbytes for n in self.skeleton.outside_tensors().values())
        if not self.needs:
            return max(peak, outside)
        widest = max(layer.info.out_features + layer.info.in_features for layer in self.layers)
        sample = sequence_length * (8 * self._hidden_size + 4 * widest) * _FLOAT32
        held = min(self.activation_bytes(num_tokens), self.recipe.activation_memory)
        return max(peak + sample, 2 * outside) + held

    @cached_property
    def _hidden_size(self) -> int:
        return int(self.skeleton.model.config.hidden_size)

    def to_dict(self) -> dict[str, Any]:
        """The plan's figures, for ``--dry-run`` and the report."""
        return {
            "model": str(self.checkpoint.path),
            "model_type": self.skeleton.model.config.model_type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "format": self.format.name,
            "num_blocks": len(self.skeleton.blocks),
            "num_parameters": self.num_parameters,
            "num_quantized": self.num_quantized,
            "share_quantized": self.num_quantized / self.num_parameters,
            "size_before": self.checkpoint.nbytes,
            "size_after": self.size_after,
            "bits_per_quantized_weight": self.bits_per_quantized_weight,
            "bits_per_weight": self.bits_per_weight,
            "forward_passes_per_block": self.forward_passes,
        }


def make_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Check a recipe against a model and lay out the run.

    Raises:
        CheckpointError: an already quantized model, not a causal language model, or tensors that do not fit.
        RecipeError: rules that match nothing, or that leave nothing to quantize, or ask for what is not possible.
        SchemeError: group sizes that do not divide, with every offending layer and the legal sizes.
    """
    if checkpoint.config.get("quantization_config") is not None:
        method = checkpoint.config["quantization_config"]
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise CheckpointError(
            message(str(checkpoint.path), f"is already quantized ({kind})", "give the original full-precision model")
        )
    dtype = resolve_dtype(recipe.dtype, checkpoint.float_dtype)
    skeleton = open_skeleton(checkpoint, dtype)
    check_complete(skeleton, checkpoint)
    layers, skipped = _choose(skeleton, recipe)
    _check_rules(skeleton, recipe)
    _check_shapes(checkpoint, layers)
    fmt = format_named(recipe.format)
    _check_format(fmt, layers)
    if not layers:
        raise RecipeError(message("rules", "nothing is left to quantize", "remove a skip rule"))
    return Plan(checkpoint, skeleton, recipe, fmt, dtype, layers, skipped, _notes(skeleton, layers))


def _solving_bytes(layers: tuple[LayerPlan, ...]) -> int:
    """A block's Hessians, one for each input, the factor of the largest, and the matrices of the largest solve."""
    rows: dict[str, int] = {}
    widths: dict[str, int] = {}
    for layer in layers:
        key = input_group(layer.info.name)
        rows[key] = rows.get(key, 0) + layer.numel
        if Stat.HESSIAN in layer.solver.needs:
            widths[key] = layer.info.in_features
    hessians = [_FLOAT32 * width**2 for width in widths.values()]
    return sum(hessians) + max(hessians, default=0) + _SOLVE_COPIES * _FLOAT32 * max(rows.values(), default=0)


def check_disk(plan: Plan, output: Path, num_tokens: int) -> None:
    """The disk that holds ``output`` has room for the checkpoint and for activations over their budget.

    Raises:
        OutputError: it has not.
    """
    activations = plan.activation_bytes(num_tokens)
    needed = plan.size_after + _DISK_MARGIN + (activations if activations > plan.recipe.activation_memory else 0)
    place = next(p for p in (output, *output.parents) if p.exists())
    free = psutil.disk_usage(str(place)).free
    if free < needed:
        raise OutputError(
            message(
                str(output),
                f"needs {needed / _MIB:.0f} MiB and the disk has {free / _MIB:.0f} MiB free",
                "free space or choose another --output",
            )
        )


def check_memory(plan: Plan, num_tokens: int, sequence_length: int) -> None:
    """The machine has the projected peak memory available.

    Raises:
        OutputError: it has not.
    """
    needed, available = plan.peak_memory(num_tokens, sequence_length), psutil.virtual_memory().available
    if needed > available:
        raise OutputError(
            message(
                "memory",
                f"the run needs about {needed / _MIB:.0f} MiB and {available / _MIB:.0f} MiB are available",
                "lower --activation-memory or --sequence-length, or use --method rtn",
            )
        )


def _choose(skeleton: Skeleton, recipe: Recipe) -> tuple[tuple[LayerPlan, ...], tuple[tuple[str, str], ...]]:
    layers: list[LayerPlan] = []
    skipped: list[tuple[str, str]] = []
    for info in skeleton.linears:
        choice = recipe.choice(info.name, info.block is not None)
        if choice is None:
            skipped.append((info.name, "kept by a rule" if info.block is not None else "outside of the blocks"))
            continue
        if info.tied:
            raise RecipeError(
                message(
                    info.name,
                    "its weight is tied to the embedding, which stays as it is",
                    "remove the rule that quantizes it",
                )
            )
        if info.block is None and choice[1].needs:
            raise RecipeError(
                message(
                    info.name,
                    f"method {choice[1].name} measures layers inside of the blocks only",
                    "add method: rtn to the rule that quantizes it",
                )
            )
        layers.append(LayerPlan(info, *choice))
    return tuple(layers), tuple(skipped)


def _check_rules(skeleton: Skeleton, recipe: Recipe) -> None:
    names = [info.name for info in skeleton.linears]
    for rule in recipe.rules:
        if not any(rule.matches(name) for name in names):
            raise RecipeError(
                message(
                    "rules",
                    f"match: {rule.match!r} matches no linear layer of this model",
                    f"names look like {names[0]} or {names[-1]}",
                )
            )


def _check_shapes(checkpoint: Checkpoint, layers: tuple[LayerPlan, ...]) -> None:
    wrong: dict[str, list[str]] = {}
    for layer in layers:
        dtype = checkpoint.tensors[f"{layer.info.stem}.weight"].dtype
        if not dtype.is_floating_point:
            raise CheckpointError(
                message(f"{layer.info.stem}.weight", f"is {dtype}", "quantkit quantizes floating-point weights")
            )
        reason = layer.scheme.why_not(layer.info.in_features)
        if reason is not None:
            wrong.setdefault(reason, []).append(layer.info.name)
    if wrong:
        raise SchemeError(" | ".join(f"{', '.join(names)}: {reason}" for reason, names in wrong.items()))


def _check_format(fmt: CheckpointFormat, layers: tuple[LayerPlan, ...]) -> None:
    for layer in layers:
        reason = fmt.why_not(layer.scheme)
        if reason is not None:
            raise SchemeError(message(layer.info.name, f"format {fmt.name} cannot hold {layer.scheme}", reason))
        if layer.solver.writes_g_idx and not fmt.holds_g_idx:
            raise RecipeError(
                message(
                    layer.info.name,
                    f"format {fmt.name} does not hold the reordered groups of act_order: group",
                    "use act_order: static, which needs none",
                )
            )


def _notes(skeleton: Skeleton, layers: tuple[LayerPlan, ...]) -> tuple[str, ...]:
    """What this plan's output will not do in other programs."""
    schemes: dict[str, object] = {info.name: None for info in skeleton.linears}
    schemes.update({layer.info.name: layer.scheme for layer in layers})
    notes = [f"{group} share one matrix in vLLM and must have one scheme there" for group in unequal_fused(schemes)]
    if any(layer.info.transposed for layer in layers):
        notes.append("quantkit runs quantized Conv1D layers; transformers' own loader leaves them newly initialized")
    used = {layer.scheme for layer in layers}
    if len(used) > 1 and not all(scheme.symmetric for scheme in used):
        notes.append("transformers 5.23 cannot load several schemes of which some are asymmetric")
    return tuple(notes)


def _encoded_bytes(fmt: CheckpointFormat, layer: LayerPlan, dtype: torch.dtype) -> int:
    rows, columns = layer.info.out_features, layer.info.in_features
    groups = layer.scheme.num_groups(columns)
    q = QuantizedTensor(
        torch.empty(rows, columns, dtype=torch.uint8, device="meta"),
        torch.empty(rows, groups, dtype=dtype, device="meta"),
        torch.empty(rows, groups, dtype=torch.uint8, device="meta"),
        layer.scheme,
    )
    return sum(t.numel() * t.element_size() for t in fmt.encode(q).values())
