"""The plan of a run: everything that can be known and checked from the config and the headers, before any work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from quantkit.arch import Structure, collapsed_name, input_group, unequal_fused
from quantkit.checkpoint import Checkpoint
from quantkit.config_names import named_schemes, names_left_out
from quantkit.errors import CheckpointError, OutputError, RecipeError, SchemeError, message
from quantkit.experts import ExpertsInfo
from quantkit.formats import CheckpointFormat, format_named
from quantkit.qtensor import QuantizedTensor
from quantkit.recipe import Recipe
from quantkit.safetensors_header import TensorInfo
from quantkit.scheme import QuantScheme
from quantkit.skeleton import LinearInfo, Skeleton, check_complete, open_skeleton
from quantkit.solvers import GPTQ, RTN, AutoRound, Solver
from quantkit.source import resolve_dtype
from quantkit.stats import Stat
from quantkit.transforms import AWQ, Rotation, SmoothQuant, changed_in_block, changed_outside, check_model
from quantkit.tuning import BlockTuning, num_steps, tuning_bytes

_FLOAT32 = _INT32 = 4
_SOLVE_COPIES = 4  # in float32: the weights, transposed, their errors, and what is reported of them
_LEFT_OUT_SHOWN = 5
_MIB = 2**20
_HEAD_WEIGHTS_AT_ONCE = 2**24  # the head is solved in pieces of about so many weights
_VLLM_EXPERT_BITS = (4, 8)
_ROUTER = "routers stay as they are"
_DISK_MARGIN = 16 * _MIB  # config, tokenizer, report


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer to quantize.

    Attributes:
        info: the layer.
        scheme: its grid.
        solver: what finds its codes.
        fallback: why ``solver`` is not the recipe's; None where it is.
    """

    info: LinearInfo
    scheme: QuantScheme
    solver: Solver
    fallback: str | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.info.out_features * self.info.in_features

    @property
    def needs(self) -> frozenset[Stat]:
        """The statistics of its input that its solver and its activations need."""
        return self.solver.needs | (frozenset({Stat.ABS_MAX}) if self.scheme.act_static else frozenset())


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
        structure: of the family, where the recipe has transforms.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    recipe: Recipe
    format: CheckpointFormat
    dtype: torch.dtype
    layers: tuple[LayerPlan, ...]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    structure: Structure | None = None

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
        if self.structure is None:
            return frozenset()
        local = changed_in_block(self.structure, self.recipe.transforms)
        outside, disk = changed_outside(self.structure, self.recipe.transforms), self.skeleton.disk_names
        found = {disk[name] for name in outside if name in disk} | ({self.head} if outside else set())
        for index in range(len(self.skeleton.blocks)):
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
        quantized = any(layer.info.tied for layer in self.layers)
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
        return named_schemes((layer.info, layer.scheme) for layer in self.layers)

    @cached_property
    def ignored(self) -> tuple[str, ...]:
        """What stays as it is, by every name that other loaders may know it under."""
        return names_left_out(self.skeleton, [name for name, _ in self.skipped])

    @cached_property
    def num_parameters(self) -> int:
        """Parameters of the output: those of the checkpoint, tied ones once, and those of a head that is untied."""
        held = sum(info.numel for info in self.checkpoint.tensors.values())
        absent = (layer for layer in self.layers if f"{layer.info.stem}.weight" not in self.checkpoint.tensors)
        dense = self.untied.numel if self.untied is not None and self.added_bytes else 0
        return held + dense + sum(layer.numel for layer in absent)

    @cached_property
    def num_quantized(self) -> int:
        """Parameters that will be quantized."""
        return sum(layer.numel for layer in self.layers)

    @cached_property
    def quantized_bytes(self) -> int:
        """Bytes of the quantized layers' tensors, by the code that will write them."""
        return sum(encoded_bytes(self.format, layer, self.dtype) for layer in self.layers)

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

    @property
    def forward_passes(self) -> int:
        """Passes of every calibration sample through a block, at most: one to measure (for each of the streams, and
        true-sequentially for each input that layers share, plus one sample to see which do, plus one to find scales),
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
        if not self.recipe.true_sequential:
            return self.num_streams + 1
        scaling = self.num_streams if self.scale_transforms else 0  # to measure, and to advance the second stream
        return self.num_streams * max(map(len, inputs.values()), default=0) + scaling + 1

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
        return tuple(layer for layer in self.layers if layer.info.block == block)

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
            infos = [self.checkpoint.tensors[n] for n in self.skeleton.block_disk_names(index)]
            # As read, as run, and as it was before quantization where that is compared with.
            copies = max(1, self.num_streams)
            block = sum(info.nbytes + copies * info.numel * self.dtype.itemsize for info in infos)
            if self.recipe.transforms:  # what they change is held in float32, one matrix at a time in float64
                block += sum(_FLOAT32 * info.numel for info in infos) + 4 * _FLOAT32 * max(i.numel for i in infos)
            peak = max(peak, block + _solving_bytes(self.block_layers(index), self.transform_needs))
            if self.tunes:
                peak = max(peak, block + self._tuning_bytes(index, sequence_length))
        outside = sum(self.checkpoint.tensors[n].nbytes for n in self.skeleton.outside_tensors().values())
        outside += self.added_bytes
        peak = max(peak, outside + sum(_head_bytes(self.format, p, self.dtype) for p in self.block_layers(None)))
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

    def _tuning_bytes(self, block: int, sequence_length: int) -> int:
        """What tuning a block holds, with what one sample's passes keep for its gradients."""
        layers = [layer for layer in self.block_layers(block) if layer.info.expert is None]
        rounded = [layer.numel for layer in layers if isinstance(layer.solver, AutoRound)]
        tuning = self.recipe.tuning
        scaled = [layer.numel for layer in layers] if tuning is not None else []
        kept = sum(layer.info.in_features + 2 * layer.info.out_features for layer in layers) + 8 * self._hidden_size
        config = self.skeleton.model.config
        scores = 0
        if getattr(config, "_attn_implementation", None) == "eager":
            scores = 3 * int(config.num_attention_heads) * sequence_length**2
        held = tuning_bytes(rounded, scaled, codes=tuning is not None and tuning.codes, dtype=self.dtype)
        return held + (sequence_length * kept + scores) * _FLOAT32

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
    quantization = checkpoint.quantization
    if quantization is not None:
        kind = quantization.get("quant_method", "unknown")
        raise CheckpointError(
            message(str(checkpoint.path), f"is already quantized ({kind})", "give the original full-precision model")
        )
    dtype = resolve_dtype(recipe.dtype, checkpoint.float_dtype)
    skeleton = open_skeleton(checkpoint, dtype)
    checkpoint = skeleton.checkpoint
    check_complete(skeleton, checkpoint)
    layers, skipped = _choose(skeleton, recipe)
    _check_rules(skeleton, recipe)
    _check_shapes(checkpoint, layers)
    fmt = format_named(recipe.format)
    _check_format(fmt, layers)
    if not layers:
        raise RecipeError(message("rules", "nothing is left to quantize", "remove a skip rule"))
    _check_drift(recipe, layers)
    _check_clip(recipe, layers)
    structure = check_model(recipe.transforms, skeleton.model, skeleton.block_path, skeleton.blocks)
    notes = _notes(skeleton, fmt, dtype, layers)
    plan = Plan(checkpoint, skeleton, recipe, fmt, dtype, layers, skipped, notes, structure)
    _check_config(plan)
    _check_share(plan)
    _check_tunings(plan)
    return replace(plan, notes=(*notes, *_transform_notes(plan)))


def _check_tunings(plan: Plan) -> None:
    """The layers of a block are learned together: they share one set of options. Experts are solved one at a time."""
    for layer in plan.layers:
        if plan.tunes and layer.scheme.act_bits is not None:
            raise RecipeError(
                message(
                    layer.info.name,
                    f"scheme {layer.scheme} rounds activations, which no gradient passes: its block cannot be learned",
                    "use a weight-only scheme, or method rtn or gptq without tuning",
                )
            )
        if layer.info.expert is not None and isinstance(layer.solver, AutoRound):
            raise RecipeError(
                message(
                    layer.info.name,
                    "experts are solved one at a time, and method autoround looks at the whole block",
                    "give them a rule with method: gptq or rtn",
                )
            )
    for index in range(len(plan.skeleton.blocks)):
        options = {layer.solver for layer in plan.block_layers(index) if isinstance(layer.solver, AutoRound)}
        if len(options) > 1:
            raise RecipeError(
                message(
                    f"{plan.skeleton.block_path}.{index}",
                    "its layers have autoround with different options, and are learned together",
                    "give them the same options; their schemes may differ",
                )
            )


def _check_clip(recipe: Recipe, layers: tuple[LayerPlan, ...]) -> None:
    """Clipped ranges are those of round-to-nearest; a solver that chooses ranges itself would undo and suffer them."""
    if not any(isinstance(one, AWQ) and one.clip for one in recipe.transforms):
        return
    for layer in layers:
        if layer.info.block is not None and layer.solver.name != RTN.name:
            raise RecipeError(
                message(
                    "transforms: awq",
                    f"clip: true is for method rtn, and {layer.info.name} has method {layer.solver.name}, which "
                    "chooses ranges of its own",
                    "use clip: false",
                )
            )


def _solving_bytes(layers: tuple[LayerPlan, ...], transform_needs: frozenset[Stat]) -> int:
    """A block's Hessians (and drifts), one for each input, a factor, and the matrices of the largest solve.

    Experts are measured one at a time: of theirs, those of one expert count.
    """
    rows: dict[str, int] = {}
    squares: dict[str, int] = {}
    matrices: dict[str, int] = {}
    owners: dict[str, tuple[str, int] | None] = {}
    for layer in layers:
        key, slot = input_group(layer.info.name), layer.info.expert
        rows[key] = rows.get(key, 0) + layer.numel
        squares[key] = _FLOAT32 * layer.info.in_features**2
        needs = layer.solver.needs | transform_needs
        matrices[key] = max(matrices.get(key, 0), len({Stat.HESSIAN, Stat.DRIFT} & needs))
        owners[key] = None if slot is None else (slot.module, slot.index)
    held: dict[tuple[str, int] | None, int] = {}
    for key, count in matrices.items():
        held[owners[key]] = held.get(owners[key], 0) + squares[key] * count
    gathered = held.pop(None, 0) + max(held.values(), default=0)
    factor = max((squares[key] for key, count in matrices.items() if count), default=0)
    return gathered + factor + _SOLVE_COPIES * _FLOAT32 * max(rows.values(), default=0)


def check_disk(plan: Plan, output: Path, num_tokens: int) -> None:
    """The disk that holds ``output`` has room for the checkpoint and for activations over their budget.

    Raises:
        OutputError: it has not.
    """
    needed = plan.size_after + _DISK_MARGIN + plan.mapped_bytes(num_tokens)
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
    head = skeleton.head_name()
    for info in skeleton.linears:
        choice = recipe.choice(info.name, info.block is not None and not info.router)
        if choice is None:
            skipped.append((info.name, _why_skipped(info, recipe)))
            continue
        if info.block is None:
            _check_outside(info, *choice, is_head=info.name == head)
        if info.expert is not None and choice[0].act_bits is not None:
            raise RecipeError(
                message(
                    info.name,
                    f"{choice[0]}: the activations of experts stay in floating point",
                    f'add the rule {{match: "{info.name.rsplit(".", 2)[0]}.*", scheme: w8a16}} or choose such a scheme',
                )
            )
        layers.append(LayerPlan(info, *choice))
    named = {info.name for info in skeleton.linears}
    skipped += [(name, _ROUTER) for name in skeleton.routers if name not in named]
    skipped += [(name, _kept_whole(name, reason, recipe)) for name, reason in skeleton.opaque_experts]
    return tuple(layers), tuple(skipped)


def _check_outside(info: LinearInfo, scheme: QuantScheme, solver: Solver, is_head: bool) -> None:
    """Outside of the blocks only the output head's input is measured, and nothing is tuned."""
    if isinstance(solver, AutoRound):
        raise RecipeError(
            message(
                info.name,
                "method autoround looks at a decoder block's output, and learns layers inside of the blocks only",
                "give the rule that quantizes it a method of its own: rtn or gptq",
            )
        )
    if solver.needs and not is_head:
        raise RecipeError(
            message(
                info.name,
                f"method {solver.name} measures the layers inside of the blocks and the output head only",
                "add method: rtn to the rule that quantizes it",
            )
        )
    if scheme.act_static and not is_head:
        raise RecipeError(
            message(
                info.name,
                f"the static activations of {scheme} are measured inside of the blocks and at the output head only",
                "give the rule that quantizes it dynamic activations, such as w8a8",
            )
        )


