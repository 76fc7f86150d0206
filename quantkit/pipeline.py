"""The sequential loop: one decoder block at a time is read, run, measured, solved, packed, written and freed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantkit.activations import Activations
from quantkit.block_tuning import SolvedBlock
from quantkit.capture import BlockInputs, Measurement
from quantkit.grid import dequantize, fake_quantize_activations
from quantkit.head import solve_in_rows
from quantkit.heap import trim
from quantkit.plan import LayerPlan, Plan
from quantkit.qtensor import QuantizedTensor
from quantkit.report import BlockRecord, BlockTuned, LayerDone, LayerRecord, Observer, Stage, Step
from quantkit.routing import ExpertInputs, expert_groups
from quantkit.skeleton import Skeleton, assign, experts_of, place_buffers, release, set_weight
from quantkit.solving import SolvedLayer, solve_group
from quantkit.staging import Staging
from quantkit.stats import LayerStats, Stat
from quantkit.transforming import Samples, Transforming
from quantkit.transforms import TransformRecord


@dataclass(frozen=True, slots=True)
class Streams:
    """The hidden states in front of the next block.

    Attributes:
        hidden: those of the quantized model, so far as it is quantized.
        reference: those of the full-precision model; None when nobody compares with them.
    """

    hidden: Activations
    reference: Activations | None

    def close(self) -> None:
        """Forget everything."""
        self.hidden.close()
        if self.reference is not None:
            self.reference.close()


@dataclass(frozen=True, slots=True)
class Scaled:
    """A block whose channels were scaled.

    Attributes:
        records: what was done.
        original: the block's parameters before.
        measured: what the solvers need too, in the new scale; None: they measure in passes of their own.
    """

    records: list[TransformRecord]
    original: dict[str, nn.Parameter]
    measured: Measurement | None


class Pipeline:
    """One run over all blocks.

    Args:
        plan: what to do.
        samples: int64 [length] token ids each; empty when no solver measures anything.
        staging: where finished shards go; the shards that are there are not solved again.
        device: where blocks run and are solved.
        observer: told of every step.
    """

    def __init__(
        self, plan: Plan, samples: Sequence[Tensor], staging: Staging, device: torch.device, observer: Observer
    ) -> None:
        self.plan, self.samples, self.staging, self.device, self.observer = plan, samples, staging, device, observer
        self.skeleton: Skeleton = plan.skeleton
        self.transform_records: list[TransformRecord] = []
        self._inputs = BlockInputs()
        self._transforming = Transforming(plan, device)
        self._rounding: list[RemovableHandle] = []  # hooks that round the inputs of the current block's solved layers
        self._solved = 0
        self.tuned: list[BlockRecord] = []

    @torch.no_grad()
    def run(self) -> list[LayerRecord]:
        """Quantize everything that is not on disk yet; returns the records of all layers."""
        records: list[LayerRecord] = []
        blocks = len(self.skeleton.blocks)
        pending = not all(self.staging.is_done(index) for index in range(self._last_measured))
        self.observer(Stage("quantizing", blocks + 1))
        streams = self._enter() if self.plan.runs_blocks and pending else None
        try:
            for index in range(blocks):
                records += self._block(index, streams)
                trim()
                self.observer(Step(f"block {index + 1}/{blocks}"))
            at_head = self._measure_head(streams)
        finally:
            if streams is not None:
                streams.close()
        records += self._outside(blocks, at_head)
        self.observer(Step("everything else"))
        return records

    def _enter(self) -> Streams:
        """The hidden states in front of the first block."""
        place_buffers(self.skeleton.model, self.device)
        outside = self._read(_in_front(self.skeleton))
        assign(self.skeleton.model, outside)
        del outside
        stores: list[Activations] = []
        for index, tokens in enumerate(self.samples):
            state = self._inputs.first_hidden(self.skeleton, tokens[None].to(self.device))
            stores = stores or self._stores(state)
            for store in stores:
                store[index] = state
        release(self.skeleton.model)
        assert stores, "the caller gives samples whenever a solver measures"
        return Streams(stores[0], stores[1] if len(stores) > 1 else None)

    def _stores(self, state: Tensor) -> list[Activations]:
        """Room for each stream's states, of which ``state`` [1, length, hidden] is one."""
        shapes = [(1, int(sample.numel()), int(state.shape[-1])) for sample in self.samples]
        names = ("activations.bin", "reference.bin")[: self.plan.num_streams]
        budget = self.plan.recipe.activation_memory // len(names)
        return [Activations(shapes, state.dtype, budget, self.staging.path, name) for name in names]

    def _block(self, index: int, streams: Streams | None) -> list[LayerRecord]:
        if self.staging.is_done(index):
            return self._replay(index, streams)
        block = self.skeleton.blocks[index]
        source = self._transforming.read_block(index)
        if streams is not None:
            self._place_block(index, source)
        layers = self.plan.block_layers(index)
        scaled = self._scale(index, layers, source, streams)
        shard: dict[str, Tensor] = {}
        records: dict[str, LayerRecord] = {}
        untuned: dict[str, SolvedLayer] = {}
        originals: dict[str, Tensor] = {}
        for group, stats in self._measured_groups(index, layers, streams, scaled):
            weights = [_rows_first(source.pop(f"{p.info.stem}.weight"), p.info.transposed) for p in group]
            solved_group = solve_group(group, weights, stats, self.device, self.plan.dtype)
            for layer, weight, solved in zip(group, weights, solved_group, strict=True):
                if streams is not None:
                    self._put_in(block, layer, solved.weight)
                if self.plan.tunes and layer.info.expert is None:
                    untuned[layer.info.local], originals[layer.info.local] = solved, weight
                else:
                    shard.update(_named(layer, self.plan.format.encode(solved.weight)))
                    records[layer.info.name] = solved.record
                    self._announce(solved.record)
        shard.update(self._transforming.shipped(source))
        tuned = self._tune(index, streams, untuned, originals, shard, records)
        ordered = [records[layer.info.name] for layer in layers]
        transforms = scaled.records if scaled is not None else []
        self.transform_records += transforms
        self.staging.write(index, shard, ordered, transforms, tuned)
        if streams is not None:
            self._hand_on(index, streams.hidden)
        self._release(block)
        return ordered

    def _tune(
        self,
        index: int,
        streams: Streams | None,
        untuned: Mapping[str, SolvedLayer],
        originals: Mapping[str, Tensor],
        shard: dict[str, Tensor],
        records: dict[str, LayerRecord],
    ) -> list[BlockRecord]:
        """Tune the solved layers together; what comes of it is added to ``shard`` and ``records``."""
        if not untuned:
            return []
        assert streams is not None, "the caller enters the model whenever blocks are tuned"
        assert streams.reference is not None, "the plan asks for it whenever blocks are tuned"
        solved = SolvedBlock(self.plan, index, self._inputs, streams.hidden, streams.reference, self.device)
        tuned = solved.tune(untuned, originals, shard, lambda name, weight: self._place(index, name, weight))
        names = self.skeleton.block_tensors(index)
        assign(
            self.skeleton.blocks[index],
            {name: self._placed(tuned.vectors[disk]) for name, disk in names.items() if disk in tuned.vectors},
        )
        shard.update(tuned.vectors)
        for name, layer in tuned.layers.items():
            shard.update(_named(solved.layers[name], self.plan.format.encode(layer.weight)))
            records[layer.record.name] = layer.record
            self._announce(layer.record)
        self._announce_tuned(tuned.records)
        return tuned.records

    def _place(self, index: int, name: str, weight: QuantizedTensor) -> None:
        """Put a layer's quantized weight into its block."""
        info = next(layer.info for layer in self.plan.block_layers(index) if layer.info.local == name)
        set_weight(self.skeleton.blocks[index], info, dequantize(weight, self.plan.dtype))

    def _place_block(self, index: int, source: dict[str, Tensor]) -> None:
        """Put a block's tensors, as read, into its module."""
        names, block = self.skeleton.block_tensors(index), self.skeleton.blocks[index]
        assign(block, {name: self._placed(source[disk]) for name, disk in names.items()})
        for info in self.skeleton.block_experts(index):
            set_weight(block, info, self._placed(source[f"{info.stem}.weight"]))

    def _scale(
        self, index: int, layers: Sequence[LayerPlan], source: dict[str, Tensor], streams: Streams | None
    ) -> Scaled | None:
        """Measure the block as it was read, and find and fold the scales of its channels; None: no such transform."""
        if not self.plan.scale_transforms or streams is None:
            return None
        original = _weights(self.skeleton.blocks[index])
        apart = self.plan.recipe.true_sequential  # solvers measure later, in passes of their own
        measuring = [] if apart else [layer for layer in layers if layer.needs]
        names = dict.fromkeys([layer.info.local for layer in measuring]) | dict.fromkeys(self._transforming.readers)
        needs, everything = self.plan.transform_needs | _needs(measuring), range(len(streams.hidden))
        measured = self._measure(index, list(names), needs, streams, original, everything, None if apart else ())
        lengths = tuple(int(streams.hidden[one].shape[1]) for one in everything)
        samples = Samples(
            lengths, lambda one: self._inputs.run(self.skeleton, index, streams.hidden[one].to(self.device))
        )
        records = self._transforming.scale_block(index, source, measured, samples)
        return Scaled(records, original, None if apart else measured)

    def _measured_groups(
        self, index: int, layers: Sequence[LayerPlan], streams: Streams | None, scaled: Scaled | None
    ) -> Iterator[tuple[list[LayerPlan], LayerStats | None]]:
        """The layers to solve together, one group after the other, each with the statistics of its input.

        Everything is measured in one pass; or, true-sequentially, each group in a pass of its own when the groups
        before it are quantized already. What was measured to find scales is measured already. Experts come last: their
        inputs are kept in the last pass, and no pass follows, so that their weights are replaced in place.
        """
        if scaled is not None and scaled.measured is not None:
            yield from _groups(layers, scaled.measured)
            return
        sequential, original = self.plan.recipe.true_sequential, _weights(self.skeleton.blocks[index])
        ordinary = [layer for layer in layers if layer.info.expert is None]
        measuring = [layer for layer in ordinary if layer.needs]
        parts = [measuring] if measuring else []
        if streams is not None and sequential and measuring:
            by_name = {layer.info.local: layer for layer in measuring}
            probe = self._measure(index, list(by_name), _needs(measuring), streams, original, range(1))
            parts = [[by_name[name] for name in names] for names in probe.groups()]
        yield from _groups([layer for layer in ordinary if not layer.needs], None)
        with self._expert_inputs(index, layers, streams) as routed:
            if routed and (sequential or not parts):
                parts.append([])
            for part in parts:
                assert streams is not None, "the caller enters the model whenever a solver measures"
                last = list(routed.values()) if part is parts[-1] and scaled is None else None
                names, samples = [layer.info.local for layer in part], range(len(streams.hidden))
                measured = self._measure(index, names, _needs(part), streams, original, samples, last)
                yield from _groups(part, measured)
            if streams is not None and streams.reference is not None and (scaled is not None or not parts):
                # With the weights as they were read, which a resumed run has too.
                with _holding(self.skeleton.blocks[index], original if scaled is None else scaled.original):
                    self._hand_on(index, streams.reference, to_compare=self.plan.tunes)
            for name, members in _by_experts(layers).items():
                threshold = self.plan.recipe.expert_tokens_per_column
                yield from expert_groups(members, routed.get(name), threshold, sequential)

    @contextmanager
    def _expert_inputs(
        self, index: int, layers: Sequence[LayerPlan], streams: Streams | None
    ) -> Iterator[dict[str, ExpertInputs]]:
        """For each module of experts in which something is measured, where its inputs are kept while it is solved."""
        modules = {
            name: experts_of(self.skeleton.blocks[index], members[0].info)
            for name, members in _by_experts(layers).items()
            if any(layer.solver.needs for layer in members)
        }
        lengths = [len(sample) for sample in self.samples]
        budget = self.plan.experts_budget(sum(lengths)) // max(len(modules), 1)
        infos = {info.name: info for info in self.skeleton.experts}
        compared = streams is not None and streams.reference is not None
        inputs: dict[str, ExpertInputs] = {}
        try:
            for name, module in modules.items():
                inputs[name] = ExpertInputs(
                    infos[name], module, lengths, self.plan.dtype, budget, self.staging.path, compared
                )
            yield inputs
        finally:
            for kept in inputs.values():
                kept.close()

    def _measure(
        self,
        index: int,
        names: Sequence[str],
        needs: frozenset[Stat],
        streams: Streams,
        original: dict[str, nn.Parameter],
        samples: range,
        last: Sequence[ExpertInputs] | None = None,
    ) -> Measurement:
        """Statistics of the layers' inputs, which come from quantized blocks.

        Args:
            index: the block.
            names: linear layers, within the block.
            needs: what to gather.
            streams: the hidden states in front of the block.
            original: the block's weights in full precision.
            samples: which to run.
            last: this is the last pass, which leaves the reference stream behind the block; the inputs of these
                experts are kept in it.
        """
        block = self.skeleton.blocks[index]
        measurement = Measurement({name: block.get_submodule(name) for name in names}, needs)
        measuring: list[Measurement | ExpertInputs] = [measurement, *(last or ())]
        with ExitStack() as hooks:
            for each in measuring:
                hooks.enter_context(each.hooked())
            for sample in samples:
                if streams.reference is not None and (last is not None or Stat.DRIFT in needs):
                    with ExitStack() as exactly, _holding(block, original):
                        for each in last or ():
                            exactly.enter_context(each.of_reference())
                        exactly.enter_context(measurement.of_reference(whole=last is not None))
                        exact = self._inputs.run(self.skeleton, index, streams.reference[sample].to(self.device))
                    if last is not None:
                        streams.reference[sample] = exact
                with measurement.one_pass(whole=bool(last)):  # experts come after the last layer
                    self._inputs.run(self.skeleton, index, streams.hidden[sample].to(self.device))
        return measurement

    @property
    def _last_measured(self) -> int:
        """The number of shards that are measured, in a row from the first: all blocks, and perhaps the head's."""
        return len(self.skeleton.blocks) + self.plan.measures_head

    def _measure_head(self, streams: Streams | None) -> LayerStats | None:
        """What the output head reads: what the model makes of the last (quantized) block's outputs."""
        if streams is None or not self.plan.measures_head or self.staging.is_done(len(self.skeleton.blocks)):
            return None
        layer = next(layer for layer in self.plan.block_layers(None) if layer.needs)
        stats = LayerStats(layer.info.in_features, layer.needs, self.device)
        assign(self.skeleton.model, self._read(_in_front(self.skeleton)))
        head = self.skeleton.model.get_submodule(layer.info.name)
        compared = streams.reference if Stat.DRIFT in layer.needs else None
        for sample, tokens in enumerate(self.samples):
            found = [
                self._inputs.head_input(self.skeleton, tokens[None].to(self.device), s[sample].to(self.device), head)
                for s in (streams.hidden, compared)
                if s is not None
            ]
            stats.update(*found)
        release(self.skeleton.model)
        return stats

    def _hand_on(self, index: int, states: Activations, to_compare: bool = False) -> None:
        """The block's outputs are the next one's inputs, which may be the head; the last block may have no next.

        With ``to_compare`` the outputs are wanted for themselves.
        """
        if index + 1 == self._last_measured and not to_compare:
            return
        for sample in range(len(states)):
            states[sample] = self._inputs.run(self.skeleton, index, states[sample].to(self.device))

    def _replay(self, index: int, streams: Streams | None) -> list[LayerRecord]:
        """A block that an interrupted run finished: nothing is solved, its outputs are computed again."""
        records = self.staging.records(index)
        self.transform_records += self.staging.transforms(index)
        for record in records:
            self._announce(record, resumed=True)
        self._announce_tuned(self.staging.tuned(index), resumed=True)
        if streams is None or all(self.staging.is_done(later) for later in range(index, self._last_measured)):
            return records
        block, names = self.skeleton.blocks[index], self.skeleton.block_tensors(index)
        if streams.reference is not None:
            self._place_block(index, self._transforming.read_block(index))
            self._hand_on(index, streams.reference)
        stored = stored_shard(self.staging, index)
        quantized = {layer.info.name: layer for layer in self.plan.block_layers(index)}
        codes = {f"{layer.info.stem}.weight" for layer in quantized.values()}  # where the format keeps that name
        for name, disk in names.items():
            if disk in stored and disk not in codes:
                assign(block, {name: self._placed(stored[disk])})
        for info in self.skeleton.block_experts(index):
            if info.name not in quantized:
                set_weight(block, info, self._placed(stored[f"{info.stem}.weight"]))
        for layer in quantized.values():
            self._put_in(block, layer, decode_layer(self.plan, layer, stored))
        self._hand_on(index, streams.hidden)
        self._release(block)
        return records

    def _outside(self, shard: int, at_head: LayerStats | None) -> list[LayerRecord]:
        """Embeddings, final norm, head and whatever else the checkpoint holds; ``at_head`` is of the head's input."""
        if self.staging.is_done(shard):
            records = self.staging.records(shard)
            for record in records:
                self._announce(record, resumed=True)
            return records
        inside = {disk for index in range(shard) for disk in self.skeleton.block_disk_names(index)}
        names = [name for name in self.plan.checkpoint.tensors if name not in inside]
        tensors = self._transforming.read_outside(names, head=True)
        records = []
        for layer in self.plan.block_layers(None):
            weight = _rows_first(tensors[self.plan.weight_tensor(layer)], layer.info.transposed)
            tensors.pop(f"{layer.info.stem}.weight", None)  # of a tied head the embedding's tensor stays
            solved = solve_in_rows(layer, weight, at_head, self.device, self.plan.dtype)
            del weight
            tensors.update(_named(layer, self.plan.format.encode(solved.weight)))
            records.append(solved.record)
            self._announce(solved.record)
        self.staging.write(shard, tensors, records)
        return records

    def _read(self, names: dict[str, str]) -> dict[str, Tensor]:
        tensors = self._transforming.read_outside(names.values(), head=False)
        return {name: self._placed(tensors[disk]) for name, disk in names.items()}

    def _placed(self, tensor: Tensor) -> Tensor:
        """On the device; floating-point tensors in the compute dtype."""
        return tensor.to(self.device, self.plan.dtype if tensor.dtype.is_floating_point else tensor.dtype)

    def _put_in(self, block: nn.Module, layer: LayerPlan, q: QuantizedTensor) -> None:
        """Let a layer compute as its quantized form will: with its decoded weight and, where asked, rounded inputs."""
        set_weight(block, layer.info, dequantize(q, self.plan.dtype).to(self.device))
        if q.scheme.act_bits is not None:
            module = block.get_submodule(layer.info.local)
            hook = _rounds_input(module._parameters["weight"], q.act_scale)
            self._rounding.append(module.register_forward_pre_hook(hook))

    def _release(self, block: nn.Module) -> None:
        """Free a block that is done."""
        for handle in self._rounding:
            handle.remove()
        self._rounding.clear()
        release(block)

    def _announce(self, record: LayerRecord, resumed: bool = False) -> None:
        self._solved += 1
        self.observer(LayerDone(record, self._solved, len(self.plan.layers), resumed))

    def _announce_tuned(self, records: Sequence[BlockRecord], resumed: bool = False) -> None:
        self.tuned += records
        for record in records:
            self.observer(BlockTuned(record, resumed))


