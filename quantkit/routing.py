"""What each expert of a block sees, and the experts' layers to solve, one expert at a time.

While the block is measured, the inputs of its experts are kept as they pass: the tokens, and for each token the experts
that the router sent it to. Everything else follows from these without running the block again: an expert's gate and up
read the tokens that were sent to it, and its down reads what the expert's own weights make of them. So the statistics
of one expert at a time are held, however many experts there are; the price is one more copy of the hidden states, which
goes to a file where it does not fit the budget of activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.activations import Activations
from quantkit.arch import input_group
from quantkit.errors import CalibrationError, CheckpointError, message
from quantkit.experts import DOWN, ExpertsInfo, SplitExperts, call_of
from quantkit.layer_plan import LayerPlan
from quantkit.solvers import RTN
from quantkit.stats import LayerStats, Stat

_GATE_UP_LEAVES = ("gate_proj", "up_proj")


class ExpertInputs:
    """The calls of one module of experts, one for each sample.

    Args:
        info: the experts.
        module: the module itself; its weights are read when an expert is measured.
        lengths: tokens of each sample.
        dtype: of the hidden states.
        budget: bytes that may lie in memory; above it a file is mapped.
        directory: where that file goes.
        with_reference: whether the full-precision model's inputs are kept as well (see :meth:`of_reference`).
    """

    def __init__(
        self,
        info: ExpertsInfo,
        module: SplitExperts,
        lengths: Sequence[int],
        dtype: torch.dtype,
        budget: int,
        directory: Path,
        with_reference: bool = False,
    ) -> None:
        self.info, self.module = info, module
        shapes = [(length, info.hidden_size) for length in lengths]
        names = ("experts.bin", "experts-reference.bin")[: 1 + with_reference]
        self._tokens = [Activations(shapes, dtype, budget // len(names), directory, name) for name in names]
        self._chosen: list[Tensor] = []  # int32 [tokens, k] of each sample
        self._calls = [0] * len(names)
        self._stream = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Keep the calls of every forward pass inside; the samples come in their order."""
        handle = self.module.register_forward_pre_hook(self._keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def of_reference(self) -> Iterator[None]:
        """The pass inside is the full-precision model's; the measured pass of the same sample follows or precedes."""
        self._stream = 1
        try:
            yield
        finally:
            self._stream = 0

    def close(self) -> None:
        """Forget everything and remove the files."""
        for store in self._tokens:
            store.close()

    def num_tokens(self, index: int) -> int:
        """Tokens that were sent to expert ``index``."""
        return sum(int((chosen == index).sum()) for chosen in self._chosen)

    def of_expert(self, index: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Sample by sample, the tokens [n, hidden] that were sent to an expert, and the full-precision model's tokens
        at the same places; samples that sent none are left out.

        Raises:
            CalibrationError: the experts did not run on every sample.
        """
        if len(self._chosen) != len(self._tokens[0]):
            raise CalibrationError(
                message(self.info.name, "never ran on the calibration data", "skip it by a rule in the recipe")
            )
        device = next(self.module.parameters()).device
        for sample, chosen in enumerate(self._chosen):
            rows = (chosen == index).any(-1).nonzero()[:, 0]
            if len(rows):
                found = [store[sample][rows].to(device) for store in self._tokens]
                yield found[0], found[1] if len(found) > 1 else None

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens, chosen = call_of(module, args, kwargs)
        store, sample = self._tokens[self._stream], self._calls[self._stream]
        self._calls[self._stream] += 1
        if sample >= len(store) or store[sample].shape != tokens.shape:
            raise CheckpointError(
                message(self.info.name, f"is called with {list(tokens.shape)}", "quantkit cannot run this model")
            )
        store[sample] = tokens.detach()
        if self._stream == 0:
            self._chosen.append(chosen.to("cpu", torch.int32))


def expert_groups(
    layers: Sequence[LayerPlan],
    inputs: ExpertInputs | None,
    tokens_per_column: float,
    sequential: bool = False,
    *,
    also: frozenset[Stat] = frozenset(),
) -> Iterator[tuple[list[LayerPlan], LayerStats | None]]:
    """The experts' layers to solve together, each group with the statistics of its input.

    An expert's layer that saw fewer than ``tokens_per_column`` tokens for each of its input columns, or none at all, is
    rounded to nearest instead of being solved; its ``fallback`` says so.

    Args:
        layers: layers of one module of experts.
        inputs: of the module; None when none of the layers needs statistics.
        tokens_per_column: see above.
        sequential: measure down behind gate and up as they are when its turn comes (quantized), not as they were.
        also: what is gathered besides what the solvers need.
    """
    experts: dict[int, list[LayerPlan]] = {}
    for layer in layers:
        assert layer.info.expert is not None, "the caller gives layers of experts"
        experts.setdefault(layer.info.expert.index, []).append(layer)
    for index, members in experts.items():
        if inputs is None or not (also or any(layer.solver.needs for layer in members)):
            for group in _alike(members):
                yield group, None
            continue
        seen = inputs.num_tokens(index)
        kept = [_or_rounded(layer, seen, tokens_per_column) for layer in members]
        parts = [kept] if not sequential else [_of(kept, _GATE_UP_LEAVES), _of(kept, (DOWN,))]
        original = inputs.module.gate_up(index) if sequential else None
        for part in parts:
            of_leaf = _measure(inputs, index, part, original, also)
            for group in _alike(part):
                yield group, of_leaf[_leaf(group[0])]


def _measure(
    inputs: ExpertInputs,
    index: int,
    layers: Sequence[LayerPlan],
    original: tuple[Tensor, Tensor] | None,
    also: frozenset[Stat],
) -> dict[str, LayerStats]:
    """Leaf -> the statistics of its input, for these layers of one expert.

    Args:
        inputs: of all experts.
        index: of the expert.
        layers: of the expert.
        original: its gate and up in full precision, where they are quantized by now.
        also: see :func:`expert_groups`.
    """
    info, module = inputs.info, inputs.module
    exact = module.gate_up(index) if original is None else original
    device = exact[0].device
    first, last = _of(layers, _GATE_UP_LEAVES), _of(layers, (DOWN,))
    at_first = LayerStats(info.hidden_size, _needs(first) | also, device)
    at_last = LayerStats(info.intermediate_size, _needs(last) | also, device)
    for x, reference in inputs.of_expert(index):
        at_first.update(x, reference)
        if last:
            at_last.update(module.inner(index, x), None if reference is None else module.inner(index, reference, exact))
    return {**dict.fromkeys(_GATE_UP_LEAVES, at_first), DOWN: at_last}


def _or_rounded(layer: LayerPlan, seen: int, tokens_per_column: float) -> LayerPlan:
    """The layer as planned, or rounded to nearest where too few tokens reach it."""
    wanted = max(1.0, tokens_per_column * layer.info.in_features)
    if not layer.solver.needs or seen >= wanted:
        return layer
    reason = f"{layer.solver.name} wants {wanted:.0f} tokens, and its expert saw {seen}"
    return replace(layer, solver=RTN(), fallback=reason)


def _alike(layers: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """Layers of one expert to solve at once: gate and up, and down, each by scheme and solver."""
    groups: dict[object, list[LayerPlan]] = {}
    for layer in layers:
        groups.setdefault((input_group(layer.info.name), layer.scheme, layer.solver), []).append(layer)
    return list(groups.values())


def _of(layers: Sequence[LayerPlan], leaves: Sequence[str]) -> list[LayerPlan]:
    return [layer for layer in layers if _leaf(layer) in leaves]


def _leaf(layer: LayerPlan) -> str:
    assert layer.info.expert is not None, "the caller gives layers of experts"
    return layer.info.expert.leaf


def _needs(layers: Sequence[LayerPlan]) -> frozenset[Stat]:
    return frozenset().union(*(layer.solver.needs for layer in layers))