def _why_skipped(info: LinearInfo, recipe: Recipe) -> str:
    if any(rule.matches(info.name) for rule in recipe.rules):
        return "kept by a rule"
    return _ROUTER if info.router else "outside of the blocks"


def _kept_whole(name: str, reason: str, recipe: Recipe) -> str:
    """Experts that cannot be quantized are most of a model: they stay as they are only when a rule says so.

    Raises:
        RecipeError: none does.
    """
    rule = next((rule for rule in recipe.rules if rule.matches(name)), None)
    if rule is None or not rule.skip:
        raise RecipeError(
            message(name, reason, f'add the rule {{match: "{collapsed_name(name)}", skip: true}} to keep such experts')
        )
    return "kept by a rule"


def _check_rules(skeleton: Skeleton, recipe: Recipe) -> None:
    names = [info.name for info in skeleton.linears]
    embeddings = [name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Embedding)]
    others = [*skeleton.routers, *(name for name, _ in skeleton.opaque_experts)]
    for rule in recipe.rules:
        if not any(rule.matches(name) for name in (names + others if rule.skip else names)):
            for name in filter(rule.matches, embeddings):
                raise RecipeError(
                    message(
                        "rules",
                        f"match: {rule.match!r} means the embedding {name}, which stays as it is: SGLang would read "
                        "a quantized one without an error as random numbers (its pull request 36137), and vLLM "
                        "before its pull request 44340 has no reader for it",
                        "remove the rule; the output head can be quantized by a rule of its own",
                    )
                )
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
        name = f"{layer.info.stem}.weight"
        dtype = checkpoint.tensors[name].dtype if name in checkpoint.tensors else checkpoint.float_dtype
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
        reason = fmt.why_not(layer.scheme, (layer.info.out_features, layer.info.in_features))
        if reason is not None:
            raise SchemeError(message(layer.info.name, f"format {fmt.name} cannot hold {layer.scheme}", reason))
        if layer.solver.writes_g_idx and not fmt.holds_g_idx:
            raise RecipeError(
                message(
                    layer.info.name,
                    f"format {fmt.name} does not hold the reordered groups of act_order: group",
                    "use act_order: static, which needs none, or format gptq",
                )
            )


def _check_config(plan: Plan) -> None:
    """Schemes that cannot stand in one config are refused before any work."""
    _ = plan.quantization


def _check_drift(recipe: Recipe, layers: tuple[LayerPlan, ...]) -> None:
    """The drift must be what is left when the layers in front are corrected already.

    Measured in one pass for the whole block, that of o_proj and down_proj still holds what q/k/v's and gate/up's own
    corrections take away, and it would be corrected twice.
    """
    if recipe.true_sequential:
        return
    for layer in layers:
        if layer.info.block is not None and isinstance(layer.solver, GPTQ) and layer.solver.drift_correction > 0:
            raise RecipeError(
                message(
                    layer.info.name,
                    "drift_correction in one pass for the block would correct the same error more than once",
                    "set true_sequential: true, or drift_correction: 0",
                )
            )


def _check_share(plan: Plan) -> None:
    """The recipe's expectation of how much is quantized, held before any work."""
    share, wanted = plan.num_quantized / plan.num_parameters, plan.recipe.min_share
    if share >= wanted:
        return
    shown = [f"{name} ({numel / plan.num_parameters:.1%})" for name, numel in plan.left_out[:_LEFT_OUT_SHOWN]]
    more = len(plan.left_out) - len(shown)
    rest = f" and {more} more ({sum(n for _, n in plan.left_out[_LEFT_OUT_SHOWN:]) / plan.num_parameters:.1%})"
    raise RecipeError(
        message(
            "min_share",
            f"{share:.1%} of the parameters would be quantized and the recipe expects {wanted:.1%}; left out: "
            f"{', '.join(shown)}{rest if more else ''}",
            "quantize more of them by a rule, or lower min_share",
        )
    )