def decode_layer(plan: Plan, layer: LayerPlan, tensors: dict[str, Tensor]) -> QuantizedTensor:
    """A layer's quantized weight from the tensors of its shard."""
    prefix = f"{layer.info.stem}."
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return plan.format.decode(layer.info.name, own, layer.scheme, (layer.info.out_features, layer.info.in_features))


def stored_shard(staging: Staging, shard: int) -> dict[str, Tensor]:
    """All tensors of a finished shard."""
    from safetensors.torch import load_file

    return load_file(staging.path / staging.shard_name(shard))


def _groups(
    layers: Sequence[LayerPlan], measured: Measurement | None
) -> Iterator[tuple[list[LayerPlan], LayerStats | None]]:
    """Layers to solve together: same input, scheme and solver; with the statistics of their input."""
    by_name = {layer.info.local: layer for layer in layers}
    shared = [[name for name in names if name in by_name] for names in measured.groups()] if measured else []
    shared += [[name] for name in by_name if not any(name in names for names in shared)]
    for names in shared:
        stats = measured.inputs.get(names[0]) if measured and names else None
        alike: dict[object, list[LayerPlan]] = {}
        for name in names:
            alike.setdefault((by_name[name].scheme, by_name[name].solver), []).append(by_name[name])
        yield from ((group, stats) for group in alike.values())


