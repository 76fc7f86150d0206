"""A solved block is tuned: which layers and vectors, in which order, and what is reported of it.

Order within a block: layers whose method is autoround are learned together when all others are solved; then the
recipe's ``tuning`` moves what may still move in all quantized layers. An expert learns from the tokens that are sent to
it; one that none of the samples reaches stays as its solver left it, and its record says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantkit.activations import Activations
from quantkit.arch import is_linear
from quantkit.capture import BlockInputs
from quantkit.digest import digest
from quantkit.layer_plan import LayerPlan
from quantkit.plan import Plan
from quantkit.qtensor import QuantizedTensor
from quantkit.report import BlockRecord, LayerRecord, decibels
from quantkit.solvers import AutoRound
from quantkit.solving import SolvedLayer, weight_errors
from quantkit.tuning import BlockRun, BlockTuning, Tuned, held_out_count, round_block, tune_block

_UNREACHED = "stays as it was rounded: no token of those that tuning learns from reaches it, or it changes nothing"

Place = Callable[[str, QuantizedTensor], None]
"""(layer within the block, weight): put it into the block's module."""


@dataclass(frozen=True, slots=True)
class TunedBlock:
    """What is left of a block after tuning.

    Attributes:
        layers: name within the block -> weight and record.
        vectors: tensor name on disk -> gain or bias, of those that changed.
        records: one for each tuning.
    """

    layers: dict[str, SolvedLayer]
    vectors: dict[str, Tensor]
    records: list[BlockRecord]


class SolvedBlock:
    """A block whose layers are solved and stand, quantized, in its module.

    Args:
        plan: what to do.
        index: of the block.
        calls: how blocks are run.
        hidden: what the quantized blocks before it give.
        reference: the full-precision model's hidden states behind this block.
        device: where it runs.
    """

    def __init__(
        self,
        plan: Plan,
        index: int,
        calls: BlockInputs,
        hidden: Activations,
        reference: Activations,
        device: torch.device,
    ) -> None:
        self.plan, self.index, self.module = plan, index, plan.skeleton.blocks[index]
        self.layers: Mapping[str, LayerPlan] = {layer.info.local: layer for layer in plan.block_layers(index)}

        def call(state: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
            return calls.run(plan.skeleton, index, state, parameters)

        self._run = BlockRun(
            where=f"{plan.skeleton.block_path}.{index}",
            call=call,
            transposed=frozenset(name for name, layer in self.layers.items() if layer.info.transposed),
            dtype=plan.dtype,
            inputs=hidden,
            targets=reference,
            device=device,
            index=index,
        )

    def tune(
        self,
        solved: Mapping[str, SolvedLayer],
        originals: Mapping[str, Tensor],
        shard: Mapping[str, Tensor],
        place: Place,
    ) -> TunedBlock:
        """Do everything that the plan asks for.

        Args:
            solved: layer within the block -> what its solver returned.
            originals: layer -> the weight [out, in] before it was solved.
            shard: the block's other tensors as they will be written, by their names on disk.
            place: puts a tuned weight into the module.
        """
        layers, records, vectors = dict(solved), [], {}
        rounded = {name: layer for name, layer in self.layers.items() if isinstance(layer.solver, AutoRound)}
        if rounded:
            options = next(iter(rounded.values())).solver
            assert isinstance(options, AutoRound)
            started = time.perf_counter()
            chosen = {name: (originals[name], layer.scheme) for name, layer in rounded.items()}
            tuned = round_block(options, self._run, chosen)
            records.append(self._record("autoround", options, tuned, started, {}))
            self._take(tuned, layers, originals, place)
        options_after = self.plan.recipe.tuning
        if options_after is not None:
            started = time.perf_counter()
            starts = {name: layer.weight for name, layer in layers.items()}
            names = self.vectors(options_after, shard)
            tuned = tune_block(
                options_after, self._run, starts, originals, {name: shard[disk] for name, disk in names.items()}
            )
            vectors = {
                names[name]: value.cpu()
                for name, value in tuned.vectors.items()
                if not _same(value, shard[names[name]])
            }
            records.append(self._record("tuning", options_after, tuned, started, vectors))
            self._take(tuned, layers, originals, place)
        return TunedBlock(layers, vectors, records)

    def vectors(self, options: BlockTuning, shard: Mapping[str, Tensor]) -> dict[str, str]:
        """Gains and biases that may move: name within the block -> name on disk."""
        found = {}
        for name, disk in self.plan.skeleton.block_tensors(self.index).items():
            owner = self.module.get_submodule(name.rpartition(".")[0])
            wanted = (options.norms and _is_norm(owner)) or (options.biases and is_linear(owner))
            tensor = shard.get(disk)
            if wanted and tensor is not None and tensor.ndim == 1 and tensor.is_floating_point():
                found[name] = disk
        return found

    def _take(
        self, tuned: Tuned, layers: dict[str, SolvedLayer], originals: Mapping[str, Tensor], place: Place
    ) -> None:
        for name, weight in tuned.weights.items():
            place(name, weight)
            record = _record_of(weight, originals[name], layers[name].record)
            if name in tuned.unreached:
                record = replace(record, notes=tuple(dict.fromkeys((*record.notes, _UNREACHED))))
            layers[name] = SolvedLayer(weight, record)

    def _record(
        self,
        method: str,
        options: AutoRound | BlockTuning,
        tuned: Tuned,
        started: float,
        vectors: Mapping[str, Tensor],
    ) -> BlockRecord:
        return BlockRecord(
            name=self._run.where,
            method=method,
            layers=len(tuned.weights),
            held_out=held_out_count(len(self._run.inputs), options.held_out),
            error_before=tuned.error_before,
            error_after=tuned.error_after,
            steps=tuned.steps,
            kept_step=tuned.kept_step,
            seconds=time.perf_counter() - started,
            changed={disk: digest(value) for disk, value in vectors.items()},
        )


def _record_of(weight: QuantizedTensor, original: Tensor, solved: LayerRecord) -> LayerRecord:
    """The record of a tuned layer. A loss that a Hessian measured stays what the solver reached: it is gone by now."""
    exact = original.to(weight.codes.device, torch.float32)
    signal, error = weight_errors(weight, exact)
    record = replace(solved, digest=weight.digest(), sqnr_db=decibels(signal, error))
    if solved.num_tokens:
        return record
    return replace(record, loss=error, relative_error=(error / signal) ** 0.5 if signal > 0 else None)


def _is_norm(module: nn.Module) -> bool:
    """LayerNorm, and the RMSNorm of each family, which are classes of their own."""
    return "norm" in type(module).__name__.lower()


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.cpu(), b.cpu())