def _notes(
    skeleton: Skeleton, fmt: CheckpointFormat, dtype: torch.dtype, layers: tuple[LayerPlan, ...]
) -> tuple[str, ...]:
    """What this plan's output will not do in other programs."""
    schemes: dict[str, object] = {info.name: None for info in skeleton.linears if info.expert is None}
    schemes.update({layer.info.name: layer.scheme for layer in layers if layer.info.expert is None})
    notes = [f"{group} share one matrix in vLLM and must have one scheme there" for group in unequal_fused(schemes)]
    if any(layer.info.transposed for layer in layers):
        notes.append("quantkit runs quantized Conv1D layers; transformers' own loader leaves them newly initialized")
    notes += _notes_on_experts(skeleton, layers)
    used = {layer.scheme for layer in layers}
    if len(used) > 1 and not all(scheme.symmetric for scheme in used):
        notes.append("transformers 5.23 cannot load several schemes of which some are asymmetric")
    for layer in layers:
        if layer.info.tied:
            notes.append(
                f"{layer.info.name} shares its weight with the embedding: it is untied (config.json: "
                "tie_word_embeddings false), the embedding stays as it is, and the quantized copy adds "
                f"{encoded_bytes(fmt, layer, dtype) / 1e6:.1f} MB"
            )
        if layer.info.block is None:
            notes.append(
                f"{layer.info.name} is quantized: vLLM before its pull request 37291 and SGLang before its pull "
                "request 35228 do not read a quantized head"
            )
    return tuple(notes)


def _transform_notes(plan: Plan) -> list[str]:
    """What the transforms change besides the quantized layers."""
    if plan.untied is None:
        return []
    cost = f"{plan.added_bytes / 1e6:.1f} MB more" if plan.added_bytes else "no more bytes, for it has one on disk"
    return [f"rotating the residual stream gives the head, tied to the embedding, a matrix of its own: {cost}"]


def head_rows_at_once(layer: LayerPlan) -> int:
    """Rows of a layer outside of the blocks that are solved at once."""
    return max(_HEAD_WEIGHTS_AT_ONCE // layer.info.in_features, 1)


def _head_bytes(fmt: CheckpointFormat, layer: LayerPlan, dtype: torch.dtype) -> int:
    """The codes of the whole layer twice (in pieces, then joined), what is written of it, and one piece's solve."""
    piece = min(head_rows_at_once(layer), layer.info.out_features) * layer.info.in_features
    hessian = 2 * _FLOAT32 * layer.info.in_features**2 if layer.solver.needs else 0
    return 2 * layer.numel + 2 * encoded_bytes(fmt, layer, dtype) + hessian + _SOLVE_COPIES * _FLOAT32 * piece


def encoded_bytes(fmt: CheckpointFormat, layer: LayerPlan, dtype: torch.dtype) -> int:
    """Bytes of a quantized layer's tensors, by the code that will write them."""
    rows, columns = layer.info.out_features, layer.info.in_features
    groups = layer.scheme.num_groups(columns)
    q = QuantizedTensor(
        torch.empty(rows, columns, dtype=torch.uint8, device="meta"),
        torch.empty(rows, groups, dtype=dtype, device="meta"),
        torch.empty(rows, groups, dtype=torch.uint8, device="meta"),
        layer.scheme,
        act_scale=1.0 if layer.scheme.act_static else None,
    )
    return sum(t.numel() * t.element_size() for t in fmt.encode(q).values())


def _notes_on_experts(skeleton: Skeleton, layers: tuple[LayerPlan, ...]) -> list[str]:
    """What other programs cannot do with the experts; seen with transformers 5.23, read in vLLM 0.33."""
    schemes: dict[str, list[QuantScheme | None]] = {info.name: [] for info in skeleton.experts}
    chosen = {layer.info.name: layer.scheme for layer in layers}
    for info in skeleton.linears:
        if info.expert is not None:
            schemes[info.expert.module].append(chosen.get(info.name))
    notes = []
    uneven = [name for name, found in schemes.items() if len(set(found)) > 1]
    if uneven:
        notes.append(f"{uneven[0]} has several schemes, and vLLM runs one for all experts of a block")
    used = {scheme for found in schemes.values() for scheme in found}
    if used and (len(used) > 1 or not all(scheme is not None and scheme.symmetric for scheme in used)):
        notes.append(
            "transformers 5.23 cannot load these experts: beside quantized layers it takes all of them as quantized, "
            "by one symmetric scheme"
        )
    if any(scheme is not None and scheme.bits not in _VLLM_EXPERT_BITS for scheme in used):
        notes.append("vLLM runs experts of 4 or 8 bits only")
    return notes