def _by_experts(layers: Sequence[LayerPlan]) -> dict[str, list[LayerPlan]]:
    """The layers of stacked experts, by module."""
    found: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        if layer.info.expert is not None:
            found.setdefault(layer.info.expert.module, []).append(layer)
    return found


def _needs(layers: Sequence[LayerPlan]) -> frozenset[Stat]:
    return frozenset[Stat]().union(*(layer.needs for layer in layers))


def _weights(block: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a block holds now, by name."""
    return dict(block.named_parameters())


@contextmanager
def _holding(block: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """The block has these parameters inside, and those that it had before again afterwards."""
    before = _weights(block)
    _put(block, parameters)
    try:
        yield
    finally:
        _put(block, before)


def _put(block: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        block.get_submodule(owner)._parameters[leaf] = parameter


def _in_front(skeleton: Skeleton) -> dict[str, str]:
    """The tensors outside of the blocks, but for the output head's own: the pass stops before it."""
    head = skeleton.head_name()
    prefix = None if head is None else f"{head}."
    return {n: d for n, d in skeleton.outside_tensors().items() if prefix is None or not n.startswith(prefix)}


def _named(layer: LayerPlan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{layer.info.stem}.{name}": tensor for name, tensor in tensors.items()}


def _rows_first(weight: Tensor, transposed: bool) -> Tensor:
    return weight.T if transposed else weight


def _rounds_input(
    weight: nn.Parameter | None, act_scale: float | None
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that rounds a layer's input to its grid, as long as the layer holds this (quantized) weight."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if module._parameters["weight"] is not weight:  # the full-precision model's turn
            return args
        return (fake_quantize_activations(args[0], act_scale), *args[1:])

    return hook
