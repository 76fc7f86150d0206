"""The plan of a run: what is done to each layer, and the figures that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from quantkit.arch import collapsed_name, input_group
from quantkit.checkpoint import Checkpoint
from quantkit.config_names import named_schemes, names_left_out
from quantkit.experts import ExpertsInfo
from quantkit.formats import CheckpointFormat
from quantkit.layer_plan import LayerPlan, encoded_bytes, head_bytes, solving_bytes
from quantkit.recipe import Recipe
from quantkit.safetensors_header import TensorInfo
from quantkit.scheme import QuantScheme
from quantkit.skeleton import Skeleton
from quantkit.solvers import AutoRound
from quantkit.stats import Stat
from quantkit.structure import Structure
from quantkit.transforms import AWQ, Rotation, SmoothQuant, changed_in_block, changed_outside
from quantkit.tuning import BlockTuning, num_steps, tuning_bytes

_FLOAT32 = _INT32 = 4
_MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What a run will do; nothing here is a tensor with values.

    Attributes:
        checkpoint: the source.
        skeleton: the model on the meta device.
        recipe: with nothing left to choose but ``auto`` dtype, which ``dtype`` resolves.
        format: the output format.
        dtype: of the forward passes and the scales.
        layers: what is quantized: linear layers in the model's order, then embeddings.
        skipped: linear layers that stay as they are, and why.
        notes: what the user should know, one sentence each.
        structures: of each block, where the recipe has transforms.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    recipe: Recipe
    format: CheckpointFormat
    dtype: torch.dtype
    layers: tuple[LayerPlan, ...]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    structures: tuple[Structure, ...] = ()

    @cached_property
    def owners(self) -> tuple[LayerPlan, ...]:
        """The layers that have codes of their own: all but a tied head that has its embedding's."""
        return tuple(layer for layer in self.layers if layer.shares is None)

    @cached_property
    def needs(self) -> frozenset[Stat]:
        """The statistics that some layer or some transform needs."""
        return self.transform_needs.union(*(layer.needs for layer in self.layers))

    @property
    def transform_needs(self) -> frozenset[Stat]:
        """The statistics that some transform needs."""
        return frozenset[Stat]().union(*(transform.needs for transform in self.scale_transforms))

    @property
    def rotation(self) -> Rotation | None:
        """The recipe's rotation."""
        return next((one for one in self.recipe.transforms if isinstance(one, Rotation)), None)

    @property
    def scale_transforms(self) -> tuple[SmoothQuant | AWQ, ...]:
        """The recipe's transforms that scale channels, in order."""
        return tuple(one for one in self.recipe.transforms if not isinstance(one, Rotation))

    @cached_property
    def changed(self) -> frozenset[str]:
        """The dense tensors, by disk name, that transforms change; all others are written as they are."""
        if not self.structures:
            return frozenset()
        outside, disk = changed_outside(self.structures[0], self.recipe.transforms), self.skeleton.disk_names
        found = {disk[name] for name in outside if name in disk} | ({self.head} if outside else set())
        for index, structure in enumerate(self.structures):
            local = changed_in_block(structure, self.recipe.transforms)
            found |= {name for inside, name in self.skeleton.block_tensors(index).items() if inside in local}
        return frozenset(found)

    def clips(self, linear: str) -> bool:
        """Whether a quantized layer's weights are clamped before they are rounded; its name within the block."""
        return any(isinstance(one, AWQ) and one.clips(linear) for one in self.recipe.transforms)

    @property
    def rotates_stream(self) -> bool:
        """Whether the residual stream is rotated, which changes embeddings, final norm and head."""
        return self.rotation is not None and self.rotation.residual

    @cached_property
    def head(self) -> str:
        """The head's tensor on disk, whether or not the source has it."""
        name = f"{self.skeleton.head_name()}.weight"
        return self.skeleton.disk_names.get(name, name)

    @cached_property
    def unties_head(self) -> bool:
        """Whether a head that is tied to the embedding gets a weight of its own, quantized or dense."""
        quantized = any(layer.info.tied for layer in self.owners)
        return quantized or (self.rotates_stream and any(info.tied for info in self.skeleton.linears))

    @cached_property
    def untied(self) -> TensorInfo | None:
        """The dense tensor that a tied head gets, where the residual stream is rotated."""
        if not self.unties_head or any(layer.info.tied for layer in self.layers):
            return None
        tied = self.skeleton.model.all_tied_weights_keys[f"{self.skeleton.head_name()}.weight"]
        return self.checkpoint.tensors[self.skeleton.disk_names[tied]]

    @property
    def added_bytes(self) -> int:
        """Bytes of the dense tensors that the source does not have."""
        return self.untied.nbytes if self.untied is not None and self.head not in self.checkpoint.tensors else 0

    @cached_property
    def tunes(self) -> bool:
        """Whether something is learned from whole blocks' outputs."""
        learned = any(isinstance(layer.solver, AutoRound) for layer in self.layers)
        return learned or (self.recipe.tuning is not None and any(p.info.block is not None for p in self.layers))

    @property
    def runs_blocks(self) -> bool:
        """Whether calibration samples go through the blocks."""
        return bool(self.needs) or self.tunes

    @cached_property
    def measures_head(self) -> bool:
        """Whether the output head needs statistics of its input."""
        return any(layer.info.block is None and layer.needs for layer in self.layers)

    @cached_property
    def replaced(self) -> frozenset[str]:
        """The tensors of the checkpoint that the output does not hold: the quantized layers' weights."""
        return frozenset(f"{layer.info.stem}.weight" for layer in self.layers) & self.checkpoint.tensors.keys()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The output's config.json but for its ``quantization_config``: the source's, with what is untied."""
        untied = {"tie_word_embeddings": False} if self.unties_head else {}
        return {**self.checkpoint.config, **untied}

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """The output's ``quantization_config``."""
        reordered = any(layer.solver.writes_g_idx for layer in self.layers)
        return self.format.write_config(self.targets, self.ignored, reordered=reordered)

    def weight_tensor(self, layer: LayerPlan) -> str:
        """The tensor that holds a layer's weight: of a tied head the embedding's, unless rotating made it its own."""
        if not layer.info.tied or self.rotates_stream:
            return f"{layer.info.stem}.weight"
        return self.skeleton.disk_names[self.skeleton.model.all_tied_weights_keys[f"{layer.info.name}.weight"]]

    @cached_property
    def targets(self) -> dict[str, QuantScheme]:
        """Scheme of every quantized layer, by every name that other loaders may know it under."""
        return named_schemes(self.skeleton, ((layer.info, layer.scheme) for layer in self.layers))

    @cached_property
    def ignored(self) -> tuple[str, ...]:
        """What stays as it is, by every name that other loaders may know it under."""
        return names_left_out(self.skeleton, [name for name, _ in self.skipped])

    @cached_property
    def num_parameters(self) -> int:
        """Parameters of the output: those of the checkpoint, tied ones once, and those of a head that is untied."""
        held = sum(info.numel for info in self.checkpoint.tensors.values())
        absent = (layer for layer in self.owners if f"{layer.info.stem}.weight" not in self.checkpoint.tensors)
        dense = self.untied.numel if self.untied is not None and self.added_bytes else 0
        return held + dense + sum(layer.numel for layer in absent)

    @cached_property
    def num_quantized(self) -> int:
        """Parameters that will be quantized, tied ones counted once."""
        return sum(layer.numel for layer in self.owners)

    @cached_property
    def quantized_bytes(self) -> int:
        """Bytes of the quantized layers' tensors, by the code that will write them."""
        return sum(encoded_bytes(self.format, layer, self.dtype) for layer in self.owners)

    @cached_property
    def size_after(self) -> int:
        """Bytes of all tensors of the output."""
        dense = sum(self.checkpoint.tensors[name].nbytes for name in self.replaced)
        return self.checkpoint.nbytes - dense + self.quantized_bytes + self.added_bytes

    @cached_property
    def left_out(self) -> tuple[tuple[str, int], ...]:
        """What stays as it is: tensor name, its indices as ``*``, and parameters in all; the largest first."""
        sizes: dict[str, int] = {}
        for name, info in self.checkpoint.tensors.items():
            if name not in self.replaced:
                sizes[collapsed_name(name)] = sizes.get(collapsed_name(name), 0) + info.numel
        return tuple(sorted(sizes.items(), key=lambda item: -item[1]))

    @property
    def bits_per_quantized_weight(self) -> float:
        """Stored bits per quantized weight, scales and zero points counted."""
        return 8 * self.quantized_bytes / self.num_quantized

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter of the whole checkpoint, whether quantized or not."""
        return 8 * self.size_after / self.num_parameters

    @property
    def num_streams(self) -> int:
        """Hidden states of each sample: the quantized model's, and the full-precision model's where it is compared."""
        return 0 if not self.runs_blocks else 2 if Stat.DRIFT in self.needs or self.tunes else 1

    def measures_apart(self, block: int) -> bool:
        """Whether a block's solvers measure in passes of their own, not in the one that its scales are found by:
        true-sequentially, or where experts are measured, one at a time.
        """
        return self.recipe.true_sequential or any(p.info.expert is not None for p in self.block_layers(block))

    @property
    def forward_passes(self) -> int:
        """Passes of every calibration sample through a block, at most: one to measure (for each of the streams, and
        true-sequentially for each input that layers share, plus one sample to see which do, plus one to find scales,
        as where experts are scaled),
        one to hand on. Tuning comes on top: :meth:`training_passes`.
        """
        if not self.runs_blocks:
            return 0
        inputs: dict[int | None, set[str]] = {}
        for layer in self.layers:
            if layer.needs and layer.info.block is not None:  # experts need one pass, however many they are
                name = input_group(layer.info.name) if layer.info.expert is None else layer.info.expert.module
                inputs.setdefault(layer.info.block, set()).add(name)
        if not inputs and not self.scale_transforms:
            return self.num_streams  # the second stream's, and to hand on
        blocks = range(len(self.skeleton.blocks))
        if not self.recipe.true_sequential and not any(map(self.measures_apart, blocks)):
            return self.num_streams + 1
        scaling = self.num_streams if self.scale_transforms else 0  # to measure, and to advance the second stream
        most = max(map(len, inputs.values()), default=0)
        return self.num_streams * (most if self.recipe.true_sequential else min(most, 1)) + scaling + 1

    def training_passes(self, num_samples: int) -> float:
        """Forward and backward passes of every sample through a block, at most, while it is tuned."""
        most = max(
            sum(num_steps(options, num_samples) * options.batch for options in self._tunings(block))
            for block in range(len(self.skeleton.blocks))
        )
        return most / max(num_samples, 1)

    def _tunings(self, block: int) -> list[AutoRound | BlockTuning]:
        """What is learned in a block."""
        layers = self.block_layers(block)
        found: list[AutoRound | BlockTuning] = list(
            dict.fromkeys(layer.solver for layer in layers if isinstance(layer.solver, AutoRound))
        )
        if layers and self.recipe.tuning is not None:
            found.append(self.recipe.tuning)
        return found

    @property
    def num_shards(self) -> int:
        """One for each block, and one for everything else."""
        return len(self.skeleton.blocks) + 1

    def block_layers(self, block: int | None) -> tuple[LayerPlan, ...]:
        """The layers to quantize in a block; None: outside of the blocks."""
        return self._by_block.get(block, ())

    @cached_property
    def _by_block(self) -> dict[int | None, tuple[LayerPlan, ...]]:
        found: dict[int | None, list[LayerPlan]] = {}
        for layer in self.layers:
            found.setdefault(layer.info.block, []).append(layer)
        return {block: tuple(layers) for block, layers in found.items()}

    def activation_bytes(self, num_tokens: int) -> int:
        """Bytes of the hidden states between two blocks."""
        return self.num_streams * num_tokens * self._hidden_size * self.dtype.itemsize

    def expert_bytes(self, num_tokens: int) -> int:
        """Bytes of the inputs of one block's experts, which are kept while these are solved."""
        widths = [info.hidden_size for info in self._measured_experts]
        return self.num_streams * num_tokens * max(widths, default=0) * self.dtype.itemsize

    def experts_budget(self, num_tokens: int) -> int:
        """Bytes of experts' inputs that may lie in memory: what the hidden states leave of ``activation_memory``."""
        budget, hidden = self.recipe.activation_memory, self.activation_bytes(num_tokens)
        return budget - hidden if hidden <= budget else budget

    def mapped_bytes(self, num_tokens: int) -> int:
        """Bytes of hidden states and of experts' inputs that go to files, because they do not fit their budgets."""
        hidden, experts = self.activation_bytes(num_tokens), self.expert_bytes(num_tokens)
        mapped = hidden if hidden > self.recipe.activation_memory else 0
        return mapped + (experts if experts > self.experts_budget(num_tokens) else 0)

    def peak_memory(self, num_tokens: int, sequence_length: int) -> int:
        """Projected peak of resident memory in bytes, above what the process holds now: it does not grow with blocks.

        The largest block as it is read and in the compute dtype, its Hessians (of its experts, one expert's), the
        working copies of the largest group of layers that is solved at once, one sample's activations, and the hidden
        states between blocks and in front of experts as far as they may lie in memory.
        """
        peak = 0
        for index in range(len(self.skeleton.blocks)):
            infos = [self.checkpoint.tensors[n] for n in self.skeleton.block_tensors(index).values()]
            # As read, as run, and as it was before quantization where that is compared with.
            copies = max(1, self.num_streams)
            block = sum(info.nbytes + copies * info.numel * self.dtype.itemsize for info in infos)
            if self.recipe.transforms:  # what they change is held in float32, one matrix at a time in float64
                block += sum(_FLOAT32 * info.numel for info in infos) + 4 * _FLOAT32 * max(i.numel for i in infos)
            if self.scale_transforms:  # a trial's weights of all experts
                experts = (layer for layer in self.block_layers(index) if layer.info.expert is not None)
                block += self.dtype.itemsize * sum(layer.numel for layer in experts)
            peak = max(peak, block + solving_bytes(self.block_layers(index), self.transform_needs))
            if self.tunes:
                peak = max(peak, block + self._tuning_bytes(index, sequence_length))
        outside = sum(self.checkpoint.tensors[n].nbytes for n in self.skeleton.outside_tensors().values())
        outside += self.added_bytes
        peak = max(peak, outside + sum(head_bytes(self.format, p, self.dtype) for p in self.block_layers(None)))
        if not self.runs_blocks:
            return peak
        widest = max(layer.info.out_features + layer.info.in_features for layer in self.layers)
        sample = sequence_length * (8 * self._hidden_size + 4 * widest * self._experts_per_token) * _FLOAT32
        held = self.activation_bytes(num_tokens) + self.expert_bytes(num_tokens) - self.mapped_bytes(num_tokens)
        chosen = num_tokens * self._experts_per_token * _INT32 if self._measured_experts else 0
        if self.scale_transforms:  # a group's inputs, its outputs and those of a trial
            searched = max(one.search_tokens for one in self.scale_transforms) + sequence_length
            peak += min(searched, num_tokens) * 3 * widest * self.dtype.itemsize
        return max(peak + sample, 2 * outside) + held + chosen

    @cached_property
    def _measured_experts(self) -> tuple[ExpertsInfo, ...]:
        """The modules of experts in which some layer's solver needs statistics."""
        names = {layer.info.expert.module for layer in self.layers if layer.info.expert and layer.solver.needs}
        return tuple(info for info in self.skeleton.experts if info.name in names)

    @cached_property
    def _experts_per_token(self) -> int:
        """How many experts see a token, at most; 1 in a model without."""
        most = max((info.num_experts for info in self.skeleton.experts), default=1)
        stated = getattr(self.skeleton.model.config, "num_experts_per_tok", None)
        return stated if isinstance(stated, int) and 0 < stated < most else most

    def _share_of_tokens(self, layer: LayerPlan) -> float:
        """The share of a sample's tokens that a layer sees, on average over the experts of its module."""
        if layer.info.expert is None:
            return 1.0
        counts = {info.name: info.num_experts for info in self.skeleton.experts}
        return self._experts_per_token / counts[layer.info.expert.module]

    def _tuning_bytes(self, block: int, sequence_length: int) -> int:
        """What tuning a block holds, with what one sample's passes keep for its gradients."""
        layers = self.block_layers(block)
        rounded = [layer.numel for layer in layers if isinstance(layer.solver, AutoRound)]
        tuning = self.recipe.tuning
        scaled = [layer.numel for layer in layers] if tuning is not None else []
        kept = 8.0 * self._hidden_size
        for layer in layers:  # of a mixture's, together, as much as a token's experts
            kept += (layer.info.in_features + 2 * layer.info.out_features) * self._share_of_tokens(layer)
        config = self.skeleton.model.config
        scores = 0
        if getattr(config, "_attn_implementation", None) == "eager":
            scores = 3 * int(config.num_attention_heads) * sequence_length**2
        held = tuning_bytes(rounded, scaled, codes=tuning is not None and tuning.codes, dtype=self.dtype)
        return held + int(sequence_length * kept + scores) * _FLOAT32

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
