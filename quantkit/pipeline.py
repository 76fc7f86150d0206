"""The sequential loop: one decoder block at a time is read, run, measured, solved, packed, written and freed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.block_tuning import SolvedBlock
from quantkit.grid import dequantize
from quantkit.head import solve_in_rows
from quantkit.heap import trim
from quantkit.layer_plan import LayerPlan
from quantkit.measuring import Measuring
from quantkit.plan import Plan
from quantkit.precision import products_note
from quantkit.qtensor import QuantizedTensor
from quantkit.report import BlockRecord, BlockTuned, LayerDone, LayerRecord, Note, Observer, Stage, Step
from quantkit.skeleton import Skeleton, assign, set_weight
from quantkit.solving import SolvedLayer, solve_group
from quantkit.staging import Staging
from quantkit.stats import LayerStats
from quantkit.streams import Runner, Streams
from quantkit.transforming import Transforming
from quantkit.transforms import TransformRecord


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
        self._transforming = Transforming(plan, device)
        self._runner = Runner(plan, samples, self._transforming, device, staging.path)
        self._measuring = Measuring(self._runner, self._transforming)
        self._solved = 0
        self.tuned: list[BlockRecord] = []

    @torch.no_grad()
    def run(self) -> list[LayerRecord]:
        """Quantize everything that is not on disk yet; returns the records of all layers."""
        note = products_note(self.plan.dtype, self.device)
        if note is not None and self.plan.runs_blocks:
            self.observer(Note(note))
        records: list[LayerRecord] = []
        blocks = len(self.skeleton.blocks)
        pending = not all(self.staging.is_done(index) for index in range(self._runner.last_measured))
        self.observer(Stage("quantizing", blocks + 1))
        streams = self._runner.enter() if self.plan.runs_blocks and pending else None
        try:
            for index in range(blocks):
                records += self._block(index, streams)
                trim()
                self.observer(Step(f"block {index + 1}/{blocks}"))
            at_head = None
            if streams is not None and self.plan.measures_head and not self.staging.is_done(blocks):
                at_head = self._runner.measure_head(streams)
        finally:
            if streams is not None:
                streams.close()
        records += self._outside(blocks, at_head)
        self.observer(Step("everything else"))
        return records

    def _block(self, index: int, streams: Streams | None) -> list[LayerRecord]:
        if self.staging.is_done(index):
            return self._replay(index, streams)
        source = self._transforming.read_block(index)
        if streams is not None:
            self._runner.place_block(index, source)
        layers = self.plan.block_layers(index)
        scaled = self._measuring.scale(index, layers, source, streams)
        shard: dict[str, Tensor] = {}
        records: dict[str, LayerRecord] = {}
        untuned: dict[str, SolvedLayer] = {}
        originals: dict[str, Tensor] = {}
        for group, stats in self._measuring.groups(index, layers, streams, scaled):
            weights = [_rows_first(source.pop(f"{p.info.stem}.weight"), p.info.transposed) for p in group]
            solved_group = solve_group(group, weights, stats, self.device, self.plan.dtype)
            for layer, weight, solved in zip(group, weights, solved_group, strict=True):
                if streams is not None:
                    self._runner.put_in(index, layer, solved.weight)
                if self.plan.tunes:
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
            self._runner.hand_on(index, streams.hidden)
        self._runner.release(index)
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
        solved = SolvedBlock(self.plan, index, self._runner.calls, streams.hidden, streams.reference, self.device)
        tuned = solved.tune(untuned, originals, shard, lambda name, weight: self._place(index, name, weight))
        names = self.skeleton.block_tensors(index)
        assign(
            self.skeleton.blocks[index],
            {name: self._runner.placed(tuned.vectors[disk]) for name, disk in names.items() if disk in tuned.vectors},
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

    def _replay(self, index: int, streams: Streams | None) -> list[LayerRecord]:
        """A block that an interrupted run finished: nothing is solved, its outputs are computed again."""
        records = self.staging.records(index)
        self.transform_records += self.staging.transforms(index)
        for record in records:
            self._announce(record, resumed=True)
        self._announce_tuned(self.staging.tuned(index), resumed=True)
        if streams is None or all(self.staging.is_done(later) for later in range(index, self._runner.last_measured)):
            return records
        block, names = self.skeleton.blocks[index], self.skeleton.block_tensors(index)
        if streams.reference is not None:
            self._runner.place_block(index, self._transforming.read_block(index))
            self._runner.hand_on(index, streams.reference)
        stored = stored_shard(self.staging, index)
        quantized = {layer.info.name: layer for layer in self.plan.block_layers(index)}
        codes = {f"{layer.info.stem}.weight" for layer in quantized.values()}  # where the format keeps that name
        for name, disk in names.items():
            if disk in stored and disk not in codes:
                # In memory of its own: a product's order of sums depends on how its operands are aligned, and a file's
                # tensors lie anywhere.
                assign(block, {name: self._runner.placed(stored[disk].clone())})
        for layer in quantized.values():
            self._runner.put_in(index, layer, decode_layer(self.plan, layer, stored))
        self._runner.hand_on(index, streams.hidden)
        self._runner.release(index)
        return records

    def _outside(self, shard: int, at_head: LayerStats | None) -> list[LayerRecord]:
        """Embeddings, final norm, head and whatever else the checkpoint holds; ``at_head`` is of the head's input."""
        if self.staging.is_done(shard):
            records = self.staging.records(shard)
            for record in records:
                self._announce(record, resumed=True)
            return records
        inside = {disk for index in range(shard) for disk in self.skeleton.block_tensors(index).values()}
        names = [name for name in self.plan.checkpoint.tensors if name not in inside]
        tensors = self._transforming.read_outside(names, head=True)
        records = []
        solved_by_name: dict[str, LayerRecord] = {}
        for layer in self.plan.block_layers(None):  # embeddings come last: a tied head is solved from their tensor
            if layer.shares is not None:
                continue
            weight = _rows_first(tensors[self.plan.weight_tensor(layer)], layer.info.transposed)
            tensors.pop(f"{layer.info.stem}.weight", None)  # of a tied head the embedding's tensor stays
            solved = solve_in_rows(layer, weight, at_head, self.device, self.plan.dtype)
            del weight
            tensors.update(_named(layer, self.plan.format.encode(solved.weight)))
            solved_by_name[layer.info.name] = solved.record
        for layer in self.plan.block_layers(None):
            record = solved_by_name[layer.shares or layer.info.name]
            if layer.shares is not None:
                tensors.pop(f"{layer.info.stem}.weight", None)
                record = replace(record, name=layer.info.name, seconds=0.0, notes=(f"has the codes of {layer.shares}",))
            records.append(record)
            self._announce(record)
        self.staging.write(shard, tensors, records)
        return records

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


def _named(layer: LayerPlan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{layer.info.stem}.{name}": tensor for name, tensor in tensors.items()}


def _rows_first(weight: Tensor, transposed: bool) -> Tensor:
    return weight.T if transposed else weight
