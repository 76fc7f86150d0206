"""What a block's layers see while it runs forward and back, and how it runs with other weights for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quantkit.arch import is_transposed
from quantkit.errors import CalibrationError, message
from quantkit.layer_plan import LayerPlan
from quantkit.stats import LayerStats, Stat


class Watch:
    """Statistics of a block's layers' inputs, and of the gradients at their outputs.

    Attributes:
        inputs: layer -> the statistics of its input, shared by layers that are called with the same tensor.
        gradient_energy: layer -> float64 [out], Σ g² over all tokens.
    """

    def __init__(self, linears: dict[str, nn.Module], needs: frozenset[Stat], *, gradients: bool) -> None:
        self.inputs: dict[str, LayerStats] = {}
        self.gradient_energy: dict[str, Tensor] = {}
        self._linears, self._needs, self._gradients = linears, needs, gradients
        self._leaders: set[str] = set()
        self._live: list[tuple[Tensor, str]] = []

    def of(self, layer: LayerPlan) -> LayerStats | None:
        """What was seen at the layer's input; None where nothing was asked for.

        Raises:
            CalibrationError: the layer never ran.
        """
        if self._needs and layer.info.local not in self.inputs:
            raise CalibrationError(
                message(layer.info.name, "never ran on the calibration data", "skip it by a rule in the recipe")
            )
        return self.inputs.get(layer.info.local)

    def end_pass(self) -> None:
        """One forward pass is over: who shares an input with whom is known from here on."""
        self._live.clear()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Gather from every pass inside."""
        handles = [module.register_forward_hook(self._seen(name)) for name, module in self._linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _seen(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()
            if name not in self.inputs:
                leader = next((other for tensor, other in self._live if tensor is args[0]), None)
                if leader is None:
                    self._leaders.add(name)
                self.inputs[name] = self.inputs[leader] if leader else LayerStats(x.shape[-1], self._needs, x.device)
                self._live.append((args[0], name))
            if name in self._leaders:
                self.inputs[name].update(x, x)  # the full-precision model is the one that runs
            if self._gradients and output.requires_grad:
                output.register_hook(self._energy(name))

        return hook

    def _energy(self, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            energy = gradient.reshape(-1, gradient.shape[-1]).float().square().sum(0).double()
            self.gradient_energy[name] = self.gradient_energy.get(name, torch.zeros_like(energy)) + energy

        return hook


@contextmanager
def changed(block: nn.Module, errors: Iterator[tuple[LayerPlan, Tensor]]) -> Iterator[None]:
    """These layers' weights with their errors added, and afterwards the weights as they were."""
    before: list[tuple[nn.Module, nn.Parameter]] = []
    for layer, error in list(errors):
        module = block.get_submodule(layer.info.local)
        weight = module.get_parameter("weight")
        before.append((module, weight))
        changed = (weight.float() + (error.T if is_transposed(module) else error)).to(weight.dtype)
        module._parameters["weight"] = nn.Parameter(changed, requires_grad=False)
    try:
        yield
    finally:
        for module, weight in before:
            module._parameters["weight"] = weight
