"""The model while its blocks run: hidden states in front of the next block, and what carries them behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantkit.activations import Activations
from quantkit.capture import BlockInputs
from quantkit.grid import dequantize, fake_quantize_activations
from quantkit.head import solve_in_rows
from quantkit.layer_plan import LayerPlan
from quantkit.plan import Plan
from quantkit.qtensor import QuantizedTensor
from quantkit.skeleton import Skeleton, assign, place_buffers, release, set_weight
from quantkit.stats import LayerStats, Stat
from quantkit.transforming import Transforming


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


class Runner:
    """The blocks of a model, one of which holds its weights at a time, run on calibration samples.

    Args:
        plan: what to do.
        samples: int64 [length] token ids each; empty when no solver measures anything.
        transforming: what the transforms make of the tensors that are read.
        device: where blocks run.
        directory: for hidden states that do not fit the recipe's activation_memory.

    Attributes:
        calls: how each block is called.
    """

    def __init__(
        self, plan: Plan, samples: Sequence[Tensor], transforming: Transforming, device: torch.device, directory: Path
    ) -> None:
        self.plan, self.samples, self.device, self.directory = plan, samples, device, directory
        self.skeleton: Skeleton = plan.skeleton
        self.calls = BlockInputs()
        self._transforming = transforming
        self._rounding: list[RemovableHandle] = []  # hooks that round the inputs of the current block's solved layers

    @property
    def last_measured(self) -> int:
        """The number of shards that are measured, in a row from the first: all blocks, and perhaps the head's."""
        return len(self.skeleton.blocks) + self.plan.measures_head

    def enter(self) -> Streams:
        """The hidden states in front of the first block; the quantized model's come from quantized embeddings."""
        place_buffers(self.skeleton.model, self.device)
        outside = self._read(_in_front(self.skeleton))
        assign(self.skeleton.model, outside)
        del outside
        stores: list[Activations] = []
        for index, tokens in enumerate(self.samples):
            state = self.calls.first_hidden(self.skeleton, tokens[None].to(self.device))
            stores = stores or self._stores(state)
            for store in stores:
                store[index] = state
        assert stores, "the caller gives samples whenever a solver measures"
        rounded = self._rounded_embeddings()
        if rounded:
            assign(self.skeleton.model, rounded)
            for index, tokens in enumerate(self.samples):
                stores[0][index] = self.calls.first_hidden(self.skeleton, tokens[None].to(self.device))
        release(self.skeleton.model)
        return Streams(stores[0], stores[1] if len(stores) > 1 else None)

    def _rounded_embeddings(self) -> dict[str, Tensor]:
        """The weights of the embeddings that will be quantized, as they will be: rounding measures nothing."""
        found = {}
        for layer in self.plan.block_layers(None):
            if layer.info.embedding:
                disk = self.plan.weight_tensor(layer)
                weight = self._transforming.read_outside([disk], head=False)[disk]
                solved = solve_in_rows(layer, weight, None, self.device, self.plan.dtype)
                found[f"{layer.info.name}.weight"] = dequantize(solved.weight, self.plan.dtype)
        return found

    def _stores(self, state: Tensor) -> list[Activations]:
        """Room for each stream's states, of which ``state`` [1, length, hidden] is one."""
        shapes = [(1, int(sample.numel()), int(state.shape[-1])) for sample in self.samples]
        names = ("activations.bin", "reference.bin")[: self.plan.num_streams]
        budget = self.plan.recipe.activation_memory // len(names)
        return [Activations(shapes, state.dtype, budget, self.directory, name) for name in names]

    def place_block(self, index: int, source: dict[str, Tensor]) -> None:
        """Put a block's tensors, as read, into its module."""
        names, block = self.skeleton.block_tensors(index), self.skeleton.blocks[index]
        assign(block, {name: self.placed(source[disk]) for name, disk in names.items()})

    def run(self, index: int, state: Tensor) -> Tensor:
        """What block ``index`` makes of one sample's hidden state."""
        return self.calls.run(self.skeleton, index, state.to(self.device))

    def hand_on(self, index: int, states: Activations, to_compare: bool = False) -> None:
        """The block's outputs are the next one's inputs, which may be the head; the last block may have no next.

        With ``to_compare`` the outputs are wanted for themselves.
        """
        if index + 1 == self.last_measured and not to_compare:
            return
        for sample in range(len(states)):
            states[sample] = self.run(index, states[sample])

    def put_in(self, index: int, layer: LayerPlan, q: QuantizedTensor) -> None:
        """Let a layer compute as its quantized form will: with its decoded weight and, where asked, rounded inputs."""
        block = self.skeleton.blocks[index]
        set_weight(block, layer.info, dequantize(q, self.plan.dtype).to(self.device))
        if q.scheme.act_bits is not None:
            module = block.get_submodule(layer.info.local)
            hook = _rounds_input(module._parameters["weight"], q.act_scale)
            self._rounding.append(module.register_forward_pre_hook(hook))

    def release(self, index: int) -> None:
        """Free a block that is done."""
        for handle in self._rounding:
            handle.remove()
        self._rounding.clear()
        release(self.skeleton.blocks[index])

    def measure_head(self, streams: Streams) -> LayerStats:
        """What the output head reads: what the model makes of the last (quantized) block's outputs."""
        layer = next(layer for layer in self.plan.block_layers(None) if layer.needs)
        stats = LayerStats(layer.info.in_features, layer.needs, self.device)
        assign(self.skeleton.model, self._read(_in_front(self.skeleton)))
        head = self.skeleton.model.get_submodule(layer.info.name)
        compared = streams.reference if Stat.DRIFT in layer.needs else None
        for sample, tokens in enumerate(self.samples):
            found = [
                self.calls.head_input(self.skeleton, tokens[None].to(self.device), s[sample].to(self.device), head)
                for s in (streams.hidden, compared)
                if s is not None
            ]
            stats.update(*found)
        release(self.skeleton.model)
        return stats

    def placed(self, tensor: Tensor) -> Tensor:
        """On the device; floating-point tensors in the compute dtype."""
        return tensor.to(self.device, self.plan.dtype if tensor.dtype.is_floating_point else tensor.dtype)

    def _read(self, names: dict[str, str]) -> dict[str, Tensor]:
        tensors = self._transforming.read_outside(names.values(), head=False)
        return {name: self.placed(tensors[disk]) for name, disk in names.items()}


def _in_front(skeleton: Skeleton) -> dict[str, str]:
    """The tensors outside of the blocks, but for the output head's own: the pass stops before it."""
    head = skeleton.head_name()
    prefix = None if head is None else f"{head}."
    return {n: d for n, d in skeleton.outside_tensors().items() if prefix is None or not n.startswith(prefix)}


def _rounds_input(
    weight: nn.Parameter | None, act_scale: float | None
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that rounds a layer's input to its grid, as long as the layer holds this (quantized) weight."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if module._parameters["weight"] is not weight:  # the full-precision model's turn
            return args
        return (fake_quantize_activations(args[0], act_scale), *args[1:])

    return hook
