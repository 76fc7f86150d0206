"""What each scheme of each unit costs the model, in nats of KL divergence a token, so that units can be compared.

A unit is what must share one scheme: layers that engines fuse into one matrix (q/k/v, gate/up). Two measures, both in
nats from the full-precision model's output distribution, both with the weights that the recipe's own solver gives:

``hessian``: the second-order estimate of that divergence. With p the model's distribution, g = ∂log p(ŷ|x)/∂y the
gradient at a layer's output y for a label ŷ drawn from p itself, and dW the rounding error,

    KL ≈ ½ E[(gᵀ dW x)²] ≈ ½ Σ_r E[g_r²] · (dW E[x xᵀ] dWᵀ)_rr ,

the Fisher information of the weights with the gradient taken to be independent of the input (K-FAC,
arXiv:1503.05671) and its output side diagonal. The GPTQ loss tr(dW H dWᵀ) alone cannot be compared between layers,
for it is in units of each layer's own output; E[g_r²] turns each row's error into nats. The Fisher information of
labels drawn from the model is the exact Hessian of this divergence at dW = 0, unlike that of the text's labels.
Diagonal Fisher weights choose bits in SqueezeLLM (arXiv:2306.07629), Hessian traces in HAWQ-V2 (arXiv:1911.03852).
Costs one pass forward and one back over the calibration tokens, whatever the number of units and schemes.

``kl``: the divergence itself, with that unit alone quantized, by running everything behind its block once for each
scheme. No approximation but that the divergences of units add up; the cost grows with the square of the blocks.

Memory: one block (with the graph of one sample), its statistics, one sample's logits, and hidden states, which go to
files above the recipe's ``activation_memory``: of every block for ``hessian``, of every unit and scheme of one block
for ``kl``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from quantkit.activations import Activations
from quantkit.arch import is_transposed
from quantkit.capture import BlockInputs
from quantkit.errors import CheckpointError, HessianError, message
from quantkit.experts import SplitExperts
from quantkit.grid import dequantize
from quantkit.heap import trim
from quantkit.layer_plan import LayerPlan
from quantkit.measuring_room import Metric
from quantkit.plan import Plan
from quantkit.report import Observer, Stage, Step
from quantkit.routing import ExpertInputs, expert_groups
from quantkit.scheme import QuantScheme
from quantkit.skeleton import assign, place_buffers, release
from quantkit.stats import LayerStats, Stat
from quantkit.units import Unit
from quantkit.watching import Watch, changed

_Error = tuple[LayerPlan, Tensor, LayerStats | None]
"""A layer, the error float32 [out, in] of its weight, and what was seen at its input."""

_FLOAT32 = 4
_POSITIONS_AT_ONCE = 256


class Sensitivity:
    """One measurement of all units with all schemes.

    Args:
        plan: the model and, in its layers, the solver of each; their schemes are not read.
        units: of the plan.
        schemes: to compare.
        samples: int64 [length] token ids each.
        device: where blocks run and are solved.
        directory: for hidden states that do not fit the recipe's activation_memory.
        observer: told of every step.
    """

    def __init__(
        self,
        plan: Plan,
        units: Sequence[Unit],
        schemes: Sequence[QuantScheme],
        samples: Sequence[Tensor],
        device: torch.device,
        directory: Path,
        observer: Observer,
    ) -> None:
        self.plan, self.units, self.schemes, self.samples = plan, units, schemes, samples
        self.device, self.observer = device, observer
        self._directory, self._skeleton, self._inputs = directory, plan.skeleton, BlockInputs()
        self._num_blocks = len(plan.skeleton.blocks)
        self._num_tokens = sum(int(sample.numel()) for sample in samples)

    def measure(self, metric: Metric, seed: int) -> list[list[float]]:
        """Nats of KL divergence a token, for each unit [units] and scheme [schemes].

        Args:
            metric: see the module.
            seed: of the labels that ``hessian`` draws.

        Raises:
            CalibrationError: a layer that never runs.
            CheckpointError: logits that are not finite.
            HessianError: from the solver, with the layer's name.
        """
        place_buffers(self._skeleton.model, self.device)
        with ExitStack() as stack:
            return self._by_hessian(stack, seed) if metric == "hessian" else self._by_divergence(stack)

    def _by_hessian(self, stack: ExitStack, seed: int) -> list[list[float]]:
        self.observer(Stage("measuring", 2 * self._num_blocks + 1))
        budget = self.plan.recipe.activation_memory // (self._num_blocks + 2)
        states = [self._enter(stack, budget, "states-0")]
        for index in range(self._num_blocks):
            states.append(self._store(stack, states[0], budget, f"states-{index + 1}"))
            with self._block(index):
                for sample in range(len(self.samples)):
                    states[-1][sample] = self._run(index, states[-2][sample])
            self.observer(Step(f"forward: block {index + 1}/{self._num_blocks}"))
        gradients = states[-1]  # its states are read once more, each just before its gradient takes the place
        self._head_gradients(gradients, torch.Generator().manual_seed(seed))
        self.observer(Step("head"))
        found: list[list[float]] = [[] for _ in self.units]
        for index in reversed(range(self._num_blocks)):
            with self._block(index) as block:
                watch = Watch(self._linears(block, index), self._needs(index) | {Stat.HESSIAN}, gradients=True)
                experts = Watch(self._linears(block, index, of_experts=True), frozenset(), gradients=True)
                with (
                    self._routed(index, True) as routed,
                    _keeping(routed),
                    watch.hooked(),
                    experts.hooked(),
                    torch.enable_grad(),
                ):
                    for sample in range(len(self.samples)):
                        hidden = states[index][sample].to(self.device, copy=True).requires_grad_(True)
                        output = self._run(index, hidden)
                        output.backward(gradients[sample].to(self.device))
                        assert hidden.grad is not None
                        gradients[sample] = hidden.grad
                        watch.end_pass()
                        experts.end_pass()
                    states[index].close()
                    energies = {**watch.gradient_energy, **experts.gradient_energy}
                    with torch.no_grad():
                        for number, unit in self._units_of(index):
                            errors = [self._errors(unit, scheme, block, watch, routed) for scheme in self.schemes]
                            found[number] = [self._weighted_loss(each, energies) for each in errors]
            trim()
            self.observer(Step(f"backward: block {index + 1}/{self._num_blocks}"))
        return found

    def _head_gradients(self, states: Activations, generator: torch.Generator) -> None:
        """Put ∂log p(ŷ)/∂h in the place of the last hidden states h, ŷ drawn from the model's p at every token."""
        with self._outside():
            for sample, tokens in enumerate(self.samples):
                hidden = states[sample].to(self.device, copy=True).requires_grad_(True)
                with torch.enable_grad():
                    logits = self._logits(tokens, hidden)
                    drawn = torch.multinomial(torch.softmax(logits.detach(), -1).cpu(), 1, generator=generator)
                    loss = torch.nn.functional.cross_entropy(logits, drawn[:, 0].to(self.device), reduction="sum")
                    loss.backward()
                assert hidden.grad is not None
                states[sample] = hidden.grad

    def _weighted_loss(self, errors: Iterator[_Error], energies: Mapping[str, Tensor]) -> float:
        """½ Σ_r Σ_t g_r² · (dW E[x xᵀ] dWᵀ)_rr over a unit's rows, by the tokens of the whole calibration set.

        Of an expert, E and the sum of g² are over the tokens that were sent to it; one that saw none costs nothing.
        """
        total = 0.0
        for layer, error, stats in errors:
            if stats is None or stats.num_tokens == 0:
                continue
            rows = ((error @ stats.hessian) * error).sum(1).double() / 2  # the Hessian is 2/n Σ x xᵀ
            total += 0.5 * float((rows * energies[layer.info.local]).sum()) / self._num_tokens
        return total

    def _by_divergence(self, stack: ExitStack) -> list[list[float]]:
        per_block = max(len(self._units_of(index)) for index in range(self._num_blocks)) * len(self.schemes)
        budget = self.plan.recipe.activation_memory // (per_block + 2)
        self.observer(Stage("measuring", 2 * self._num_blocks))
        hidden = self._enter(stack, budget, "hidden")
        final = self._store(stack, hidden, budget, "final")
        for sample in range(len(self.samples)):
            final[sample] = hidden[sample]
        for index in range(self._num_blocks):
            with self._block(index):
                self._hand_on(index, [final])
            self.observer(Step(f"dense: block {index + 1}/{self._num_blocks}"))
        found: list[list[float]] = [[] for _ in self.units]
        for index in range(self._num_blocks):
            with ExitStack() as own:
                streams = self._perturbed(own, index, hidden, budget)
                for later in range(index + 1, self._num_blocks):
                    with self._block(later):
                        self._hand_on(later, list(streams.values()))
                losses = self._divergences(final, list(streams.values()))
            for (number, _), loss in zip(streams, losses, strict=True):
                found[number].append(loss)
            trim()
            self.observer(Step(f"behind block {index + 1}/{self._num_blocks}"))
        return found

    def _perturbed(
        self, stack: ExitStack, index: int, hidden: Activations, budget: int
    ) -> dict[tuple[int, int], Activations]:
        """(unit, scheme) -> the block's outputs with that unit alone quantized; ``hidden`` is handed on, dense."""
        streams: dict[tuple[int, int], Activations] = {}
        with self._block(index) as block:
            needs = self._needs(index)
            watch = Watch(self._linears(block, index), needs, gradients=False)
            with self._routed(index, False) as routed:
                if needs:
                    with watch.hooked(), _keeping(routed):
                        for sample in range(len(self.samples)):
                            self._run(index, hidden[sample])
                            watch.end_pass()
                for number, unit in self._units_of(index):
                    for column, scheme in enumerate(self.schemes):
                        store = self._store(stack, hidden, budget, f"unit-{number}-{column}")
                        errors = self._errors(unit, scheme, block, watch, routed)
                        with changed(block, ((layer, error) for layer, error, _ in errors)):
                            for sample in range(len(self.samples)):
                                store[sample] = self._run(index, hidden[sample])
                        streams[number, column] = store
            self._hand_on(index, [hidden])
        return streams

    def _divergences(self, final: Activations, streams: Sequence[Activations]) -> list[float]:
        """KL(dense || stream), a mean over all tokens, for each stream of last hidden states."""
        totals = [0.0] * len(streams)
        with self._outside():
            for sample, tokens in enumerate(self.samples):
                dense = self._logits(tokens, final[sample])
                for number, stream in enumerate(streams):
                    totals[number] += _divergence(dense, self._logits(tokens, stream[sample]))
        return [max(total, 0.0) / self._num_tokens for total in totals]  # below zero is rounding: the divergence is not

    @contextmanager
    def _routed(self, index: int, always: bool) -> Iterator[ExpertInputs | None]:
        """Where the inputs of a block's experts are kept inside; None: nobody reads them.

        Args:
            index: of the block.
            always: also where no solver reads them.
        """
        layers = [layer for _, unit in self._units_of(index) if unit.is_experts for layer in unit.layers]
        if not layers or not (always or any(layer.solver.needs for layer in layers)):
            yield None
            return
        slot = layers[0].info.expert
        assert slot is not None, "the unit is of experts"
        info = next(info for info in self._skeleton.experts if info.name == slot.module)
        module = cast(SplitExperts, self._skeleton.model.get_submodule(slot.module))
        budget = self.plan.experts_budget(self._num_tokens)
        lengths = [len(sample) for sample in self.samples]
        inputs = ExpertInputs(info, module, lengths, self.plan.dtype, budget, self._directory)
        try:
            yield inputs
        finally:
            inputs.close()

    def _together(
        self, unit: Unit, scheme: QuantScheme, watch: Watch, routed: ExpertInputs | None
    ) -> Iterator[tuple[list[LayerPlan], LayerStats | None]]:
        """Layers of a unit with one input and solver, and what was seen there; of experts, one expert at a time."""
        if unit.is_experts:
            layers = [replace(layer, scheme=scheme) for layer in unit.layers]
            threshold = self.plan.recipe.expert_tokens_per_column
            yield from expert_groups(layers, routed, threshold, also=frozenset({Stat.HESSIAN}))
            return
        found: dict[object, tuple[list[LayerPlan], LayerStats | None]] = {}
        for layer in unit.layers:
            stats = watch.of(layer)
            key = (layer.info.name if stats is None else id(stats), layer.solver)
            found.setdefault(key, ([], stats))[0].append(layer)
        yield from found.values()

    def _errors(
        self, unit: Unit, scheme: QuantScheme, block: nn.Module, watch: Watch, routed: ExpertInputs | None
    ) -> Iterator[_Error]:
        """Each layer's weight error; layers of one input and solver are solved as one matrix."""
        for layers, stats in self._together(unit, scheme, watch, routed):
            weights = [_rows_first(block.get_submodule(layer.info.local)) for layer in layers]
            stacked = torch.cat([weight.float() for weight in weights])
            first = layers[0]
            try:
                solved = first.solver.solve(stacked, scheme, stats if first.solver.needs else None, self.plan.dtype)
            except HessianError as problem:
                raise HessianError(f"{', '.join(layer.info.name for layer in layers)}: {problem}") from problem
            error = dequantize(solved.weight, torch.float32).sub_(stacked)
            del stacked, solved
            parts = error.split([layer.info.out_features for layer in layers])
            yield from ((layer, part, stats) for layer, part in zip(layers, parts, strict=True))

    def _units_of(self, index: int) -> list[tuple[int, Unit]]:
        return [(n, unit) for n, unit in enumerate(self.units) if unit.layers[0].info.block == index]

    def _linears(self, block: nn.Module, index: int, *, of_experts: bool = False) -> dict[str, nn.Module]:
        units = (unit for _, unit in self._units_of(index) if unit.is_experts == of_experts)
        layers = (layer for unit in units for layer in unit.layers)
        return {layer.info.local: block.get_submodule(layer.info.local) for layer in layers}

    def _needs(self, index: int) -> frozenset[Stat]:
        solvers = [layer.solver for _, unit in self._units_of(index) for layer in unit.layers]
        return frozenset().union(*(solver.needs for solver in solvers))

    def _enter(self, stack: ExitStack, budget: int, name: str) -> Activations:
        """The hidden states in front of the first block."""
        store: Activations | None = None
        with self._outside():
            for index, tokens in enumerate(self.samples):
                state = self._inputs.first_hidden(self._skeleton, tokens[None].to(self.device))
                if store is None:
                    shapes = [(1, int(sample.numel()), int(state.shape[-1])) for sample in self.samples]
                    store = Activations(shapes, state.dtype, budget, self._directory, f"{name}.bin")
                    stack.callback(store.close)
                store[index] = state
        assert store is not None, "there is at least one sample"
        return store

    def _store(self, stack: ExitStack, like: Activations, budget: int, name: str) -> Activations:
        shapes = [tuple(like[sample].shape) for sample in range(len(like))]
        store = Activations(shapes, like[0].dtype, budget, self._directory, f"{name}.bin")
        stack.callback(store.close)
        return store

    def _run(self, index: int, state: Tensor) -> Tensor:
        return self._inputs.run(self._skeleton, index, state.to(self.device))

    def _hand_on(self, index: int, streams: Sequence[Activations]) -> None:
        for stream in streams:
            for sample in range(len(stream)):
                stream[sample] = self._run(index, stream[sample])

    def _logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """float32 [length, vocabulary], of the last block's output."""
        logits = self._inputs.finish(self._skeleton, tokens[None].to(self.device), hidden.to(self.device))
        logits = logits.reshape(-1, logits.shape[-1]).float()
        if not bool(torch.isfinite(logits.detach().sum())):
            raise CheckpointError(
                message("the model", "its logits are NaN or infinite", "use a wider --dtype (bfloat16, float32)")
            )
        return logits

    @contextmanager
    def _block(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights, which are freed afterwards."""
        block, names = self._skeleton.blocks[index], self._skeleton.block_tensors(index)
        assign(block, self._read(names))
        try:
            yield block
        finally:
            release(block)

    @contextmanager
    def _outside(self) -> Iterator[None]:
        """Everything outside of the blocks, head and all, which is freed afterwards."""
        model, names = self._skeleton.model, dict(self._skeleton.outside_tensors())
        for tied, owner in (model.all_tied_weights_keys or {}).items():
            names[tied] = self._skeleton.disk_names[owner]
        assign(model, self._read(names))
        try:
            yield
        finally:
            release(model)

    def _read(self, names: dict[str, str]) -> dict[str, Tensor]:
        tensors = self.plan.checkpoint.read(set(names.values()), self.device)
        dtype = self.plan.dtype
        placed = {n: t.to(dtype if t.dtype.is_floating_point else t.dtype) for n, t in tensors.items()}
        return {name: placed[disk] for name, disk in names.items()}


def _keeping(routed: ExpertInputs | None) -> AbstractContextManager[None]:
    return nullcontext() if routed is None else routed.hooked()


def _divergence(dense: Tensor, other: Tensor) -> float:
    """Σ KL over the positions of float32 [positions, vocabulary] logits."""
    total = 0.0
    for a, b in zip(dense.split(_POSITIONS_AT_ONCE), other.split(_POSITIONS_AT_ONCE), strict=True):
        log_p, log_q = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
        total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    return total


def _rows_first(module: nn.Module) -> Tensor:
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight
