"""The transforms of a run: what is rewritten as tensors are read, and the scales that are found for a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.capture import Measurement
from quantkit.errors import CalibrationError, CheckpointError, message
from quantkit.plan import Plan
from quantkit.scheme import QuantScheme
from quantkit.skeleton import assign
from quantkit.stats import LayerStats
from quantkit.structure import Heads, Norm, ScaleGroup, Source, find_heads
from quantkit.transforms import BlockTensors, Call, Found, Rotation, ScaleTransform, TransformRecord, clip_weight
from quantkit.transforms.folding import fold_scale, rotate_final_norm, rotate_rows, rotate_stream, rotate_values
from quantkit.transforms.orthogonal import Orthogonal, rotation_of


@dataclass(frozen=True, slots=True)
class Samples:
    """The calibration samples in front of a block: their lengths, and a way to run the block on one of them."""

    lengths: tuple[int, ...]
    run: Callable[[int], object]

    def some(self, num_tokens: int) -> list[int]:
        """As few samples as have this many tokens together, at least one, spread evenly."""
        mean = sum(self.lengths) / len(self.lengths)
        count = min(len(self.lengths), max(1, round(num_tokens / mean)))
        return [index * len(self.lengths) // count for index in range(count)]


class Transforming:
    """What the recipe's transforms do to the tensors of a model.

    Args:
        plan: of the run; without transforms everything is handed on as it is read.
        device: where blocks run.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self._rotations: _Rotations | None = None
        if plan.structures and plan.rotation is not None:
            self._rotations = _Rotations(plan, plan.rotation)

    def readers(self, index: int) -> tuple[str, ...]:
        """The linears of a block whose inputs are measured for the transforms, by local name.

        Not those of experts that read what the routers read: that input is measured there, of all tokens.
        """
        structure = self._plan.structures[index]
        taken = [group for group in structure.groups if any(one.takes(group) for one in self._plan.scale_transforms)]
        read = [
            reader
            for group in taken
            for reader in group.readers
            if len(group.readers) == 1 or not structure.is_expert(reader)
        ]
        clipped = [p.info.local for p in self._plan.block_layers(index) if self._plan.clips(p.info.local)]
        return tuple(dict.fromkeys([*read, *clipped]))

    def read_block(self, index: int) -> dict[str, Tensor]:
        """A block's tensors by disk name, rotated; what was changed is wide (:class:`BlockTensors`)."""
        source = self._plan.checkpoint.read(self._plan.skeleton.block_tensors(index).values())
        if self._rotations is None:
            return source
        names = self._plan.skeleton.block_tensors(index)
        tensors = self._tensors(index, source)
        self._rotations.rotate_block(index, tensors, f"{self._plan.skeleton.block_path}.{index}")
        return source | {names[name]: tensor for name, tensor in tensors.tensors().items()}

    def read_outside(self, names: Iterable[str], head: bool) -> dict[str, Tensor]:
        """Tensors outside of the blocks by disk name, rotated, in the dtypes that ship.

        Args:
            names: on disk.
            head: with the tensor that a tied head gets when it is untied.
        """
        tensors = self._plan.checkpoint.read(names)
        if self._rotations is not None and self._rotations.stream is not None:
            self._rotations.rotate_outside(tensors, head)
        return tensors

    def shipped(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors by disk name in the dtypes of the source, rounded once."""
        infos = self._plan.checkpoint.tensors
        return {name: tensor.to(infos[name].dtype) if name in infos else tensor for name, tensor in tensors.items()}

    def scale_block(
        self, index: int, source: dict[str, Tensor], measured: Measurement, samples: Samples
    ) -> list[TransformRecord]:
        """Find the scales of a block's groups and fold them: into its tensors, its module and what was measured.

        Args:
            index: the block; its module holds its tensors.
            source: the block's tensors by disk name; those that change are replaced by wide ones.
            measured: on this block, the inputs of all readers; rescaled.
            samples: in front of the block.
        """
        plan = self._plan
        names = plan.skeleton.block_tensors(index)
        tensors = self._tensors(index, source)
        context = _Block(plan, index, tensors, measured, samples)
        context.check_finite()
        records = []
        for transform in plan.scale_transforms:
            for group in plan.structures[index].groups:
                if transform.takes(group) and any(context.scheme(reader) is not None for reader in group.readers):
                    records.append(self._scale_group(transform, group, context))
        records += self._clip(context)
        source.update({names[name]: tensors[name] for name in tensors.changed})
        return records

    def _clip(self, context: _Block) -> list[TransformRecord]:
        """Clamp the weights of the block's layers where the recipe asks for it."""
        records = []
        for layer in self._plan.block_layers(context.index):
            name = layer.info.local
            if not self._plan.clips(name):
                continue
            weight, hessian = context.tensors.weight(name).float(), context.stats(name).hessian
            weight, after, before = clip_weight(weight, layer.scheme.weight_only, hessian.cpu(), self._plan.dtype)
            context.tensors.put_weight(name, weight)
            note = "the layer's own loss and sqnr_db are against the clipped weights"
            records.append(TransformRecord("awq", layer.info.name, (layer.info.name,), "clip", after, before, note))
        return records

    def _scale_group(self, transform: ScaleTransform, group: ScaleGroup, context: _Block) -> TransformRecord:
        structure = self._plan.structures[context.index]
        reason = context.too_few(group)
        try:
            found = transform.find(group, context) if reason is None else Found(None, "none", note=reason)
        except CalibrationError as error:
            raise CalibrationError(f"{context.prefix}{error}") from error
        if found.scale is not None:
            before = set(context.tensors.changed)
            context.tensors.changed.clear()
            columns = fold_scale(context.tensors, group, found.scale, structure.norm, context.heads)
            context.rescale(group, 1 / columns)
            context.place(self._device)
            context.tensors.changed |= before
        prefix = context.prefix
        return TransformRecord(
            transform.name,
            f"{prefix}{group.source}",
            tuple(f"{prefix}{reader}" for reader in group.readers),
            found.choice,
            found.loss,
            found.loss_before,
            found.note,
        )

    def _tensors(self, index: int, source: dict[str, Tensor]) -> BlockTensors:
        names = self._plan.skeleton.block_tensors(index)
        transposed = frozenset(i.local for i in self._plan.skeleton.linears if i.block == index and i.transposed)
        return BlockTensors({name: source[disk] for name, disk in names.items()}, transposed)


class _Rotations:
    """The rotations of a run: two orthogonal matrices, made once."""

    def __init__(self, plan: Plan, rotation: Rotation) -> None:
        self._plan, structure = plan, plan.structures[0]
        self._heads = find_heads(plan.skeleton.model.config)
        self.stream = structure.residual if rotation.residual else None
        self._values: Orthogonal | None = None
        if rotation.heads:
            self._values = rotation_of(self._heads.dim, rotation.seed)
        if self.stream is not None:
            gain = plan.skeleton.model.get_submodule(self.stream.final_norm).weight
            assert isinstance(gain, Tensor)
            self._residual = rotation_of(gain.numel(), rotation.seed, keep_ones=structure.norm is Norm.LAYER)

    def rotate_block(self, index: int, tensors: BlockTensors, where: str) -> None:
        structure = self._plan.structures[index]
        if self.stream is not None:
            assert structure.residual is not None, "the blocks are of one family"
            rotate_stream(tensors, structure.residual, self._residual, structure.norm, where)
        if self._values is not None:
            for group in structure.groups:
                if group.kind in (Source.VALUES, Source.VALUES_BY_HEAD):
                    rotate_values(tensors, group, self._values, self._heads)

    def rotate_outside(self, tensors: dict[str, Tensor], with_head: bool) -> None:
        """Rotate the embeddings, the final norm and the head among these tensors, and add an untied head."""
        stream, disk = self.stream, self._plan.skeleton.disk_names
        assert stream is not None, "the caller looks whether there is one"
        embeddings = [disk[f"{name}.weight"] for name in stream.embeddings]
        gain_name, bias_name = disk[f"{stream.final_norm}.weight"], disk.get(f"{stream.final_norm}.bias")
        if with_head and self._plan.unties_head:
            tensors[self._plan.head] = tensors[embeddings[0]].clone()
        if (head := self._plan.head) in tensors:
            gain = tensors[gain_name] if gain_name in tensors else self._plan.checkpoint.read([gain_name])[gain_name]
            rotate_rows(tensors[head], self._residual, gain.double())
        if gain_name in tensors:
            bias = None if bias_name is None else tensors[bias_name]
            gain, bias = rotate_final_norm(tensors[gain_name], bias, self._residual, stream.final_norm)
            tensors[gain_name] = gain
            if bias_name is not None and bias is not None:
                tensors[bias_name] = bias
        for name in embeddings:
            if name in tensors:
                rotate_rows(tensors[name], self._residual)


class _Block:
    """A block while scales are found for it; see :class:`quantkit.transforms.BlockContext`."""

    def __init__(self, plan: Plan, index: int, tensors: BlockTensors, measured: Measurement, samples: Samples) -> None:
        self.plan, self.index, self.tensors, self.measured, self.samples = plan, index, tensors, measured, samples
        self._structure = plan.structures[index]
        self._layers = {layer.info.local: layer for layer in plan.block_layers(index)}
        self._kept: dict[str, list[Call]] = {}  # what experts' layers are called with

    @property
    def heads(self) -> Heads:
        return find_heads(self.plan.skeleton.model.config)

    @property
    def dtype(self) -> torch.dtype:
        return self.plan.dtype

    @property
    def prefix(self) -> str:
        return f"{self.plan.skeleton.block_path}.{self.index}."

    def stats(self, linear: str) -> LayerStats:
        return self.measured.inputs[linear]

    def scheme(self, linear: str) -> QuantScheme | None:
        layer = self._layers.get(linear)
        return None if layer is None else layer.scheme

    def check_finite(self) -> None:
        """Every input that was measured is finite: else the first layer that reads one that is not is named."""
        for linear, stats in self.measured.inputs.items():
            if not stats.is_finite:
                what, fix = "its activations are not finite", "check the model in this dtype, or use --dtype float32"
                raise CalibrationError(message(f"{self.prefix}{linear}", what, fix))

    def too_few(self, group: ScaleGroup) -> str | None:
        """Why the channels inside of an expert stay as they are: too few tokens reached it; None otherwise."""
        reader = group.readers[0]
        if len(group.readers) > 1 or not self._structure.is_expert(reader):
            return None
        stats = self.measured.inputs.get(reader)
        seen = 0 if stats is None else stats.num_tokens
        wanted = max(1.0, self.plan.recipe.expert_tokens_per_column * self._layers[reader].info.in_features)
        return None if seen >= wanted else f"its expert saw {seen} tokens, and {wanted:.0f} are wanted"

    def module(self, name: str) -> nn.Module:
        return self.plan.skeleton.blocks[self.index].get_submodule(name)

    def calls(self, name: str, num_tokens: int) -> Sequence[Call]:
        if not self._structure.is_expert(name):
            return self._record([name], num_tokens)[name]
        if name not in self._kept:  # one run for all experts: their inner channels do not depend on each other
            of_experts = (g.parent for g in self._structure.groups if self._structure.is_expert(g.parent))
            self._kept.update(self._record([*of_experts], num_tokens))
        return self._kept[name]

    def _record(self, names: Sequence[str], num_tokens: int) -> dict[str, list[Call]]:
        """Name -> the calls of a submodule while some samples run."""
        seen: dict[str, list[Call]] = {name: [] for name in names}

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            return lambda _, args, kwargs: seen[name].append(Call(args, kwargs))

        with ExitStack() as hooks:
            for name in names:
                handle = self.module(name).register_forward_pre_hook(hook(name), with_kwargs=True)
                hooks.callback(handle.remove)
            for sample in self.samples.some(num_tokens):
                self.samples.run(sample)
        return seen

    def rescale(self, group: ScaleGroup, factors: Tensor) -> None:
        """The readers' inputs were multiplied by these factors."""
        self._kept.pop(group.parent, None)
        found = (self.measured.inputs.get(reader) for reader in group.readers)
        stats = {id(one): one for one in found if one is not None}
        others = [n for n, s in self.measured.inputs.items() if id(s) in stats and n not in group.readers]
        if others:
            raise CheckpointError(
                message(
                    f"{self.prefix}{others[0]}",
                    f"reads what {self.prefix}{group.source} makes, which transforms do not know",
                    "remove the transform",
                )
            )
        for one in stats.values():
            one.rescale(factors)

    def place(self, device: torch.device) -> None:
        """Put the changed tensors into the module."""
        placed = {name: self.tensors[name].to(device, self.plan.dtype) for name in self.tensors.changed}
        assign(self.plan.skeleton.blocks[self.index], placed)
